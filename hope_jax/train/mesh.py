"""How many devices there are along each axis of a mesh, and the mesh itself. Read ``sharding.py`` next.

A mesh has four axes. Devices along ``data`` and ``fsdp`` share each batch, those along ``tensor`` share the features of
each token, those along ``sequence`` the tokens of each sequence (``nn/tokens.py``).
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh

from hope_jax.errors import UserError, whole
from hope_jax.memory.mesh import SHARE_BATCH, SHARE_HEADS
from hope_jax.models import ModelConfig
from hope_jax.nn.mixers.attention import AttentionConfig
from hope_jax.nn.mixers.gated_deltanet import GatedDeltaNetConfig
from hope_jax.nn.mixers.lstm import LSTMConfig
from hope_jax.nn.mixers.mamba2 import Mamba2Config
from hope_jax.nn.mixers.memory import MemoryMixerConfig
from hope_jax.nn.mixers.memory_caching import MemoryCachingConfig
from hope_jax.nn.mixers.self_modifying import SelfModifyingConfig
from hope_jax.nn.mixers.srwm import SRWMConfig
from hope_jax.nn.mixers.tnt import TNTConfig
from hope_jax.train import processes
from hope_jax.train.devices import cores

MESH = (*SHARE_BATCH, *SHARE_HEADS)
ALONG_TIME = (
    *(AttentionConfig, GatedDeltaNetConfig, LSTMConfig, Mamba2Config, MemoryCachingConfig, MemoryMixerConfig),
    *(SRWMConfig, SelfModifyingConfig, TNTConfig),
)
"""Mixers for which tests show the same numbers along ``sequence`` as on one device; others are refused."""


@dataclass(frozen=True)
class MeshConfig:
    """How many devices there are along each axis of the mesh."""

    data: int | None = None
    """Devices that share each batch and hold all parameters each; on a CPU, cores. None: as many as are left and divide
    the batch."""
    fsdp: int = 1
    """Devices that share each batch, and the parameters with the optimizer's state: each keeps a part of the model's
    features. Must divide the width and, times data, the batch."""
    tensor: int = 1
    """Devices that share each token: each has a part of the heads and of the hidden features. Must divide them."""
    sequence: int = 1
    """Devices that share the tokens of each sequence, and inside mixers the heads. Must divide the tokens that are read
    at once and, times tensor, the heads."""

    def __post_init__(self) -> None:
        for name, count in self.given.items():
            whole(f"mesh.{name}", count, 1, "devices")

    @property
    def given(self) -> dict[str, int]:
        """The axes whose number of devices is given."""
        return {name: count for name in MESH if (count := getattr(self, name)) is not None}

    @property
    def of_host(self) -> int | None:
        """How many devices a CPU is split into for this mesh; None: one for each core (``split_host``)."""
        count = math.prod(self.given.values())
        return None if count == 1 and self.data is None else count * (1 if self.data else max(1, cores() // count))

    def check_batch(self, batch: int, tokens: int = 0) -> None:
        """Raise UserError unless the devices can share so many sequences, and the ``tokens`` of each read at once."""
        count = (self.data or 1) * self.fsdp
        if batch % count:
            which = "mesh.fsdp" if self.data is None else "mesh.data x mesh.fsdp"
            raise UserError(f"{which} is {count}, which cannot share {batch} sequences; give a divisor of that")
        if tokens % self.sequence:
            raise UserError(
                f"mesh.sequence is {self.sequence}, which cannot share the {tokens} tokens of a sequence that are read "
                "at once; give a divisor of that"
            )

    def check_model(self, model: ModelConfig) -> None:
        """Raise UserError unless the devices divide the model's width and heads."""
        self._check_mixers(model)
        which = "mesh.tensor" if self.sequence == 1 else "mesh.tensor x mesh.sequence"
        count = self.tensor * self.sequence
        if model.width % self.fsdp:
            raise UserError(f"mesh.fsdp is {self.fsdp}; give a divisor of the model's width, {model.width}")
        for part in _configs((model.mixer,)):
            heads: Any = getattr(part, "heads", None)
            heads = heads(model.width) if callable(heads) else heads
            if heads and heads % count:
                raise UserError(f"{which} is {count}; give a divisor of the model's heads, {heads}")

    def _check_mixers(self, model: ModelConfig) -> None:
        """Raise UserError for devices along ``sequence`` and a mixer that is not among ``ALONG_TIME``."""
        if self.sequence == 1:
            return
        for mixer, _ in model.pattern:
            if type(mixer) not in ALONG_TIME:
                known = ", ".join(sorted(kind.__name__ for kind in ALONG_TIME))
                came = f"mesh.sequence is {self.sequence} and a mixer {type(mixer).__name__}"
                raise UserError(f"{came}; leave it out, or take a model whose mixers are of {known}")

    def make(self, batch: int, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh for batches of so many sequences, of ``devices``; None: those of this machine (on a CPU, cores).

        Raises:
          UserError: the product of the axes does not divide the number of devices; they cannot share a batch; or a mesh
            of this shape does not fit into their network.
        """
        self.check_batch(batch)
        found, count = jax.devices() if devices is None else devices, math.prod(self.given.values())
        if len(found) % count:
            asked = ", ".join(f"mesh.{name} {size}" for name, size in self.given.items())
            raise UserError(
                f"{asked}: {count} devices are asked for, which do not divide the {len(found)} that there are"
            )
        of_hosts = cores() * processes.count() if devices is None and found[0].platform == "cpu" else len(found)
        data = self.data or self._left(batch // self.fsdp, min(of_hosts, len(found)))
        shape = (data, self.fsdp, self.tensor, self.sequence)
        used = found[: math.prod(shape)]
        if devices is None and len({device.process_index for device in used}) < processes.count():
            raise UserError(
                f"{len(used)} devices share the work, which leaves out some of {processes.count()} processes: give "
                "a batch or numbers of mesh.* that use all devices, or start fewer processes"
            )
        return _laid_out(shape, used)

    def _left(self, batch: int, most: int) -> int:
        """The largest number of devices along data that divides the batch, where there are ``most`` devices in all."""
        others = self.fsdp * self.tensor * self.sequence
        return max(n for n in range(1, max(1, most // others) + 1) if batch % n == 0)


def _laid_out(shape: tuple[int, ...], devices: Sequence[Any]) -> Mesh:
    """The mesh; where possible, its neighbours are neighbours in the network of the devices."""
    try:
        places = create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (NotImplementedError, ValueError) as error:
        asked = " x ".join(f"{name} {size}" for name, size in zip(MESH, shape, strict=True))
        raise UserError(f"a mesh of {asked} does not fit into the network of the devices: {error}") from error
    return Mesh(places, MESH, axis_types=(AxisType.Auto,) * len(MESH))


def _configs(tree: Any) -> Iterator[Any]:
    """All configurations inside tuples and inside one another."""
    if dataclasses.is_dataclass(tree):
        yield tree
        tree = tuple(vars(tree).values())
    for part in tree if isinstance(tree, tuple) else ():
        yield from _configs(part)
