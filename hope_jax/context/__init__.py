"""A memory that keeps learning: levels that are written while a stream is read.

Reads in the order ``schedule.py`` (what is written when), ``writes.py`` (one chunk), ``piece.py`` (the program),
``stream.py``, ``files.py``.
"""

from hope_jax.context.files import load, note, save
from hope_jax.context.stream import clear, expect, finish, learn, merge, reset, start, surprise

__all__ = ["clear", "expect", "finish", "learn", "load", "merge", "note", "reset", "save", "start", "surprise"]
