"""The folder of a run: one writer at a time, writable before training starts, and belonging to one configuration.

``config.json`` holds the whole configuration, so that the folder is all that one needs to go on or to use the model.
Read ``checkpoint.py`` next: it fills the folder.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hope_jax.config import Json, to_json
from hope_jax.errors import UserError
from hope_jax.nn.config import ModelConfig
from hope_jax.storage.digests import read_sealed, write_sealed
from hope_jax.storage.locks import hold
from hope_jax.train.checkpoint import FOLDER
from hope_jax.train.optimizer import OptimizerConfig
from hope_jax.train.record import METRICS_FILE

LOCK_FILE = ".lock"
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class TextRun:
    """All that decides what a language model learns, up to rounding, but for the number of steps.

    Attributes:
      model: the whole model, whether it has a name or not.
      optimizer: the training optimizer.
      batch, length: sequences per batch, tokens per sequence.
      seed: of the initial parameters and the order of the text.
      text_fingerprint: of the text and its held-out part.
      tokenizer_fingerprint: of the tokenizer.
    """

    model: ModelConfig
    optimizer: OptimizerConfig
    batch: int
    length: int
    seed: int
    text_fingerprint: str
    tokenizer_fingerprint: str


@dataclass(frozen=True)
class Run:
    """Where a run is kept, and what it is.

    Attributes:
      folder: the run folder, held by ``open_run``.
      config: all that decides what is learned, but for the number of steps; anything that ``hope_jax.config`` can
        write. A run is continued with an equal one only.
      keep: checkpoints to keep, at least 2, so that a damaged one has a good one before it.
      resume_from: a saved step to go back to; None: the latest.
    """

    folder: Path
    config: Any
    keep: int = 3
    resume_from: int | None = None

    def __post_init__(self) -> None:
        if self.keep < 2:
            raise UserError(f"keep is {self.keep}; expected at least 2 checkpoints")


@contextlib.contextmanager
def open_run(folder: Path) -> Iterator[Path]:
    """Create or reopen a run folder and hold it for this process.

    Raises:
        UserError: it cannot be written, holds something that is not a run, or another process trains in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(folder)
        # A whole block, so that a full disk is noticed and not only a forbidden one.
        (folder / LOCK_FILE).write_bytes(b"\0" * 4096)
        lock = (folder / LOCK_FILE).open("r+b")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"The run folder {folder} cannot be written ({reason}); choose another --run.") from error
    with lock:
        hold(lock, f"Another process is training in {folder}; wait for it or choose another --run.")
        yield folder


def _refuse_foreign(folder: Path) -> None:
    known = {LOCK_FILE, FOLDER, METRICS_FILE, CONFIG_FILE}
    inside = {path.name for path in folder.iterdir()}
    if inside and not inside & known:
        raise UserError(f"The folder {folder} holds {min(inside)} but no run; choose an empty or new --run folder.")


def write_config(folder: Path, config: Any) -> None:
    """Write ``config`` as the configuration of the run."""
    write_sealed(folder / CONFIG_FILE, to_json(config))


def read_config(folder: Path) -> Json:
    """The configuration of a run that has saved steps, as JSON.

    Raises:
        UserError: it is damaged, or the run was written by a version that kept none.
    """
    try:
        return read_sealed(folder / CONFIG_FILE)
    except FileNotFoundError as error:
        raise UserError(
            f"The run in {folder} was written by an earlier version of hope_jax and has no {CONFIG_FILE}; train it "
            "anew in another --run folder."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / CONFIG_FILE} is damaged, so the run cannot be used; put a copy of it back or train it anew."
        ) from error
