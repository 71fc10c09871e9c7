"""Streams that a model learns from: any cut, independence, what is kept between calls and in files, mistakes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import MIXERS, close, made, read, stream
from drawn import drawn

from hope_jax import context
from hope_jax.context.schedule import schedule_of
from hope_jax.errors import UserError
from hope_jax.models import MODELS
from hope_jax.nn.language_model import LanguageModel

# ---------------------------------------------------------------- Hope


CUTS = [(21,), (5, 3, 1, 5, 7), (1, 7, 13)]


NESTED = {"wiring": "nested", "optimizer": "adam", "rate": 0.1}  # one model for what needs either


@pytest.mark.parametrize("wiring", ["sequential", "nested", pytest.param("independent", marks=pytest.mark.slow)])
def test_any_cut_of_a_stream_equals_the_whole(wiring, x64):
    model, params, tokens = made(**NESTED) if wiring == "nested" else made(wiring=wiring)
    whole, *others = CUTS if wiring == "sequential" else [(18,), (6, 4, 4, 4)]
    tokens = tokens[:, : whole[0]]
    expected, end = stream(model, params, tokens, whole)
    assert expected.shape == (2, whole[0] - 1)
    for cuts in others:
        found, state = stream(model, params, tokens, cuts)
        np.testing.assert_allclose(found, expected, rtol=1e-9)
        close(state, end, rtol=1e-7, atol=1e-9)


def test_rate_0_is_the_static_model_to_the_bit(x64):
    model, params, tokens = made()
    params["blocks"]["feed_forward"]["rate"] *= 0
    static, plain = read(model, params, tokens[:, :16], model.init_state(params, 2))
    _, state = context.surprise(model, params, context.start(model, params, 2), tokens[:, :33])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.blocks.feed_forward))
    again, learned = read(model, params, tokens[:, :16], context.start(model, params, 2))
    np.testing.assert_array_equal(again, static)
    found, expected = (read(model, params, tokens[:, 16:32], state)[0] for state in (learned, plain))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_hope_learns_as_any_other_model(mixer, x64):
    model, params, tokens = made(mixer=mixer, layers=1)
    expected, end = stream(model, params, tokens[:, :9], (5, 4))
    found, state = stream(model, params, tokens[:, :9], (1, 4, 4))
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    close(state, end, rtol=1e-7, atol=1e-9)


def test_a_level_moves_at_multiples_of_its_period_alone_once_the_next_token_is_there(x64):
    model, params, tokens = made()
    state, before, moves = context.start(model, params, 2), None, {0: [], 1: []}
    for t in range(30):
        _, state = context.learn(model, params, state, tokens[:, t : t + 1])
        now = [np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(f)]) for f in state.blocks.feed_forward]
        for i in range(2):
            if before is not None and np.any(now[i] != before[i]):
                moves[i].append(t)
        before = now
    assert moves == {0: [4, 8, 12, 16, 20, 24, 28], 1: [8, 16, 24]}


def test_nested_levels_start_anew_when_the_slower_one_is_written(x64):
    model, params, tokens = made(**NESTED)
    for cuts, moved in (((6,), True), ((6, 4), False), ((6, 4, 4), True)):
        _, state = stream(model, params, tokens[:, : sum(cuts)], cuts)
        assert np.any(jax.tree.leaves(state.levels[0].delta)[0] != 0) == moved


def test_sequences_of_a_batch_are_on_their_own(x64):
    model, params, tokens = made()
    found, end = stream(model, params, tokens[:, :21], CUTS[2])
    alone, one = stream(model, params, tokens[1:, :21], CUTS[2])
    np.testing.assert_allclose(found[1:], alone, rtol=1e-9)
    second = jax.tree.map(lambda leaf: leaf[:, 1:], end.blocks.feed_forward)
    close(second, one.blocks.feed_forward, rtol=1e-8, atol=1e-11)


@pytest.mark.slow
def test_a_model_whose_levels_are_slower_than_the_context_learns_too():
    tiny = replace(MODELS["hope_attention-tiny"], layers=1)
    model = LanguageModel(tiny)
    tokens = jax.random.randint(jax.random.key(0), (1, 20), 0, 256)
    params = drawn(model.init, tokens[:, :1], spread=0.07, rate=1.0)
    loss, state = context.learn(model, params, model.init_state(params, batch=1), tokens)
    assert schedule_of(model, trained=False).distinct == (2048, 8192) and 4 < loss < 12
    stored = context.finish(model, params, state)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(stored.blocks.feed_forward))


def test_what_was_read_between_is_context_and_ends_the_chunk(x64):
    model, params, tokens = made()
    _, state = stream(model, params, tokens[:, :8], (1, 7))
    _, later = read(model, params, tokens[:, 8:11], state)
    close(later.blocks.feed_forward, state.blocks.feed_forward, rtol=0)
    _, after = context.learn(model, params, later, tokens[:, 11:17])
    # Chunk 4..7 ends with its three labels; its gradient counts, at the weights it was read with.
    _, ended = context.learn(model, params, later, tokens[:, 11:12])
    slow, before = (jax.tree.leaves(s.levels[1].delta)[0] for s in (ended, state))
    assert np.any(slow != before)
    assert int(ended.position) == 0 and int(ended.unfinished) == 1 and int(after.position) == 4
    # A context that is cleared is interrupted, too: the same is written.
    cleared = context.clear(model, params, state)
    close(cleared.blocks.feed_forward, ended.blocks.feed_forward, rtol=1e-10)
    close((cleared.levels, cleared.position), (ended.levels, ended.position), rtol=1e-10)


def test_finish_counts_every_token_once(x64):
    model, params, tokens = made()
    _, state = stream(model, params, tokens[:, :8], (1, 7))
    done = context.finish(model, params, state)
    _, longer = context.learn(model, params, state, tokens[:, 8:9])
    # Of the second chunk the label of the last token is missing; all else is written as after the ninth token.
    small, large = (jax.tree.leaves(s.levels[1].delta)[0] for s in (done, longer))
    assert 0.2 < float(jnp.linalg.norm(small) / jnp.linalg.norm(large)) < 2
    assert int(done.unfinished) == 0 and not done.interrupted and int(done.position) == 0
    again, _ = context.surprise(model, params, done, tokens[:, 8:13])
    assert again.shape == (2, 4)


def test_merged_parameters_read_as_the_written_ones_did(x64):
    for rank in (None, 3):
        model, params, tokens = made(rank=rank)
        _, state = stream(model, params, tokens[:1, :8], (1, 7))
        state = context.finish(model, params, state)
        logits, _ = read(model, params, tokens[:1, 8:16], state)
        before = jax.tree.map(np.array, params)
        merged, emptied = context.merge(model, params, state)
        close(params, before, rtol=0)
        again, _ = read(model, merged, tokens[:1, 8:16], emptied)
        np.testing.assert_allclose(again, logits, rtol=1e-9, atol=1e-10)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(emptied.blocks.feed_forward))


def test_of_several_streams_the_mean_is_merged(x64):
    model, params, tokens = made()
    _, state = stream(model, params, tokens[:, :8], (1, 7))
    merged, _ = context.merge(model, params, state)
    done = context.finish(model, params, state).blocks.feed_forward[0]["up"]
    moved = (
        merged["blocks"]["feed_forward"]["level_0"]["up"]["kernel"]
        - params["blocks"]["feed_forward"]["level_0"]["up"]["kernel"]
    )
    np.testing.assert_allclose(moved, done.mean(axis=1), rtol=1e-9, atol=1e-12)
    again = context.finish(model, params, context.finish(model, params, state))
    close(again.blocks.feed_forward, context.finish(model, params, state).blocks.feed_forward, rtol=0)


def test_reading_before_learning_is_no_chunk(x64):
    model, params, tokens = made(**NESTED)
    ends = []
    for state in (model.init_state(params, 2), context.start(model, params, 2)):
        _, later = read(model, params, tokens[:, :3], state)
        ends.append(context.learn(model, params, later, tokens[:, 3:12])[1])
    close(ends[0].blocks.feed_forward, ends[1].blocks.feed_forward, rtol=1e-9)
    assert int(ends[0].position) == int(ends[1].position) == 0  # 8 tokens, the slowest period


def test_reset_forgets_one_level_or_all(x64):
    model, params, tokens = made()
    _, state = stream(model, params, tokens[:, :21], CUTS[2])
    one, every = context.reset(model, state, level=0), context.reset(model, state)

    def written(s):
        return [bool(np.any(jax.tree.leaves(f)[0])) for f in s.blocks.feed_forward]

    assert (written(state), written(one), written(every)) == ([True, True], [False, True], [False, False])
    close(every.blocks.mixer, state.blocks.mixer, rtol=0)
    close(one.levels[1].gathered, state.levels[1].gathered, rtol=0)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(one.levels[1].gathered)), "the other level is inside a period"
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(context.reset(model, state, level=1).levels[1]))
    assert written(context.finish(model, params, every)) == [False, False], "nothing is gathered any more"
    with pytest.raises(UserError, match="level is 2; the model's levels are 0 to 1"):
        context.reset(model, state, level=2)
