"""A trained run back from its folder; the commands that write with it and look into it."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax import context, generate
from hope_jax import train as training
from hope_jax.cli import ask
from hope_jax.cli.main import main
from hope_jax.cli.runs import with_levels
from hope_jax.data import JsonTokenizer
from hope_jax.errors import UserError
from hope_jax.storage.array_digests import describe_parts
from hope_jax.train.run import TOKENIZER, keep_tokenizer, load_run


def test_a_run_folder_is_all_that_one_needs_of_a_trained_model(trained, bpe):
    found = load_run(trained)
    part: Any = found.model.config.feed_forward
    assert found.step == 4 and found.tokenizer.fingerprint == JsonTokenizer(bpe).fingerprint
    assert found.model.config.vocab_size == found.tokenizer.vocab_size > 256
    assert part.in_context == 1 and part.writes.rate == 2 and [level.period for level in part.levels] == [16, 64]
    saved = {n: e for n, e in training.read_manifest(trained, 4).arrays.items() if n.startswith("params/")}
    assert describe_parts({"params": found.params})() == saved
    assert load_run(trained / "checkpoints" / "4").step == 4


def test_asking_writes_text_and_stores_it_only_if_told_so(learned, tmp_path, capfd):
    run = Path(shutil.copytree(learned[0], tmp_path / "run"))
    command, texts = ["ask", "--checkpoint", str(run), "--tokens", "12", "--clear", "The light"], []
    before = (run / "contexts" / "4.safetensors").read_bytes()
    for flags in ([], [], ["--learn"]):
        assert main([*command, *flags]) == 0
        texts.append(capfd.readouterr().out)
        assert ((run / "contexts" / "4.safetensors").read_bytes() == before) == (not flags)
    assert texts[0] == texts[1] and texts[0].startswith("The light") and len(texts[0]) > len("The light\n")
    shutil.rmtree(run / "contexts")
    config = ask.AskConfig(prompt="The light", checkpoint=run, tokens=12)
    state = ask.begin(config.trained(), config, jnp.zeros((1, 5), jnp.int32))
    assert "nothing was learned since training" in capfd.readouterr().err
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state))


def test_what_is_learned_while_asking_leaves_room_for_more(trained, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    assert main(["ask", "--checkpoint", str(run), "--tokens", "4", "--learn", "The light"]) == 0
    assert main(["ask", "--checkpoint", str(run), "--tokens", "4", "The light"]) == 0


def test_what_was_asked_and_written_is_stored_to_the_last_token(trained, tmp_path, capfd):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    assert main(["ask", "--checkpoint", str(run), "--tokens", "20", "--learn", "The light"]) == 0
    model, params, tokenizer, *_ = load_run(run)
    prompt = jnp.asarray(tokenizer.encode("The light"))[None]
    how = {"steps": 20, "temperature": 0.8, "key": jax.random.key(0), "learn": True}
    written, state = generate.sample(model, params, model.init_state(params, 1, 64), prompt, **how)
    _, state = context.learn(model, params, state, written[:, -1:])
    expected = context.finish(model, params, state)
    found = context.load(run / "contexts" / "4.safetensors", model, params)
    jax.tree.map(np.testing.assert_array_equal, found.blocks.feed_forward, expected.blocks.feed_forward)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(found.levels[0].delta))
    assert "The light" + tokenizer.decode(np.asarray(written)[0])[:8] in capfd.readouterr().out


def test_watching_draws_and_changes_nothing(learned, document, tmp_path):
    run, _ = learned
    before = (run / "contexts" / "4.safetensors").read_bytes()
    command = ["watch", "--checkpoint", str(run), "--data.path", str(document), "--tokens", "64", "--figure"]
    (tmp_path / "figure.json").write_text("mine")
    for name, flags in (("figure", ()), ("fresh", ["--fresh"])):
        assert main([*command, str(tmp_path / "new" / f"{name}.png"), *flags]) == 0
    numbers, fresh = (json.loads((tmp_path / "new" / f"{name}.png.json").read_text()) for name in ("figure", "fresh"))
    model, params, tokenizer, *_ = load_run(run)
    tokens = jnp.asarray(tokenizer.encode(document.read_text())[None, :64])
    cleared = context.clear(model, params, context.load(run / "contexts" / "4.safetensors", model, params), 64)
    for found, state in ((numbers, cleared), (fresh, context.start(model, params, 1, 64))):
        nats, _ = context.surprise(model, params, state, tokens)
        np.testing.assert_allclose(found["surprise"], nats[0], rtol=1e-3, atol=1e-3)
    assert (tmp_path / "new" / "figure.png").stat().st_size > 10_000
    assert (run / "contexts" / "4.safetensors").read_bytes() == before and (tmp_path / "figure.json").exists()


def test_the_tokenizer_of_a_run_is_the_one_it_was_trained_with(trained, bpe, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    altered = json.loads((run / TOKENIZER).read_text())
    (tmp_path / "other.json").write_text(json.dumps(altered | {"normalizer": {"type": "Lowercase"}}))
    for file in (run / TOKENIZER, tmp_path / "other.json"):  # its own file, and one that the run will refuse
        keep_tokenizer(run, file)
        assert (run / TOKENIZER).read_bytes() == bpe.read_bytes()
    altered["truncation"] = None  # decides no token of a training text
    (run / TOKENIZER).write_text(json.dumps(altered))
    load_run(run)
    altered["normalizer"] = {"type": "Lowercase"}
    for change in (lambda: (run / TOKENIZER).write_text(json.dumps(altered)), (run / TOKENIZER).unlink):
        change()
        with pytest.raises(UserError, match="another tokenizer than .* put its JSON file at .*tokenizer.json"):
            load_run(run)


def test_a_run_that_saved_nothing_has_the_tokenizer_of_the_last_attempt(bpe, tmp_path):
    for file, kept in ((bpe, True), (None, False)):
        keep_tokenizer(tmp_path, file)
        assert (tmp_path / TOKENIZER).exists() == kept


def test_levels_can_be_written_at_other_periods_and_rates(trained):
    one = load_run(trained)
    other = with_levels(one, (8, 16), 0.5)
    part: Any = other.model.config.feed_forward
    assert [level.period for level in part.levels] == [8, 16] and part.writes.rate == 0.5
    assert np.all(other.params["blocks"]["feed_forward"]["rate"] == 0.5)
    same = with_levels(one, (), None)
    assert same is one
