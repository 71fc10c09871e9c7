"""What benchmarks measure with: the best of interleaved repetitions, what the machine is."""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from hope_jax import train as training
from hope_jax.cli.results import Row, append


def machine() -> Row:
    """What measures: the device, the cores that this process may use, the version of JAX, and the pages of memory."""
    about = {"device": jax.devices()[0].device_kind, "cores": training.cores(), "jax": jax.__version__}
    return about | {"large_pages": "hugetlb=1" in os.environ.get("GLIBC_TUNABLES", "")}


def report(path: Path, rows: Iterable[Row]) -> None:
    """Print each row as it comes; on file it also says what measured it."""
    for row in rows:
        append(path, row | machine())
        print(json.dumps(row), flush=True)


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
