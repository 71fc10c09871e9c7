"""Arrays of bytes in idx files, the form in which MNIST and sets like it are published."""

import gzip
import zlib
from pathlib import Path

import numpy as np

from hope_jax.errors import UserError

BYTES = b"\0\0\x08"
"""How an idx file of unsigned bytes begins."""


def read_idx(folder: Path, name: str) -> np.ndarray:
    """The array of one idx file, packed by gzip or not: two zero bytes, type, axes, their big-endian sizes, the values.

    Raises UserError where it is missing, damaged or of other numbers than bytes.
    """
    found = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
    if not found:
        raise UserError(f"There is no {name} or {name}.gz in {folder}; give the folder of MNIST's four files.")
    try:
        data = gzip.decompress(found[0].read_bytes()) if found[0].suffix == ".gz" else found[0].read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"Cannot read {found[0]}: {error}.") from error
    start = 4 + 4 * (data[3] if len(data) > 3 else 0)
    shape = np.frombuffer(data[4:start], ">u4").tolist() if len(data) >= start else []
    if data[:3] != BYTES or len(data) - start != np.prod(shape):
        raise UserError(f"{found[0]} is no idx file of bytes, or it is cut off.")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
