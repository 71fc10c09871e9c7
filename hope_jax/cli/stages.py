"""``pretrain --stage-two RUN``: what a run has learned goes on in a run of its own, with other periods."""

from pathlib import Path
from typing import Any

from hope_jax import ModelConfig
from hope_jax.data import Tokenizer
from hope_jax.errors import UserError
from hope_jax.models.stages import with_local_period
from hope_jax.train.run import load_run


def check_stage(run: Path, stage_two: Path | None, period: int | None, others: bool) -> None:
    """Raise UserError where the flags do not belong together; ``others``: flags that would change the parameters."""
    if (stage_two is None) != (period is None):
        raise UserError("--stage-two and --period belong together: the run to go on from, and its new local period.")
    if stage_two is not None and others:
        raise UserError("--stage-two takes the model of that run as it is; leave out --model and --cms.*.")
    if stage_two is not None and stage_two.absolute() == run.absolute():
        raise UserError(f"--stage-two needs a run of its own: give another --run than {run}.")


def begin(stage_two: Path, period: int, tokenizer: Tokenizer) -> tuple[ModelConfig, Any]:
    """The model of the second stage, and the parameters it begins with.

    Raises UserError where there is no such run, it is no TNT model, or its tokenizer is another one.
    """
    before = load_run(stage_two)
    if before.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(f"The run in {stage_two} has another tokenizer; give the same --data.tokenizer.")
    return with_local_period(before.model.config, period), before.params
