"""Reading with writes: what training differentiates; causality; other ways to write."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import MIXERS, VOCAB, close, config, made, stream

from hope_jax import context
from hope_jax.cli.main import main
from hope_jax.context.writes import reading_loss
from hope_jax.errors import UserError
from hope_jax.models import MODELS, with_in_context
from hope_jax.nn.feed_forward.fast import BlockState
from hope_jax.nn.language_model import LanguageModel
from hope_jax.train.step import next_token_loss

# Compiled once for a model and a length: most tests below read the same 24 tokens, six chunks.
T = 24
read = jax.jit(reading_loss, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def gradient(model, params, tokens):
    """Of the mean loss, for tokens [B, T+1]."""
    return jax.grad(lambda p: reading_loss(model, p, tokens[:, :-1], tokens[:, 1:]).mean())(params)


def test_training_reads_as_the_stream_does_and_learns_the_rates(x64):
    model, params, tokens = made()
    expected, _ = stream(model, params, tokens[:, : T + 1], (T + 1,))
    np.testing.assert_allclose(read(model, params, tokens[:, :T], tokens[:, 1 : T + 1]), expected, rtol=1e-9)
    slope = gradient(model, params, tokens[:, : T + 1])
    rates = np.abs(slope["blocks"]["feed_forward"]["rate"])
    assert rates.shape == (1, 2) and np.all(rates > 0)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_hope_can_be_differentiated_through_the_writes_of_its_levels(mixer, untyped, x64):
    """Traced only: compiling it takes minutes. Values are those of the parts, each tested where it is."""
    model, params, tokens = made((4,), in_context=1, mixer=mixer)
    slope = jax.eval_shape(
        lambda: jax.grad(lambda p: reading_loss(model, p, tokens[:, :8], tokens[:, 1:9]).mean())(params)
    )
    assert jax.tree.map(lambda leaf: leaf.shape, slope) == jax.tree.map(jnp.shape, params)


def test_full_gradients_are_those_of_finite_differences(x64):
    model, params, tokens = made()

    def loss(p):
        return read(model, p, tokens[:, :T], tokens[:, 1 : T + 1]).mean()

    slope = gradient(model, params, tokens[:, : T + 1])["blocks"]["feed_forward"]
    for path in (("rate",), ("level_0", "up", "kernel"), ("level_1", "down", "kernel")):

        def moved(h, path=path):
            tree = jax.tree.map(lambda x: x, params)
            *first, last = ("blocks", "feed_forward", *path)
            place = tree
            for name in first:
                place = place[name]
            place[last] = place[last].at[(0,) * place[last].ndim].add(h)
            return float(loss(tree))

        found = slope
        for name in path:
            found = found[name]
        expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
        np.testing.assert_allclose(found[(0,) * found.ndim], expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adam", marks=pytest.mark.slow)])
def test_no_loss_depends_on_a_later_token_through_the_writes(optimizer, x64):
    """One token is another: the losses before it are the same, all after it are not."""
    model, params, tokens = made(optimizer=optimizer)
    tokens = np.array(tokens[:, : T + 1])
    base = read(model, params, tokens[:, :T], tokens[:, 1:])[0]
    for t in (0, 4, 5, 15):
        changed = tokens.copy()
        changed[0, t] = (tokens[0, t] + 1) % VOCAB
        other = read(model, params, changed[:, :T], changed[:, 1:])[0]
        np.testing.assert_array_equal(other[: max(t - 1, 0)], base[: max(t - 1, 0)])
        assert np.all(other[t:] != base[t:]), "every earlier token matters"


def test_the_count_of_differentiated_writes_changes_no_value(x64):
    model, params, tokens = made()
    cut = LanguageModel(config(bptt=(0, 1)))
    pair = (tokens[:, :T], tokens[:, 1 : T + 1])
    np.testing.assert_array_equal(read(cut, params, *pair), read(model, params, *pair))


@pytest.mark.slow
def test_the_count_of_differentiated_writes_changes_gradients(x64):
    _, params, tokens = made()
    full, first, one, many = (
        gradient(LanguageModel(config(bptt=counts)), params, tokens[:, : T + 1])
        for counts in ((), (0, 0), (1, 1), (100, 100))
    )
    close(many, full, rtol=1e-10, atol=1e-13)

    def kernel(tree):
        return tree["blocks"]["feed_forward"]["level_0"]["up"]["kernel"]

    different = [np.abs(kernel(a) - kernel(b)).max() for a, b in ((full, first), (full, one), (first, one))]
    assert min(different) > 1e-8
    assert not np.any(first["blocks"]["feed_forward"]["rate"]) and np.any(one["blocks"]["feed_forward"]["rate"])


@pytest.mark.slow
def test_first_order_is_the_gradient_with_the_written_weights_held(x64):
    """The losses of chunks at the weights they were read with, those weights constants."""
    model, params, tokens = made(bptt=(0, 0))
    _, state = context.learn(model, params, context.start(model, params, 2), tokens[:, :1])
    states = []
    for k in range(T // 4):
        states.append(state.blocks.feed_forward)
        _, state = context.learn(model, params, state, tokens[:, 4 * k + 1 : 4 * k + 5])

    def loss(params):
        def chunk(mixer, one):
            fast, inputs, labels = one
            logits, after = model.apply({"params": params}, inputs, BlockState(mixer, fast))
            return after.mixer, -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1).sum()

        def cut(shifted):
            return jnp.stack(jnp.split(shifted, T // 4, axis=1))

        every = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), cut(tokens[:, :T]), cut(tokens[:, 1 : T + 1])
        return jax.lax.scan(chunk, model.init_state(params, 2).mixer, every)[1].sum() / (2 * T)

    expected = jax.jit(jax.grad(loss))(params)
    found = gradient(model, params, tokens[:, : T + 1])
    close(found, expected, rtol=1e-7, atol=1e-11)
    assert not np.any(found["blocks"]["feed_forward"]["rate"])


# The optimizers are tested against numpy in ``test_writes_linear.py``.
WAYS: list[Any] = [dict(rank=2)]
for way in (dict(optimizer="muon", rate=1e-2), dict(optimizer="adam", rate=1e-2), dict(optimizer="momentum")):
    WAYS.append(pytest.param(way, marks=pytest.mark.slow))


@pytest.mark.parametrize("settings", WAYS, ids=str)
def test_other_ways_to_write_learn_a_repeated_phrase(settings):
    model, params, _ = made(dtype=jnp.float32, **settings)
    phrase = jnp.arange(257)[None] % 4
    nats, _ = context.surprise(model, params, context.start(model, params, 1, 257), phrase)
    fixed = jax.tree.map(lambda x: x, params)
    fixed["blocks"]["feed_forward"]["rate"] *= 0
    static, _ = context.surprise(model, fixed, context.start(model, params, 1, 257), phrase)
    assert nats[0, -32:].mean() < 0.8 * static[0, -32:].mean()


def test_the_training_loss_of_such_a_model_is_that_of_reading_with_writes(x64):
    model, params, tokens = made()
    loss = jax.jit(next_token_loss(model, np.ones(VOCAB)))
    found, metrics = loss(params, tokens[:, : T + 1])
    np.testing.assert_allclose(found, read(model, params, tokens[:, :T], tokens[:, 1 : T + 1]).mean(), rtol=1e-6)
    assert metrics["loss"].count == 2 * T
    without = next_token_loss(LanguageModel(config(in_context=0)), np.ones(VOCAB))
    static = jax.jit(without)(params, tokens[:, : T + 1])[0]
    assert abs(found - static) > 1e-3
    with pytest.raises(UserError, match="leave out remat_every"):
        next_token_loss(model, np.ones(VOCAB), remat_every=8)


def test_levels_in_context_take_the_place_of_faster_ones_and_leave_the_size_alone():
    hope = MODELS["hope-tiny"]
    before: Any = hope.feed_forward
    mixed = with_in_context(hope, (64, 256))
    part: Any = mixed.feed_forward
    assert [level.period for level in part.levels] == [64, 256, 2048, 8192]
    assert mixed.update_every(2048) == {"static": 1, "level_0": 1, "level_1": 1, "level_2": 1, "level_3": 4}
    assert part.hidden * 4 == before.hidden * 2
    with pytest.raises(UserError, match="need periods and a model with levels"):
        with_in_context(MODELS["titans-tiny"], (64,))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--cms.in-context", "64", "100"], "do not nest; make 100 a multiple of 64"),
        (["--cms.in-context", "60"], "do not nest; make 2048 a multiple of 60"),
        (["--cms.in-context", "64", "--length", "500"], "in context: 64 does not divide 500"),
        (["--cms.in-context", "64", "512"], "in context: 512 tokens, got 512"),
        (["--cms.rank", "3"], "give their periods: --cms.in-context"),
        (["--cms.in-context", "64", "--remat-every", "64"], "--remat-every does not go together with levels"),
        (["--model", "titans-tiny", "--cms.in-context", "64"], "hope, hope_attention or hope_tnt"),
    ],
    ids=str,
)
def test_mistakes_on_the_command_line_are_one_sentence(flags, expected, capsys, tmp_path):
    assert main(["pretrain", "--run", str(tmp_path / "run"), *flags]) == 2
    said = capsys.readouterr().err.strip()
    assert expected in said and "\n" not in said
