"""Generation: greedy text is the argmax of the full pass, sessions go on, samples have the right distribution."""

import functools
from collections import Counter
from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from flax import linen as nn

from hope_jax import generate
from hope_jax.errors import NotFinite, UserError
from hope_jax.memory import RULES
from hope_jax.nn.config import ModelConfig
from hope_jax.nn.feed_forward.swiglu import SwiGLUConfig
from hope_jax.nn.language_model import LanguageModel
from hope_jax.nn.mixers.attention import AttentionConfig
from hope_jax.nn.mixers.memory import MemoryMixerConfig
from hope_jax.nn.mixers.self_modifying import SelfModifyingConfig

VOCAB, PROMPT, ROOM = 13, 66, 140
MIXERS = {
    "attention": AttentionConfig(2),
    "window": AttentionConfig(2, window=5, conv=3),
    "memory": MemoryMixerConfig(RULES["deltanet"], 2, impl="chunked"),  # plain products compile sooner
    "hope": SelfModifyingConfig(2, c_memory=8, c_projections=4, rate_max=2.0),
}
# Without limit as a memory, and of one kind with attention.
NAMES = ["attention", *(pytest.param(n, marks=pytest.mark.slow) for n in ("window", "hope")), "memory"]
mixers = pytest.mark.parametrize("name", NAMES)


@functools.cache
def tiny(mixer, capacity=ROOM):
    """A small model, its parameters, a fresh state of two sequences and prompts that are read as 64 + 1 + 1 tokens."""
    model = LanguageModel(ModelConfig(mixer, SwiGLUConfig(24), width=16, layers=2, vocab_size=VOCAB))
    prompt = np.asarray(jax.random.randint(jax.random.key(0), (2, PROMPT), 0, VOCAB))
    params = drawn(model.init, prompt[:, :1])
    return model, params, model.init_state(params, 2, capacity), prompt


@mixers
def test_greedy_text_is_the_argmax_of_one_full_pass_over_it(key, name):
    model, params, state, prompt = tiny(MIXERS[name])
    tokens, _ = generate.sample(model, params, state, prompt, steps=40, temperature=0, key=key)
    logits, _ = jax.jit(model.apply)({"params": params}, np.concatenate([prompt, tokens], axis=1))
    logits = np.asarray(logits)[:, PROMPT - 1 : -1]
    chosen = np.take_along_axis(logits, np.asarray(tokens)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(chosen, logits.max(-1), atol=1e-4)
    assert len(np.unique(np.asarray(tokens))) > 1, "a constant text proves nothing"


@mixers
def test_two_calls_write_what_one_longer_call_writes_and_leave_the_same_state(key, name):
    model, params, state, prompt = tiny(MIXERS[name])
    settings = {"temperature": 0, "key": key}
    whole, end = generate.sample(model, params, state, prompt, steps=50, **settings)
    first, middle = generate.sample(model, params, state, prompt, steps=17, **settings)
    second, last = generate.sample(model, params, middle, first[:, -1:], steps=33, **settings)
    np.testing.assert_array_equal(np.concatenate([first, second], axis=1), whole)
    chex.assert_trees_all_close(last, end, atol=1e-5)


def test_the_state_has_read_everything_but_the_last_token(key):
    model, params, state, prompt = tiny(MIXERS["attention"])
    tokens, end = generate.sample(model, params, state, prompt, steps=6, key=key)
    read = np.concatenate([prompt, tokens[:, :-1]], axis=1)
    _, expected = jax.jit(model.apply)({"params": params}, read, state)
    chex.assert_trees_all_close(end, expected, atol=1e-5)


def test_a_longer_sample_starts_like_a_shorter_one_and_other_keys_differ(key):
    model, params, state, prompt = tiny(MIXERS["attention"])
    long, _ = generate.sample(model, params, state, prompt, steps=45, temperature=1.5, key=key)
    short, _ = generate.sample(model, params, state, prompt, steps=9, temperature=1.5, key=key)
    other, _ = generate.sample(model, params, state, prompt, steps=9, temperature=1.5, key=jax.random.key(1))
    np.testing.assert_array_equal(long[:, :9], short)
    assert (other != short).any()


def test_a_stream_stopped_early_leaves_a_state_to_go_on_from(key):
    model, params, state, prompt = tiny(MIXERS["memory"])
    whole, _ = generate.sample(model, params, state, prompt, steps=60, temperature=0, key=key)
    pieces = generate.stream(model, params, state, prompt, steps=60, temperature=0, key=key)
    first, _ = next(pieces)
    second, middle = next(pieces)
    assert (first.shape[1], second.shape[1]) == (1, generate.PIECE)
    rest, _ = generate.sample(model, params, middle, second[:, -1:], steps=60 - 33, temperature=0, key=key)
    np.testing.assert_array_equal(np.concatenate([first, second, rest], axis=1), whole)


@dataclass(frozen=True)
class FixedConfig:
    """Configuration of ``Fixed``."""

    vocab_size: int
    logits: tuple[float, ...]


TRACED: Counter = Counter()


class Fixed(nn.Module):
    """Always the same logits; counts how often it is traced."""

    config: FixedConfig

    def __call__(self, tokens, state, count=None):
        TRACED[self.config] += 1
        return jnp.broadcast_to(jnp.array(self.config.logits), (*tokens.shape, self.config.vocab_size)), state


CHANCES = np.array([0.05, 0.4, 0.1, 0.3, 0.15])
FIXED = Fixed(FixedConfig(5, tuple(np.log(CHANCES).tolist())))


def frequencies(**settings):
    """Shares of the five tokens among 40 steps of 500 sequences."""
    prompt = jnp.zeros((500, 1), jnp.int32)
    tokens, _ = generate.sample(FIXED, {}, (), prompt, steps=40, key=jax.random.key(3), **settings)
    return np.bincount(np.asarray(tokens).ravel(), minlength=5) / tokens.size


@pytest.mark.parametrize(
    ("settings", "allowed", "power"),
    [
        ({}, [0, 1, 2, 3, 4], 1),
        ({"temperature": 2.0}, [0, 1, 2, 3, 4], 0.5),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4], 2),
        ({"temperature": 0}, [1], 1),
        ({"top_k": 3}, [1, 3, 4], 1),
        ({"top_k": 1}, [1], 1),
        ({"top_p": 0.69}, [1, 3], 1),
        ({"top_p": 0.71}, [1, 3, 4], 1),
        ({"top_p": 1e-6}, [1], 1),
        ({"top_k": 4, "top_p": 0.73}, [1, 3], 1),
        ({"temperature": 0.5, "top_p": 0.8}, [1, 3], 2),
    ],
    ids=str,
)
def test_tokens_come_with_the_chances_the_settings_ask_for(settings, allowed, power):
    """top_k=4 leaves 0.95, of which 0.7 is 0.737: two tokens. Sharpened to squares, 0.25 of 0.295 is 0.85."""
    expected = np.zeros(5)
    expected[allowed] = CHANCES[allowed] ** power
    np.testing.assert_allclose(frequencies(**settings), expected / expected.sum(), atol=0.012)


def test_ties_never_let_more_than_top_k_tokens_through():
    flat = Fixed(FixedConfig(5, (0.0,) * 5))
    prompt = jnp.zeros((200, 1), jnp.int32)
    tokens, _ = generate.sample(flat, {}, (), prompt, steps=5, top_k=2, key=jax.random.key(0))
    assert len(np.unique(np.asarray(tokens))) == 2


def test_every_step_draws_with_a_key_of_its_own():
    tokens, _ = generate.sample(FIXED, {}, (), jnp.zeros((9, 1), jnp.int32), steps=65, key=jax.random.key(0))
    assert len({column.tobytes() for column in np.asarray(tokens).T}) == 65


def test_other_lengths_and_settings_of_a_second_call_compile_nothing_new():
    prompt, key = jnp.zeros((1, 700), jnp.int32), jax.random.key(0)
    model = Fixed(FixedConfig(3, (0.0, 1.0, 2.0)))
    generate.sample(model, {}, (), prompt[:, :585], steps=40, key=key)
    before = TRACED[model.config]
    assert before > 0
    for time, steps, settings in ((1, 1, {}), (77, 33, {"temperature": 0}), (700, 90, {"top_k": 2, "top_p": 0.5})):
        generate.sample(model, {}, (), prompt[:, :time], steps=steps, key=key, **settings)
    assert TRACED[model.config] == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": jnp.zeros((2, 3))}, "float32"),
        ({"prompt": jnp.zeros((2, 0), jnp.int32)}, r"\(2, 0\)"),
        ({"prompt": jnp.zeros((0, 3), jnp.int32)}, r"\(0, 3\)"),
        ({"prompt": jnp.zeros(3, jnp.int32)}, r"\(3,\)"),
        ({"prompt": jnp.full((2, 3), VOCAB)}, "13"),
        ({"prompt": jnp.full((2, 3), -1)}, "-1"),
        ({"steps": 0}, "steps is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": VOCAB + 1}, "top_k is 14"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"steps": ROOM}, "room for 205 tokens.*room for 140"),
        ({"steps": 2.5}, "steps is 2.5; give a whole number"),
        ({"steps": True}, "steps is True"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": 1e39}, "temperature is 1e[+]39"),
        ({"top_k": 2.0}, "top_k is 2.0; give a whole number"),
        ({"top_p": 1e-50}, "top_p is 1e-50"),
        ({"key": 0}, "key is a int.*jax.random.key"),
        ({"key": jax.random.split(jax.random.key(0), 3)}, r"shape \(3,\); give one random key"),
        ({"prompt": "text"}, "prompt: dtype is"),
        ({"prompt": [[1, 2], [3]]}, "prompt is no array"),
        ({"prompt": np.array([[2**32 + 1]])}, "prompt: ids run from 4294967297"),
        ({"prompt": jnp.zeros((3, 4), jnp.int32)}, "state is not of this model with a prompt of 3 sequences"),
        ({"state": ()}, "state is a tuple; give one of model.init_state"),
        ({"params": {}}, "params are not those of this model"),
    ],
    ids=str,
)
def test_mistakes_are_told_before_anything_runs(key, untyped, changes, words):
    model, params, state, prompt = tiny(MIXERS["attention"])
    arguments = {"params": params, "state": state, "prompt": prompt, "steps": 5, "key": key, **changes}
    with pytest.raises(UserError, match=words):
        generate.stream(model, **arguments)


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-40, 1.2e-38, 1e-30])
def test_however_cold_the_likeliest_token_is_written(temperature):
    assert frequencies(temperature=temperature)[1] == frequencies(temperature=temperature, top_k=3)[1] == 1


def test_the_last_free_slot_can_be_used_and_room_counts_what_was_read(key):
    model, params, state, prompt = tiny(MIXERS["attention"])
    tokens, state = generate.sample(model, params, state, prompt, steps=ROOM - PROMPT + 1, key=key)
    with pytest.raises(UserError, match="room for 0 more"):
        generate.sample(model, params, state, tokens[:, -1:], steps=1, key=key)


@pytest.mark.parametrize("name", NAMES[1:])
def test_windows_and_memories_write_without_limit(key, name):
    model, params, state, prompt = tiny(MIXERS[name], capacity=4)
    tokens, end = generate.sample(model, params, state, prompt, steps=50, key=key)
    assert tokens.shape == (2, 50)
    chex.assert_trees_all_equal_shapes_and_dtypes(end, jax.tree.map(jnp.asarray, state))


def test_a_model_that_gives_nan_is_an_error_not_a_text(key):
    model, params, state, prompt = tiny(MIXERS["attention"])
    broken = jax.tree.map(lambda p: p * jnp.nan, params)
    with pytest.raises(NotFinite, match="not finite"):
        generate.sample(model, broken, state, prompt, steps=5, key=key)
