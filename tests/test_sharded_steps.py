"""One training step on meshes of eight devices is the step on one device: every architecture is tried."""

import functools
import itertools
from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import drawn
from jax.tree_util import keystr, tree_leaves_with_path

from hope_jax import train as training
from hope_jax.levels import Level
from hope_jax.models import ARCHITECTURES, LanguageModel, Size, with_impl, with_in_context
from hope_jax.nn.mixers.attention import AttentionConfig
from hope_jax.nn.mixers.gated_deltanet import GatedDeltaNetConfig
from hope_jax.nn.mixers.mamba2 import Mamba2Config
from hope_jax.nn.mixers.retnet import RetNetConfig
from hope_jax.nn.mixers.rwkv7 import RWKV7Config
from hope_jax.train.mesh import MeshConfig
from hope_jax.train.sharding import model_on
from hope_jax.train.work import work

VOCAB, B, T = 48, 8, 64  # several chunks of every memory
SIZE = Size(width=32, layers=2, heads=4, vocab_size=VOCAB, context=64, levels=(Level(16), Level(32)))
# Mixers whose published form has one head at this width, with four.
SEVERAL_HEADS: dict[Any, dict[str, int]] = {
    GatedDeltaNetConfig: dict(heads=4, key_size=8, value_size=8),
    Mamba2Config: dict(head_size=16, state=8),  # all heads share their keys
    RetNetConfig: dict(heads=4),
    RWKV7Config: dict(head_dim=8),
}


def small(name):
    """A row at ``SIZE``, of four heads."""
    config = ARCHITECTURES[name](SIZE)
    mixers = tuple(replace(mixer, **SEVERAL_HEADS.get(type(mixer), {})) for mixer, _ in config.pattern)
    return replace(config, mixer=mixers if isinstance(config.mixer, tuple) else mixers[0])


MODELS = {name: small(name) for name in ARCHITECTURES}
MODELS["kernels"] = with_impl(MODELS["hope"], "pallas")
MODELS["levels in context"] = with_in_context(MODELS["hope_attention"], (4, 8))
for count in (1, 2):  # heads of keys and values, fewer than devices that share heads
    attention = AttentionConfig(4, key_heads=count, persistent=2)
    MODELS[f"key heads {count}"] = replace(MODELS["transformer_pp"], mixer=attention)
MODELS["odd vocabulary"] = replace(MODELS["transformer_pp"], vocab_size=VOCAB - 1, tied=False)
MESHES = {"all": MeshConfig(2, 2, 2), "fsdp": MeshConfig(1, 8), "tensor": MeshConfig(4, 1, 2)}
MESHES["sequence"] = MeshConfig(1, 2, 2, 2)
EVERYWHERE = ("transformer_pp", "hope", "titans", "gated_deltanet", "kernels", "levels in context")
RECURRENT = ("gated_deltanet", "hope", "titans", "mamba2", "lstm", "srwm")
ALONG_TIME = {*EVERYWHERE, *RECURRENT, "hope_tnt", "memory_caching", "transformer_conv", "samba"}
ALONG_TIME |= {"key heads 1", "key heads 2"}
WHERE = {"all": tuple(MODELS), "fsdp": EVERYWHERE, "tensor": EVERYWHERE, "sequence": tuple(sorted(ALONG_TIME))}
FAST = ("transformer_pp", "all"), ("gated_deltanet", "sequence")
# Of absolute differences. Moneta's gradient, up to 143, moves by 5e-8 where the parameters move by 1e-15 of themselves.
CLOSE = dict.fromkeys(MODELS, 1e-11) | {"moneta": 1e-7}


def rows(pairs):
    """Parameters of a test, slow but for those that are ``FAST``."""
    return [pytest.param(*pair, marks=[] if pair in FAST else pytest.mark.slow) for pair in pairs]


@functools.cache
def step_of(name, mesh, remat=False, remat_every=None, accumulate=1, remat_states="exact"):
    """State and metrics after one step of gradient descent with momentum, and the text of the program."""
    config = replace(MODELS[name], dtype=jnp.float64)
    batch = np.random.default_rng(0).integers(0, config.vocab_size, (B, T + 1)).astype(np.int32)
    params = drawn(LanguageModel(config).init, batch[:, :1], spread=0.18, retention_bias=4.0)
    mesh = None if mesh is None else MESHES[mesh].make(B)
    model = model_on(mesh, config, remat, remat_states)
    loss = training.next_token_loss(model, np.ones(config.vocab_size), remat_every)
    how: dict[str, Any] = {"mesh": mesh, "axes": model.axes(), "accumulate": accumulate}
    init = functools.partial(training.init_params, model)
    setup = training.Setup(init, loss, optax.sgd(1.0, 0.9), lambda step: 1.0, **how)
    state, batch = setup.start(0, params), setup.place(batch)
    quick = {"xla_backend_optimization_level": 0}  # to compile
    program = cast(Any, setup.step).lower(state, batch).compile(quick)
    return *program(state, batch), str(program.as_text())


@pytest.mark.parametrize(
    ("name", "mesh"),
    rows([(name, mesh) for mesh, names in WHERE.items() for name in names]),
)
def test_a_step_on_a_mesh_is_the_step_on_one_device(x64, name, mesh):
    expected = jax.device_get(step_of(name, None)[:2])
    state, metrics, _ = step_of(name, mesh)
    found = jax.device_get((state, metrics))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=CLOSE[name]), found, expected)
    for (path, leaf), moment in zip(tree_leaves_with_path(state.params), jax.tree.leaves(state.opt_state), strict=True):
        assert leaf.sharding.is_equivalent_to(moment.sharding, leaf.ndim), keystr(path)
    leaves = tree_leaves_with_path(state.params["blocks"])
    kernels = [leaf for path, leaf in leaves if "feed_forward" in keystr(path) and leaf.ndim == 3]
    parts = [leaf.size // leaf.addressable_shards[0].data.size for leaf in kernels or jax.tree.leaves(state.params)]
    assert max(parts) == MESHES[mesh].fsdp * MESHES[mesh].tensor


@pytest.mark.slow
@pytest.mark.parametrize("name", ["key heads 1", "gated_deltanet", "hope"])
@pytest.mark.parametrize(
    "how", [{"remat": True}, {"remat_every": 32}, {"accumulate": 2}], ids=lambda how: next(iter(how))
)
def test_what_saves_memory_changes_no_number_where_devices_share_tokens(x64, name, how):
    expected, found = jax.device_get(step_of(name, None)[:2]), jax.device_get(step_of(name, "sequence", **how)[:2])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hope", "titans"])
@pytest.mark.parametrize("how", [{}, {"remat": True}], ids=["none", "block"])
def test_rounded_states_give_on_a_mesh_what_they_give_on_one_device(x64, name, how):
    expected = jax.device_get(step_of(name, None, remat_states="bfloat16")[:2])
    for mesh in ("all", "sequence"):
        found = jax.device_get(step_of(name, mesh, remat_states="bfloat16", **how)[:2])
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-8), found, expected)
    exact = jax.tree.leaves(jax.device_get(step_of(name, None)[0].params))
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(expected[0].params), exact, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformer_pp", "gated_deltanet", "titans"])
def test_no_head_is_gathered(x64, name):
    assert "all-gather" not in step_of(name, "tensor")[2]


@pytest.mark.parametrize(("name", "mesh"), rows(itertools.product(RECURRENT, MESHES)))
def test_devices_exchange_nothing_between_two_chunks_of_a_memory(x64, name, mesh):
    """Nor between two tokens of a mixer without chunks; what heads start from is gathered before the loop over time."""
    done = work(step_of(name, mesh)[2])
    assert done.rounds > 2 * 2 * SIZE.layers  # besides those over the layers, forward and back
    assert done.looped and not done.nested
