"""Tokenizes a corpus into a folder of shards, in parallel; what is there already is not done again. See shards.py.

A process that is killed leaves at most files in ``.part``, which nobody reads and which are written anew.
"""

import contextlib
import fcntl
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hope_jax.data.text import building, shards
from hope_jax.data.text.corpus import Corpus, Split
from hope_jax.data.text.shards import PLAN, TOKENIZER, TOKENS, Shard, records_in
from hope_jax.data.text.tokenizers import Tokenizer
from hope_jax.errors import UserError


@dataclass(frozen=True)
class Work:
    """What a process needs to write any shard; ``dtype``: name of the tokens' type."""

    folder: Path
    corpus: Corpus
    tokenizer: Tokenizer
    dtype: str
    length: int

    def shard(self, shard: Shard) -> Shard:
        """Write a shard unless it is there. UserError where the tokenizer loses text."""
        path = self.folder / shard.name
        if not path.exists():
            shards.write_shard(path, self._tokens(shard), np.dtype(self.dtype), self.length)
        return shard

    def _tokens(self, shard: Shard) -> Iterator[np.ndarray]:
        read = kept = 0
        for texts in building.groups(self.corpus, shard.pieces):
            ids = np.concatenate(self.tokenizer.encode_many(texts))
            read, kept = read + sum(map(len, texts)), kept + int(self.tokenizer.byte_lengths[ids].sum())
            yield ids
        building.check_bytes(self.tokenizer, len(shard.pieces), read, kept)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make a folder for tokens, and keep other processes that write tokens out of it.

    Raises UserError where another process is in it, it holds something else, or it cannot be written.
    """
    _make_folder(folder)
    try:
        with building.locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB) as held:
            if not held:
                raise UserError(f"another process writes tokens into {folder}: wait or choose another --out")
            for part in folder.glob("*.part"):  # of a process that was killed
                part.unlink()
            yield
    except OSError as error:
        raise UserError(f"cannot write tokens into {folder}: {error.strerror or error}") from error


def tokenize(work: Work, plan: Mapping[str, Any], todo: list[Shard], processes: int, progress: bool) -> None:
    """Fill the folder of ``work`` with the shards of its ``plan``, inside ``alone``."""
    with building.bar(progress, "tokenizing", sum(_size(work, shard) for shard in todo), "B") as bar:
        for shard in _written(work, todo, processes):
            bar.update(_size(work, shard))
    _finish(work, plan, todo)


def _size(work: Work, shard: Shard) -> int:
    return sum(shards.size_of(work.corpus, piece) for piece in shard.pieces)


def _make_folder(folder: Path) -> None:
    """Make a folder for tokens. UserError where that is impossible, or it holds something else."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in folder.iterdir() if not path.name.endswith(".part"))
    except OSError as error:
        raise UserError(f"cannot write tokens into {folder}: {error.strerror or error}") from error
    if PLAN not in names and names not in ([], [TOKENIZER]):
        raise UserError(f"the folder {folder} holds {names[0]} but no tokens: choose another --out")


def check_plan(folder: Path, plan: Mapping[str, Any]) -> bool:
    """Whether the folder has a plan. UserError where the values of ``plan``, which may be some of all, are others."""
    try:
        there = json.loads((folder / PLAN).read_text())
    except FileNotFoundError:
        return False
    except ValueError as error:
        raise UserError(f"{folder / PLAN} is damaged: choose another --out") from error
    different = [name for name, value in plan.items() if there.get(name) != value]
    if different:
        raise UserError(
            f"the folder {folder} holds tokens of another {', '.join(different)}: give the same flags, or choose "
            "another --out"
        )
    return True


def _written(work: Work, todo: list[Shard], processes: int) -> Iterator[Shard]:
    """The shards, each when it is there."""
    if processes == 1:
        yield from map(work.shard, todo)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_worker, (work,)) as pool:
        futures = [pool.submit(_in_worker, shard) for shard in todo]
        try:
            yield from (future.result() for future in as_completed(futures))
        except BrokenProcessPool as error:
            raise UserError("a process that tokenizes was killed: give fewer --processes, or more memory") from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_WORK: list[Work] = []
"""In a process of the pool: what all its shards need, sent once."""


def _start_worker(work: Work) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends them
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _WORK.append(work)


def _end_with_parent() -> None:
    """End this process when its parent is gone, however it went."""
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


def _in_worker(shard: Shard) -> Shard:
    return _WORK[-1].shard(shard)


def _finish(work: Work, plan: Mapping[str, Any], todo: list[Shard]) -> None:
    """Write down what is there, once every split has a record."""
    files = {
        shard.name: [records_in(path), path.stat().st_size] for shard in todo for path in [work.folder / shard.name]
    }
    for split in Split._fields:
        if not sum(count for name, (count, _) in files.items() if name.startswith(f"{split}-")):
            which = "training" if split == "train" else "held-out"
            raise UserError(
                f"the {which} text has no window of {work.length} tokens: give more text or a smaller --length"
            )
    shards.write_json(work.folder / TOKENS, {"plan": plan, "files": files})
