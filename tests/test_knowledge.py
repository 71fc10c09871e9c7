"""The experiment of made-up facts: what is asked cannot be known, both ways to read do what they say, the table."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn

from experiments import facts, incorporation, knowledge
from experiments.__main__ import main
from experiments.incorporation import Method
from hope_jax import LanguageModel, context
from hope_jax import train as training
from hope_jax.context.writes import cross_entropy
from hope_jax.errors import UserError

CONFIG = knowledge.KnowledgeConfig(levels=(2,), periods=(16, 32), width=8, layers=1, length=64, readers=2)


@pytest.fixture(scope="module")
def read():
    """A small model with two levels, its parameters, and two documents of three facts."""
    model = LanguageModel(CONFIG.model(2))
    params = drawn(model.init, jnp.zeros((1, 1), jnp.int32), rate=1.0)
    return model, params, facts.draw_facts(0, 0, 2, 3, heldout=True)


def text(tokens):
    return bytes(np.asarray(tokens).astype(np.uint8).ravel()).decode()


def test_facts_are_lines_about_different_names_asked_in_another_order():
    drawn = facts.draw_facts(0, 3, 4, 8, heldout=False)
    for told, asked in zip(drawn.told, drawn.asked, strict=True):
        lines = [text(line) for line in told]
        assert sorted(lines) == sorted(text(line) for line in asked)
        assert len({line[:4] for line in lines}) == 8
        assert all(line[4 : facts.ASKED] == " likes " and line[facts.ASKED : -1] in facts.WORDS for line in lines)
    again = facts.draw_facts(0, 3, 4, 8, heldout=False)
    np.testing.assert_array_equal(again.asked, drawn.asked)
    assert np.any(facts.draw_facts(0, 4, 4, 8, heldout=False).told != drawn.told)
    assert len({word[0] for word in facts.WORDS}) == len(facts.WORDS) == 16, "the first byte says which word"


def test_names_that_are_asked_about_are_never_trained_on():
    trained, heldout = facts.names(False), facts.names(True)
    assert len(trained) + len(heldout) == len({*trained, *heldout}) == 6400
    assert {text(line)[:4] for line in facts.draw_facts(0, 0, 1, 50, heldout=True).told[0]} <= set(heldout)
    assert facts.episodes(0, 0, 0, 64).shape == (0, 65)
    windows = facts.episodes(0, 0, 3, 64)
    assert windows.shape == (3, 65)
    assert {text(window)[i : i + 4] for window in windows for i in range(0, 64, 16)} <= set(trained)
    with pytest.raises(UserError, match="expected 1 to 800, one for each name"):
        facts.draw_facts(0, 0, 1, 801, heldout=True)


def test_what_is_stored_is_what_a_stream_left_in_the_levels(read):
    model, params, drawn = read
    told = drawn.told.reshape(2, -1)
    question = jnp.asarray(drawn.asked[:, 0, : facts.ASKED])
    found = incorporation.stored(model, params, told)(question)
    _, state = context.surprise(model, params, context.start(model, params, 2), told)
    state = context.finish(model, params, state)
    merged = [context.merge(model, params, jax.tree.map(lambda x, i=i: one(x, i), state))[0] for i in range(2)]
    expected = [predicted(model, merged[i], question[i : i + 1])[0] for i in range(2)]
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-3, atol=1e-5)
    assert np.any(np.abs(found[:1] - predicted(model, params, question[:1])) > 1e-4)


@functools.partial(jax.jit, static_argnums=0)
def predicted(model, params, tokens):
    """Logits of fresh sequences."""
    return model.apply({"params": params}, tokens)[0]


def one(leaf, i):
    """Stream ``i`` of a leaf of a state."""
    return leaf[:, i : i + 1] if leaf.ndim > 2 else leaf[i : i + 1] if leaf.ndim == 2 else leaf


def test_fine_tuning_takes_a_step_for_each_chunk_with_the_context_before_it(read):
    model, params, drawn = read
    told = drawn.told.reshape(2, -1)[:, :32]
    question = jnp.asarray(drawn.asked[:, 0, : facts.ASKED])
    found = incorporation.tuned(model, params, told, 16, Method("sgd", 0.5, 1))(question)
    tokens, tuned, state = jnp.asarray(told[:1]), params, model.init_state(params, 1)

    @functools.partial(jax.grad, has_aux=True)
    def slope(params, inputs, labels, known, state):
        logits, after = model.apply({"params": params}, inputs, state)
        return (cross_entropy(logits, labels) * known).sum() / 16, after

    slope, labels = jax.jit(slope), jnp.roll(tokens, -1, axis=1)
    for start, last in ((0, 16), (16, 15)):  # nothing comes after the last token
        now = slice(start, start + 16)
        slopes, state = slope(tuned, tokens[:, now], labels[:, now], jnp.arange(16)[None] < last, state)
        tuned = jax.tree.map(lambda p, g: p - 0.5 * g, tuned, slopes)
    np.testing.assert_allclose(found[:1], predicted(model, tuned, question[:1]), rtol=1e-3, atol=1e-4)


def test_recall_and_bits_are_those_of_the_predictions():
    drawn = facts.draw_facts(0, 0, 2, 3, heldout=True)
    knows = {text(line[: facts.ASKED]): line[facts.ASKED] for line in drawn.told.reshape(-1, 16)[:4]}

    def predict(tokens):
        named = np.array([knows.get(text(row), 0) for row in tokens])
        return np.eye(256)[named[:, None].repeat(tokens.shape[1], 1)]

    assert incorporation.recall(predict, drawn) == pytest.approx(4 / 6)

    def uniform(tokens):
        return jnp.zeros((*tokens.shape, 256))

    assert incorporation.bits_per_byte(uniform, np.zeros((2, 9), np.int32)) == pytest.approx(8)


def test_the_controls_are_trained_without_writing_or_without_facts():
    first_order = dataclasses.replace(CONFIG, bptt=0)
    parts: list[Any] = [config.model(2).feed_forward for config in (first_order, CONFIG)]
    assert parts[0].writes.bptt == (0, 0) != parts[1].writes.bptt
    assert first_order.setting("x") != CONFIG.setting("x")
    assert dataclasses.replace(CONFIG, text=CONFIG.batch).figure.name == "knowledge-text-8.png"
    assert (first_order.figure.name, CONFIG.figure.name) == ("knowledge-bptt-0.png", "knowledge.png")


def test_the_models_of_all_rows_have_one_size():
    config = knowledge.KnowledgeConfig()
    sizes = {}
    for levels in config.levels:
        model = LanguageModel(config.model(levels))
        shapes = jax.eval_shape(lambda model=model: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
        sizes[levels] = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert max(sizes.values()) < 1.01 * min(sizes.values())


def test_a_level_that_is_set_back_is_empty_and_the_other_is_as_it_was(read):
    model, params, drawn = read
    told = drawn.told.reshape(2, -1)
    whole = incorporation.stored(model, params, told).args[-1].blocks.feed_forward
    assert all(np.any(leaf) for leaf in jax.tree.leaves(whole))
    for level in range(2):
        left = incorporation.stored(model, params, told, forget=level).args[-1].blocks.feed_forward
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(left[level]))
        jax.tree.map(np.testing.assert_array_equal, left[1 - level], whole[1 - level])


def test_fine_tuning_is_reported_at_the_rate_that_recalls_most_of_other_facts(read, monkeypatch):
    model, params, drawn = read
    seen = []

    def tuned(model, params, documents, chunk, method):
        seen.append(len(documents))
        return method

    scores = {"sgd": (0, 1, 5, 2, 3, 4), "adamw": (3, 2, 1, 0, 5, 4)}
    rates = incorporation.RATES
    known = {(name, rate): score for name in scores for rate, score in zip(rates[name], scores[name], strict=True)}
    monkeypatch.setattr(incorporation, "tuned", tuned)
    monkeypatch.setattr(incorporation, "recall", lambda method, _: known[method[:2]])
    assert CONFIG.ways(0) == ["sgd x1", "sgd x32", "adamw x1", "adamw x32"] and CONFIG.ways(2) == ["levels"]
    found = [incorporation.by_tuning(model, params, drawn, how, 16) for how in CONFIG.ways(0)]
    assert [row["rate"] for row, _ in found] == [0.03, 0.03, 3e-3, 3e-3]
    assert [method.passes for _, method in found] == [1, 32, 1, 32]
    assert set(seen[:6]) == {incorporation.CHOOSERS} and seen[6] == 2, "chosen on other facts than the reported ones"


@pytest.mark.slow
def test_a_run_appends_its_lines_and_the_table_and_figure_are_made_of_them(tmp_path, capsys, monkeypatch):
    corpus = tmp_path / "text.txt"
    corpus.write_text("".join(f"{i} times {j} is {i * j}.\n" for i in range(40) for j in range(20)))
    flags = ["--width", "8", "--layers", "1", "--length", "64", "--periods", "16", "--batch", "2", "--text", "1"]
    flags += ["--levels", "0", "1", "--steps", "2", "--readers", "2", "--passes", "2", "--facts", "2", "--seeds", "0"]
    flags += ["--results", str(tmp_path / "r"), "--cache", str(tmp_path / "c"), "--data.path", str(corpus)]
    assert main(["knowledge", *flags]) == 0
    rows = [json.loads(line) for line in (tmp_path / "r" / "knowledge.jsonl").read_text().splitlines()]
    assert [row["how"] for row in rows] == ["sgd x1", "sgd x2", "adamw x1", "adamw x2", "levels"]
    assert all(0 <= row["recall"] <= 1 and 4 < row["before"] < 10 for row in rows)
    assert rows[-1]["without"] == [] and rows[0]["rate"] in incorporation.RATES["sgd"]
    assert main(["knowledge", *flags, "--readers", "999"]) == 2
    assert "--readers is 999; the held-out text has" in capsys.readouterr().err
    with (tmp_path / "r" / "knowledge.jsonl").open("a") as file:
        file.write(json.dumps(rows[-1] | {"seed": 1, "recall": rows[-1]["recall"] + 0.5}) + "\n")
        file.write(json.dumps(rows[-1] | {"recall": 0.25}) + "\n")  # the same run again
    capsys.readouterr()
    monkeypatch.setattr(training, "fit", lambda *_, **__: pytest.fail("trained again"))
    assert main(["knowledge", *flags]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.split()[:2] == ["1", "levels"])
    assert f"{(0.25 + rows[-1]['recall'] + 0.5) / 2:.1%}" in line and line.endswith("2")
    assert (tmp_path / "r" / "knowledge.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--levels", "4"], "--levels are [4]; expected 0 to 3"),
        (["--length", "100"], "--length must be a multiple of 32"),
        (["--text", "16"], "--text must be at most --batch, got 16 of 8"),
        (["--seeds"], "Give at least one of each"),
        (["--seeds", "4294967296"], "seed is 4294967296; give a number below 4294967296"),
        (["--table", "--results", "/nowhere"], "There is nothing in /nowhere/knowledge.jsonl"),
        (
            ["--facts", "5", "--periods", "32", "64", "--levels", "1"],
            "--facts 5: expected 1 to 800, so many that their bytes, 16 each, are a",
        ),
        (["--facts", "900"], "--facts 900: expected 1 to 800"),
        (["--periods"], "Give at least one of each"),
        (["--periods", "0", "--levels", "0"], "--periods must be at least 1, got 0"),
        (["--data.tokenizer", "t.json"], "--data.tokenizer cannot be given here: the facts are bytes"),
    ],
)
def test_wrong_flags_are_one_plain_sentence(flags, said, capfd):
    assert main(["knowledge", *flags]) == 2
    assert said in capfd.readouterr().err
