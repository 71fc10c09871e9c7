"""One portable file of named tensors: safetensors, with a sealed JSON header in its metadata.

The metadata has one entry, ``hope_jax`` (the library orders several at random, and equal contents are equal files):
JSON ``{"body": {"about": ..., "tensors": {name: dtype, shape and digest}}, "digest": SHA-256 of body}``. A file is on
the disk, read back and compared before it gets its name.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hope_jax.errors import extra
from hope_jax.storage.digests import canonical, describe, digest

HEADER = "hope_jax"


class NotWhole(ValueError):
    """The bytes of a file are not those that were written; the message says what differs."""


class Foreign(ValueError):
    """A file, or something else, that ``write_tensors`` did not write."""


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Write ``tensors`` and the JSON ``about`` as file ``path``, which then replaces an older one.

    Raises:
      OSError, NotWhole: it could not be written, or what was read back is something else. The older one is untouched.
      MissingExtra: safetensors is not installed.
    """
    body = {"about": about, "tensors": describe(dict(tensors))}
    metadata = {HEADER: json.dumps({"body": body, "digest": digest(canonical(body))})}
    part = path.with_name(f".{path.name}.part")
    with _library() as library:
        contiguous = {name: np.ascontiguousarray(tensor).reshape(tensor.shape) for name, tensor in tensors.items()}
        part.write_bytes(library.save(contiguous, metadata))
    with part.open("rb") as file:
        os.fsync(file.fileno())
    read_tensors(part)
    os.replace(part, path)


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors and ``about`` of a file. Raises OSError, Foreign or NotWhole."""
    body = _header(path)
    with _library() as library:
        tensors = library.load(path.read_bytes())
    if tensors.keys() != body["tensors"].keys():
        raise NotWhole("it has other tensors than its header")
    for name, found in describe(tensors).items():
        if found != body["tensors"][name]:
            raise NotWhole(f"{name} differs from its digest")
    return tensors, body["about"]


def read_about(path: Path) -> dict[str, Any]:
    """The ``about`` of a file; its tensors are not read. Raises OSError, Foreign or NotWhole."""
    return _header(path)["about"]


def _header(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise Foreign("it is a folder")
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(min(size, 2**26))
    try:
        sealed = json.loads(text)["__metadata__"][HEADER]
    except (ValueError, KeyError, TypeError) as error:
        raise Foreign("it is no safetensors file with a header of hope_jax") from error
    try:
        stored = json.loads(sealed)
        whole = digest(canonical(stored["body"])) == stored["digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise NotWhole("its header was altered") from error
    if not whole:
        raise NotWhole("its header was altered")
    return stored["body"]


@contextlib.contextmanager
def _library() -> Iterator[Any]:
    with extra("train"):
        from safetensors import SafetensorError, numpy
    try:
        yield numpy
    except SafetensorError as error:
        raise NotWhole(str(error)) from error
