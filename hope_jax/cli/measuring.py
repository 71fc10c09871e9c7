"""Tools of benchmarks: the best time of interleaved repetitions, a description of the machine, rows of results."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from hope_jax import train as training
from hope_jax.cli.results import Row, append
from hope_jax.errors import UserError


def machine() -> Row:
    """The machine: device, cores that this process may use, version of JAX, pages of memory, flags of XLA."""
    about = {"device": jax.devices()[0].device_kind, "cores": training.cores(), "jax": jax.__version__}
    about |= {"large_pages": "hugetlb=1" in os.environ.get("GLIBC_TUNABLES", "")}
    return about | {"xla_flags": os.environ.get("XLA_FLAGS", "")}


def report(path: Path, rows: Iterable[Row]) -> None:
    """Print each row as it comes, and append it to the file together with ``machine()``."""
    for row in rows:
        append(path, row | machine())
        print(json.dumps(row), flush=True)


@contextlib.contextmanager
def told(row: Row) -> Iterator[None]:
    """Note an error that is raised inside as ``row["failed"]``, in one line; a UserError is raised as usual."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of many kinds: what compilers and devices refuse comes from C++
        row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def did_not_fit(row: Row) -> bool:
    """Whether a row failed for lack of memory, as far as its message says."""
    reasons = ("RESOURCE_EXHAUSTED", "out of memory", "MemoryError", "does not fit")
    return any(reason.lower() in row.get("failed", "").lower() for reason in reasons)


def best_seconds(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of each call, the best of interleaved repetitions after one that compiles."""
    best = {}
    for name, call in calls.items():
        jax.block_until_ready(call())
        best[name] = math.inf
    for _ in range(repeats):
        for name, call in calls.items():
            since = time.perf_counter()
            jax.block_until_ready(call())
            best[name] = min(best[name], time.perf_counter() - since)
    return best
