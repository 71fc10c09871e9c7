"""A trained model as one portable file, and back as a run folder; ``docs/model_file.md`` has the layout.

The file holds what using the model needs: its configuration, its tokenizer and its parameters, each with its digest. It
holds nothing of the optimizer: an imported model can be used, but training cannot go on.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from hope_jax.config import from_json, to_json
from hope_jax.errors import UserError
from hope_jax.models import LanguageModel
from hope_jax.storage.digests import first_difference, kinds, leaves, write_file, write_sealed
from hope_jax.storage.tensor_file import Foreign, NotWhole, read_tensors, write_tensors
from hope_jax.train.checkpoint import saved_steps
from hope_jax.train.folder import open_run
from hope_jax.train.run import CONFIG_FILE, TOKENIZER, TextRun, Trained, load_config
from hope_jax.train.saving import save_params
from hope_jax.train.step import abstract_params

VERSION = 1
"""Version of the layout; a file of another version is refused."""


class Portable(NamedTuple):
    """A model outside of a run folder: its configuration, parameters, step, and the JSON of its tokenizer, if any."""

    config: TextRun
    params: Any
    step: int
    tokenizer: str | None


def portable(trained: Trained) -> Portable:
    """A trained model of a run folder."""
    tokenizer = trained.run / TOKENIZER
    text = tokenizer.read_text(encoding="utf-8") if tokenizer.exists() else None
    return Portable(load_config(trained.run), trained.params, trained.step, text)


def write_model(path: Path, model: Portable) -> None:
    """Write a model as file ``path``. Raises UserError where something is there or it cannot be written."""
    if path.exists():
        raise UserError(f"{path} is there already; choose another file.")
    about = {
        "version": VERSION,
        "config": to_json(model.config),
        "step": model.step,
        "tokenizer": model.tokenizer,
    }
    tensors: dict[str, Any] = dict(leaves(jax.tree.map(np.asarray, model.params)))
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, about)
    except (OSError, NotWhole) as error:
        raise UserError(f"{path} could not be written ({error}); choose another file.") from error


def read_model(path: Path) -> Portable:
    """The model in a file. Raises UserError if ``write_model`` did not write the file, or if it was altered since."""
    try:
        tensors, about = read_tensors(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from error
    except Foreign as error:
        raise UserError(f"{path} is no exported model: {error}.") from error
    except NotWhole as error:
        raise UserError(f"{path} is damaged: {error}.") from error
    if "config" not in about:
        raise UserError(f"{path} is no exported model; expected a file of `checkpoint export`.")
    if about["version"] != VERSION:
        raise UserError(f"{path} has layout {about['version']}; this version of hope_jax reads {VERSION}.")
    params = traverse_util.unflatten_dict({name: jnp.asarray(tensor) for name, tensor in tensors.items()}, sep="/")
    return Portable(from_json(about["config"], TextRun), params, about["step"], about["tokenizer"])


def make_run(folder: Path, model: Portable, origin: str) -> None:
    """Make a run folder with one saved step that has parameters alone; ``origin``: where the model comes from.

    Raises UserError where the parameters are not those of the configuration, or the folder holds something already.
    """
    expected = kinds(abstract_params(LanguageModel(model.config.model)))
    if different := first_difference(kinds(model.params), expected):
        name, there, here = different
        raise UserError(f"{origin} has {name} as {there}; its configuration needs {here}.")
    with open_run(folder, "--run") as run:
        if saved_steps(run) or (run / CONFIG_FILE).exists():
            raise UserError(f"The folder {folder} holds a run already; choose a new --run.")
        write_sealed(run / CONFIG_FILE, to_json(model.config))
        if model.tokenizer is not None:
            write_file(run / TOKENIZER, model.tokenizer.encode())
        save_params(run, model.step, model.params, {"origin": origin})
