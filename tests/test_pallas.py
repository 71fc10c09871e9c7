"""The kernel of a loop over chunks: the numbers and derivatives of ``lax.scan``, whatever runs inside it."""

import contextlib
import functools
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from jax import lax
from test_recurrence import ALL, draw, outputs
from test_self_modifying import config_of, draw_head

from hope_jax import train as training
from hope_jax.errors import UserError
from hope_jax.levels import Level
from hope_jax.memory.catalogue import RULES
from hope_jax.memory.kernels import pallas
from hope_jax.memory.kernels.plan import Plan
from hope_jax.memory.self_modifying import scan
from hope_jax.models import ARCHITECTURES, Size, with_impl, with_in_context
from hope_jax.nn.heads import over_heads
from hope_jax.nn.mixers.memory import MemoryMixerConfig
from hope_jax.nn.mixers.self_modifying import SelfModifyingConfig
from hope_jax.train import MeshConfig, OptimizerConfig, TextRun, text_setup
from hope_jax.train.kernels import count_kernels, evaluated
from hope_jax.train.sharding import model_on

NEAR = dict(rtol=1e-9, atol=1e-9)
PLATFORMS = 2  # a kernel stands in a program twice, compiled and interpreted


def value_and_gradients(function, *given):
    """Everything that comes out, and the gradients of a sum of sines of it."""

    def total(*given):
        out = [x for x in jax.tree.leaves(function(*given)) if x is not None]
        return sum(jnp.sum(jnp.sin(x)) for x in out), out

    (_, out), gradients = jax.value_and_grad(total, range(len(given)), has_aux=True)(*given)
    return out, gradients


def toy(loop, held, state, chunks):
    """A loop whose step holds a number, a vector and a matrix."""
    scale, offset, mixing = held

    def step(state, chunk):
        x, gate = chunk
        state = jnp.tanh(scale * state @ mixing + offset[None] + x.T @ (gate[:, None] * x))
        return state, (x @ state, gate * jnp.sum(state))

    return loop(step, state, chunks)


def toy_inputs(chunks, *copies):
    rng = np.random.default_rng(0)
    held = rng.normal(), rng.normal(size=3), 0.5 * rng.normal(size=(3, 3))
    tokens = rng.normal(size=(*copies, chunks, 4, 3)), rng.normal(size=(*copies, chunks, 4))
    return jax.tree.map(np.asarray, (held, rng.normal(size=(*copies, 3, 3)), tokens))


# A state is saved for 1; for 6 and 5; for 6 and 6, which the recurrence has, too.
@pytest.mark.parametrize("chunks", [1, 11, pytest.param(12, marks=pytest.mark.slow)])
def test_a_loop_with_shared_arrays_over_heads_of_sequences(x64, chunks):
    held, state, tokens = toy_inputs(chunks, 2, 3)
    shared = jax.tree.map(lambda x: np.stack([x, 2 * x, -x]), held)  # of the heads

    @functools.partial(jax.jit, static_argnums=0)
    def run(loop):
        heads = jax.vmap(functools.partial(toy, loop))
        return value_and_gradients(jax.vmap(heads, in_axes=(None, 0, 0)), shared, state, tokens)

    chex.assert_trees_all_close(run(pallas.scan), run(lax.scan), **NEAR)


@pytest.mark.parametrize("order", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_devices_share_sequences_and_heads(x64, order):
    """A kernel on a mesh, with an array from outside: the numbers of one device, two orders of derivatives."""
    held, state, tokens = toy_inputs(2, 4, 2)
    shared = jax.tree.map(lambda x: np.stack([x, -x]), held)
    auto = dict(axis_types=(jax.sharding.AxisType.Auto,) * 3)

    def run(scale, shared, state, tokens):
        def head(held, state, tokens):
            return toy(pallas.scan, (scale * held[0], *held[1:]), state, tokens)

        return over_heads(head, (shared,), (state, tokens), "pallas")

    def differentiated(*given):
        first = functools.partial(value_and_gradients, run)
        return first(*given) if order == 1 else value_and_gradients(lambda *given: first(*given)[1], *given)

    given = np.float64(1.5), shared, state, tokens
    expected = jax.jit(differentiated)(*given)
    with jax.set_mesh(jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), **auto)):
        chex.assert_trees_all_close(jax.jit(differentiated)(*given), expected, **NEAR)
        for batch, along in ((4, "('data', 'fsdp')"), (3, "None")):
            own = jax.tree.map(lambda x, batch=batch: x[:batch], given[2:])
            program = str(jax.make_jaxpr(run)(*given[:2], *own)).replace("('tensor',)", "'tensor'")
            assert f"out_specs=(P({along}, 'tensor'), " in program


@pytest.mark.parametrize(
    ("name", "length", "more", "said"),
    [
        ("titans", 48, {}, None),
        ("titans", 40, {}, "40 tokens are no whole periods of the memories"),
        pytest.param("titans_mag", 40, {}, "40 tokens are no whole periods", marks=pytest.mark.slow),
        ("titans", 32, {"remat_every": 16}, "-every 16 reads a sequence in pieces"),
        pytest.param("hope", 32, {"levels": (8, 16)}, "context read a sequence in pieces", marks=pytest.mark.slow),
        ("transformer_pp", 32, {}, "impl is 'pallas', of memories; the mixers are AttentionConfig"),
    ],
)
def test_a_kernel_that_is_asked_for_runs_or_is_refused(name, length, more, said):
    model, remat_every = ARCHITECTURES[name](Size(16, 1, 2, 16, 64, (Level(16), Level(32)))), more.get("remat_every")
    model = with_in_context(model, more["levels"]) if "levels" in more else model
    run = TextRun(model, OptimizerConfig(), 2, length, 0, "", "")
    expected = contextlib.nullcontext() if said is None else pytest.raises(UserError, match=said)
    with expected:
        text_setup(run, 1, np.ones(16), remat_every=remat_every, impl="pallas")


def test_what_runs_the_memories_is_told():
    hybrid = with_impl(ARCHITECTURES["titans_mag"](Size(16, 1, 2, 16, 64, ())), "pallas")
    assert evaluated(hybrid, "tpu") == "one kernel over all chunks"
    assert evaluated(hybrid, "cpu") == "one kernel over all chunks, interpreted on cpu, which is slow"
    assert evaluated(with_impl(hybrid, "auto"), "tpu") == "a loop over chunks"  # until a kernel has run on a TPU
    narrow = with_impl(hybrid, "pallas_bfloat16_3x")
    assert evaluated(narrow, "tpu") == "one kernel over all chunks in three passes of bfloat16"
    assert evaluated(ARCHITECTURES["transformer_pp"](Size(16, 1, 2, 16, 64, ())), "tpu") == "none"


def test_a_model_on_a_mesh_runs_its_kernels_on_each_device_alone():
    """Where nobody but the model says which mesh it is."""
    config = with_impl(ARCHITECTURES["titans"](Size(16, 1, 2, 16, 64, ())), "pallas")
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    for mesh, parted in ((MeshConfig(2).make(2), True), (None, False)):
        model = model_on(mesh, config)
        given = training.abstract_params(model), tokens
        program = str(
            jax.make_jaxpr(lambda params, tokens, model=model: model.apply({"params": params}, tokens))(*given)
        )
        assert "pallas_call[" in program and ("shard_map[" in program) == parted


@pytest.mark.parametrize(("size", "chunks", "every"), [(64, 127, 8), (64, 9, 5), (512, 128, 6), (2048, 7, 1)])
def test_few_states_are_saved_whatever_the_number_of_chunks(size, chunks, every):
    state, tokens = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((size, size), (16, size)))
    plan = Plan(len, (), state, tokens, tokens, chunks)
    assert (plan.save_every, plan.groups) == (every, -(-chunks // every))


def kernels_in(function, *given):
    """How often a program starts a kernel."""
    return count_kernels(jax.make_jaxpr(function)(*given).jaxpr)


def test_arrays_from_outside_may_be_constants_and_a_loop_may_run_without_jit(x64):
    mixing, (state, (x, _)) = np.eye(3) + 0.1, toy_inputs(2)[1:]

    state, x = jnp.asarray(state), jnp.asarray(x)

    def run(loop):
        return loop(lambda state, x: (jnp.tanh(state @ mixing + x.T @ x), x @ state), state, x)

    chex.assert_trees_all_close(run(pallas.scan), run(lax.scan), **NEAR)


def test_a_gradient_through_an_inner_gradient_step(x64):
    def after_a_step(loop, held, state, tokens):
        def loss(state):
            return jnp.sum(jnp.sin(toy(loop, held, state, tokens)[1][0]))

        return loss(state - 0.1 * jax.grad(loss)(state))

    @functools.partial(jax.jit, static_argnums=0)
    def run(loop):
        return jax.grad(functools.partial(after_a_step, loop), (0, 1, 2))(*toy_inputs(3))

    chex.assert_trees_all_close(run(pallas.scan), run(lax.scan), **NEAR)


def test_arrays_without_a_place_are_refused():
    ((_, _, mixing), _, (x, gate)), numbers = jax.tree.map(jnp.asarray, toy_inputs(2)), jnp.arange(3)[None]
    with pytest.raises(UserError, match=r"state of shape \(3,\); expected two axes"):
        pallas.scan(lambda state, chunk: (state, chunk), mixing[0], x)
    with pytest.raises(UserError, match=r"tokens of shape \(1, 4, 3\); expected numbers"):
        pallas.scan(lambda state, chunk: (state, None), mixing, x[:, None])
    with pytest.raises(UserError, match="uses an array of int32; expected floats"):
        pallas.scan(lambda state, chunk: (state * numbers, chunk), mixing, gate)
    with pytest.raises(UserError, match="needs one period, but c_memory=16 and c_projections=4"):
        SelfModifyingConfig(1, c_projections=4, impl="pallas")
    with pytest.raises(UserError, match=r"tokens of shape \(\); expected numbers"):
        pallas.scan(lambda state, chunk: (state, chunk.sum()), mixing, gate)


@pytest.mark.parametrize(
    ("features", "read", "narrow"),
    [
        pytest.param(ALL, "before", "", id="all"),
        pytest.param(frozenset(), "after", "", id="none"),
        pytest.param(frozenset({"erase"}), "after", "_bfloat16_3x", id="narrow", marks=pytest.mark.slow),
    ],
)
def test_the_recurrence_is_its_definition(x64, features, read, narrow):
    """With narrow products: the loop of the same products."""
    inputs = draw(features, 46)  # 12 blocks, the last is short

    @functools.partial(jax.jit, static_argnums=0)
    def run(impl):
        return value_and_gradients(lambda x: outputs(x, impl=impl, read=read, block=4), inputs)

    expected = run("chunked" + narrow if narrow else "sequential")
    chex.assert_trees_all_close(run("pallas" + narrow), expected, **NEAR)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(dict(c_memory=4, hidden=1), id="all memories"),
        pytest.param(
            dict(c_memory=4, momentum="none", retain_to="init", inner_projection=()),
            marks=pytest.mark.slow,
            id="few memories",
        ),
    ],
)
def test_a_self_modifying_head_is_that_of_the_loop(x64, row):
    config = config_of(row)
    _, (initial, tuning, streams) = draw_head(config)
    streams = jax.tree.map(lambda x: x[:16], streams)

    @functools.partial(jax.jit, static_argnums=0)
    def run(impl):
        def head(initial, tuning, streams):
            fast = config.spec().start(initial)
            return scan(config.spec(), initial, tuning, fast, streams, np.zeros((), int), impl)

        return value_and_gradients(head, initial, tuning, streams)

    assert (kernels_in(lambda: run("pallas")), kernels_in(lambda: run("chunked"))) == (2 * PLATFORMS, 0)
    chex.assert_trees_all_close(run("pallas"), run("chunked"), **NEAR)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["titans", "deltanet"])
def test_a_kernel_holds_no_other_kernel(rule):
    """Where a period is longer than a block of the recurrence."""
    mixer = MemoryMixerConfig(heads=2, rule=replace(RULES[rule], period=64), impl="pallas").build(8, jnp.float32)

    def read(mixer, u):
        return mixer(u, mixer.init_state(*u.shape[:2]))[0]

    u = jax.ShapeDtypeStruct((1, 128, 8), jnp.float32)
    params = jax.eval_shape(functools.partial(mixer.init, method=read), jax.random.key(0), u)
    assert kernels_in(lambda params, u: mixer.apply(params, u, method=read), params, u) == PLATFORMS


@pytest.mark.slow
def test_retention_by_channel_is_its_definition(x64):
    """RWKV-7's recurrence."""
    inputs = jax.tree.map(jnp.asarray, draw(frozenset(), 21))
    inputs["retention"] = jnp.asarray(np.random.default_rng(3).uniform(0.1, 1, inputs["keys"].shape))

    @functools.partial(jax.jit, static_argnums=0)
    def run(impl):
        return value_and_gradients(lambda x: outputs(x, impl=impl, read="after", block=4), inputs)

    chex.assert_trees_all_close(run("pallas"), run("sequential"), **NEAR)


def test_a_mixer_with_an_mlp_memory_is_that_of_the_loop(x64):
    config, u = (
        MemoryMixerConfig(heads=2, rule=RULES["titans"], conv=1),
        np.random.default_rng(0).normal(size=(2, 32, 8)),
    )

    def read(mixer, u):
        return mixer(u, mixer.init_state(*u.shape[:2]))[0]

    params = drawn(functools.partial(config.build(8, jnp.float64).init, method=read), u[:, :1])

    @functools.partial(jax.jit, static_argnums=0)
    def run(impl):
        mixer = replace(config, impl=impl).build(8, jnp.float64)
        return value_and_gradients(lambda params, u: mixer.apply({"params": params}, u, method=read), params, u)

    assert (kernels_in(lambda: run("pallas")), kernels_in(lambda: run("chunked"))) == (2 * PLATFORMS, 0)
    chex.assert_trees_all_close(run("pallas"), run("chunked"), **NEAR)
