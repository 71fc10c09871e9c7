"""Self-modifying Titans against a token-by-token numpy head, its layer, and whether it stays finite and stores anything."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import references
from hope_jax.errors import UserError
from hope_jax.memory import RULES, architectures, objectives
from hope_jax.memory.rule import Gates, MemoryState, Rule
from hope_jax.memory.rule import scan as scan_rule
from hope_jax.memory.self_modifying import Boxes, Streams, Tuning, scan
from hope_jax.nn.self_modifying import SelfModifyingConfig

D, H, T = 4, 6, 21
SMALL = dict(heads=1, c_memory=8, c_projections=4)
# One change of the small configuration per row.
ROWS = {
    "periods 16 16": dict(c_memory=16, c_projections=16),
    "periods 16 4": dict(c_memory=16, c_projections=4),
    "periods 4 16": dict(c_memory=4, c_projections=16),
    "no momentum": dict(momentum="none"),
    "constant undamped momentum": dict(momentum="const", damped=False),
    "read after": dict(read="after"),
    "read anchor": dict(read="anchor"),
    "no projections, dot": dict(inner_projection=(), objective=objectives.dot),
    "all projections": dict(inner_projection=("k", "v", "q")),
    "value only, input_only": dict(inner_projection=("v",), dgd_scope="input_only"),
    "retain to init, no DGD": dict(retain_to="init", dgd_scope="none"),
    "retain to init": dict(retain_to="init"),
    "no retention, literal rate": dict(retention=False, rate_form="literal", rate_max=0.8),
}


def config_of(row):
    return SelfModifyingConfig(**SMALL | row)


def draw_head(config):
    """Streams, starts, log rates and biases of one head, in numpy and in the library's containers."""
    rng, names = np.random.default_rng(0), config.inner_projection
    streams = {n: x / np.linalg.norm(x, axis=1, keepdims=True) for n, x in zip("xkvq", rng.normal(size=(4, T, D)))}
    decay = {"none": None, "const": np.full(T, 0.4), "gated": rng.uniform(0.05, 0.6, T)}[config.momentum]
    starts = {n: [0.5 * rng.normal(size=(D, D)), 0.5 * rng.normal(size=(D, D))] for n in names}
    starts |= {n: [0.5 * rng.normal(size=(D, D)), 0.5 * rng.normal(size=(1, D))] for n in ("eta", "alpha")}
    starts["memory"] = [0.5 * rng.normal(size=(H, D)), 0.5 * rng.normal(size=(D, H))]
    log_rates, biases = (0.1, -0.7, -0.4), (-0.3, 2.0)
    sizes = {"projections": (D, D), "gates": (1, D)}
    stack = lambda group, boxes: tuple(  # noqa: E731
        jnp.asarray([starts[n][i] for n in boxes]).reshape(-1, *((D, D) if i == 0 else sizes[group])) for i in range(2)
    )
    initial = Boxes(tuple(map(jnp.asarray, starts["memory"])), stack("projections", names), stack("gates", ("eta", "alpha")))
    tuning = Tuning(Boxes(*map(jnp.asarray, log_rates)), *map(jnp.asarray, biases))
    ours = Streams(*(jnp.asarray(streams[n]) for n in "xkvq"), None if decay is None else jnp.asarray(decay))
    return (streams | dict(decay=decay), starts, log_rates, biases), (initial, tuning, ours)


def reference(config, numpy_head):
    how = {n: getattr(config, n) for n in ("c_memory", "c_projections", "read", "rate_max", "retention", "dgd_scope")}
    how |= {n: getattr(config, n) for n in ("rate_form", "damped", "retain_to")}
    how["objective"] = "dot" if config.objective is objectives.dot else "l2"
    return references.self_modifying(*numpy_head, names=config.inner_projection, **how)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_head_equals_the_token_by_token_equations(x64, row):
    config = config_of(row)
    numpy_head, (initial, tuning, streams) = draw_head(config)
    spec = config.spec()
    fast = Boxes(*(rule.start(w) for rule, w in zip(spec.rules, initial, strict=True)))
    new, reads = jax.jit(functools.partial(scan, spec))(initial, tuning, fast, streams, 0)
    expected, boxes = reference(config, numpy_head)
    np.testing.assert_allclose(reads, expected, rtol=1e-9, atol=1e-9)
    groups = dict(memory=["memory"], projections=config.inner_projection, gates=["eta", "alpha"])
    for group, names in groups.items():
        for kind in ("running", "anchor", "momentum") if config.momentum != "none" else ("running", "anchor"):
            for i, layer in enumerate(getattr(getattr(new, group), kind)):
                if names:
                    right = np.stack([getattr(boxes[n], kind)[i] for n in names]).reshape(layer.shape)
                    np.testing.assert_allclose(layer, right, rtol=1e-9, atol=1e-9, err_msg=f"{group} {kind} {i}")


def test_with_period_one_reading_before_is_reading_the_anchor(x64):
    reads = []
    for read in ("before", "anchor"):
        config = config_of(dict(c_memory=1, c_projections=1, read=read))
        _, (initial, tuning, streams) = draw_head(config)
        spec = config.spec()
        fast = Boxes(*(rule.start(w) for rule, w in zip(spec.rules, initial, strict=True)))
        reads.append(jax.jit(functools.partial(scan, spec))(initial, tuning, fast, streams, 0)[1])
    np.testing.assert_allclose(*reads, atol=1e-12)


# ---------------------------------------------------------------- the layer

LAYER = dict(heads=2, c_memory=8, c_projections=4, horizon=32, projection_rate=0.5)


@functools.cache
def layer(dtype="float64", **row):
    """(compiled apply, parameters, input [2,T,8], fresh state) of a small layer."""
    module, key = SelfModifyingConfig(**LAYER | row).build(8, dtype), jax.random.key(0)
    u = jax.random.normal(key, (2, T, 8), dtype)
    variables = jax.jit(module.init_with_output, static_argnames="method")
    _, params = variables(key, 2, T, method=type(module).init_state)
    # Creating the parameters by the call itself also makes those that only the call uses.
    state = module.apply(params, 2, T, method=type(module).init_state)
    params = jax.jit(module.init)(key, u[:, :1], state)
    return jax.jit(module.apply), params, u, module.apply(params, 2, T, method=type(module).init_state)
