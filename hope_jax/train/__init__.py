"""Training: a pure step, a loop around it, checkpoints that can be trusted, and a record of what happened.

Read ``optimizer.py``, ``state.py``, ``step.py``, ``loop.py`` in this order; ``checkpoint.py``, ``monitor.py``,
``record.py`` and ``interrupt.py`` are what the loop is handed.
"""

from hope_jax.errors import extra

with extra("train"):
    from hope_jax.train.checkpoint import (
        DamagedCheckpoint,
        Manifest,
        Saver,
        check_room,
        last_good,
        read_manifest,
        restore,
        saved_steps,
        set_aside,
    )
    from hope_jax.train.devices import cores, data_mesh, replicate, share, split_host
    from hope_jax.train.interrupt import Interrupt
    from hope_jax.train.loop import Plan, train
    from hope_jax.train.monitor import Diverged, Monitor
    from hope_jax.train.optimizer import OptimizerConfig, optimizer, schedule
    from hope_jax.train.record import Record, draw_curve, read_rows
    from hope_jax.train.resume import IDENTITY, resume, step_to_resume
    from hope_jax.train.state import TrainState, abstract_state, count_parameters, init_state
    from hope_jax.train.step import Mean, evaluator, next_token_loss, train_step

__all__ = [
    "IDENTITY",
    "DamagedCheckpoint",
    "Diverged",
    "Interrupt",
    "Manifest",
    "Mean",
    "Monitor",
    "OptimizerConfig",
    "Plan",
    "Record",
    "Saver",
    "TrainState",
    "abstract_state",
    "check_room",
    "cores",
    "count_parameters",
    "data_mesh",
    "draw_curve",
    "evaluator",
    "init_state",
    "last_good",
    "next_token_loss",
    "optimizer",
    "read_manifest",
    "read_rows",
    "replicate",
    "restore",
    "resume",
    "saved_steps",
    "schedule",
    "set_aside",
    "share",
    "split_host",
    "step_to_resume",
    "train",
    "train_step",
]
