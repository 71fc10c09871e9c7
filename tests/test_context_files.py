"""Streams in files and in generation; mistakes that are named and lose nothing."""

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import VOCAB, close, config, made, read, stream
from drawn import drawn
from safetensors import safe_open
from safetensors.numpy import load_file, save

from hope_jax import context, generate
from hope_jax.errors import UserError
from hope_jax.models import MODELS
from hope_jax.nn.feed_forward.fast import Writes
from hope_jax.nn.feed_forward.swiglu import SwiGLUConfig
from hope_jax.nn.language_model import LanguageModel


def test_fresh_and_finished_states_can_be_saved_and_nothing_beside_them_is_touched(tmp_path):
    model, params, tokens = made(dtype=jnp.float32)
    (tmp_path / "memory.old").mkdir()
    fresh = context.start(model, params, 2)
    _, state = stream(model, params, tokens[:, :11], (11,))
    for one in (fresh, context.finish(model, params, state)):
        context.save(tmp_path / "memory", model, params, one)
        jax.tree.map(np.testing.assert_array_equal, context.load(tmp_path / "memory", model, params), one)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory", "memory.old"]


def test_a_save_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    model, params, tokens = made(dtype=jnp.float32)
    state = context.start(model, params, 2)
    context.save(tmp_path / "memory", model, params, state, {"mine": 1})

    def full(*_):
        raise OSError("No space left on device")

    def rotten(tensors, metadata):
        data = bytearray(save(tensors, metadata))
        data[-1] ^= 1
        return bytes(data)

    _, other = stream(model, params, tokens[:, :11], (11,))
    for broken in (full, rotten):  # a save is finished when it has been read back
        with monkeypatch.context() as patch:
            patch.setattr("safetensors.numpy.save", broken)
            with pytest.raises(UserError, match="could not be written .*what was saved there before is untouched"):
                context.save(tmp_path / "memory", model, params, other)
    jax.tree.map(np.testing.assert_array_equal, context.load(tmp_path / "memory", model, params), state)
    assert context.note(tmp_path / "memory") == {"mine": 1}


@pytest.mark.parametrize("read_on", [False, True], ids=["learned", "read on"])
def test_going_on_from_a_file_equals_never_having_stopped_to_the_bit(tmp_path, read_on):
    model, params, tokens = made(dtype=jnp.float32)
    _, state = stream(model, params, tokens[:, :11], (11,))
    if read_on:
        _, state = read(model, params, tokens[:, 11:14], state)
    context.save(tmp_path / "memory", model, params, state)
    loaded = context.load(tmp_path / "memory", model, params)
    assert bool(loaded.interrupted) == read_on
    expected, end = context.surprise(model, params, state, tokens[:, 14:22])
    found, after = context.surprise(model, params, loaded, tokens[:, 14:22])
    np.testing.assert_array_equal(found, expected)
    jax.tree.map(np.testing.assert_array_equal, after, end)
    context.save(tmp_path / "memory", model, params, after)  # replaces it
    jax.tree.map(np.testing.assert_array_equal, context.load(tmp_path / "memory", model, params), after)


def test_a_file_that_is_not_what_was_saved_is_refused(tmp_path):
    model, params, tokens = made(dtype=jnp.float32)
    _, state = stream(model, params, tokens[:, :11], (11,))
    with pytest.raises(UserError, match="there is no saved context in"):
        context.load(tmp_path / "nothing", model, params)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="is there and is no saved context"):
        context.save(tmp_path / "mine", model, params, state)
    context.save(tmp_path / "memory", model, params, state)
    other = LanguageModel(replace(model.config, context=128))
    with pytest.raises(UserError, match="of another model: context is 64 there and 128 here"):
        context.load(tmp_path / "memory", other, params)
    moved = params | {"norm": jax.tree.map(lambda leaf: leaf * 1.01, params["norm"])}
    with pytest.raises(UserError, match="parameters is those of digest .* there and those of digest .* here"):
        context.load(tmp_path / "memory", model, moved)
    whole = (tmp_path / "memory").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    (tmp_path / "text").write_text("My notes, which nobody may replace.")
    for damaged, message in (
        (whole[:-5], "is damaged"),
        (whole[:header], "is damaged"),
        (whole.replace(b'\\"batch\\": 2', b'\\"batch\\": 3'), "is damaged: its header was altered"),
        *((_flipped(whole, at), "is damaged: .* differs from its digest") for at in (header, len(whole) - 1)),
        (b"", "there is no saved context"),
        ((tmp_path / "text").read_bytes(), "there is no saved context"),
    ):
        assert damaged != whole
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            context.load(tmp_path / "damaged", model, params)
    with pytest.raises(UserError, match="is there and is no saved context"):
        context.save(tmp_path / "text", model, params, state)
    (tmp_path / "damaged").write_bytes(_flipped(whole, header))
    context.save(tmp_path / "damaged", model, params, state)  # a damaged one may be replaced
    assert (tmp_path / "damaged").read_bytes() == whole


def _flipped(data, at):
    """``data`` with another bit at one place."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_a_file_is_small_and_says_what_it_belongs_to(tmp_path):
    """Zeros, free slots of caches and what is there twice are left out; other programs can read the rest."""
    model, params, tokens = made(dtype=jnp.float32)
    _, state = stream(model, params, tokens[:, :9], (9,))
    context.save(tmp_path / "learned", model, params, context.clear(model, params, state, 5000), {"mine": [1]})
    tensors = load_file(tmp_path / "learned")
    assert int(state.position) == 0 and {name.split("/")[0] for name in tensors} == {"levels"}
    assert {name.split("/")[2] for name in tensors if "/" in name} == {"delta"}
    sizes = sum(tensor.nbytes for tensor in tensors.values())
    assert sizes == 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state.levels[0].delta))
    context.save(tmp_path / "read", model, params, state)
    assert load_file(tmp_path / "read")["mixer/cache/keys"].shape == (1, 2, 2, 9, 4)
    with safe_open(tmp_path / "learned", framework="numpy") as file:
        about = json.loads(file.metadata()["hope_jax"])["body"]["about"]
    assert about["version"] == 1 and about["note"] == {"mine": [1]} and about["batch"] == 2
    assert about["levels"] == [{"periods": [4]}, {"periods": [8]}]
    assert about["model"]["width"] == 8 and about["model"]["parameters"].startswith("those of digest")


def test_mistakes_are_plain_and_leave_the_state_as_it_was():
    model, params, tokens = made(dtype=jnp.float32)
    _, state = stream(model, params, tokens[:, :11], (11,))
    before = jax.tree.map(np.array, state)
    with pytest.raises(UserError, match="of another model, batch size or dtype"):
        context.learn(model, params, state, tokens[:1])
    with pytest.raises(UserError, match="expected \\[batch, time\\] with at least one token"):
        context.learn(model, params, state, tokens[:, :0])
    with pytest.raises(UserError, match="ids run from 0 to 11"):
        context.learn(model, params, state, tokens.at[0, 0].set(VOCAB).at[0, 1].set(0))
    with pytest.raises(UserError, match="90 tokens do not fit: the cache has room for 53 more"):
        context.learn(model, params, state, jnp.tile(tokens[:, :30], 3))
    with pytest.raises(UserError, match="not finite, so nothing was learned"):
        context.learn(model, params | {"embedding": params["embedding"] * jnp.nan}, state, tokens[:, :8])
    jax.tree.map(np.testing.assert_array_equal, state, before)
    other = LanguageModel(replace(model.config, width=16, mixer=replace(model.config.mixer, heads=4)))
    there = drawn(other.init, tokens[:, :1])
    with pytest.raises(UserError, match="of another model"):
        context.learn(other, there, state, tokens)
    plain = LanguageModel(MODELS["transformer_pp-tiny"])
    with pytest.raises(UserError, match="the model has no level that can be written in context"):
        context.start(plain, {}, 1)


def test_a_state_of_another_kind_is_refused(untyped):
    model, params, tokens = made(dtype=jnp.float32)
    wrong: Any = {}
    with pytest.raises(UserError, match="the state is a dict"):
        context.learn(model, params, wrong, tokens)


def test_generation_reads_with_what_was_learned_and_writes_nothing():
    model, params, tokens = made(dtype=jnp.float32)
    _, state = stream(model, params, tokens[:, :11], (11,))
    written, after = generate.sample(model, params, state, tokens[:, 11:13], steps=4, key=jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, after.blocks.feed_forward, state.blocks.feed_forward)
    again, _ = generate.sample(model, params, state, tokens[:, 11:13], steps=4, key=jax.random.key(0))
    np.testing.assert_array_equal(written, again)
    loss, _ = context.learn(model, params, after, written)
    assert np.isfinite(loss)


def test_generation_that_learns_is_learning_token_by_token():
    model, params, tokens = made(dtype=jnp.float32)
    params["blocks"]["feed_forward"]["rate"] *= 20
    params["embedding"] *= 3  # opinions that the writes change
    _, state = stream(model, params, tokens[:, :5], (4, 1))
    how: Any = {"steps": 9, "temperature": 0.0, "key": jax.random.key(0), "learn": True}
    written, after = generate.sample(model, params, state, tokens[:, 5:8], **how)
    logits, expected = context.expect(model, params, state, tokens[:, 5:8])
    chosen = []
    for _ in range(9):
        chosen.append(jnp.argmax(logits, axis=-1))
        end, (logits, expected) = expected, context.expect(model, params, expected, chosen[-1][:, None])
    np.testing.assert_array_equal(written, np.stack(chosen, axis=1))
    close(after, end, rtol=1e-4, atol=1e-6)
    assert np.any(after.levels[1].delta["up"] != state.levels[1].delta["up"])
    plain, _ = generate.sample(model, params, state, tokens[:, 5:8], **how | {"learn": False})
    assert plain.shape == written.shape and np.any(plain != written), "the weights that were written are read"
    with pytest.raises(UserError, match="no level that can be written"):
        other = LanguageModel(replace(model.config, feed_forward=SwiGLUConfig(8)))
        generate.sample(other, params, state, tokens, **how)


def test_a_cleared_context_is_an_empty_one_with_the_levels_as_they_are():
    model, params, tokens = made(dtype=jnp.float32)
    _, state = stream(model, params, tokens[:, :5], (5,))  # 4 taken up, the unfinished chunk has 1 token: no label
    after = context.clear(model, params, state, capacity=40)
    close(after.blocks.feed_forward, state.blocks.feed_forward, rtol=0)
    close(after.blocks.mixer, model.init_state(params, 2, 40).mixer, rtol=0)
    fresh = context.start(model, params, 2, 40)
    fresh = fresh._replace(levels=state.levels)
    logits, _ = read(model, params, tokens[:, 13:], after)
    np.testing.assert_array_equal(logits, read(model, params, tokens[:, 13:], fresh)[0])
    nats, _ = context.surprise(model, params, after, tokens[:, 8:13])
    assert nats.shape == (2, 4), "the first token of an empty context is not predicted"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: config((4, 6)), "periods \\(4, 6\\) do not nest; make 6 a multiple of 4"),
        (lambda: config(in_context=3), "in_context is 3; expected 0 to 2"),
        (lambda: config(rate=float("nan")), "rate of writes is nan"),
        (lambda: Writes(optimizer="sgd"), "optimizer of writes is 'sgd'; expected an InnerOptimizer such as"),
        (lambda: config(bptt=(1,)), "bptt is \\(1,\\); expected one for each of 2"),
        (lambda: config(bptt=(1, -1)), "bptt is \\(1, -1\\); expected 0 or more"),
        (lambda: config(rank=0), "rank is 0"),
    ],
)
def test_wrong_settings_are_refused(make, message, untyped):
    with pytest.raises(UserError, match=message):
        make()
