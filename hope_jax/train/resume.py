"""Going on from a saved step: which one, whether it belongs to this configuration, and what to do if it is damaged.

Read ``checkpoint.py`` next: it knows what is saved and whether it is whole.
"""

from pathlib import Path

from hope_jax.config import check_same, flatten, flatten_json
from hope_jax.errors import UserError
from hope_jax.train.checkpoint import DamagedCheckpoint, Manifest, last_good, read_manifest, restore, saved_steps
from hope_jax.train.run import Run, read_config
from hope_jax.train.state import TrainState


def step_to_resume(run: Path, wanted: int | None, steps: int) -> int | None:
    """The saved step to go on from: ``wanted`` or else the latest; None to start at the beginning.

    Raises:
        UserError: ``wanted`` is not saved, or the step lies beyond the ``steps`` that the run is to have.
    """
    saved = saved_steps(run)
    if wanted is not None and wanted not in saved:
        raise UserError(f"There is no saved step {wanted} in {run}; saved steps: {saved or 'none'}.")
    step = wanted if wanted is not None else max(saved, default=None)
    if step is not None and step > steps:
        raise UserError(
            f"The run in {run} is at step {step} already, beyond --steps {steps}: raise --steps, or go back with "
            "--resume-from."
        )
    return step


def resume(run: Run, step: int, like: TrainState) -> tuple[TrainState, Manifest]:
    """The state and manifest of a saved step of ``run``; ``like`` as in ``restore``.

    Raises:
        DamagedCheckpoint: naming what is damaged and the last step before it that is not.
        UserError: the folder belongs to another configuration; the fields that differ are named.
    """
    check_same(flatten_json(read_config(run.folder)), flatten(run.config), run.folder)
    try:
        return restore(run.folder, step, like), read_manifest(run.folder, step)
    except DamagedCheckpoint as error:
        good = last_good(run.folder, step, like)
        advice = "No earlier step is good." if good is None else f"Step {good} is good: add --resume-from {good}."
        raise DamagedCheckpoint(f"{error} {advice}") from error
