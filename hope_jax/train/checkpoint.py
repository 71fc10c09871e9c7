"""Checkpoints that are whole or not there, and that say when they are damaged.

A step is a folder ``checkpoints/<step>`` written by orbax, with the parameters and the rest of the state apart, plus
``manifest.json``: the data position, and digests of every array and every file. The manifest is written last,
atomically, and only after the step was read back and found equal; a step without one was never finished. Orbax loads
flipped bytes without a word and answers truncated files with pages of logs, so files are compared with their digests
before orbax reads them, and arrays after. Read ``loop.py`` next.
"""

import contextlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from hope_jax.errors import UserError
from hope_jax.storage.digests import (
    changed_array,
    changed_file,
    describe,
    described_kinds,
    digest_files,
    first_difference,
    kinds,
    read_sealed,
    write_sealed,
)
from hope_jax.train.paths import plain_path
from hope_jax.train.state import TrainState, count_bytes

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
PARAMS, REST = "params", "training"
"""Parts of a saved state: what using a model needs, and what only training it further needs."""


class DamagedCheckpoint(UserError):
    """A saved step whose bytes are not those that were written; the message names what differs."""


@dataclass(frozen=True)
class Manifest:
    """What is saved beside the arrays.

    ``data``: the position of the batches. ``about``: how the run was planned when it was saved, such as its number of
    steps. ``arrays``: path of each array in the state -> dtype, shape and digest. ``files``: path of each file in the
    step's folder -> digest.
    """

    step: int
    data: dict[str, Any]
    about: dict[str, Any]
    arrays: dict[str, str]
    files: dict[str, str]


def saved_steps(run: Path) -> list[int]:
    """Finished steps of a run folder, ascending; whether they are undamaged only ``restore`` knows."""
    folders = (run / FOLDER).glob(f"*/{MANIFEST}")
    return sorted(int(path.parent.name) for path in folders if path.parent.name.isdigit())


def read_manifest(run: Path, step: int) -> Manifest:
    """The manifest of a saved step.

    Raises:
        DamagedCheckpoint: it does not parse or differs from its own digest.
    """
    path = run / FOLDER / str(step) / MANIFEST
    try:
        return Manifest(**read_sealed(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(run, step, f"{MANIFEST} was altered") from error


def restore(run: Path, step: int, like: TrainState) -> TrainState:
    """The state of a saved step, placed as ``like`` (shapes with shardings), bit for bit as it was saved.

    Raises:
        DamagedCheckpoint: a file or an array differs from its digest.
        UserError: the arrays are not those of ``like`` (another model or optimizer).
    """
    manifest = read_manifest(run, step)
    return _joined(_read(run, manifest, _parted(like)))


def restore_params(run: Path, step: int, like: Any) -> Any:
    """The parameters alone of a saved step, placed as ``like``. Raises as ``restore``."""
    manifest = read_manifest(run, step)
    return _read(run, manifest, {PARAMS: like})[PARAMS]


def _parted(state: TrainState) -> dict[str, Any]:
    """A state as orbax writes it: each part in a folder of its own."""
    return {PARAMS: state.params, REST: {"step": state.step, "opt_state": state.opt_state}}


def _joined(parts: Mapping[str, Any]) -> TrainState:
    return TrainState(params=parts[PARAMS], **parts[REST])


def _read(run: Path, manifest: Manifest, like: dict[str, Any]) -> dict[str, Any]:
    """The parts that ``like`` names, compared with the manifest."""
    folder = run / FOLDER / str(manifest.step)
    arrays = {path: entry for path, entry in manifest.arrays.items() if path.split("/")[0] in like}
    unread = [part for part in (PARAMS, REST) if part not in like]
    files = {name: entry for name, entry in manifest.files.items() if name.split("/")[0] not in unread}
    _check_files(manifest, folder, files, run)
    _check_structure(manifest, arrays, like, run)
    try:
        with plain_path(folder) as place:
            parts = ocp.load_checkpointables(place, like)
    except Exception as error:  # Orbax reports unreadable files by many classes; each means the same here.
        raise _damaged(run, manifest.step, f"orbax cannot read it ({error})") from error
    if path := changed_array(parts, arrays):
        raise _damaged(run, manifest.step, f"{path} differs from its digest")
    return parts


def last_good(run: Path, before: int, like: TrainState) -> int | None:
    """The latest undamaged step below ``before``, found by restoring; None if there is none."""
    for step in reversed([step for step in saved_steps(run) if step < before]):
        with contextlib.suppress(UserError):
            restore(run, step, like)
            return step
    return None


def set_aside(run: Path, after: int) -> list[Path]:
    """Move what is not part of the run up to step ``after`` out of the way: later steps and unfinished saves.

    Nothing is deleted; returns the new places, ``set_aside/<step>`` with a number where that is taken.
    """
    kept = {str(step) for step in saved_steps(run) if step <= after}
    strays = [path for path in sorted((run / FOLDER).glob("*")) if path.name.isdigit() and path.name not in kept]
    return [_move_to(run / "set_aside", path) for path in strays]


def _move_to(place: Path, path: Path) -> Path:
    place.mkdir(exist_ok=True)
    names = [path.name, *(f"{path.name}-{i}" for i in range(1, 10_000))]
    target = next(place / name for name in names if not (place / name).exists())
    return path.rename(target)


class Saver:
    """Writes the steps of one run and keeps the last ``keep`` of them; a context manager. ``keep``: at least 2.

    ``about``: what each manifest says beside the data position.
    """

    def __init__(self, run: Path, about: Mapping[str, Any], keep: int):
        self._run, self._about, self._keep = run, dict(about), keep
        self._open = contextlib.ExitStack()
        (run / FOLDER).mkdir(exist_ok=True)
        place = self._open.enter_context(plain_path(run / FOLDER))
        self._orbax = ocp.training.Checkpointer(place, cleanup_tmp_directories=True)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *error: object) -> None:
        self._orbax.close()
        self._open.close()

    def save(self, state: TrainState, data: Mapping[str, Any], **about: Any) -> None:
        """Save ``state`` and the data position as step ``state.step``: on disk and read back when this returns.

        ``about``: more that the manifest is to say.

        Raises:
            UserError: it could not be written, or what was written reads otherwise; the steps saved before are
                untouched.
        """
        step, parts = int(state.step), _parted(state)
        try:
            self._orbax.save_checkpointables(step, parts, force=True)
            folder = self._run / FOLDER / str(step)
            manifest = Manifest(step, dict(data), self._about | about, describe(parts), digest_files(folder, MANIFEST))
            _read(self._run, manifest, _on_host(parts))
            write_sealed(folder / MANIFEST, vars(manifest))
            self._prune()
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"Step {step} could not be saved in {self._run} ({error}); saved steps: {saved_steps(self._run)}. "
                "Make room or repair the folder, then run the same command again."
            ) from error

    def _prune(self) -> None:
        """Remove the oldest steps, now that one more is known to be good."""
        for step in saved_steps(self._run)[: -self._keep]:
            folder = self._run / FOLDER / str(step)
            (folder / MANIFEST).unlink()  # first: what is half removed is not a saved step
            shutil.rmtree(folder, ignore_errors=True)


def _on_host(parts: Any) -> Any:
    """Shapes like those of ``parts``, placed in the memory of this machine: reading back takes none of the device's."""
    place = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), parts)


def _damaged(run: Path, step: int, reason: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"The checkpoint of step {step} in {run} is damaged: {reason}.")


def check_room(run: Path, state: TrainState, keep: int) -> None:
    """Find out before training whether ``keep`` checkpoints (and the one being written) of ``state`` fit on the disk.

    Raises:
        UserError: they do not.
    """
    each = count_bytes(state)
    need = each * max(1, keep + 1 - len(saved_steps(run)))
    free = shutil.disk_usage(run).free
    if free < need + 2**24:
        raise UserError(
            f"The disk of {run} has {free / 2**20:,.0f} MiB free, but checkpoints of {each / 2**20:,.0f} MiB need "
            f"{need / 2**20:,.0f} MiB: make room, choose another run folder or keep fewer of them."
        )


def _check_files(manifest: Manifest, folder: Path, files: Mapping[str, str], run: Path) -> None:
    if name := changed_file(folder, files):
        what = "differs from its digest" if (folder / name).is_file() else "is missing"
        raise _damaged(run, manifest.step, f"{name} {what}")


def _check_structure(manifest: Manifest, arrays: Mapping[str, str], like: Any, run: Path) -> None:
    if different := first_difference(described_kinds(arrays), kinds(like)):
        path, there, here = different
        raise UserError(
            f"The checkpoint of step {manifest.step} in {run} belongs to another model or optimizer: {path} is "
            f"{there} there and {here} here; choose another run folder."
        )
