"""The folder of a run, which belongs to one configuration, and the model that was trained in it.

    model, params, tokenizer, *_ = load_run(Path("runs/hope-tiny"))

``config.json`` holds the whole configuration, so that the folder is all that is needed to go on or to use the model.
Read ``folder.py`` next: it lets one program at a time write there; then ``checkpoint.py``: it fills the folder.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from hope_jax.config import TRUSTED, Json, check_same, flatten, flatten_json, from_json
from hope_jax.data import Tokenizer, read_tokenizer
from hope_jax.errors import UserError, whole
from hope_jax.models import LanguageModel, ModelConfig
from hope_jax.storage.digests import read_sealed, write_file
from hope_jax.train import checkpoint
from hope_jax.train.checkpoint import DamagedCheckpoint, Manifest
from hope_jax.train.optimizer import OptimizerConfig
from hope_jax.train.processes import found_by_first
from hope_jax.train.schedules import COSINE, Schedule
from hope_jax.train.step import TrainState, abstract_params

CONFIG_FILE = "config.json"
TOKENIZER = "tokenizer.json"  # runs on bytes have none
MAY_CHANGE = "may_change"
"""Metadata that mark a field of a configuration: it may have another value when a run goes on."""
Read = TypeVar("Read")


@dataclass(frozen=True)
class TextRun:
    """All that decides what a language model learns, up to rounding, except the number of steps.

    A run goes on only with equal values of all fields except ``spike``, which may be changed while it trains.

    ``batch`` sequences of ``length`` tokens; ``seed``: of the initial parameters and the order of the text;
    ``text_fingerprint``: of the text and its held-out part; ``stage_one``: the saved step of another run that
    the parameters come from, such as ``tnt/checkpoints/400``; None: they are initial ones. ``schedule``: of the
    learning rate. ``z_loss``: weight of the z-loss, see ``next_token_loss``. ``spike``: as in ``Setup``.
    """

    model: ModelConfig
    optimizer: OptimizerConfig
    batch: int
    length: int
    seed: int
    text_fingerprint: str
    tokenizer_fingerprint: str
    stage_one: str | None = None
    schedule: Schedule = COSINE
    z_loss: float = 0.0
    spike: float | None = field(default=None, metadata={MAY_CHANGE: True})


@dataclass(frozen=True)
class Run:
    """Where a run is kept, and what it is.

    Attributes:
      folder: held by ``open_run`` (``folder.py``).
      config: all that decides what is learned, except the number of steps; anything that ``hope_jax.config`` can
        write. A run is continued only with an equal one; fields whose metadata have ``MAY_CHANGE`` may differ.
      keep: checkpoints to keep, at least 2, so that a damaged one has a good one before it.
      keep_every: checkpoints whose step is a multiple of it are kept, too; None: no others are.
      save_minutes: at most so many minutes lie between two checkpoints; None: there is no such limit.
      resume_from: a saved step to go back to; None: the latest.
      profile: steps that are recorded with JAX's profiler, see ``profile.py``; None: no steps.
    """

    folder: Path
    config: Any
    keep: int = 3
    resume_from: int | None = None
    profile: range | None = None
    keep_every: int | None = None
    save_minutes: float | None = None

    def __post_init__(self) -> None:
        whole("keep", self.keep, 2, "checkpoints")
        if self.keep_every is not None:
            whole("keep_every", self.keep_every, 1, "steps")
        if self.save_minutes is not None and not self.save_minutes > 0:
            raise UserError(f"save_minutes is {self.save_minutes}; give a number above 0.")


def read_config(folder: Path) -> Json:
    """The configuration of a run that has saved steps, as JSON. Raises UserError where it is missing or damaged."""
    try:
        return read_sealed(folder / CONFIG_FILE)
    except FileNotFoundError as error:
        raise UserError(
            f"The run in {folder} was written by an earlier version of hope_jax and has no {CONFIG_FILE}; train it "
            "anew in another run folder."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / CONFIG_FILE} is damaged, so the run cannot be used; put a copy of it back or train it anew."
        ) from error


def resume(run: Run, like: TrainState) -> tuple[TrainState, Manifest]:
    """State and manifest of the step to go on from: ``run.resume_from``, or else the latest good saved step.

    ``like``: as in ``restore``. Raises DamagedCheckpoint, naming what is damaged, where that step or every step is;
    UserError, naming the fields that differ, where the folder belongs to another configuration.
    """
    saved = flatten_json(found_by_first(functools.partial(read_config, run.folder)))
    saved, now = (_without_changes(run.config, values) for values in (saved, flatten(run.config)))
    check_same(saved, now, run.folder)

    def read(step: int) -> tuple[TrainState, Manifest]:
        manifest = checkpoint.read_manifest(run.folder, step)
        return checkpoint.restore_from(run.folder, manifest, like), manifest

    return _read_step(run.folder, run.resume_from, read, "Leave out --resume-from to go on from the latest good step.")


def _without_changes(config: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The ``flatten``ed values without those that may change."""
    fields = dataclasses.fields(config) if dataclasses.is_dataclass(config) else ()
    changing = {field.name for field in fields if MAY_CHANGE in field.metadata}
    return {name: value for name, value in values.items() if name not in changing}


def _read_step(run: Path, wanted: int | None, read: Callable[[int], Read], advice: str) -> Read:
    """What ``read`` returns for the step ``wanted``; None: for the latest saved step that is good."""
    if wanted is None:
        found = checkpoint.latest_good(run, read)
        assert found is not None
        return found
    try:
        return read(wanted)
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(f"{error} {advice}") from error


class Trained(NamedTuple):
    """A model with its parameters and tokenizer, and the folder and step it comes from."""

    model: LanguageModel
    params: Any
    tokenizer: Tokenizer
    run: Path
    step: int


def load_run(folder: Path, trusted: Sequence[str] = TRUSTED) -> Trained:
    """The latest good step of a run folder, or the step that ``RUN/checkpoints/STEP`` names.

    Damaged steps are named on stderr and skipped.

    ``trusted``: packages whose classes and functions the model may be made of, see ``hope_jax.config``.

    Raises UserError where there is no such step, it is damaged, its configuration cannot be read by this version or is
    no ``TextRun``, or its tokenizer is missing.
    """
    run, wanted = named_step(folder)
    if checkpoint.find_step(run, wanted) is None:
        raise UserError(f"There is no trained model in {run}; give the --run folder of a pretrain command.")
    config = load_config(run, trusted)
    model, tokenizer = LanguageModel(config.model), _tokenizer(run, config)
    like = abstract_params(model)

    def read(step: int) -> Trained:
        return Trained(model, checkpoint.restore_params(run, step, like), tokenizer, run, step)

    return _read_step(run, wanted, read, f"Give {run} alone to use its latest good step.")


def named_step(folder: Path) -> tuple[Path, int | None]:
    """The run folder and the step that ``RUN/checkpoints/STEP`` names; for a run folder alone the step is None."""
    if folder.name.isdecimal() and folder.absolute().parent.name == checkpoint.FOLDER:
        return folder.absolute().parent.parent, int(folder.name)
    return folder, None


def load_config(run: Path, trusted: Sequence[str] = TRUSTED) -> TextRun:
    """The configuration of a run with saved steps; ``trusted`` as in ``load_run``. UserError if it cannot be read."""
    try:
        return from_json(read_config(run), TextRun, trusted)
    except UserError as error:
        raise UserError(f"The run in {run} cannot be loaded: {error}") from error


def _tokenizer(run: Path, config: TextRun) -> Tokenizer:
    file = run / TOKENIZER
    found = read_tokenizer(file if file.exists() else None)
    if found.fingerprint != config.tokenizer_fingerprint:
        what = "that file" if file.exists() else "bytes"
        raise UserError(
            f"The run in {run} was trained with another tokenizer than {what}: put its JSON file at {file}."
        )
    return found


def keep_tokenizer(run: Path, file: str | Path | None) -> None:
    """Copy the tokenizer's file into the run folder, which then holds all that is needed; None: bytes, without a file.

    A run with saved steps keeps the file that it has, even if ``file`` is another one: ``resume`` compares them.
    """
    kept = run / TOKENIZER
    if kept.exists() and checkpoint.saved_steps(run):
        return
    if file is None:
        kept.unlink(missing_ok=True)  # left by an attempt that saved no step
        return
    write_file(kept, Path(file).expanduser().read_bytes())
