"""Checkpoints that are whole or not there, and that say when they are damaged.

A step is a folder ``checkpoints/<step>`` written by orbax, with the parameters and the rest of the state apart, plus
``manifest.json``: the data position, and digests of every array and every file. The manifest is written last,
atomically, and only after the step was read back and found equal; a step without one was never finished. Orbax loads
flipped bytes without a word and answers truncated files with pages of logs, so files are compared with their digests
before orbax reads them, and arrays after. Read ``loop.py`` next.
"""

import contextlib
import functools
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from hope_jax.errors import UserError
from hope_jax.storage import digests
from hope_jax.train.devices import shape_at
from hope_jax.train.step import TrainState, count_bytes

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
PARAMS, REST = "params", "training"  # what using a model needs, and what only training it further needs


class DamagedCheckpoint(UserError):
    """A saved step whose bytes are not those that were written; the message names what differs."""


@dataclass(frozen=True)
class Manifest:
    """What is saved beside the arrays of a step.

    ``data``: the position of the batches. ``about``: how the run was planned when it was saved, such as its number of
    steps. ``arrays``: path of each in the state -> dtype, shape, digest. ``files``: path in the folder -> digest.
    """

    step: int
    data: dict[str, Any]
    about: dict[str, Any]
    arrays: dict[str, str]
    files: dict[str, str]


def saved_steps(run: Path) -> list[int]:
    """Finished steps of a run folder, ascending; whether they are undamaged only ``restore`` knows."""
    folders = (run / FOLDER).glob(f"*/{MANIFEST}")
    return sorted(int(path.parent.name) for path in folders if path.parent.name.isdecimal())


def find_step(run: Path, wanted: int | None) -> int | None:
    """``wanted``, or else the latest saved step, None if there is none. Raises UserError if ``wanted`` is not saved."""
    saved = saved_steps(run)
    if wanted is not None and wanted not in saved:
        raise UserError(f"There is no saved step {wanted} in {run}; saved steps: {saved or 'none'}.")
    return max(saved, default=None) if wanted is None else wanted


def read_manifest(run: Path, step: int) -> Manifest:
    """The manifest of a saved step. Raises DamagedCheckpoint if it does not parse or differs from its own digest."""
    try:
        return Manifest(**digests.read_sealed(run / FOLDER / str(step) / MANIFEST))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(run, step, f"{MANIFEST} was altered") from error


def restore(run: Path, step: int, like: TrainState) -> TrainState:
    """The state of a saved step, placed as ``like`` (shapes with shardings), bit for bit as it was saved.

    Raises DamagedCheckpoint where a file or an array differs from its digest, UserError where the arrays are not those
    of ``like`` (another model or optimizer).
    """
    parts = _read(run, read_manifest(run, step), _parted(like))
    return TrainState(params=parts[PARAMS], **parts[REST])


def restore_params(run: Path, step: int, like: Any) -> Any:
    """The parameters alone of a saved step, placed as ``like``. Raises as ``restore``."""
    return _read(run, read_manifest(run, step), {PARAMS: like})[PARAMS]


def _parted(state: TrainState) -> dict[str, Any]:
    """A state as orbax writes it: each part in a folder of its own."""
    return {PARAMS: state.params, REST: {name: part for name, part in vars(state).items() if name != PARAMS}}


def _read(run: Path, manifest: Manifest, like: dict[str, Any]) -> dict[str, Any]:
    """The parts that ``like`` names, compared with the manifest."""
    folder, unread = run / FOLDER / str(manifest.step), {PARAMS, REST} - like.keys()
    arrays, files = (
        {name: entry for name, entry in entries.items() if name.split("/")[0] not in unread}
        for entries in (manifest.arrays, manifest.files)
    )
    if name := digests.changed_file(folder, files):
        what = "differs from its digest" if (folder / name).is_file() else "is missing"
        raise _damaged(run, manifest.step, f"{name} {what}")
    saved_kinds = {name: entry.rsplit(" ", 1)[0] for name, entry in arrays.items()}  # without the digests
    if different := digests.first_difference(saved_kinds, digests.kinds(like)):
        path, there, here = different
        raise UserError(
            f"The checkpoint of step {manifest.step} in {run} belongs to another model or optimizer: {path} is "
            f"{there} there and {here} here; choose another run folder."
        )
    try:
        with plain_path(folder) as place:
            parts = ocp.load_checkpointables(place, like)
    except Exception as error:  # Orbax reports unreadable files by many classes; each means the same here.
        raise _damaged(run, manifest.step, f"orbax cannot read it ({error})") from error
    if different := digests.first_difference(arrays, digests.describe(parts)):
        raise _damaged(run, manifest.step, f"{different[0]} differs from its digest")
    return parts


def _damaged(run: Path, step: int, reason: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"The checkpoint of step {step} in {run} is damaged: {reason}.")


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
    strays = [path for path in sorted((run / FOLDER).glob("*")) if path.name.isdecimal() and path.name not in kept]
    return [_move_to(run / "set_aside", path) for path in strays]


def _move_to(place: Path, path: Path) -> Path:
    place.mkdir(exist_ok=True)
    names = [path.name, *(f"{path.name}-{i}" for i in range(1, 10_000))]
    return path.rename(next(place / name for name in names if not (place / name).exists()))


def save(run: Path, state: TrainState, data: Mapping[str, Any], about: Mapping[str, Any], keep: int) -> None:
    """Save a state as step ``state.step``: on disk and read back when this returns.

    ``data``, ``about``: as in ``Manifest``. ``keep``: how many steps stay, at least 2; the oldest are removed.

    Raises UserError where it could not be written or reads otherwise; the steps saved before are untouched.
    """
    step, parts = int(state.step), _parted(state)
    folder = run / FOLDER / str(step)
    try:
        folder.parent.mkdir(exist_ok=True)
        with plain_path(folder.parent) as place:
            ocp.save_checkpointables(f"{place}/{step}", parts)
        arrays, files = digests.describe(parts), digests.digest_files(folder, MANIFEST)
        manifest = Manifest(step, dict(data), dict(about), arrays, files)
        _read(run, manifest, _on_host(parts))
        digests.write_sealed(folder / MANIFEST, vars(manifest))
        _prune(run, keep)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"Step {step} could not be saved in {run} ({error}); saved steps: {saved_steps(run)}. "
            "Make room or repair the folder, then run the same command again."
        ) from error


def _on_host(parts: Any) -> Any:
    """Shapes like those of ``parts``, placed in the memory of this machine: reading back takes none of the device's."""
    place = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    return jax.tree.map(functools.partial(shape_at, place), parts)


def _prune(run: Path, keep: int) -> None:
    """Remove the oldest steps, now that one more is known to be good, and parts of saves that were killed."""
    for step in saved_steps(run)[:-keep]:
        folder = run / FOLDER / str(step)
        (folder / MANIFEST).unlink()  # first: what is half removed is not a saved step
        shutil.rmtree(folder, ignore_errors=True)
    for part in (run / FOLDER).glob("*.orbax-checkpoint-tmp"):
        shutil.rmtree(part, ignore_errors=True)


def check_room(run: Path, state: TrainState, keep: int) -> None:
    """Raise UserError unless ``keep`` checkpoints (and the one being written) of ``state`` fit on the disk."""
    each = count_bytes(state)
    need, free = each * max(1, keep + 1 - len(saved_steps(run))), shutil.disk_usage(run).free
    if free < need + 2**24:
        raise UserError(
            f"The disk of {run} has {free / 2**20:,.0f} MiB free, but checkpoints of {each / 2**20:,.0f} MiB need "
            f"{need / 2**20:,.0f} MiB: make room, choose another run folder or keep fewer of them."
        )


@contextlib.contextmanager
def plain_path(folder: Path) -> Iterator[str]:
    """A path of ``folder`` that orbax cannot take for a pattern: where its own is not plain, a link to it.

    Orbax reads brackets and backslashes in paths as patterns, and cannot write bytes that are not UTF-8.
    """
    folder = folder.absolute()
    if re.fullmatch(r"[\w/. +,=@~-]*", str(folder)):
        yield str(folder)
        return
    with tempfile.TemporaryDirectory(prefix="hope-jax-") as place:
        link = Path(place) / "run"
        link.symlink_to(folder, target_is_directory=True)
        yield str(link)
