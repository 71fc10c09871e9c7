"""Tokens in, logits out: embedding, a scan over equal blocks, a norm and the output projection (tied or not).

A block is ``x = x + mixer(norm(x))`` followed by the feed-forward part (which holds its own norms and residuals), if
there is one. In a hybrid the scan is over a pattern of different blocks.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.core import Tracer
from jax.sharding import NamedSharding

from hope_jax.errors import UserError
from hope_jax.kept import RematStates, keeping
from hope_jax.memory.products import by_rows
from hope_jax.nn.axes import Axes, norm_axes, stacked
from hope_jax.nn.config import ModelConfig, PartConfig, PassesOn
from hope_jax.nn.feed_forward.fast import BlockState, ContextState
from hope_jax.nn.layers import LayerNorm, RMSNorm, param_dtype
from hope_jax.nn.tokens import mesh_of, shared
from hope_jax.types import Array, Count, Logits, Stream, Tokens

State = BlockState | ContextState
NORMS = {"rms": RMSNorm, "layer": LayerNorm}  # ``ModelConfig.norm``

# Logits are multiplied by this and the last norm's scale starts that much smaller: a step of the optimizer, which is as
# large for every parameter, then moves it ten times as fast, from its small start (``_last_scale``).
LOGIT_GAIN = 10.0


class Depth(NamedTuple):
    """What a block hands to the next: the residual stream, and what mixers hand on (``PassesOn``; () if none does)."""

    x: Stream
    passed: Any = ()


def entry(config: ModelConfig, x: Stream) -> Depth:
    """The input of the first block."""
    for mixer, _ in config.pattern:
        if isinstance(mixer, PassesOn):
            return Depth(x, mixer.nothing_passed(x))
    return Depth(x)


class Block(nn.Module):
    """Mixer and feed-forward part at one ``place`` of the pattern. A call without state reads a fresh sequence."""

    config: ModelConfig
    place: int = 0
    sequences: NamedSharding | None = None

    def setup(self) -> None:
        c, parts = self.config, self._parts()
        self.norm = NORMS[c.norm](c.dtype)
        self.mixer = parts["mixer"].build(c.width, c.dtype)
        if "feed_forward" in parts:
            self.feed_forward = parts["feed_forward"].build(c.width, c.dtype)

    @nn.nowrap
    def _parts(self) -> dict[str, PartConfig]:
        mixer, feed_forward = self.config.pattern[self.place]
        return {"mixer": mixer} | ({} if feed_forward is None else {"feed_forward": feed_forward})

    @nn.nowrap
    def axes(self) -> Axes:
        c = self.config
        parts = {n: part.build(c.width, c.dtype).axes() for n, part in self._parts().items()}
        return {"norm": norm_axes(c.norm == "layer"), **parts}

    def init_state(self, batch: int, capacity: int) -> BlockState:
        """State of the static model before the first token; learning in context adds Delta (``context/writes.py``)."""
        return BlockState(self.mixer.init_state(batch, capacity), ())

    def __call__(self, depth: Depth, state: BlockState | None, count: Count = None) -> tuple[Depth, BlockState]:
        x, passed = shared(depth.x, self.sequences), depth.passed
        if state is None:
            state = self.init_state(*x.shape[:2])
        if isinstance(self._parts()["mixer"], PassesOn):
            y, mixer, passed = self.mixer(self.norm(x), state.mixer, count, passed)
        else:
            y, mixer = self.mixer(self.norm(x), state.mixer, count)
        x = shared(x + y, self.sequences)
        if "feed_forward" in self._parts():
            x = self.feed_forward(x, state.feed_forward)
        return Depth(x, passed), state._replace(mixer=mixer)


class Pattern(nn.Module):
    """Different blocks, one after another; the mixers' states are a tuple, in their order."""

    config: ModelConfig
    sequences: NamedSharding | None = None

    def setup(self) -> None:
        self.parts = [Block(self.config, place, self.sequences) for place in range(len(self.config.pattern))]

    @nn.nowrap
    def axes(self) -> Axes:
        places = range(len(self.config.pattern))
        return {f"parts_{place}": Block(self.config, place, parent=None).axes() for place in places}

    def init_state(self, batch: int, capacity: int) -> BlockState:
        """State before the first token."""
        return BlockState(tuple(part.init_state(batch, capacity).mixer for part in self.parts), ())

    def __call__(self, depth: Depth, state: BlockState | None, count: Count = None) -> tuple[Depth, BlockState]:
        mixers = []
        for place, part in enumerate(self.parts):
            depth, after = part(depth, None if state is None else BlockState(state.mixer[place], ()), count)
            mixers.append(after.mixer)
        return depth, BlockState(tuple(mixers), ())


def body_of(config: ModelConfig) -> type[Block] | type[Pattern]:
    """The module that is repeated over the layers of a model."""
    return Block if len(config.pattern) == 1 else Pattern


class LanguageModel(nn.Module):
    """``(tokens[B,T], state) -> (logits[B,T,vocab], state)``, causal; any cut of a sequence gives the same result.

    >>> model = LanguageModel(MODELS["hope-tiny"])
    >>> params = model.init(key, tokens[:, :1])["params"]
    >>> state = model.init_state(params, batch=tokens.shape[0])
    >>> logits, state = model.apply({"params": params}, tokens, state)

    ``remat``: the backward pass of training keeps the input of each block (of a pattern: of the first of its blocks)
    and computes the rest a second time, block by block. The parameters and, up to rounding, all numbers are the same.
    ``remat_states``, ``nested``: how exactly the backward pass keeps the states of memories between chunks, and whether
    it keeps fewer of them, in nested loops (``kept.py``).
    ``sequences``: the devices that share a batch and its tokens, between mixers and feed-forward parts; None: as JAX
    decides.
    """

    config: ModelConfig
    remat: bool = False
    sequences: NamedSharding | None = None
    remat_states: RematStates = "exact"
    nested: bool = False

    def setup(self) -> None:
        c = self.config
        start, body = nn.initializers.normal(c.width**-0.5), body_of(c)
        self.embedding = self.param("embedding", start, (c.vocab_size, c.width), param_dtype(c.dtype))
        self.blocks = nn.scan(
            nn.remat(body, prevent_cse=False) if self.remat else body,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType], one for each argument
            length=c.layers // len(c.pattern),
            metadata_params={nn.PARTITION_NAME: "layers"},
            # The check traces the block a second time. It is left on for ``init``, whose random draws depend on it.
            check_constancy_invariants=self.is_initializing(),
        )(c, sequences=self.sequences)
        self.norm = NORMS[c.norm](c.dtype, _last_scale(c.vocab_size, c.width))
        if c.embedding_norm:
            self.embedding_norm = NORMS[c.norm](c.dtype)
        if not c.tied:
            self.head = self.param("head", start, (c.width, c.vocab_size), param_dtype(c.dtype))

    @nn.nowrap
    def axes(self) -> Axes:
        """The logical axis names of every parameter, see ``nn/axes.py``."""
        c, norm = self.config, norm_axes(self.config.norm == "layer")
        blocks = stacked("layers", body_of(c)(c, parent=None).axes())
        first = {"embedding_norm": norm} if c.embedding_norm else {}
        head = {} if c.tied else {"head": ("embed", "vocab")}
        return {"embedding": ("vocab", "embed"), **first, "blocks": blocks, "norm": norm, **head}

    def init_state(self, params: Any, batch: int, capacity: int | None = None) -> BlockState:
        """State of ``batch`` fresh sequences, memories at their meta-learned start.

        ``capacity``: tokens that caches which grow, such as those of full attention, can hold in all; the model's
        ``context`` by default. Models without such caches ignore it and read on for ever.
        """
        if batch < 1:
            raise UserError(f"batch is {batch}; expected at least one sequence")
        capacity = self.config.context if capacity is None else capacity
        body = body_of(self.config)
        module = body(self.config, sequences=self.sequences, parent=None)

        def of_layer(block: Any) -> Any:
            return module.apply({"params": block}, batch, capacity, method=body.init_state)

        with mesh_of(self.sequences):
            return jax.vmap(of_layer)(params["blocks"])

    def __call__(self, tokens: Tokens, state: State | None = None, count: Count = None) -> tuple[Logits, State]:
        """Logits in at least float32. Without a state the sequence is fresh (and the caches hold just T tokens).

        A state of ``hope_jax.context`` is read with the weights it has learned; reading writes nothing. ``count``: how
        many tokens are real, from the first; the others are padding, so that one compiled program reads any number.

        Raises:
          UserError: tokens that are not integers, an empty batch or sequence, or ids outside the vocabulary
            (ids that are only known at run time give NaN logits instead).
        """
        learns = isinstance(state, ContextState)
        with mesh_of(self.sequences), keeping(self.remat_states, self.nested):
            depth = entry(self.config, self._embed(tokens))
            (x, _), blocks = self.blocks(depth, state.blocks if learns else state, count)
            logits = self._logits(shared(x, self.sequences))
        return logits, state.read_on(blocks.mixer) if learns else blocks

    def _logits(self, x: Stream) -> Logits:
        table, product = (self.embedding, "rd,vd->rv") if self.config.tied else (self.head, "rd,dv->rv")
        table, wide = table.astype(self.config.dtype), param_dtype(self.config.dtype)
        x = LOGIT_GAIN * self.norm(x)
        return by_rows(lambda rows: jnp.einsum(product, rows, table, preferred_element_type=wide), x)

    def _embed(self, tokens: Tokens) -> Stream:
        check_tokens(tokens, self.config.vocab_size)
        known = (tokens >= 0) & (tokens < self.config.vocab_size)
        rows = jnp.take(self.embedding, tokens, axis=0, mode="clip")
        x = jnp.where(known[..., None], rows, jnp.nan) * self.config.width**0.5
        x = x.astype(self.config.dtype)
        return self.embedding_norm(x) if self.config.embedding_norm else x


def _last_scale(vocab_size: int, width: int) -> float:
    """The start of the last norm's scale: the first loss is then that of equal probabilities, to 0.1 bits per token.

    A tied table scores the token just read with its own row, of norm 1, by ``LOGIT_GAIN * scale * sqrt(width)``. At
    log(1 + 0.03 vocab_size) that costs log2(1.03) = 0.04 bits; a scale of 1 without gain costs 6 bits at width 192.
    """
    return math.log1p(0.03 * vocab_size) / (LOGIT_GAIN * width**0.5)


def check_tokens(tokens: Array | np.ndarray, vocab_size: int, name: str = "tokens") -> None:
    """Raise UserError for tokens no model can read; ids are checked where their values are known."""
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise UserError(f"{name}: dtype is {tokens.dtype}; expected integers (token ids)")
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise UserError(f"{name}: shape is {tokens.shape}; expected [batch, time] with at least one token")
    if not isinstance(tokens, Tracer):
        values = np.asarray(tokens)  # not jnp: inside a jitted function even a constant's minimum is traced
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= vocab_size:
            raise UserError(f"{name}: ids run from {low} to {high}; the vocabulary has ids 0 to {vocab_size - 1}")
