"""Look at the saved steps of a run, and carry trained models to other places and programs.

    python -m hope_jax checkpoint verify --run runs/hope-tiny
    python -m hope_jax checkpoint show --run runs/hope-tiny --step 300
    python -m hope_jax checkpoint export --run runs/hope-tiny --file hope.safetensors
    python -m hope_jax checkpoint export --run runs/transformer --file folder --llama
    python -m hope_jax checkpoint import --run runs/imported --file hope.safetensors

``verify`` reads every file of every saved step, names those that are damaged, and exits with status 2 if there are any.
``export`` and ``import`` carry what using a model needs, and nothing of the optimizer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import tyro

from hope_jax import interop
from hope_jax import train as training
from hope_jax.cli.parse import parse
from hope_jax.config import flatten_json
from hope_jax.data import read_tokenizer
from hope_jax.errors import UserError
from hope_jax.train.checkpoint import FOLDER, PARAMS, DamagedCheckpoint, check, find_step, saved_steps, unfinished
from hope_jax.train.exchange import Portable, make_run, portable, read_model, write_model
from hope_jax.train.run import TOKENIZER, load_run, read_config


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Verify, show, export or import the saved steps of a run."""

    action: tyro.conf.Positional[Literal["verify", "show", "export", "import"]]  # What to do.
    run: Path  # Run folder; with import a new one.
    step: int | None = None  # A saved step. None: with verify all of them, else the latest that is good.
    file: Path | None = None
    """With export and import: a safetensors file; or a folder in the layout of Hugging Face, see --llama."""
    llama: bool = False
    """With export: write a Llama's config.json and model.safetensors into the folder --file. Import reads
    such folders without this flag, of every known architecture."""

    def __post_init__(self):
        carries = self.action in ("export", "import")
        if carries and self.file is None:
            raise UserError(f"The flag --file is missing: {self.action} needs it.")
        if not carries and self.file is not None:
            raise UserError(f"--file belongs to export and import; leave it out with {self.action}.")
        if self.llama and self.action != "export":
            raise UserError(f"--llama belongs to export; leave it out with {self.action}.")
        if self.action == "import" and self.step is not None:
            raise UserError("--step belongs to verify, show and export; an imported model has one step.")

    @property
    def source(self) -> Path:
        """The step, or the run folder for the latest good one."""
        return self.run if self.step is None else self.run / FOLDER / str(self.step)

    @property
    def place(self) -> Path:
        """Where to export to, or import from."""
        assert self.file is not None
        return self.file


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    config = parse(CheckpointConfig, arguments, "python -m hope_jax checkpoint")
    return {"verify": verify, "show": show, "export": export, "import": import_}[config.action](config)


def verify(config: CheckpointConfig) -> int:
    """Compare the files of saved steps with their digests; status 2 if one differs."""
    others, damaged = unfinished(config.run), 0
    saved = _steps(config, needed=not others)
    for step in saved if config.step is None else [config.step]:
        try:
            manifest = check(config.run, step)
            print(f"step {step}: good, {len(manifest.files)} files", flush=True)
        except DamagedCheckpoint as error:
            damaged += 1
            print(error, flush=True)
    for folder in others:
        print(f"step {folder.name}: was not finished, and does not count")
    return 2 if damaged else 0


def show(config: CheckpointConfig) -> int:
    """Print what a saved step holds."""
    steps = _steps(config)
    manifest = training.read_manifest(config.run, steps[-1] if config.step is None else config.step)
    about = ", ".join(f"{name} {value}" for name, value in manifest.about.items())
    fields = flatten_json(read_config(config.run))
    arrays = {name: entry.rsplit(" ", 1)[0] for name, entry in manifest.arrays.items()}
    params = {name: kind for name, kind in arrays.items() if name.startswith(f"{PARAMS}/")}
    count, others = (sum(map(_size, kinds.values())) for kinds in (params, arrays))
    print(f"saved steps: {' '.join(map(str, steps))}\nstep {manifest.step}: {about}")
    _print({name: value for name, value in fields.items() if name.startswith("model")} | params)
    print(f"{count:,} parameters, {others - count:,} numbers that only training needs")
    return 0


def _print(rows: Mapping[str, object]) -> None:
    width = max(map(len, rows)) + 2
    print("\n".join(f"{name:<{width}}{value}" for name, value in rows.items()))


def export(config: CheckpointConfig) -> int:
    """Write a saved step as a file, or as a Llama in a folder."""
    trained = load_run(config.source)
    if config.llama:
        interop.save_llama(config.place, trained.model.config, trained.params)
        tokenizer = trained.run / TOKENIZER
        if tokenizer.exists():
            (config.place / TOKENIZER).write_bytes(tokenizer.read_bytes())
    else:
        write_model(config.place, portable(trained))
    print(f"step {trained.step} of {trained.run} written to {config.place}")
    return 0


def import_(config: CheckpointConfig) -> int:
    """Make a run folder from a file, or from a folder in the layout of Hugging Face."""
    model = _from_hugging_face(config.place) if config.place.is_dir() else read_model(config.place)
    make_run(config.run, model, config.place.name)
    print(f"{config.place} is step {model.step} of {config.run}: it can be used, but not trained on")
    return 0


def _from_hugging_face(folder: Path) -> Portable:
    file = folder / TOKENIZER
    if not file.exists():
        raise UserError(f"{folder} has no {TOKENIZER}; put the tokenizer of the model there.")
    model, params = interop.load(folder, jnp.float32)
    fingerprint = read_tokenizer(file).fingerprint
    run = training.TextRun(model, training.OptimizerConfig(), 1, model.context, 0, "", fingerprint)
    return Portable(run, params, 0, file.read_text(encoding="utf-8"))


def _steps(config: CheckpointConfig, needed: bool = True) -> list[int]:
    """The saved steps. Raises UserError if a step is needed and none is saved, or if the chosen one is not saved."""
    if find_step(config.run, config.step) is None and needed:
        raise UserError(f"There is no saved step in {config.run}; give the --run folder of a pretrain command.")
    return saved_steps(config.run)


def _size(kind: str) -> int:
    """Numbers in an array whose dtype and shape are written like ``float32[3, 4]``."""
    return math.prod(int(count or 1) for count in kind[kind.index("[") + 1 : -1].split(", "))
