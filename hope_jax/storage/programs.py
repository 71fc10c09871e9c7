"""Traced programs kept on disk: a second process neither traces nor compiles what a first one did.

JAX's compilation cache saves the compiling, but every process traces a program anew, which takes longer than reading a
document with it. Where that cache is on, ``run_stored`` keeps the traced program in the same folder, and
``stored_shapes`` what a trace is made for alone: the shapes of a result.
"""

import base64
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import export

from hope_jax.config import from_json, to_json
from hope_jax.errors import UserError
from hope_jax.storage import digests
from hope_jax.storage.digests import read_sealed, write_sealed

PACKAGES = ("jax", "jaxlib", "flax", "optax")
SETTINGS = ("enable_x64", "default_matmul_precision", "default_prng_impl", "threefry_partitionable")
"""What a traced program depends on, apart from our own source: packages, and settings of JAX."""


def keep_programs(folder: Path) -> None:
    """Compile once for all runs and processes, unless the environment says where compiled programs are kept."""
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute() / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # small programs add up


def run_stored(program: Callable[..., Any], model: Any, arrays: tuple[Any, ...], like: Any) -> Any:
    """``program(model, *arrays)``, by the traced program on disk if there is one.

    It is called directly where nothing can be stored: without a compilation cache, for a model that has no name or
    is made of code of other packages, on several devices, or without the package flatbuffers.

    Args:
      program: a compiled function at the top of a module of hope_jax whose first argument is static.
      model: its first argument, such as a ``LanguageModel``.
      arrays: the others, trees of arrays and numbers.
      like: any tree of the structure of the result.
    """
    place = _place(model)
    if place is None or not _can_store():  # before anything is done to the arrays: a call may read a single token
        return program(model, *arrays)
    leaves, tree = jax.tree.flatten(jax.tree.map(jnp.asarray, arrays))
    if any(len(leaf.devices()) > 1 for leaf in leaves):
        return program(model, *arrays)
    kinds = tuple(map(_kind, leaves))
    folder, config = place
    path = folder / f"traced-{_digest(program, model, config, tree, kinds)}.json"
    return jax.tree.unflatten(jax.tree.structure(like), _stored(path, program, model, tree, kinds)(*leaves))


def stored_shapes(make: Callable[..., Any], model: Any, *shapes: jax.ShapeDtypeStruct) -> Any:
    """The shapes of ``make(model, *arrays)``, a nested dict: from the disk where ``run_stored`` would store.

    ``make``: a function at the top of a module of hope_jax. ``shapes``: those of the arrays.
    """
    if (place := _place(model)) is None:
        return jax.eval_shape(functools.partial(make, model), *shapes)
    folder, config = place
    path = folder / f"shapes-{_digest(make, model, config, None, shapes)}.json"
    try:
        found = read_sealed(path)
    except (OSError, ValueError, KeyError, TypeError):
        made = digests.leaves(jax.eval_shape(functools.partial(make, model), *shapes))
        found = {name: [leaf.dtype.name, *leaf.shape] for name, leaf in made}
        _keep(path, found)
    flat = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (dtype, *shape) in found.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def _place(model: Any) -> tuple[Path, str] | None:
    """Where programs of a model are kept, and its configuration as text; None where they are not."""
    folder = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if folder is None or not type(model).__module__.startswith("hope_jax."):
        return None
    config = _named(model.config)
    return None if config is None else (Path(folder), config)


def _keep(path: Path, body: Any) -> None:
    """Write it, unless the disk is full or read-only, or another process writes the same."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_sealed(path, body)


def _kind(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    """What the program depends on; not the mesh that an array was made on."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=jax.typeof(leaf).weak_type)


def _digest(program: Callable[..., Any], model: Any, config: str, tree: Any, kinds: Iterable[Any]) -> str:
    """What tells the traced program from all others."""
    about = {
        "program": f"{program.__module__}:{program.__qualname__}",
        "model": [type(model).__qualname__, config],
        "arrays": list(map(str, kinds)),
        "tree": str(tree),
        "machine": _machine(),
    }
    return digests.digest_json(about)


@functools.lru_cache
def _named(config: Any) -> str | None:
    """The configuration as text; None where it names what this package does not define."""
    try:
        from_json(data := to_json(config))
    except UserError:
        return None
    return json.dumps(data)


@functools.cache
def _can_store() -> bool:
    return importlib.util.find_spec("flatbuffers") is not None


def _machine() -> list[str]:
    """What else the traced program depends on."""
    return [jax.default_backend(), _source(), *(str(getattr(jax.config, f"jax_{name}", None)) for name in SETTINGS)]


@functools.cache
def _source() -> str:
    """Digest of the package's source and of the versions of ``PACKAGES``."""
    known = hashlib.sha256("".join(map(importlib.metadata.version, PACKAGES)).encode())
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        known.update(file.read_bytes())
    return known.hexdigest()


@functools.lru_cache
def _stored(path: Path, program: Callable[..., Any], model: Any, tree: Any, kinds: tuple[Any, ...]) -> Any:
    """The program on flat arrays: from the file, or traced and written there. An unreadable file is written anew."""

    def flat(*leaves: Any) -> list[Any]:
        return jax.tree.leaves(program(model, *jax.tree.unflatten(tree, leaves)))

    try:
        data = base64.b64decode(read_sealed(path)["program"])
    except (OSError, ValueError, KeyError, TypeError):
        data = export.export(jax.jit(flat))(*kinds).serialize()
        _keep(path, {"program": base64.b64encode(data).decode()})
    return jax.jit(export.deserialize(bytearray(data)).call)
