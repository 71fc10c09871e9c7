"""What benchmarks measure with: the best of interleaved repetitions, what the machine is, an optimizer's step."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hope_jax import LanguageModel, model_named
from hope_jax import train as training
from hope_jax.cli.results import Row, append
from hope_jax.errors import UserError
from hope_jax.optim import M3

BLOCK = M3().slow_period or 1
"""Steps of M3 between two blocks of its slow momentum."""


def machine() -> Row:
    """What measures: the device, the cores that this process may use, the version of JAX, and the pages of memory."""
    about = {"device": jax.devices()[0].device_kind, "cores": training.cores(), "jax": jax.__version__}
    return about | {"large_pages": "hugetlb=1" in os.environ.get("GLIBC_TUNABLES", "")}


def report(path: Path, rows: Iterable[Row]) -> None:
    """Print each row as it comes; on file it also says what measured it."""
    for row in rows:
        append(path, row | machine())
        print(json.dumps(row), flush=True)


@contextlib.contextmanager
def told(row: Row) -> Iterator[None]:
    """An error inside is a result, ``row["failed"]`` in a line; a mistake of the user stays one."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of many kinds: what compilers and devices refuse comes from C++
        row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def did_not_fit(row: Row) -> bool:
    """Whether what failed lacked memory, as far as its message says."""
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


class Stepper:
    """One optimizer's compiled step, with a state at the start of a block and one inside it."""

    def __init__(self, tx: optax.GradientTransformation, params: Any):
        def step(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        self.params, self.start = params, jax.jit(tx.init)(params)
        lowered, since = jax.jit(step).lower(params, self.start, params), time.perf_counter()
        self._step = lowered.compile()
        self.compile_seconds = time.perf_counter() - since
        self.inside = self(self.start)[1]

    def __call__(self, state: Any) -> tuple[Any, Any]:
        """Parameters and state after a step from ``state``; the parameters serve as gradients."""
        return self._step(self.params, state, self.params)

    def row(self, seconds_start: float, seconds: float, parameters: int) -> Row:
        """What is known about steps that take so long."""
        mean = (seconds_start + (BLOCK - 1) * seconds) / BLOCK
        times = {"step_ms": 1e3 * mean, "inside_ms": 1e3 * seconds, "start_ms": 1e3 * seconds_start}
        size = {"state_bytes_per_parameter": sum(leaf.nbytes for leaf in jax.tree.leaves(self.start)) / parameters}
        rounded = {name: round(value, 2) for name, value in (times | size).items()}
        return rounded | {"compile_seconds": round(self.compile_seconds, 1)}


def random_parameters(model: str) -> Any:
    """Normal numbers in the shapes of the model's parameters."""
    shapes = training.abstract_params(LanguageModel(model_named(model)))
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))
    return jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape, jnp.float32), shapes)
