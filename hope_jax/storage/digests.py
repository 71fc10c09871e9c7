"""What is on the disk is what was written: digests of arrays and of files, and JSON that carries its own."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np


def leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """Path and array of every leaf."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def kind(leaf: Any) -> str:
    """Dtype and shape of an array, as text."""
    return f"{leaf.dtype}{list(leaf.shape)}"


def kinds(tree: Any) -> dict[str, str]:
    """Path -> dtype and shape of each array."""
    return {path: kind(leaf) for path, leaf in leaves(tree)}


def first_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first name, in order, with two values, and the values ("absent" where there is none); None: all agree."""
    for name in sorted(there.keys() | here.keys()):
        pair = there.get(name, "absent"), here.get(name, "absent")
        if pair[0] != pair[1]:
            return name, *pair
    return None


def describe(state: Any) -> dict[str, str]:
    """Path -> dtype, shape and digest of each array; one array at a time on the host."""
    return {path: f"{kind(leaf)} {digest(np.asarray(leaf).tobytes())}" for path, leaf in leaves(state)}


def digest_arrays(tree: Any) -> str:
    """Digest of the names, dtypes, shapes and values of all arrays together."""
    return digest_json(describe(tree))


def changed_file(folder: Path, files: Mapping[str, str]) -> str | None:
    """The first of ``files`` (see ``digest_files``) that has another digest or none; None: there is none."""
    return next((name for name, expected in files.items() if _digest_or_none(folder / name) != expected), None)


def _digest_or_none(path: Path) -> str | None:
    try:
        return digest_file(path)
    except OSError:  # it is missing, or its place on the disk is damaged
        return None


def digest_files(folder: Path, skip: str) -> dict[str, str]:
    """Path -> digest of every file below ``folder`` whose name does not start with ``skip``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(skip))
    return {str(path.relative_to(folder)): digest_file(path) for path in files}


def digest_file(path: Path) -> str:
    """Digest of the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(data: bytes) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digest_json(body: Mapping[str, Any]) -> str:
    """Digest of JSON with sorted keys: equal for equal contents."""
    return digest(json.dumps(body, sort_keys=True).encode())


def sealed(body: Mapping[str, Any]) -> str:
    """JSON of ``body`` with its digest."""
    return json.dumps({"digest": digest_json(body), "body": body})


def unsealed(text: str) -> Any:
    """What ``sealed`` was given. Raises ValueError, KeyError or TypeError for anything else."""
    body = json.loads(text)["body"]
    if sealed(body) != text:
        raise ValueError("digest")
    return body


def write_sealed(path: Path, body: Mapping[str, Any]) -> None:
    """Write ``sealed`` JSON as a file."""
    write_file(path, sealed(body).encode())


def read_sealed(path: Path) -> Any:
    """What ``write_sealed`` wrote. Raises OSError, ValueError, KeyError or TypeError for anything else."""
    return unsealed(path.read_text())


def write_file(path: Path, data: bytes, check: Callable[[Path], Any] | None = None) -> None:
    """Write a file that is on the disk, and has passed ``check``, before it gets its name and replaces an older one."""
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if check is not None:
        check(part)
    os.replace(part, path)
