"""The training step compiled for chips that need not be there: what each of them needs, computes and sends.

    devices = topology("v5e:4x4")  # needs the extra [tpu], but no TPU
    setup = text_setup(..., mesh=MeshConfig(fsdp=4).make(32, devices))
    report = compile_step(setup, jax.ShapeDtypeStruct((32, 2049), jnp.int32))

The compiler of a TPU refuses a program that does not fit into the memory of a chip, so what compiles fits.
"""

import functools
import importlib
import os
import re
import time
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from hope_jax.errors import UserError, extra
from hope_jax.train.devices import split_host
from hope_jax.train.setup import Setup
from hope_jax.train.work import Work, work

EXAMPLES = "v5e:4x4, v5e:16x16, v5p:4x4x4, v6e:4x4 or cpu:8"
# With these libtpu looks for no TPU, no other process and no cloud.
ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_LOG_DIR": "disabled",
}


@dataclass(frozen=True)
class Report:
    """What a compiled step needs on each chip.

    Attributes:
      seconds: to compile.
      arguments, results, shared: bytes of arguments, of results, and of results that replace arguments in memory.
      temporaries, code: bytes besides these.
      text: the program; ``work`` reads it.
    """

    seconds: float
    arguments: int
    results: int
    shared: int
    temporaries: int
    code: int
    text: str

    @functools.cached_property
    def work(self) -> Work:
        """What a chip computes and sends in a step."""
        return work(self.text)

    @property
    def bytes(self) -> int:
        """Bytes that a chip holds while a step runs."""
        return self.arguments + self.results - self.shared + self.temporaries + self.code


def topology(name: str) -> list[Any]:
    """The chips of a TPU topology such as ``v5e:4x4``, or devices of this machine's CPU such as ``cpu:8``.

    Raises:
        MissingExtra: libtpu is not installed.
        UserError: there is no such topology.
    """
    version, _, shape = name.partition(":")
    if version == "cpu" and shape.isdecimal():
        return _of_this_machine(int(shape))
    with extra("tpu"):
        importlib.import_module("libtpu")
    os.environ.update({key: os.environ.get(key, value) for key, value in ALONE.items()})
    jax.config.update("jax_platforms", "cpu")  # a TPU of this machine stays free for others
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:  # of several kinds, from C++
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--topology is {name!r}; give one such as {EXAMPLES}. The compiler says: {reason}") from error


def _of_this_machine(count: int) -> list[Any]:
    split_host(count)
    found = jax.devices("cpu")
    if not 1 <= count <= len(found):
        raise UserError(f"--topology is cpu:{count}; this process has {len(found)} CPU devices.")
    return found[:count]


def compile_step(setup: Setup, batch: Any) -> Report:
    """Compile the step of ``setup`` for the devices of its mesh; ``batch``: shapes of a whole batch.

    Raises UserError where the step does not fit into the memory of a chip.
    """
    try:
        return compiled_step(setup, batch)[1]
    except jax.errors.JaxRuntimeError as error:
        raise _does_not_fit(error) from error


def compiled_step(setup: Setup, batch: Any) -> tuple[Any, Report]:
    """As ``compile_step``, but the program as well, and errors as the compiler raises them."""
    since = time.monotonic()
    program = setup.lower(batch).compile()
    seconds, memory = time.monotonic() - since, program.memory_analysis()
    return program, Report(
        seconds,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        program.as_text(),
    )


def _does_not_fit(error: Exception) -> Exception:
    """The UserError for a step that does not fit; other errors as they are."""
    said = str(error)
    used = re.search(r"in memory space hbm\. Used ([\d.]+\w+) of ([\d.]+\w+)", said)
    used = used or re.search(r"\(([\d.]+\w+)\) exceeds available HBM \(([\d.]+\w+)", said)
    if used is None:
        return error
    return UserError(
        f"The step does not fit: it needs {used[1]} of the {used[2]} bytes of a chip's memory; give a smaller --batch, "
        "--remat block, --remat-every, more --mesh.fsdp, or a topology of more chips."
    )
