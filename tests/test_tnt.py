"""TNT: memories set back at shards are read side by side, and it makes no difference; what crosses a shard, and how."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_tnt
from drawn import enlarged
from jax.extend.core import jaxprs_in_params
from references import initial, sigmoid
from test_mixers import HEADS, WIDTH, answer_output, conv, silu, units

from hope_jax import config as configs
from hope_jax.errors import UserError
from hope_jax.memory import RULES
from hope_jax.memory.architectures import Architecture
from hope_jax.memory.frozen import scan_frozen
from hope_jax.nn.axes import of_parameters
from hope_jax.nn.mixers.attention import AttentionConfig
from hope_jax.nn.mixers.memory import MemoryMixerConfig
from hope_jax.nn.mixers.self_modifying import SelfModifyingConfig
from hope_jax.nn.mixers.titans_mag import TitansMAGConfig
from hope_jax.nn.mixers.tnt import TNTConfig

B, T, SHARD, PERIOD = 2, 24, 8, 18  # the last divides neither the time nor what is read at once
TITANS = replace(RULES["titans"], period=4, shard=SHARD, project_queries=True)
# Small: its projection and gates have one layer, and of keys, values and queries one is made by memories.
HOPE = dict(inner_projection=("k",), projection=Architecture(1, True, (0.5,)), gate=Architecture(1, False, (1.0,)))
HOPE |= dict(rate_max=2.0, rate_bias=-2.5)
LOCAL = {  # in plain products, which compile sooner
    "titans": MemoryMixerConfig(TITANS, HEADS, horizon=32, rate_max=0.7, unit_values=True, impl="chunked"),
    "hope": SelfModifyingConfig(
        HEADS, c_memory=4, c_projections=4, impl="chunked", shard=SHARD, project_queries=True, **HOPE
    ),
}
ROWS = {name: TNTConfig(local, PERIOD) for name, local in LOCAL.items()}
rows = pytest.mark.parametrize("name", ROWS)
# Shards are laid side by side by one function, whatever the local memory is; Hope's gradients take long to compile.
by_titans = pytest.mark.parametrize("name", ["titans", pytest.param("hope", marks=pytest.mark.slow)])


def fresh(module, u):
    """A call on a fresh sequence, whose position is known."""
    return module(u, module.init_state(len(u), T))


def token_by_token(module, u):
    """The same, one token per call."""

    def step(state, x):
        y, state = module(x[:, None], state)
        return state, y[:, 0]

    state, y = jax.lax.scan(step, module.init_state(len(u), T), jnp.swapaxes(u, 0, 1))
    return jnp.swapaxes(y, 0, 1), state


@functools.cache
def drawn(name):
    """The layer, its parameters, all drawn, and an input."""
    module, rng = ROWS[name].build(WIDTH, jnp.float64), np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(module.init, method=fresh), jax.random.key(0), jnp.zeros((1, 1, WIDTH)))
    params = enlarged(jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.5), shapes))
    return module, params, rng.normal(size=(B, T, WIDTH))


@functools.cache
def pulled(name):
    """Compiled (parameters, input, cotangent of the output) -> output, gradients of parameters and input, state."""
    module = drawn(name)[0]

    @jax.jit
    def pulled(params, u, cotangent):
        y, pull, state = jax.vjp(lambda p, u: module.apply(p, u, method=fresh), params, u, has_aux=True)
        return y, pull(cotangent), state

    return pulled


@functools.cache
def whole(name):
    """Compiled (parameters, input) -> output, state; of Titans the program that has gradients."""
    if name == "hope":
        return jax.jit(functools.partial(drawn(name)[0].apply, method=fresh))
    return lambda params, u: pulled(name)(params, u, np.zeros_like(u))[::2]


@functools.cache
def piece(name):
    """Compiled (parameters, input, state, count) -> output, state: nobody knows the position beforehand."""
    return jax.jit(drawn(name)[0].apply)


@functools.partial(jax.jit, static_argnums=0)
def start(name, params):
    """The state before the first token."""
    return drawn(name)[0].apply(params, B, T, method="init_state")


def assert_equal(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), found, expected)


@by_titans
def test_shards_side_by_side_give_what_shards_one_after_another_give(x64, name):
    """Outputs, state, and the slope along a random direction: in the other form by differences."""
    _, params, u = drawn(name)
    rng = np.random.default_rng(1)
    weight, *direction = jax.tree.map(lambda x: rng.normal(size=x.shape), (u, params, u))
    y, gradients, state = pulled(name)(params, u, weight)
    zeros = [path for path, x in jax.tree_util.tree_leaves_with_path(gradients[0]) if np.any(np.all(x == 0, axis=-1))]
    assert not zeros

    def after(step):
        moved = jax.tree.map(lambda x, d: x + step * d, (params, u), tuple(direction))
        return piece(name)(*moved, start(name, moved[0]), np.int32(T))

    assert_equal(after(0.0), (y, state))
    values = [np.sum(weight * after(step)[0]) for step in (1e-6, -1e-6)]
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: np.sum(g * d), gradients, tuple(direction))))
    assert float(slope) == pytest.approx(float(values[0] - values[1]) / 2e-6, rel=1e-6)


@rows
def test_any_cut_with_any_padding_gives_the_same_outputs_and_state(x64, name):
    _, params, u = drawn(name)
    expected, state, parts = whole(name)(params, u), start(name, params), []
    for begin, stop in ((0, 5), (5, 8), (8, 9), (9, 22), (22, 24)):
        y, state = piece(name)(params, np.roll(u, -begin, axis=1), state, np.int32(stop - begin))
        parts.append(np.asarray(y)[:, : stop - begin])
    assert_equal((np.concatenate(parts, axis=1), state), expected)


@by_titans
def test_one_token_per_call_gives_the_same_outputs_and_state(x64, name):
    module, params, u = drawn(name)
    assert_equal(jax.jit(functools.partial(module.apply, method=token_by_token))(params, u), whole(name)(params, u))


@by_titans
def test_only_the_global_memory_and_the_convolutions_see_an_earlier_shard(x64, name):
    _, params, u = drawn(name)

    def moved(t):
        """Whether each token of each sequence matters for the first sequence's output at t."""
        cotangent = np.zeros_like(u)
        cotangent[0, t] = 1
        return np.max(np.abs(pulled(name)(params, u, cotangent)[1][1]), axis=-1)

    early, late = moved(PERIOD - 1), moved(PERIOD + 4)
    first = PERIOD // SHARD * SHARD - (LOCAL[name].conv - 1)
    assert np.all(early[0, :first] == 0) and np.all(early[0, first:PERIOD] > 1e-12)
    assert np.all(late[0, : PERIOD + 5] > 1e-12)
    for gradient, t in ((early, PERIOD - 1), (late, PERIOD + 4)):
        assert np.all(gradient[0, t + 1 :] == 0) and np.all(gradient[1] == 0)


def read_by_numpy(name, params, u):
    """Streams of the local mixer, its reads and queries, by head."""
    p, how = params["local"], dict(shard=SHARD)
    if name == "titans":
        streams = [silu(conv(u @ p[f"project_{n}"]["kernel"], p[f"conv_{n}"]["kernel"])) for n in "qkv"]
        q, k, v = map(units, streams)
        gates = [
            sigmoid(u @ p[f"gate_{n}"]["kernel"] + p[f"gate_{n}"]["bias"]).T for n in ("rate", "retention", "momentum")
        ]
        starts = [initial(p, "memory", i).swapaxes(1, 2) for i in (0, 1)]
        of_head = [
            references_tnt.local_titans(
                k[h], v[h], q[h], 0.7 * gates[0][h], gates[1][h], gates[2][h], [w[h] for w in starts], 4, **how
            )
            for h in range(HEADS)
        ]
        return (q, k, v), of_head
    x, (q, k, v) = units(u), (units(silu(conv(u, p[f"conv_{n}"]["kernel"]))) for n in "qkv")
    q, v = static(q, p["project_q"]["kernel"]), static(v, p["project_v"]["kernel"])
    decay = sigmoid(np.einsum("htk,hk->ht", x, p["momentum_kernel"]) + p["momentum_bias"][:, None])
    how |= dict(names=("k",), read="before", rate_max=2.0, retention=True, c_memory=4, c_projections=4)

    def head(h):
        start = {"k": [initial(p, "projections", 0)[h, 0].T]}
        start |= {n: [initial(p, "gates", 0)[h, b].T] for b, n in enumerate(("eta", "alpha"))}
        start["memory"] = [initial(p, "memory", i)[h].T for i in (0, 1)]
        rates = [p[f"log_rate_{n}"][h] for n in ("memory", "projections", "gates")]
        streams = dict(x=x[h], k=k[h], v=v[h], q=q[h], decay=decay[h])
        return references_tnt.local_self_modifying(
            streams, start, rates, (p["rate_bias"][h], p["retention_bias"][h]), **how
        )

    return (q, static(k, params["project_k"]["kernel"]), v), list(map(head, range(HEADS)))


def static(x, kernel):
    """A stream through a projection."""
    return units(np.moveaxis(x, 0, 1).reshape(T, WIDTH) @ kernel)


@rows
def test_the_layer_is_its_equations(x64, name):
    _, variables, inputs = drawn(name)
    y = whole(name)(variables, inputs)[0][1]
    params, u = jax.tree.map(np.asarray, variables["params"]), np.asarray(inputs[1])
    (q, k, v), of_head = read_by_numpy(name, params, u)
    local, asked = map(np.stack, zip(*of_head, strict=True))
    rate = 2.0 / PERIOD * sigmoid(u @ params["gate_rate"]["kernel"] + params["gate_rate"]["bias"]).T
    starts = [initial(params, "memory", i).swapaxes(1, 2) for i in (0, 1)]
    of_global = np.stack(
        [references_tnt.frozen(k[h], v[h], q[h], rate[h], [w[h] for w in starts], PERIOD) for h in range(HEADS)]
    )
    expected = answer_output(params["local"]["out"], u, q + asked, local + of_global - q - asked)
    np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-9)


def without_shards(config):
    """The mixer that reads a text as one, and asks with the queries as they are."""
    plain = dict(shard=None, project_queries=False)
    if isinstance(config, MemoryMixerConfig):
        return replace(config, rule=replace(config.rule, **plain))
    return replace(config, **plain)


def with_shard(config, shard):
    """The same with shards."""
    if isinstance(config, MemoryMixerConfig):
        return replace(config, rule=replace(config.rule, shard=shard))
    return replace(config, shard=shard)


@by_titans
def test_a_shard_as_long_as_the_text_changes_nothing(x64, name):
    plain, (_, params, u) = without_shards(LOCAL[name]), drawn(name)
    local = {"params": params["params"]["local"]}
    modules = [config.build(WIDTH, jnp.float64) for config in (plain, with_shard(plain, 2 * T))]
    ys = [jax.jit(functools.partial(module.apply, method=fresh))(local, u)[0] for module in modules]
    np.testing.assert_array_equal(*ys)


def steps(jaxpr):
    """Steps that a program takes one after another: those of its loops, inner ones times the outer ones'."""
    total = 0
    for equation in jaxpr.eqns:
        inside = sum(steps(inner) for inner in jaxprs_in_params(equation.params))
        if equation.primitive.name == "scan":
            inside = equation.params["length"] * max(1, inside)
        total += inside
    return total


@rows
def test_sequential_steps_are_those_of_one_shard(x64, name):
    params = drawn(name)[1]["params"]

    def counted(config, params):
        module, u = config.build(WIDTH, jnp.float64), jax.ShapeDtypeStruct((1, 72, WIDTH), jnp.float64)
        return steps(jax.make_jaxpr(functools.partial(module.apply, method=fresh))({"params": params}, u).jaxpr)

    assert counted(without_shards(LOCAL[name]), params["local"]) == 72 // 4
    assert counted(ROWS[name], params) == SHARD // 4 + 72 // PERIOD


def test_the_gates_of_local_memories_are_sown_where_those_of_every_mixer_are(x64):
    module, params, u = drawn("hope")
    call = functools.partial(module.apply, method=fresh, mutable=["intermediates"])
    sown = jax.eval_shape(call, params, u)[1]["intermediates"]
    assert {name: one.shape for name, (one,) in sown.items()} == dict.fromkeys(("rate", "retention"), (B, HEADS, T))


@rows
def test_names_of_axes_and_the_written_configuration_fit(x64, name):
    module, params, _ = drawn(name)
    names = of_parameters(module.axes(), len)(params["params"])
    assert jax.tree.leaves(names) == [x.ndim for x in jax.tree.leaves(params)]
    assert configs.from_json(configs.to_json(ROWS[name]), TNTConfig) == ROWS[name]


WRONG = {
    "shard is 6; expected a multiple of the anchor period, 4": lambda: replace(TITANS, shard=6),
    "shard is 0; give a whole number": lambda: replace(TITANS, shard=0),
    "shard is 10; expected a multiple of the anchor period, 4": lambda: with_shard(LOCAL["hope"], 10),
    "shard of the local memory is None": lambda: TNTConfig(without_shards(LOCAL["titans"])),
    "global_period is 0": lambda: replace(ROWS["titans"], global_period=0),
    "rate_max is -1": lambda: replace(ROWS["titans"], rate_max=-1.0),
    "3 heads do not divide": lambda: replace(ROWS["hope"], local=replace(LOCAL["hope"], heads=3)).build(8, "float32"),
    "persistent vectors would be forgotten": lambda: replace(LOCAL["titans"], persistent=2),
    "the memory's shard is 8; set it to None": lambda: TitansMAGConfig(AttentionConfig(HEADS), LOCAL["titans"]),
    "a frozen memory needs read='anchor'": lambda: scan_frozen(TITANS, (), (), 0),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_configuration_says_what_is_wrong(untyped, message):
    with pytest.raises(UserError, match=message):
        WRONG[message]()
