"""What benchmarks measure with: the best of interleaved repetitions, operations of a program, what the machine is."""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params

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


def operations(jaxpr: Any) -> int:
    """Multiplications and additions of all matrix products of a program, loops unrolled, recomputation included."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        parts = [operations(inner) for inner in jaxprs_in_params(equation.params)]
        if equation.primitive.name == "cond":  # platforms and branches: only one of them runs
            parts = [max(parts)]
        total += sum(parts) * (equation.params["length"] if equation.primitive.name == "scan" else 1)
    return total
