"""Training: a pure step, a loop around it, checkpoints that can be trusted, and a record of what happened.

``fit`` is the way in: read ``fit.py``, ``setup.py``, ``step.py`` and ``loop.py`` in this order; ``checkpoint.py``,
``saving.py``, ``monitor.py`` and ``record.py`` are what the loop is handed.
"""

from hope_jax.errors import extra

with extra("train"):
    from hope_jax.signals import Interrupt
    from hope_jax.storage.programs import keep_programs
    from hope_jax.train.batches import Batches, ComputedBatches, JoinedBatches
    from hope_jax.train.checkpoint import DamagedCheckpoint, read_manifest, restore, restore_params, saved_steps
    from hope_jax.train.clock import TIMED
    from hope_jax.train.compile import compile_step, topology
    from hope_jax.train.devices import cores, split_host
    from hope_jax.train.fit import Result, fit
    from hope_jax.train.flops import flops_per_token
    from hope_jax.train.folder import open_run
    from hope_jax.train.language import model_setup, state_bytes, text_setup
    from hope_jax.train.loop import Steps
    from hope_jax.train.mesh import MeshConfig
    from hope_jax.train.monitor import Diverged, progress
    from hope_jax.train.optimizer import OptimizerConfig, optimizer, schedule
    from hope_jax.train.processes import ProcessesConfig, is_first, told
    from hope_jax.train.record import median_speed, read_rows
    from hope_jax.train.remat import Remat, RematStates, check_states, what_is_kept
    from hope_jax.train.run import Run, TextRun
    from hope_jax.train.saving import Saver, save
    from hope_jax.train.schedules import SCHEDULES, Schedule
    from hope_jax.train.setup import Setup, at_rate
    from hope_jax.train.sharding import check_shares
    from hope_jax.train.step import (
        Mean,
        TrainState,
        abstract_params,
        answer_loss,
        count_bytes,
        count_parameters,
        init_params,
        next_token_loss,
        train_step,
    )

__all__ = [
    "Batches", "ComputedBatches", "DamagedCheckpoint", "Diverged", "Interrupt", "JoinedBatches", "Mean", "MeshConfig",
    "OptimizerConfig", "ProcessesConfig", "Remat", "RematStates", "Result", "Run", "SCHEDULES", "Saver", "Schedule",
    "Setup", "Steps", "TIMED", "TextRun", "TrainState", "abstract_params", "answer_loss", "at_rate", "check_shares",
    "check_states", "compile_step", "cores", "count_bytes", "count_parameters", "fit", "flops_per_token", "init_params",
    "is_first", "keep_programs", "median_speed", "model_setup", "next_token_loss", "open_run", "optimizer", "progress",
    "read_manifest", "read_rows", "restore", "restore_params", "save", "saved_steps", "schedule", "split_host",
    "state_bytes", "text_setup", "told", "topology", "train_step", "what_is_kept",
]  # fmt: skip
