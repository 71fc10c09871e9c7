"""Data parallelism: devices read a share of each batch and hold the same state. Read ``step.py`` next.

The training step does not mention devices: JAX follows the placement of its arguments and adds up the gradients. On a
CPU the whole machine is one device, unless ``split_host`` makes one of each core. A model of many small products keeps
only one core of a device busy; with a share of the batch for each core, all of them work.
"""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from hope_jax.errors import UserError

DATA = "data"  # axis of the mesh that batches lie along


def split_host(count: int | None = None) -> None:
    """Make so many devices of this machine's CPU; None: one of each core that this process may use.

    To be called before JAX computes anything: later, or where XLA_FLAGS name a number, that number stays.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    with contextlib.suppress(RuntimeError):  # JAX has started
        jax.config.update("jax_num_cpu_devices", cores() if count is None else count)


def cores() -> int:
    """How many cores of this machine this process may use (``taskset`` counts)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def data_mesh(batch: int, count: int | None = None) -> Mesh:
    """``count`` devices to share batches of so many sequences; None: as many as can, on a CPU no more than cores.

    Raises:
      UserError: there are not so many devices, or they do not divide the batch.
    """
    found = jax.devices()
    if count is None:
        most = min(len(found), cores()) if found[0].platform == "cpu" else len(found)
        count = max(n for n in range(1, most + 1) if batch % n == 0)
    if not 1 <= count <= len(found):
        raise UserError(f"{count} devices are asked for; there are {len(found)}: {found[0].device_kind}")
    if batch % count:
        raise UserError(f"{count} devices cannot share {batch} sequences; give a divisor of that, or None")
    return Mesh(np.array(found[:count]), (DATA,))


def abstract(make: Callable[[], Any]) -> Any:
    """Shapes, dtypes and placement (the first device) of what ``make`` returns, without computing it."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(make)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes)
