"""One portable file of named tensors: safetensors, with a sealed JSON header in its metadata.

The metadata has one entry, ``hope_jax`` (the library orders several at random, and equal contents are equal files):
JSON ``{"digest": SHA-256 of body, "body": {"about": ..., "tensors": {name: dtype, shape and digest}}}``. A file is on
the disk, read back and compared before it gets its name.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hope_jax.errors import extra
from hope_jax.storage.digests import describe, first_difference, sealed, unsealed, write_file

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
    metadata = {HEADER: sealed({"about": about, "tensors": describe(dict(tensors))})}
    contiguous = {name: np.ascontiguousarray(tensor).reshape(tensor.shape) for name, tensor in tensors.items()}
    with _library() as library:
        data = library.save(contiguous, metadata)
    write_file(path, data, check=read_tensors)


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors and ``about`` of a file. Raises OSError, Foreign or NotWhole."""
    body = _header(path)
    with _library() as library:
        tensors = library.load(path.read_bytes())
    if tensors.keys() != body["tensors"].keys():
        raise NotWhole("it has other tensors than its header")
    if different := first_difference(body["tensors"], describe(tensors)):
        raise NotWhole(f"{different[0]} differs from its digest")
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
        header = json.loads(text)["__metadata__"][HEADER]
    except (ValueError, KeyError, TypeError) as error:
        raise Foreign("it is no safetensors file with a header of hope_jax") from error
    try:
        return unsealed(header)
    except (ValueError, KeyError, TypeError) as error:
        raise NotWhole("its header was altered") from error


@contextlib.contextmanager
def _library() -> Iterator[Any]:
    with extra("train"):
        from safetensors import SafetensorError, numpy
    try:
        yield numpy
    except SafetensorError as error:
        raise NotWhole(str(error)) from error
