"""One tree of arrays in one folder, whole or not there, with digests: what a stream has learned, between sessions.

Written by orbax into a folder beside the final one, which it then replaces: a save that fails leaves the one before.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from hope_jax.errors import UserError
from hope_jax.storage.digests import (
    changed_array,
    changed_file,
    describe,
    described_kinds,
    digest_files,
    first_difference,
    kinds,
    read_sealed,
    write_sealed,
)

ABOUT = "about.json"


def _older(path: Path) -> Path:
    """Where what is replaced waits until its successor has its name."""
    return path.with_name(f".{path.name}.older-context")


def is_saved(path: Path) -> bool:
    """Whether ``load_arrays`` finds something there, be it what a save that was stopped was about to replace."""
    return path.exists() or _older(path.absolute()).exists()


def _filled(tree: Any) -> dict[str, Any]:
    """The leaves by number, without the empty ones, which orbax does not write."""
    return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(tree)) if leaf.size}


def empty_part(path: Path) -> Path:
    """An empty folder beside ``path``, for what will replace it.

    Raises:
      UserError: ``path`` is something else, or nothing can be written there.
    """
    path = path.absolute()
    if path.exists() and not (path / ABOUT).is_file():
        raise UserError(f"{path} is there and is no saved context; choose another place")
    part = path.with_name(f".{path.name}.unfinished-context")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}); choose another place") from error
    return part


def save_arrays(path: Path, tree: Any, about: dict[str, Any]) -> None:
    """Write ``tree`` and the JSON ``about`` as folder ``path``; an older one there is replaced once all is written.

    Raises:
      UserError: ``path`` is something else, or it cannot be written.
    """
    path = path.absolute()
    part, old = empty_part(path), _older(path)
    try:
        part.rmdir()
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        ocp.save(str(part), _filled(tree))
        body = {"about": about, "arrays": describe(tree), "files": digest_files(part, ABOUT)}
        write_sealed(part / ABOUT, body)
        if path.exists():
            path.rename(old)  # found by load_arrays, should the next line not be reached
        part.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} could not be written ({error}); what was saved there before is untouched") from error


def another_model(path: Path, different: tuple[str, Any, Any]) -> UserError:
    """What is said of a context whose ``first_difference`` from what is expected is this."""
    name, there, here = different
    return UserError(f"the context in {path} is of another model: {name} is {there} there and {here} here")


def read_about(path: Path) -> dict[str, Any]:
    """The ``about`` that was saved. Raises UserError where nothing is saved or it is damaged."""
    return _body(_found(path))["about"]


def _found(path: Path) -> Path:
    path = path.absolute()
    return path if path.exists() or not _older(path).exists() else _older(path)


def _body(path: Path) -> dict[str, Any]:
    try:
        return read_sealed(path / ABOUT)
    except OSError as error:
        raise UserError(f"there is no saved context in {path} ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the context in {path} is damaged: {ABOUT} was altered") from error


def load_arrays(path: Path, like: Callable[[dict[str, Any]], Any]) -> Any:
    """The tree of a folder, bit for bit as it was saved; ``like(about)`` gives shapes of the same structure.

    Raises:
      UserError: nothing is saved there, it is damaged, or its arrays are not those of ``like``.
    """
    path = _found(path)
    body = _body(path)
    if name := changed_file(path, body["files"]):
        raise UserError(f"the context in {path} is damaged: {name} is missing or differs from its digest")
    shapes = like(body["about"])
    if different := first_difference(described_kinds(body["arrays"]), kinds(shapes)):
        raise another_model(path, different)
    loaded = ocp.load(str(path), _filled(shapes))
    flat, structure = jax.tree.flatten(shapes)
    tree = structure.unflatten(
        loaded[str(i)] if leaf.size else jnp.zeros(leaf.shape, leaf.dtype) for i, leaf in enumerate(flat)
    )
    if name := changed_array(tree, body["arrays"]):
        raise UserError(f"the context in {path} is damaged: {name} differs from its digest")
    return tree
