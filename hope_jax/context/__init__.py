"""A memory that keeps learning: levels that are written while a stream is read. Start with ``api.py``."""

from hope_jax.context.api import (
    clear,
    expect,
    finish,
    learn,
    load,
    merge,
    note_of,
    reset,
    save,
    start,
    surprise,
)

__all__ = ["clear", "expect", "finish", "learn", "load", "merge", "note_of", "reset", "save", "start", "surprise"]
