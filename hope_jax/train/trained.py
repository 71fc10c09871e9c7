"""A trained language model back from its run folder: the folder is all that one needs.

    model, params, tokenizer, *_ = load_run(Path("runs/hope-tiny"))

Read ``run.py`` and ``checkpoint.py`` next: they filled the folder.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hope_jax.config import TRUSTED, from_json
from hope_jax.data import DataConfig, Tokenizer, make_tokenizer
from hope_jax.errors import UserError
from hope_jax.models import LanguageModel
from hope_jax.train.checkpoint import FOLDER, restore_params, saved_steps
from hope_jax.train.run import TextRun, read_config
from hope_jax.train.state import abstract_params

TOKENIZER = "tokenizer.json"
"""File of a run folder; runs on bytes have none."""


class Trained(NamedTuple):
    """A model with its parameters and tokenizer, and the folder and step it comes from."""

    model: LanguageModel
    params: Any
    tokenizer: Tokenizer
    run: Path
    step: int


def load_run(checkpoint: Path, trusted: Sequence[str] = TRUSTED) -> Trained:
    """The latest step of a run folder, or the step that ``RUN/checkpoints/STEP`` names.

    ``trusted``: packages whose classes and functions the model may be made of, see ``hope_jax.config``.

    Raises:
        UserError: there is no such step, it is damaged, its configuration cannot be read by this version or is no
            ``TextRun``, or its tokenizer is missing.
    """
    run, step = _step(checkpoint)
    try:
        config: TextRun = from_json(read_config(run), TextRun, trusted)
    except UserError as error:
        raise UserError(f"The run in {run} cannot be loaded: {error}") from error
    model = LanguageModel(config.model)
    tokenizer = _tokenizer(run, config)
    return Trained(model, restore_params(run, step, abstract_params(model)), tokenizer, run, step)


def _step(checkpoint: Path) -> tuple[Path, int]:
    if checkpoint.name.isdigit() and checkpoint.absolute().parent.name == FOLDER:
        run, wanted = checkpoint.absolute().parent.parent, int(checkpoint.name)
    else:
        run, wanted = checkpoint, None
    saved = saved_steps(run)
    if not saved:
        raise UserError(f"There is no trained model in {run}; give the --run folder of a pretrain command.")
    if wanted is not None and wanted not in saved:
        raise UserError(f"There is no saved step {wanted} in {run}; saved steps: {saved}.")
    return run, max(saved) if wanted is None else wanted


def _tokenizer(run: Path, config: TextRun) -> Tokenizer:
    file = run / TOKENIZER
    found = make_tokenizer(DataConfig(tokenizer=str(file) if file.exists() else None))
    if found.fingerprint != config.tokenizer_fingerprint:
        what = "that file" if file.exists() else "bytes"
        raise UserError(
            f"The run in {run} was trained with another tokenizer than {what}: put its JSON file at {file}."
        )
    return found


def keep_tokenizer(run: Path, data: DataConfig) -> None:
    """Copy the tokenizer's file into the run folder, so that the folder is all that one needs."""
    kept = run / TOKENIZER
    if data.tokenizer is None or (kept.exists() and kept.samefile(Path(data.tokenizer).expanduser())):
        return
    part = kept.with_name(f"{TOKENIZER}.part")
    shutil.copyfile(Path(data.tokenizer).expanduser(), part)
    part.replace(kept)
