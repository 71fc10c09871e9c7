"""TTT-E2E: clipped gradient descent on the loss of the whole model writes the first part of the last blocks."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_prime
from contexts import stream
from drawn import drawn

from experiments.compare import CompareConfig
from experiments.needle import NeedleConfig
from experiments.recall import RecallConfig
from hope_jax import config as configs
from hope_jax import context, evals, generate
from hope_jax import train as training
from hope_jax.cli.compile import CompileConfig
from hope_jax.cli.pretrain import PretrainConfig
from hope_jax.cli.report import continued
from hope_jax.context.writes import cross_entropy, reading_loss
from hope_jax.data import IGNORE, ByteTokenizer, TextData
from hope_jax.errors import UserError
from hope_jax.levels import Level
from hope_jax.models import MODELS
from hope_jax.nn.config import ModelConfig
from hope_jax.nn.feed_forward.fast import Writes
from hope_jax.nn.feed_forward.prime import PrimeConfig
from hope_jax.nn.language_model import LanguageModel
from hope_jax.nn.mixers.attention import AttentionConfig
from hope_jax.train import count_bytes

WIDTH, VOCAB, LAYERS, WRITTEN, PERIOD, T, CLIP = 8, 11, 4, 2, 4, 12, 0.5
LEVELS = (*[None] * (LAYERS - WRITTEN), *[Level(PERIOD)] * WRITTEN)
PRIME = PrimeConfig(6, LEVELS, Writes(rate=0.8, clip=CLIP), static=10)
CONFIG = ModelConfig(AttentionConfig(2, window=5), PRIME, WIDTH, LAYERS, VOCAB, dtype=jnp.float64)
MODEL = LanguageModel(CONFIG)


@functools.cache
def made():
    """Random parameters, with another rate in every layer, and tokens of two sequences."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, T + 1)))
    params = drawn(MODEL.init, tokens[:, :1], rate=0.8)
    return params, tokens


def both(reader):
    """Compiled: (parameters, tokens) -> the gradient of the mean of all nats, and what ``reader`` gives, nats first."""

    def loss(params, tokens):
        found = reader(params, tokens)
        return found[0].mean(), found

    return jax.jit(jax.grad(loss, has_aux=True))


def reading(params, tokens):
    return (reading_loss(MODEL, params, tokens[:, :-1], tokens[:, 1:]),)


read = jax.jit(reading)


def replaced(params, kernels):
    """The parameters with other matrices in the first part of the last blocks."""
    part = params["blocks"]["feed_forward"]
    prime = {name: {"kernel": part["prime"][name]["kernel"].at[-WRITTEN:].set(k)} for name, k in kernels.items()}
    part = part | {"prime": part["prime"] | prime}
    return params | {"blocks": params["blocks"] | {"feed_forward": part}}


def by_gradients(params, tokens):
    """Nats of one sequence, and the lengths of the gradients that are written: one chunk after another.

    The model is the plain one; its parameters are moved by what ``jax.grad`` says of the chunk before.
    """
    part = params["blocks"]["feed_forward"]
    start = {name: part["prime"][name]["kernel"][-WRITTEN:] for name in ("gate", "up", "down")}

    def chunk(carry, pair):
        kernels, state = carry

        def loss(kernels):
            logits, after = MODEL.apply({"params": replaced(params, kernels)}, pair[0][None], state)
            nats = cross_entropy(logits, pair[1][None])[0]
            return nats.mean(), (nats, after)

        slope, (nats, state) = jax.grad(loss, has_aux=True)(kernels)
        length = jnp.sqrt(sum(jnp.sum(g**2) for g in slope.values()))
        step = part["rate"][-WRITTEN:, :, None] * jnp.minimum(1, CLIP / length)
        return (jax.tree.map(lambda kernel, g: kernel - step * g, kernels, slope), state), (nats, length)

    pairs = tokens[:-1].reshape(-1, PERIOD), tokens[1:].reshape(-1, PERIOD)
    _, (nats, lengths) = jax.lax.scan(chunk, (start, MODEL.init_state(params, 1)), pairs)
    return nats.ravel(), lengths


one_after_another = jax.vmap(by_gradients, in_axes=(None, 0))


def test_values_are_those_of_writing_one_chunk_after_another(x64):
    nats, lengths = jax.jit(one_after_another)(*made())
    assert np.any(lengths > CLIP) and np.any(lengths[:, :-1] < CLIP), lengths
    np.testing.assert_allclose(read(*made())[0], nats, rtol=1e-9)


@pytest.mark.slow
def test_gradients_go_through_all_writes(x64):
    found, expected = (both(reader)(*made())[0] for reader in (reading, one_after_another))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), found, expected)
    rates = found["blocks"]["feed_forward"]["rate"]
    assert np.all(rates[-WRITTEN:] != 0) and not np.any(rates[:-WRITTEN])


def test_rate_0_is_the_transformer_of_the_equations_and_so_is_every_rate_before_the_first_write(x64):
    params, tokens = made()
    part = params["blocks"]["feed_forward"]
    still = params | {"blocks": params["blocks"] | {"feed_forward": part | {"rate": 0 * part["rate"]}}}
    known, sizes = jax.tree.map(np.asarray, params), dict(layers=LAYERS, heads=2, window=5)
    plain = np.stack([references_prime.nats(known, row, **sizes) for row in np.asarray(tokens)])
    np.testing.assert_allclose(read(still, tokens)[0], plain, rtol=1e-9)
    nats = read(params, tokens)[0]
    np.testing.assert_allclose(nats[:, :PERIOD], plain[:, :PERIOD], rtol=1e-9)
    assert np.all(np.abs(nats - plain)[:, PERIOD:] > 1e-6)


@pytest.mark.slow
def test_a_stream_in_pieces_reads_as_training_does_and_what_it_stored_can_be_merged(x64):
    params, tokens = made()
    nats, state = stream(MODEL, params, tokens, (3, 1, 7, 2))
    np.testing.assert_allclose(nats, read(params, tokens)[0], rtol=1e-9)
    done = context.finish(MODEL, params, state)
    sizes = np.max([np.abs(leaf).max(axis=(1, 2, 3)) for leaf in done.levels[0].delta.values()], axis=0)
    assert not np.any(sizes[:-WRITTEN]) and np.all(sizes[-WRITTEN:] > 0)
    _, one = context.learn(MODEL, params, context.start(MODEL, params, 1), tokens[:1])
    merged, emptied = context.merge(MODEL, params, one)
    after = context.finish(MODEL, params, one)
    logits = [MODEL.apply({"params": p}, tokens[:1], s)[0] for p, s in ((merged, emptied), (params, after))]
    np.testing.assert_allclose(*logits, rtol=1e-9)


def test_needles_and_samples_are_read_with_writes_where_training_was(x64, monkeypatch):
    params, asked = made()[0], []

    def sample(model, params, state, prompt, *, steps, learn, **how):
        asked.append(learn)
        return np.zeros((len(prompt), steps), np.int32), state

    monkeypatch.setattr(generate, "sample", sample)
    plain = replace(CONFIG, feed_forward=replace(PRIME, levels=()))
    inputs, targets = np.ones((2, T), np.int32), np.full((2, T), IGNORE, np.int32)
    targets[:, -2:] = ord("7")
    monkeypatch.setattr(TextData, "heldout_batches", lambda self, **how: iter([np.ones((1, T + 1), np.int32)]))
    text = object.__new__(TextData)
    for model in (MODEL, LanguageModel(plain)):
        evals.needle.answered(model, params, ByteTokenizer(), inputs, targets)
        continued(model, params, ByteTokenizer(), text, T, 3, seed=0, whole=True)
    assert asked == [True, True, False, False]


def test_what_levels_store_belongs_to_the_state(x64):
    params = made()[0]
    mixers = count_bytes(MODEL.init_state(params, 1, T))
    assert training.state_bytes(MODEL, params, T) == mixers + LAYERS * 3 * WIDTH * PRIME.hidden * 8


REFUSED = {
    "512 tokens, got 512": lambda: PretrainConfig(Path("x"), model="ttt_e2e-30m"),
    "256 does not divide 300": lambda: PretrainConfig(Path("x"), model="ttt_e2e-tiny", length=300),
    "--remat-every does not": lambda: PretrainConfig(Path("x"), model="ttt_e2e-tiny", remat_every=256),
    "--z-loss does not": lambda: PretrainConfig(Path("x"), model="ttt_e2e-tiny", z_loss=1e-4),
    "256 tokens, got 256": lambda: CompileConfig("cpu:1", model="ttt_e2e-tiny", length=256),
    "256 does not divide 400": lambda: CompareConfig(rows=("hope", "ttt_e2e"), length=400),
    "the loss of answers is read without writes": lambda: NeedleConfig(rows=("hope", "ttt_e2e")),
    "loss of answers": lambda: RecallConfig(rows=("ttt_e2e",)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_training_in_which_no_write_would_be_read_is_refused(message):
    with pytest.raises(UserError, match=message):
        REFUSED[message]()


def test_the_row_writes_the_last_quarter_of_its_blocks_every_eighth_of_the_context():
    part: Any = MODELS["ttt_e2e-1.3b"].feed_forward
    mixer: Any = MODELS["ttt_e2e-1.3b"].mixer
    assert mixer.window == 2048
    assert part.periods(24) == ((0,) * 18 + (512,) * 6,)
    assert part.writes.clip == 1.0 and part.trained == 1
    assert configs.from_json(configs.to_json(PRIME), PrimeConfig) == PRIME


WRONG = {
    "static is 0; give a whole number": lambda: PrimeConfig(6, static=0),
    "clip is 0; expected a length above 0": lambda: Writes(clip=0),
    "clip is nan": lambda: Writes(clip=float("nan")),
    "rank is 2; SwiGLU layers are written whole": lambda: PrimeConfig(6, LEVELS, Writes(rank=2), static=6),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_settings_are_refused(untyped, message):
    with pytest.raises(UserError, match=message):
        WRONG[message]()
