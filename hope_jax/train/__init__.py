"""Training: a pure step, a loop around it, checkpoints that can be trusted, and a record of what happened.

``fit`` is the way in: read ``fit.py``, ``setup.py``, ``step.py`` and ``loop.py`` in this order; ``checkpoint.py``,
``monitor.py``, ``record.py`` and ``interrupt.py`` are what the loop is handed.
"""

from hope_jax.errors import extra

with extra("train"):
    from hope_jax.train.batches import Batches, ComputedBatches, JoinedBatches
    from hope_jax.train.checkpoint import (
        DamagedCheckpoint,
        Manifest,
        Saver,
        check_room,
        last_good,
        read_manifest,
        restore,
        restore_params,
        saved_steps,
        set_aside,
    )
    from hope_jax.train.devices import cores, data_mesh, replicate, share, split_host
    from hope_jax.train.fit import Result, fit
    from hope_jax.train.interrupt import Interrupt
    from hope_jax.train.loop import Steps, run_steps
    from hope_jax.train.monitor import Diverged, Monitor
    from hope_jax.train.optimizer import OptimizerConfig, optimizer, schedule
    from hope_jax.train.record import Record, draw_curve, median_speed, read_rows
    from hope_jax.train.resume import resume, step_to_resume
    from hope_jax.train.run import Run, TextRun, open_run
    from hope_jax.train.setup import Heldout, Setup, at_rate, model_setup, text_setup
    from hope_jax.train.state import (
        TrainState,
        abstract_params,
        abstract_state,
        count_parameters,
        init_params,
        init_state,
    )
    from hope_jax.train.step import Mean, answer_loss, evaluator, next_token_loss, train_step

__all__ = [
    "Batches",
    "ComputedBatches",
    "DamagedCheckpoint",
    "Diverged",
    "Heldout",
    "Interrupt",
    "JoinedBatches",
    "Manifest",
    "Mean",
    "Monitor",
    "OptimizerConfig",
    "Record",
    "Result",
    "Run",
    "Saver",
    "Setup",
    "Steps",
    "TextRun",
    "TrainState",
    "abstract_params",
    "abstract_state",
    "answer_loss",
    "at_rate",
    "check_room",
    "cores",
    "count_parameters",
    "data_mesh",
    "draw_curve",
    "evaluator",
    "fit",
    "init_params",
    "init_state",
    "last_good",
    "median_speed",
    "model_setup",
    "next_token_loss",
    "open_run",
    "optimizer",
    "read_manifest",
    "read_rows",
    "replicate",
    "restore",
    "restore_params",
    "resume",
    "run_steps",
    "saved_steps",
    "schedule",
    "set_aside",
    "share",
    "split_host",
    "step_to_resume",
    "text_setup",
    "train_step",
]
