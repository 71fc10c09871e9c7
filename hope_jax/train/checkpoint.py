"""Checkpoints that are whole or not there, and that say when they are damaged.

A step is a folder ``checkpoints/<step>`` written by orbax, with the parameters and the rest of the state apart, plus
``manifest.json``: the data position, and digests of every array and every file. The manifest is written last,
atomically, and only after the step was read back and found equal (if one process trains: of several none has the whole
state); a step without a manifest was never finished. Orbax loads flipped bytes without a word and answers truncated
files with pages of logs, so files are compared with their digests before orbax reads them, and arrays after. Read
``saving.py`` next: it writes what is read here.
"""

import contextlib
import functools
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from hope_jax.errors import UserError
from hope_jax.storage import digests
from hope_jax.storage.array_digests import describe_parts
from hope_jax.train.processes import count, found_by_first, is_first, seen_by_all
from hope_jax.train.step import TrainState

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
PARAMS, REST = "params", "training"  # what using a model needs, and what only training it further needs
LAYOUT = 3
"""Version of what is described here; steps of another version are refused."""

Read = TypeVar("Read")


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
    layout: int = LAYOUT


def saved_steps(run: Path) -> list[int]:
    """Finished steps of a run folder, ascending. They may be damaged: ``check`` and ``restore`` find that out."""
    folders = (run / FOLDER).glob(f"*/{MANIFEST}")
    return sorted(int(path.parent.name) for path in folders if path.parent.name.isdecimal())


def find_step(run: Path, wanted: int | None) -> int | None:
    """``wanted``, or else the latest saved step, or else None. Raises UserError if ``wanted`` is not saved."""
    saved = saved_steps(run)
    if wanted is not None and wanted not in saved:
        raise UserError(f"There is no saved step {wanted} in {run}; saved steps: {saved or 'none'}.")
    return max(saved, default=None) if wanted is None else wanted


def latest_good(run: Path, read: Callable[[int], Read]) -> Read | None:
    """What ``read`` returns for the latest step that is not damaged; None: no step is saved.

    Damaged steps are named on stderr. Raises DamagedCheckpoint where all are. Several processes try the same steps.
    """
    saved, problem = found_by_first(functools.partial(saved_steps, run)), None
    for step in reversed(saved):
        try:
            return read(step)
        except DamagedCheckpoint as error:
            problem = error
            if is_first():
                tqdm.write(f"{error} It is skipped.", file=sys.stderr)
    if problem is not None:
        raise DamagedCheckpoint(f"{problem} No earlier step is good: put a copy of one back, or begin a new run.")
    return None


def read_manifest(run: Path, step: int) -> Manifest:
    """The manifest of a saved step, as process 0 finds it.

    Raises DamagedCheckpoint if it does not parse or differs from its own digest, UserError if it has another layout.
    """
    return found_by_first(functools.partial(_own_manifest, run, step))


def _own_manifest(run: Path, step: int) -> Manifest:
    """The manifest as this process finds it."""
    try:
        body = digests.read_sealed(run / FOLDER / str(step) / MANIFEST)
        layout = body.get("layout", 1)
        if layout == LAYOUT and body["step"] != step:
            raise ValueError("step")  # the folder was given another number
        if layout == LAYOUT:
            return Manifest(**body)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(run, step, f"{MANIFEST} was altered") from error
    raise UserError(
        f"The checkpoint of step {step} in {run} has layout {layout}; this version of hope_jax reads {LAYOUT}: use the "
        "version that wrote it, or begin a new run."
    )


def check(run: Path, step: int) -> Manifest:
    """The manifest of a saved step, after comparing its files with their digests.

    Raises as ``read_manifest``, and DamagedCheckpoint, naming the file, where one differs or is missing.
    """
    manifest = read_manifest(run, step)
    _check_files(run, manifest, manifest.files)
    return manifest


def restore(run: Path, step: int, like: TrainState) -> TrainState:
    """The state of a saved step, placed as ``like`` (shapes with shardings), bit for bit as it was saved.

    Raises DamagedCheckpoint where a file or an array differs from its digest, UserError where the arrays are not those
    of ``like`` (another model or optimizer).
    """
    return restore_from(run, read_manifest(run, step), like)


def restore_from(run: Path, manifest: Manifest, like: TrainState) -> TrainState:
    """``restore`` of the step whose manifest was read."""
    parts = read_parts(run, manifest, parted(like))
    return TrainState(params=parts[PARAMS], **parts[REST])


def restore_params(run: Path, step: int, like: Any) -> Any:
    """The parameters alone of a saved step, placed as ``like``. Raises as ``restore``."""
    return read_parts(run, read_manifest(run, step), {PARAMS: like})[PARAMS]


def parted(state: TrainState) -> dict[str, Any]:
    """A state as orbax writes it: each part in a folder of its own."""
    return {PARAMS: state.params, REST: {name: part for name, part in vars(state).items() if name != PARAMS}}


def read_parts(run: Path, manifest: Manifest, like: dict[str, Any]) -> dict[str, Any]:
    """The parts that ``like`` names, compared with the manifest. Raises as ``restore``."""
    unread = {PARAMS, REST} - like.keys()
    arrays, files = (
        {name: entry for name, entry in entries.items() if name.split("/")[0] not in unread}
        for entries in (manifest.arrays, manifest.files)
    )
    if like.keys() - {name.split("/")[0] for name in manifest.arrays}:
        raise UserError(
            f"The checkpoint of step {manifest.step} in {run} holds parameters alone, as imported models do: it can be "
            "used, but not trained on."
        )
    _check_files(run, manifest, files)
    seen_by_all(functools.partial(_sees, run, manifest), f"The checkpoint of step {manifest.step} in {run}")
    saved_kinds = {name: entry.rsplit(" ", 1)[0] for name, entry in arrays.items()}  # without the digests
    if different := digests.first_difference(saved_kinds, digests.kinds(like)):
        path, there, here = different
        raise UserError(
            f"The checkpoint of step {manifest.step} in {run} belongs to another model or optimizer: {path} is "
            f"{there} there and {here} here; choose another run folder."
        )
    try:
        with plain_path(run / FOLDER / str(manifest.step)) as place:
            parts = ocp.load_checkpointables(place, like)
    except Exception as error:  # Orbax reports unreadable files by many classes; each means the same here.
        problem = _damaged(run, manifest.step, f"orbax cannot read it ({error})")
        # Of several processes others may have read it: an earlier step would part this one from them.
        raise (problem if count() == 1 else UserError(str(problem))) from error
    if different := digests.first_difference(arrays, describe_parts(parts)()):
        raise _damaged(run, manifest.step, f"{different[0]} differs from its digest")
    return parts


def _check_files(run: Path, manifest: Manifest, files: dict[str, str]) -> None:
    """Process 0 reads the files, and all hear what it found."""

    def compare() -> None:
        folder = run / FOLDER / str(manifest.step)
        if name := digests.changed_file(folder, files):
            what = "differs from its digest" if (folder / name).is_file() else "is missing"
            raise _damaged(run, manifest.step, f"{name} {what}")

    found_by_first(compare)


def _sees(run: Path, manifest: Manifest) -> bool:
    """Whether the step is on the disk as this process sees it."""
    folder = run / FOLDER / str(manifest.step)
    with contextlib.suppress(UserError):
        same = _own_manifest(run, manifest.step) == manifest
        return same and all((folder / name).exists() for name in manifest.files)
    return False


def _damaged(run: Path, step: int, reason: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"The checkpoint of step {step} in {run} is damaged: {reason}.")


def unfinished(run: Path, after: float = math.inf) -> list[Path]:
    """Folders of steps that were not saved to the end, and of all steps later than ``after``."""
    kept = {str(step) for step in saved_steps(run) if step <= after}
    return [path for path in sorted((run / FOLDER).glob("*")) if path.name.isdecimal() and path.name not in kept]


def set_aside(run: Path, after: int) -> list[Path]:
    """Move later steps than ``after``, and unfinished saves, out of the way.

    Nothing is deleted; returns the new places, ``set_aside/<step>`` with a number where that is taken.
    """
    return [_move_to(run / "set_aside", path) for path in unfinished(run, after)]


def _move_to(place: Path, path: Path) -> Path:
    place.mkdir(exist_ok=True)
    names = [path.name, *(f"{path.name}-{i}" for i in range(1, 10_000))]
    return path.rename(next(place / name for name in names if not (place / name).exists()))


@contextlib.contextmanager
def plain_path(folder: Path) -> Iterator[str]:
    """A path of ``folder`` that orbax cannot read as a pattern: its own, or a link to it where its own is not plain.

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
