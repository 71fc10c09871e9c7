"""Test-time training in mini-batches (TTT, arXiv 2407.04620): a memory that is trained on the tokens as they come.

The inner model is f(x) = x + LN(Z(x)): a linear map or an MLP Z with biases, and a LayerNorm that is trained outside.
Its loss at a token is 1/2 ||LN(Z(k)) - (v - k)||^2. At the i-th token of a mini-batch its weights are

    W_i = W_anchor - s_i sum_{j <= i} eta_j grad_j        every gradient at the anchor

and those at the last token are the next anchor. The factor s_i is of the token that reads, not of those that wrote. So
the sums are kept apart from the anchor: each is a linear memory of the one recurrence, empty at every anchor. A bias
is the weight of one more feature, which is 1.
"""

import functools
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.levels import Active, Due, scan_levels
from hope_jax.memory import architectures, objectives
from hope_jax.memory.architectures import Architecture, Weights
from hope_jax.memory.chunked import Linear, Lookup, Tokens, Write
from hope_jax.memory.decays import Shared
from hope_jax.memory.kernels import Impl, Products, inside_kernel, kernel_loop, products_of
from hope_jax.memory.recurrence import evaluate
from hope_jax.memory.rule import Gates, Rule, layer_writes
from hope_jax.types import Array, Count, Float, Int, Scalar


def with_one(x: Float[Array, "*axes F"]) -> Float[Array, "*axes G"]:
    """One more feature, G = F + 1, which is 1."""
    return jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)


def gelu_and_one(z: Float[Array, "*axes F"]) -> Float[Array, "*axes G"]:
    """GELU in its tanh form, and one more feature for the bias of the next layer."""
    return with_one(jax.nn.gelu(z))


# The scales are not used: the start does not depend on the fan-in, see ``nn/mixers/ttt.py``.
linear = Architecture(layers=1, residual=False, scales=(1.0,))
mlp = Architecture(layers=2, residual=False, scales=(1.0, 1.0), activation=gelu_and_one)


class Norm(NamedTuple):
    """Scale and bias of the inner LayerNorm of a head."""

    scale: Float[Array, "*H K"]
    bias: Float[Array, "*H K"]


class Inner(NamedTuple):
    """Inner weights of a head: those of the anchor, and what was written since, ``-sum eta_j grad_j``.

    One kernel for each layer, [in + 1, out]; the last row is the bias.
    """

    anchor: Weights
    sums: Weights


class Inputs(NamedTuple):
    """What a head reads, per token. Keys and queries end with the feature 1; ``last``: 1 where a mini-batch ends."""

    keys: Float[Array, "T G"]
    targets: Float[Array, "T K"]
    queries: Float[Array, "T G"]
    rate: Float[Array, " T"]
    gain: Float[Array, " T"]
    last: Float[Array, " T"]


def start(anchor: Weights) -> Inner:
    """Inner weights at the start of a sequence."""
    return Inner(anchor, jax.tree.map(jnp.zeros_like, anchor))


def layer_norm(norm: Norm, x: Float[Array, " K"]) -> Float[Array, " K"]:
    """The inner LayerNorm, of one token."""
    return architectures.layer_norm(x) * norm.scale + norm.bias


def scan(
    rule: Rule,
    norm: Norm,
    inner: Inner,
    keys: Float[Array, "T K"],
    values: Float[Array, "T K"],
    queries: Float[Array, "T K"],
    rate: Float[Array, " T"],
    gains: Float[Array, " C"],
    position: Int[Array, ""] | np.ndarray,
    impl: Impl = "auto",
    count: Count = None,
) -> tuple[Inner, Float[Array, "T K"]]:
    """Train and read the inner model of one head over T tokens: its weights after them, and f(q) after every write.

    ``rule`` has the architecture and, as its period, the size C of a mini-batch. ``rate`` is eta_j >= 0, ``gains`` the
    s_1 ... s_C of the places in a mini-batch, ``position`` the tokens before this call. Any cut of the T tokens into
    calls gives the same result. ``impl`` is that of ``gated_delta``; UserError for an unknown one.
    """
    places = (position + jnp.arange(len(keys))) % rule.period
    last = (places == rule.period - 1).astype(rate.dtype)
    inputs = Inputs(with_one(keys), values - keys, with_one(queries), rate, gains[places], last)
    rule = replace(rule, objective=functools.partial(_loss, norm))

    def run_chunk(inner: Inner, inputs: Inputs, active: Active, due: tuple[Due, ...]):
        return _write(rule, inside_kernel(impl), inner, inputs, active, due[0] is True)

    periods, kernel = (rule.period,), kernel_loop(impl)
    inner, outputs = scan_levels(
        run_chunk, inner, inputs, position=position, periods=periods, count=count, kernel=kernel
    )
    return inner, queries + jax.vmap(functools.partial(layer_norm, norm))(outputs)


def _loss(norm: Norm, prediction: Float[Array, " K"], target: Float[Array, " K"]) -> Scalar:
    return objectives.l2(layer_norm(norm, prediction), target)


def _write(
    rule: Rule, impl: Impl, inner: Inner, inputs: Inputs, active: Active, whole: bool
) -> tuple[Inner, Float[Array, "T K"]]:
    """Write and read inside one mini-batch. ``whole``: the tokens are all of it, so nothing was written before."""
    products, rate = products_of(impl), inputs.rate if active is None else active * inputs.rate
    both = products.matmul(jnp.concatenate([inputs.keys, inputs.queries]), inner.anchor[0])
    at_keys, at_queries = jnp.split(both, 2)
    gates = Gates(rate, jnp.ones_like(inputs.gain), None)
    pairs = inputs.keys, inputs.targets
    writes = layer_writes(rule, products, inner.anchor[1:], pairs, (at_keys, None), gates)
    sums = jax.tree.map(jnp.zeros_like, inner.sums) if whole else inner.sums
    read = functools.partial(_read, rule.architecture, products, inner.anchor, whole)
    shared = Shared(gates.retention, None, active)
    tokens = Tokens(writes, shared, (inputs.queries, at_queries, inputs.gain))
    ends, outputs = evaluate(list(map(Linear, sums)), tokens, read, "after", impl)
    if whole:
        return Inner(_at_the_end(products, inner.anchor, writes, inputs.gain[-1]), inner.sums), outputs
    done = inputs.last[-1] if active is None else active[-1] * inputs.last[-1]
    return _moved(inner.anchor, tuple(end.memory for end in ends), inputs.gain[-1], done), outputs


def _at_the_end(products: Products, anchor: Weights, writes: list[Write], gain: Scalar) -> Weights:
    """The next anchor after a whole mini-batch. The writes take less memory than their sum, in both passes."""
    pairs = zip(anchor, writes, strict=True)
    return tuple(weights + products.matmul_tn(one.keys, gain * one.writes) for weights, one in pairs)


def _moved(anchor: Weights, sums: Weights, gain: Scalar, done: Scalar) -> Inner:
    """The anchor moved and the sums emptied where ``done`` is 1, not 0."""
    moved = jax.tree.map(lambda weights, written: weights + done * gain * written, anchor, sums)
    return Inner(moved, jax.tree.map(lambda written: (1 - done) * written, sums))


def _read(
    architecture: Architecture, products: Products, anchor: Weights, empty: bool, lookup: Lookup, queries
) -> Float[Array, "T K"]:
    """Z at every token's weights, ``anchor + gain * sums``. ``empty``: the sums hold nothing before these tokens."""
    inputs, at_anchor, gain = queries

    def layer(index: int, inputs: Array, at_anchor: Array) -> Array:
        known = (jnp.zeros_like(at_anchor),) if empty else ()
        return at_anchor + gain[:, None] * lookup(index, inputs, *known)

    z = layer(0, inputs, at_anchor)
    for index, weights in enumerate(anchor[1:], start=1):
        inputs = architecture.activation(z)
        z = layer(index, inputs, products.matmul(inputs, weights))
    return z
