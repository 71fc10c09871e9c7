"""The devices of this machine. Read ``sharding.py`` next: how they share the work.

On a CPU the whole machine is one device, unless ``split_host`` makes each core a device. A model of many small products
keeps only one core of a device busy; with a share of the batch for each core, all of them work.
"""

import contextlib
import os
from typing import Any

import jax


def split_host(count: int | None = None, processes: int = 1) -> None:
    """Split this machine's CPU into so many devices; None: one for each core that this process may use.

    ``processes``: how many share the ``count`` devices.

    Call it before JAX computes anything. Afterwards, and where XLA_FLAGS give the number of devices, nothing changes.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    with contextlib.suppress(RuntimeError):  # JAX has started
        jax.config.update("jax_num_cpu_devices", cores() if count is None else max(1, count // processes))


def cores() -> int:
    """How many cores of this machine this process may use (``taskset`` counts)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_of(device: Any) -> int:
    """Bytes of memory that this process may use on a device; for a CPU, all memory of the machine."""
    found = device.memory_stats() or {}
    return found.get("bytes_limit", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def on_first_device(shapes: Any) -> Any:
    """Shapes and dtypes of arrays that lie on the first device."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: shape_at(place, leaf), shapes)


def shape_at(place: jax.sharding.Sharding, leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array that lies at ``place``."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
