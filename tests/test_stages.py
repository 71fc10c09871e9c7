"""Stage two of TNT: the parameters of a run go on in a model with other local periods."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_mixers import WIDTH
from test_tnt import LOCAL, ROWS

from hope_jax import MODELS, ModelConfig
from hope_jax.cli.main import main
from hope_jax.errors import UserError
from hope_jax.models import without_writes
from hope_jax.models.stages import with_local_period
from hope_jax.nn.feed_forward.swiglu import SwiGLUConfig
from hope_jax.train.run import load_run

MODEL = ModelConfig(ROWS["hope"], SwiGLUConfig(8), WIDTH, 1)


def test_a_model_without_writes_writes_neither_memory():
    mixer = without_writes(MODEL).mixer
    assert mixer == replace(ROWS["hope"], rate_max=0.0, local=replace(LOCAL["hope"], rate_max=0.0))


def test_stage_two_is_the_same_model_with_smaller_local_periods():
    config = replace(
        MODEL, mixer=(ROWS["hope"], LOCAL["titans"], ROWS["titans"]), layers=3, feed_forward=(SwiGLUConfig(8),) * 3
    )
    hope, kept, titans = with_local_period(config, 2).mixer
    assert kept == LOCAL["titans"]
    assert hope == replace(ROWS["hope"], local=replace(LOCAL["hope"], c_memory=2, c_projections=2))
    assert titans == replace(ROWS["titans"], local=replace(kept, rule=replace(kept.rule, period=2)))


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """A folder, and ``pretrain(run, *flags)``: the exit status of a short training of that run in it."""
    place = tmp_path_factory.mktemp("stages")
    (place / "text.txt").write_text("twelve squared is 144.\n" * 60)
    text = ["--data.path", str(place / "text.txt"), "--batch", "1", "--length", "16", "--sample-tokens", "0"]
    text += ["--mesh.data", "1", "--no-compile-cache", "--eval-batches", "1", "--optimizer.learning-rate", "1e-30"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "titans_tnt-nano", replace(MODEL, mixer=ROWS["titans"], vocab_size=256))
        yield place, lambda run, *flags: main(["pretrain", "--run", str(place / run), *text, *flags])


@pytest.mark.slow
def test_stage_two_goes_on_with_the_parameters_of_a_run_that_may_be_moved_then(train, capfd):
    place, pretrain = train
    one = ["--model", "titans_tnt-nano", "--dtype", "bfloat16", "--optimizer.learning-rate", "0.01"]
    assert pretrain("one", *one, "--steps", "1") == 0
    before = load_run(place / "one")
    two = ["two", "--stage-two", str(place / "one"), "--local-period", "2"]
    assert pretrain(*two, "--steps", "1") == 0
    after = load_run(place / "two")
    assert after.model.config == with_local_period(before.model.config, 2)
    assert after.model.config.dtype == jnp.bfloat16
    same = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-20)  # but for a tiny step
    jax.tree.map(same, after.params, before.params)

    (place / "one").rename(place / "gone")
    assert pretrain(*two, "--steps", "2") == 0
    assert load_run(place / "two").step == 2
    for other, words in {
        ("--stage-two", str(place / "gone")): "stage_one is one/checkpoints/1 there and gone/checkpoints/1 here",
        ("--stage-two", str(place / "one/checkpoints/3")): "there and one/checkpoints/3 here",
        ("--local-period", "4"): "model.mixer.local.rule.period is 2 there and 4 here",
        ("--dtype", "float32"): "model.dtype is bfloat16 there and float32 here",
    }.items():
        assert pretrain(*two, "--steps", "2", *other) == 2
        assert words in capfd.readouterr().err
    assert pretrain("gone", *two[1:], "--steps", "2") == 2
    assert "has begun without --stage-two" in capfd.readouterr().err


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--stage-two", "one"], "belong together"),
        (["--stage-two", "one", "--local-period", "2", "--model", "titans-tiny"], "leave out --model"),
        (["--stage-two", "new", "--local-period", "2"], "another --run than"),
        # Before a text is prepared, which takes its time.
        (["--stage-two", "gone", "--local-period", "2", "--data.path", "nowhere.txt"], "no trained model in gone"),
    ],
)
def test_flags_of_stage_two_that_do_not_fit_are_refused(flags, words, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "--run", "new", *flags]) == 2
    assert words in " ".join(capfd.readouterr().err.split())


def test_a_model_without_local_memories_has_no_stage_two():
    with pytest.raises(UserError, match="MemoryMixerConfig has no local memories"):
        with_local_period(replace(MODEL, mixer=LOCAL["titans"]), 2)
