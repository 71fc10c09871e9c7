"""Stage two of TNT: the parameters of a run go on in a model with other local periods."""

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
    config = replace(MODEL, mixer=(ROWS["hope"], LOCAL["titans"], ROWS["titans"]), layers=3)
    hope, kept, titans = with_local_period(config, 2).mixer
    assert kept == LOCAL["titans"]
    assert hope == replace(ROWS["hope"], local=replace(LOCAL["hope"], c_memory=2, c_projections=2))
    assert titans == replace(ROWS["titans"], local=replace(kept, rule=replace(kept.rule, period=2)))


@pytest.mark.slow
def test_stage_two_goes_on_with_the_parameters_of_a_run(tmp_path, monkeypatch):
    small = replace(MODEL, mixer=ROWS["titans"], vocab_size=256)
    monkeypatch.setitem(MODELS, "titans_tnt-nano", small)
    (tmp_path / "text.txt").write_text("twelve squared is 144.\n" * 60)
    text = ["--data.path", str(tmp_path / "text.txt"), "--batch", "1", "--length", "16", "--steps", "1"]
    text += ["--sample-tokens", "0", "--devices", "1", "--no-compile-cache", "--eval-batches", "1"]
    assert main(["pretrain", "--run", str(tmp_path / "one"), "--model", "titans_tnt-nano", *text]) == 0
    two = ["pretrain", "--run", str(tmp_path / "two"), "--stage-two", str(tmp_path / "one"), "--period", "2"]
    assert main([*two, *text, "--optimizer.learning-rate", "1e-30"]) == 0
    before, after = load_run(tmp_path / "one"), load_run(tmp_path / "two")
    assert after.model.config == replace(with_local_period(before.model.config, 2), dtype=jnp.dtype("float32"))
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--stage-two", "one"], "belong together"),
        (["--stage-two", "one", "--period", "2", "--model", "titans-tiny"], "leave out --model"),
        (["--stage-two", "new", "--period", "2"], "another --run than"),
    ],
)
def test_flags_of_stage_two_that_do_not_fit_are_refused(flags, words, capfd):
    assert main(["pretrain", "--run", "new", *flags]) == 2
    assert words in " ".join(capfd.readouterr().err.split())


def test_a_model_without_local_memories_has_no_stage_two():
    with pytest.raises(UserError, match="MemoryMixerConfig has no local memories"):
        with_local_period(replace(MODEL, mixer=LOCAL["titans"]), 2)
