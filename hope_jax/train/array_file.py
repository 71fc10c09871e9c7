"""One tree of arrays in one folder, whole or not there, with digests: what a stream has learned, between sessions.

Written by orbax into a folder beside the final one, which it then replaces: a save that fails leaves the one before.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp

from hope_jax.errors import UserError
from hope_jax.train.digests import describe, digest_file, digest_files, kind, leaves, read_sealed, write_sealed

ABOUT = "about.json"


def save_arrays(path: Path, tree: Any, about: dict[str, Any]) -> None:
    """Write ``tree`` and the JSON ``about`` as folder ``path``; an older one there is replaced once all is written.

    Raises:
      UserError: ``path`` is something else, or it cannot be written.
    """
    path = path.absolute()
    if path.exists() and not (path / ABOUT).is_file():
        raise UserError(f"{path} is there and is no saved context; choose another place")
    part, old = path.with_name(path.name + ".part"), path.with_name(path.name + ".old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stray in (part, old):
            shutil.rmtree(stray, ignore_errors=True)
        ocp.save(str(part), tree)
        body = {"about": about, "arrays": describe(tree), "files": digest_files(part, ABOUT)}
        write_sealed(part / ABOUT, body)
        if path.exists():
            path.rename(old)
        part.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} could not be written ({error}); what was saved there before is untouched") from error


def load_arrays(path: Path, like: Callable[[dict[str, Any]], Any]) -> Any:
    """The tree of a folder, bit for bit as it was saved; ``like(about)`` gives shapes of the same structure.

    Raises:
      UserError: nothing is saved there, it is damaged, or its arrays are not those of ``like``.
    """
    path = path.absolute()
    try:
        body = read_sealed(path / ABOUT)
    except OSError as error:
        raise UserError(f"there is no saved context in {path} ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the context in {path} is damaged: {ABOUT} was altered") from error
    for name, digest in body["files"].items():
        if not (path / name).is_file() or digest_file(path / name) != digest:
            raise UserError(f"the context in {path} is damaged: {name} is missing or differs from its digest")
    shapes = like(body["about"])
    expected = {name: kind(leaf) for name, leaf in leaves(shapes)}
    found = {name: entry.rsplit(" ", 1)[0] for name, entry in body["arrays"].items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            there, here = found.get(name, "absent"), expected.get(name, "absent")
            raise UserError(f"the context in {path} is of another model: {name} is {there} there and {here} here")
    tree = ocp.load(str(path), shapes)
    for name, entry in describe(tree).items():
        if entry != body["arrays"][name]:
            raise UserError(f"the context in {path} is damaged: {name} differs from its digest")
    return tree
