"""Traced programs on disk: the same numbers as without, traced once for all processes, anew where something differs."""

import functools
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.levels import Level
from hope_jax.storage import programs
from hope_jax.storage.programs import run_stored, stored_shapes

TRACES = []
"""Models that ``program`` was traced for."""


@dataclass(frozen=True)
class Model:
    """A model of the package, as its name says."""

    config: object
    __module__ = "hope_jax.tests"


@functools.partial(jax.jit, static_argnums=0)
def program(model, tree, count):
    """Some numbers; the state has the structure of ``tree``."""
    TRACES.append(model)
    return jnp.sum(tree["x"]) * count, jax.tree.map(lambda x: x + model.config.period, tree)


@pytest.fixture
def folder(tmp_path):
    """A compilation cache of the test's own, and none of its programs in memory."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    another_process()
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


def another_process():
    """Nothing is in memory; what is found lies on the disk."""
    TRACES.clear()
    program.clear_cache()
    programs._stored.cache_clear()


def called(period=3, size=4, count=5, model=None):
    """The result of one call, checked."""
    tree = {"x": jnp.arange(size, dtype=jnp.float32), "y": (jnp.ones(2),)}
    total, after = run_stored(program, model or Model(Level(period)), (tree, count), (0, tree))
    assert total == count * size * (size - 1) / 2
    np.testing.assert_array_equal(after["x"], np.arange(size) + period)
    np.testing.assert_array_equal(after["y"][0], [1 + period] * 2)
    return len(TRACES)


def files(folder):
    """The traced programs there."""
    return sorted(folder.glob("traced-*"))


def test_a_second_process_does_not_trace(folder):
    assert called() == 1 and len(files(folder)) == 1
    assert called(count=7) == 1
    another_process()
    assert called() == 0 and len(files(folder)) == 1


def test_another_model_or_shape_is_another_program(folder):
    called()
    for change in ({"period": 4}, {"size": 5}):
        another_process()
        assert called(**change) == 1
    assert len(files(folder)) == 3


@pytest.mark.parametrize("damage", [b"", b"{}", b"half"])
def test_a_damaged_file_is_written_anew(folder, damage):
    called()
    (file,) = files(folder)
    good = file.read_bytes()
    file.write_bytes(good[: len(good) // 2] if damage == b"half" else damage)
    another_process()
    assert called() == 1
    another_process()
    assert called() == 0


def test_changed_source_is_another_program(folder, monkeypatch):
    called()
    another_process()
    monkeypatch.setattr(programs, "_source", lambda: "another version")
    assert called() == 1 and len(files(folder)) == 2


@pytest.mark.parametrize("setting", [lambda: jax.enable_x64(True), lambda: jax.threefry_partitionable(False)])
def test_float64_and_another_way_to_draw_numbers_are_other_programs(folder, setting):
    called()
    another_process()
    with setting():
        assert called() == 1 and len(files(folder)) == 2


def test_an_array_from_a_mesh_on_one_device_fits_the_program(folder):
    tree = {"x": jnp.arange(4.0), "y": (jnp.ones(2),)}
    mesh = jax.sharding.NamedSharding(jax.make_mesh((2,), ("data",)), jax.sharding.PartitionSpec())
    shared = jax.device_put(tree, mesh)
    for arrays in (jax.device_put(shared, jax.devices()[0]), tree, shared):  # the last one is not stored
        total, _ = run_stored(program, Model(Level(3)), (arrays, 2), (0, tree))
        assert total == 12
    assert len(files(folder)) == 1 and len(TRACES) == 2


@dataclass(frozen=True)
class Foreign:
    """Not of the package: its source may change without notice."""

    period: int = 3


class ForeignModel(Model):
    """Neither."""

    __module__ = "tests"


@pytest.mark.parametrize("model", [Model(Foreign()), ForeignModel(Level(3))])
def test_what_the_package_does_not_define_is_not_stored(folder, model):
    assert called(model=model) == 1
    assert not files(folder)


def test_nothing_is_stored_without_flatbuffers_or_a_cache(folder, monkeypatch):
    monkeypatch.setattr(programs, "_can_store", lambda: False)
    assert called() == 1 and not files(folder)
    monkeypatch.undo()
    jax.config.update("jax_compilation_cache_dir", None)
    assert called() == 1 and not Path("None").exists()


def parameters(model, scale):
    """Some arrays of a model."""
    TRACES.append(model)
    size = model.config.period
    return {"blocks": {"kernel": jnp.zeros((2, size)), "count": jnp.zeros((), jnp.int8)}, "scale": scale}


def test_shapes_are_found_on_the_disk_and_made_anew_where_something_differs(folder, monkeypatch):
    def made(period=3, module="hope_jax.tests", size=5):
        TRACES.clear()
        monkeypatch.setattr(Model, "__module__", module)
        scale = jax.ShapeDtypeStruct((size,), jnp.bfloat16)
        shapes = stored_shapes(parameters, model := Model(Level(period)), scale)
        count = len(TRACES)
        assert shapes == jax.eval_shape(functools.partial(parameters, model), scale)
        return count

    assert made() == 1 and made() == 0
    assert made(size=6) == 1
    assert made(period=4) == 1 and made(period=4) == 0
    for file in folder.glob("shapes-*"):
        file.write_bytes(file.read_bytes()[:-9])
    assert made() == 1 and made() == 0
    assert made(module="tests") == 1
    monkeypatch.setattr(programs, "_source", lambda: "another version")
    assert made() == 1
