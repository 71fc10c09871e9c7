"""Several processes that train together: they find each other, agree on what to do, and end together.

Every process runs the same program on devices of its own. A decision that depends on one process alone, such as on
its signal, clock or file, is made together (``told``, ``Agreement``): else the processes would wait for each other for
ever. What is on the disk is what process 0 sees there (``found_by_first``): a network may show an older folder to
others. Process 0 alone writes files and prints. Read ``watch.py`` next: it ends the others when one dies.
"""

import atexit
import contextlib
import functools
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hope_jax.errors import Stopped, UserError, exit_status, of_disk, whole
from hope_jax.train.watch import Watch

PATIENCE = 300  # seconds that processes wait for each other when they start
SHARING = 60  # seconds that a file system may take to show all processes what process 0 has written
SLURM_TASKS = "SLURM_STEP_NUM_TASKS"

Found = TypeVar("Found")


@dataclass(frozen=True)
class ProcessesConfig:
    """Processes that train together. A task of SLURM (srun) needs no flags, and a worker of a Cloud TPU none where
    TPU_WORKER_HOSTNAMES names several hosts; elsewhere a worker needs --processes.coordinator auto."""

    coordinator: str | None = None
    """HOST:PORT where process 0 waits for the others; auto: find out, as on SLURM, Cloud TPU and Kubernetes. None: what
    the environment says."""
    count: int | None = None  # How many processes there are.
    index: int | None = None  # Which of them this one is, from 0.

    def __post_init__(self) -> None:
        named = self.coordinator not in (None, "auto")
        if named != (self.count is not None) or named != (self.index is not None):
            raise UserError(
                "--processes.coordinator HOST:PORT, --processes.count and --processes.index belong together: give all "
                "three, or none where the environment names the processes."
            )
        if named:
            self._check_numbers()

    def _check_numbers(self) -> None:
        if whole("processes.index", self.index, 0) >= whole("processes.count", self.count, 1, "processes"):
            raise UserError(f"processes.index is {self.index}; give a number below processes.count, {self.count}.")
        host, _, port = str(self.coordinator).rpartition(":")
        if not (host and port.isdecimal()):
            raise UserError(f"processes.coordinator is {self.coordinator!r}; give HOST:PORT, such as 10.0.0.1:8476.")

    @property
    def expected(self) -> int:
        """How many processes there are by the flags or by SLURM; 1 where neither says so."""
        return self.count or int(os.environ.get(SLURM_TASKS, "1"))

    @property
    def several(self) -> bool:
        """Whether this process is one of several, by flags or by the environment."""
        hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
        named = "JAX_COORDINATOR_ADDRESS" in os.environ or len(hosts) > 1
        return self.expected > 1 or self.coordinator == "auto" or named

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """In here the processes are one program; to be entered before the first use of a device.

        Raises UserError where they do not find each other.
        """
        if not self.several:
            yield
            return
        self._join()
        with Watch(jax.process_index(), jax.process_count(), *_coordinator(), told) as watch:
            try:
                yield
            except Stopped:  # all of them do
                raise
            except BaseException as error:
                _leave_first(error, watch)
                raise

    def _join(self) -> None:
        jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is ours, see ``signals.py``
        how: dict[str, Any] = {"initialization_timeout": PATIENCE}
        if self.count is not None:
            how |= {"coordinator_address": self.coordinator, "num_processes": self.count, "process_id": self.index}
            how |= {"cluster_detection_method": "deactivate"}
        try:
            jax.distributed.initialize(**how)
        except (RuntimeError, ValueError, KeyError) as error:
            what = "the processes did not find each other" if self.count else "the environment names no processes"
            raise UserError(f"{what} ({' '.join(str(error).split())[:200]}); see --processes.* in --help.") from error


def _coordinator() -> tuple[str, int]:
    """Host and port of process 0, the same in all processes."""
    from jax._src.distributed import global_state  # only here JAX keeps the address that it found

    host, _, port = str(global_state.coordinator_address).rpartition(":")
    return host, int(port)


def _leave_first(error: BaseException, watch: Watch) -> None:
    """After an error: let the others end; at its own end this process does not wait for them, as JAX would."""
    if not isinstance(error, UserError | KeyboardInterrupt):
        watch.wait()  # the death of another process comes as an error of any kind
    watch.fail()
    atexit.register(functools.partial(_leave, exit_status(error)))


def _leave(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def count() -> int:
    """How many processes train together. JAX is not started for it."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return count() == 1 or jax.process_index() == 0


def told(number: int) -> int:
    """The number of process 0; all processes call this, and none returns before all have called it."""
    if count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def found_by_first(work: Callable[[], Found]) -> Found:
    """The result of ``work``, such as what is on the disk; process 0 alone calls it, and all processes call this.

    A UserError or OSError in process 0 is raised in all processes, as a UserError.
    """
    if count() == 1:
        return work()
    found = error = None
    if is_first():
        try:
            found = work()
        except (UserError, OSError) as problem:
            error = of_disk(problem) if isinstance(problem, OSError) else problem
    found, error = pickle.loads(_bytes_of_first(pickle.dumps((found, error))))
    if error is not None:
        raise error
    return found


def _bytes_of_first(data: bytes) -> bytes:
    size = told(len(data))
    same_size = np.frombuffer(data[:size].ljust(size), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(same_size)).astype(np.uint8).tobytes()


def seen_by_all(sees: Callable[[], bool], what: str) -> None:
    """Wait until every process ``sees`` on its disk ``what`` process 0 has written, which may take time.

    Raises UserError in all processes if one does not see it in ``SHARING`` seconds.
    """
    if count() == 1:
        return
    until = time.monotonic() + SHARING
    while not (seen := sees()) and time.monotonic() < until:
        time.sleep(0.1)
    if bool(np.asarray(_any(not seen))):
        raise UserError(
            f"{what} is there for process 0 but not for {'another' if seen else 'this'} process: all processes need "
            "the same folder at the same path, on a file system that they share."
        )


def check_equal(ours: Any, what: str) -> None:
    """Raise UserError in all processes if one has other values than process 0; ``what``: the name of the values."""
    other = found_by_first(lambda: ours) != ours
    if count() > 1 and bool(np.asarray(_any(other))):
        raise UserError(
            f"{what} of {'this' if other else 'another'} process are not those of process 0: give all processes the "
            "same flags and the same files."
        )


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """Process 0 runs the block first, and the others when it is done; for a file that all need, for example."""
    if not is_first():
        told(0)
    yield
    if is_first():
        told(0)


class Agreement:
    """Whether any process wishes something. All call it equally often; the answer belongs to the call before.

    So devices never wait for it: what is sent with one step is read after the next step has begun. A single process
    has its answer at once.
    """

    def __init__(self, wish: Callable[[], bool]):
        self._wish, self._sent = wish, None

    def forget(self) -> None:
        """Forget earlier wishes: they were fulfilled. All processes call it."""
        self._sent = None

    def __call__(self) -> bool:
        """Whether any process wished it."""
        if count() == 1:
            return self._wish()
        before, self._sent = self._sent, _any(self._wish())
        return before is not None and bool(np.asarray(before))


def _any(wish: bool) -> jax.Array:
    """Whether it is true in any process, as an array that devices still compute."""
    one_of_each, program = _devices()
    return program(jax.make_array_from_callback((count(),), one_of_each, lambda index: np.array([wish])))


@functools.cache
def _devices() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    """A part of an array on one device of each process, and whether any part is true, on all of these."""
    firsts = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([firsts[index] for index in sorted(firsts)]), ("process",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, PartitionSpec("process")), jax.jit(jnp.any, out_shardings=everywhere)
