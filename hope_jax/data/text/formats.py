"""The text in a file: plain, or JSON lines, or either of them compressed by gzip or zstd; the name of the file says it.

Read files.py next.
"""

import gzip
import importlib
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hope_jax.errors import extra

TEXT = "text"
"""The field of a JSON line that is read."""
PIECE = 1 << 16
"""Bytes of a file of zstd that are unpacked together: what follows a frame in a piece is copied."""


class NotText(ValueError):
    """Why a file is not what its name says; details are in brackets."""


def text_of(path: Path) -> bytes:
    """The text of a file; of one in ``.jsonl`` the field "text" of each line, with a line end after each.

    ``.gz`` and ``.zst`` behind the name are unpacked, in memory.

    Raises:
        NotText: the contents are not what the name says.
        OSError: the file cannot be read.
        MissingExtra: a package for ``.zst`` is not installed.
    """
    data, name = path.read_bytes(), path.name.lower()
    for ending, unpack in UNPACK.items():
        if name.endswith(ending):
            data, name = unpack(data), name.removesuffix(ending)
    return _lines(data) if name.endswith(".jsonl") else data


def _gunzip(data: bytes) -> bytes:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise NotText(f"damaged or no gzip ({error})") from error


def _unzstd(data: bytes) -> bytes:
    with extra("zst"):
        zstandard: Any = importlib.import_module("zstandard")
    try:
        return b"".join(_frames(data, zstandard.ZstdDecompressor()))
    except zstandard.ZstdError as error:
        raise NotText(f"damaged or no zstd ({error})") from error


def _frames(data: bytes, reader: Any) -> Iterator[bytes]:
    """The text of each frame. A cut frame is an error of ours alone: zstandard gives what there is of it."""
    start = 0
    while start < len(data):
        frame = reader.decompressobj()
        while start < len(data) and not frame.eof:
            piece = data[start : start + PIECE]
            yield frame.decompress(piece)
            start += len(piece) - len(frame.unused_data)
        if not frame.eof:
            raise NotText("damaged or no zstd (it ends too early)")


UNPACK: dict[str, Callable[[bytes], bytes]] = {".gz": _gunzip, ".zst": _unzstd}


def _lines(data: bytes) -> bytes:
    """The texts of JSON lines."""
    parts = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            parts.append(_text(line, number))
    return b"".join(parts)


def _text(line: bytes, number: int) -> bytes:
    try:
        text = json.loads(line)[TEXT]
        return text.encode() + b"\n"
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # no JSON, no object, no field, no string
        raise NotText(f"no JSON lines with texts (line {number} has no string {TEXT!r})") from error
