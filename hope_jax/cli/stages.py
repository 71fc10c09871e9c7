"""``pretrain --stage-two RUN``: what a run has learned goes on in a run of its own, with other periods."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

from hope_jax import ModelConfig
from hope_jax.data import Tokenizer
from hope_jax.errors import UserError
from hope_jax.models.stages import with_local_period
from hope_jax.train.checkpoint import FOLDER, saved_steps
from hope_jax.train.processes import count, found_by_first
from hope_jax.train.run import load_config, load_run, named_step


def check_stage(run: Path, stage_two: Path | None, period: int | None, others: bool) -> None:
    """Raise UserError where the flags do not belong together; ``others``: flags that would change the parameters."""
    if (stage_two is None) != (period is None):
        raise UserError(
            "--stage-two and --local-period belong together: the run to go on from, and its new local period."
        )
    if stage_two is not None and others:
        raise UserError("--stage-two takes the model of that run as it is; leave out --model and --cms.*.")
    if stage_two is not None and stage_two.absolute() == run.absolute():
        raise UserError(f"--stage-two needs a run of its own: give another --run than {run}.")


class Stage(NamedTuple):
    """The model of a run; ``origin``: ``TextRun.stage_one``; ``params``: to begin with, None: initial ones."""

    model: ModelConfig
    origin: str | None = None
    params: Any = None


def begin(run: Path, stage_two: Path, period: int, tokenizer: Tokenizer) -> Stage:
    """The second stage of the run ``stage_two`` in the folder ``run``.

    A second stage that has saved steps has its own parameters: the run before it may have been moved. Raises UserError
    where there is no such run, it is no TNT model, or its tokenizer is another one.
    """
    if found_by_first(functools.partial(saved_steps, run)):
        return _go_on(run, stage_two, period)
    if count() > 1:
        raise UserError("--stage-two begins in one process; several can go on with it when it has saved a step.")
    before = load_run(stage_two)
    if before.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(f"The run in {stage_two} has another tokenizer; give the same --data.tokenizer.")
    return Stage(with_local_period(before.model.config, period), _origin(before.run, before.step), before.params)


def _go_on(run: Path, stage_two: Path, period: int) -> Stage:
    """A stage that has begun, as the flags describe it; ``train.run.resume`` checks that it is the same."""
    config, (before, step) = found_by_first(functools.partial(load_config, run)), named_step(stage_two)
    if config.stage_one is None:
        raise UserError(f"The run in {run} has begun without --stage-two; leave it out or give another --run.")
    began = int(Path(config.stage_one).name)  # from this step, where the flags name none
    return Stage(with_local_period(config.model, period), _origin(before, began if step is None else step))


def _origin(run: Path, step: int) -> str:
    return f"{run.absolute().name}/{FOLDER}/{step}"
