"""Saving in the background: training goes on while a step is written, read back and sealed.

``Saver.save`` returns as soon as the state is copied. A thread then writes the files, forces them to the disk, digests
them, reads the step back, and writes the manifest, which makes it a saved step (``checkpoint.py``). Saves do not
overlap. An error of the thread is raised by the next call: at the next step, the next save, or at the end.

Of several processes each writes its own part of the arrays; process 0 then digests the files and seals the step. It is
not read back: no process has all of it. Digests of arrays are compared when it is restored.
Read ``loop.py`` next: it says when to save.
"""

import concurrent.futures
import contextlib
import functools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from hope_jax.errors import UserError
from hope_jax.storage import digests
from hope_jax.storage.array_digests import describe_parts
from hope_jax.train.checkpoint import FOLDER, MANIFEST, PARAMS, Manifest, parted, plain_path, read_parts, saved_steps
from hope_jax.train.devices import shape_at
from hope_jax.train.monitor import Diverged
from hope_jax.train.processes import count, found_by_first, is_first
from hope_jax.train.step import TrainState, count_bytes


class Saver(contextlib.AbstractContextManager["Saver"]):
    """Saves the steps of a run in the background; a context manager, which waits at its end until all are saved.

    ``keep``: how many of the latest steps stay, at least 2; older ones are removed when one more is known to be good.
    Multiples of ``keep_every`` stay for ever; None: there are none.
    """

    def __init__(self, run: Path, keep: int, keep_every: int | None = None):
        self._run, self._keep, self._keep_every = run, keep, keep_every
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._last: concurrent.futures.Future[None] | None = None

    def save(self, state: TrainState, data: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Begin to save a state as step ``state.step``, which may be donated when this returns.

        ``data``, ``about``: as in ``Manifest``. Raises UserError where this step cannot be written, or the one before
        could not; the steps saved before are untouched.
        """
        self.wait()
        finish = _begin(self._run, int(state.step), parted(state), dict(data), dict(about))
        self._last = self._pool.submit(self._finish, int(state.step), finish)

    def _finish(self, step: int, finish: Callable[[], None]) -> None:
        with _plain_errors(self._run, step):
            finish()
            if is_first():
                _prune(self._run, self._keep, self._keep_every)

    def check(self) -> None:
        """Raise the error of a save in the background, if this process had one. Does not wait."""
        if self._last is not None and self._last.done():
            self._last.result()

    def wait(self) -> None:
        """Return when the last state is a saved step; all processes call it. Raises UserError where it cannot be.

        Process 0 tells the others whether it is sealed: in a folder that they do not share they would never see it.
        If process 0 ends, they end with it (``watch.py``).
        """
        last, self._last = self._last, None
        if last is None:
            return
        if not is_first():
            last.result()  # its own part is written
        found_by_first(last.result)

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            # Another error may be in this process alone; it is raised, and not replaced by one from here.
            if kind is None or issubclass(kind, Diverged):
                self.wait()
        finally:
            self._pool.shutdown()


def save(
    run: Path,
    state: TrainState,
    data: Mapping[str, Any],
    about: Mapping[str, Any],
    keep: int,
    keep_every: int | None = None,
) -> None:
    """``Saver.save``, finished when this returns; ``keep``, ``keep_every`` as in ``Saver``."""
    with Saver(run, keep, keep_every) as saver:
        saver.save(state, data, about)


def save_params(run: Path, step: int, params: Any, about: Mapping[str, Any]) -> None:
    """Save parameters alone as a step: a model that can be used, not trained on. Raises as ``save``."""
    finish = _begin(run, step, {PARAMS: params}, {}, dict(about))
    with _plain_errors(run, step):
        finish()


def _begin(
    run: Path, step: int, parts: dict[str, Any], data: dict[str, Any], about: dict[str, Any]
) -> Callable[[], None]:
    """Begin to write a step; returns a function that does the rest, which may run in another thread."""
    parts = _copied(parts)
    folder, open_path = run / FOLDER / str(step), contextlib.ExitStack()
    with _plain_errors(run, step), contextlib.ExitStack() as stack:
        folder.parent.mkdir(exist_ok=True)
        place = stack.enter_context(plain_path(folder.parent))
        writing = ocp.save_checkpointables_async(f"{place}/{step}", parts)
        arrays = describe_parts(parts)
        open_path = stack.pop_all()

    def finish() -> None:
        with open_path:
            writing.result()
        if not is_first():
            return
        _force_to_disk(folder)
        manifest = Manifest(step, data, about, arrays(), digests.digest_files(folder, MANIFEST))
        if count() == 1:
            read_parts(run, manifest, _on_host(parts))
        digests.write_sealed(folder / MANIFEST, vars(manifest))
        _force(folder)

    return finish


@contextlib.contextmanager
def _plain_errors(run: Path, step: int) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        if is_first() and not isinstance(error, UserError):  # one that was read back otherwise stays as it is
            _remove_unfinished(run, step)  # on a full disk, what is left of it leaves no room to go on
        raise UserError(
            f"Step {step} could not be saved in {run} ({error}); saved steps: {saved_steps(run)}. "
            "Make room or repair the folder, then run the same command again."
        ) from error


def _copied(parts: Any) -> Any:
    """A copy in the memory of this machine: the next training step writes over the state.

    Where several processes have them on accelerators, orbax copies them itself.
    """
    if jax.default_backend() == "cpu":
        return jax.tree.map(jnp.copy, parts)
    return jax.device_put(parts, _host()) if count() == 1 else parts


def _host() -> jax.sharding.Sharding:
    """The memory of this machine; the first device where JAX was told to leave the CPU alone (``JAX_PLATFORMS``)."""
    try:
        return jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    except RuntimeError:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _on_host(parts: Any) -> Any:
    """Shapes like those of ``parts``, placed in the memory of this machine: reading back needs none of the devices'."""
    return jax.tree.map(functools.partial(shape_at, _host()), parts)


def _force_to_disk(folder: Path) -> None:
    """Return when all files below the folder are on the disk, and not only in the memory of the system."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        _force(path)


def _force(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(run: Path, keep: int, keep_every: int | None) -> None:
    """Remove the oldest steps, as one more is known to be good, and parts of saves that were killed."""
    for step in saved_steps(run)[:-keep]:
        if keep_every is not None and step % keep_every == 0:
            continue
        folder = run / FOLDER / str(step)
        (folder / MANIFEST).unlink()  # first: what is half removed is not a saved step
        shutil.rmtree(folder, ignore_errors=True)
    remove_parts(run)


def remove_parts(run: Path, step: int | str = "*") -> None:
    """Remove what orbax was writing when it was killed or failed."""
    for part in (run / FOLDER).glob(f"{step}.orbax-checkpoint-tmp"):
        shutil.rmtree(part, ignore_errors=True)


def _remove_unfinished(run: Path, step: int) -> None:
    """Remove what this process wrote of a step that it cannot finish."""
    remove_parts(run, step)
    folder = run / FOLDER / str(step)
    if not (folder / MANIFEST).exists():
        shutil.rmtree(folder, ignore_errors=True)


def check_room(run: Path, state: TrainState, keep: int) -> None:
    """Raise UserError unless ``keep`` checkpoints of ``state``, and the one being written, fit on the disk."""
    each = count_bytes(state)
    need, free = each * max(1, keep + 1 - len(saved_steps(run))), shutil.disk_usage(run).free
    if free < need + 2**24:
        raise UserError(
            f"The disk of {run} has {free / 2**20:,.0f} MiB free, but checkpoints of {each / 2**20:,.0f} MiB need "
            f"{need / 2**20:,.0f} MiB: make room, choose another run folder or keep fewer of them."
        )
