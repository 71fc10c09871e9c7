"""The flags that ``pretrain`` and ``compile`` share: what a training step computes, where, and what it keeps."""

from dataclasses import dataclass, field

import numpy as np
from jax.sharding import Mesh

from hope_jax import ModelConfig
from hope_jax import train as training
from hope_jax.cli.checks import at_least, must_divide
from hope_jax.cli.in_context import check_reading, read_at_once
from hope_jax.memory.kernels import Impl


@dataclass(frozen=True, kw_only=True)
class StepFlags:
    """A training step of a language model: the model, its batch, and how the step is computed."""

    model: str = "hope-tiny"  # Name of the model, <architecture>-<size>; hope@64-tiny: with an anchor every 64 tokens.
    batch: int = 4  # Sequences per batch, of all devices together.
    length: int = 512  # Tokens per sequence.
    accumulate: int = 1  # Slices of a batch computed one after another to save memory; must divide the batch.
    remat_every: int | None = None
    """Tokens between the states that are kept for the backward pass, which computes the rest again; must divide the
    length. None: the whole sequence at once."""
    remat: training.Remat = "auto"
    """block: keep the input of every block alone. nested: of the states of its memories, too, fewer than one a chunk.
    auto, without --remat-every: nested on a TPU, block on other accelerators; else none."""
    remat_states: training.RematStates = "exact"
    """bfloat16: the states of memories are kept for the backward pass at half the bytes; gradients are rounded."""
    impl: Impl | None = None
    """What computes the memories: auto, chunked: a loop over chunks; pallas: a TPU kernel that no TPU has run yet;
    sequential: token by token; ..._bfloat16, ..._bfloat16_3x: rounded products, see memory/kernels. None: as the model
    says, which is auto for all named ones."""
    mesh: training.MeshConfig = training.MeshConfig()
    optimizer: training.OptimizerConfig = field(default_factory=training.OptimizerConfig)

    def check(self, model: ModelConfig, z_loss: float = 0.0) -> None:
        """Raise UserError where the flags do not fit each other or the model, which is that of ``impl``."""
        at_least(self, 1, "batch", "length", "accumulate")
        must_divide("accumulate", self.accumulate, "batch", self.batch)
        if self.remat_every is not None:
            must_divide("remat_every", self.remat_every, "length", self.length)
        check_reading(model, self.length, self.remat_every, z_loss)
        training.check_states(self.remat_states, model, self.remat_every)
        self.mesh.check_batch(self.batch // self.accumulate, read_at_once(model, self.length, self.remat_every))

    def setup(self, run: training.TextRun, steps: int, byte_lengths: np.ndarray, mesh: Mesh | None) -> training.Setup:
        """The setup of a run of so many steps that computes its step so; see ``train.text_setup``."""
        return training.text_setup(
            run,
            steps,
            byte_lengths,
            mesh=mesh,
            accumulate=self.accumulate,
            remat=self.remat,
            remat_every=self.remat_every,
            remat_states=self.remat_states,
            impl=self.impl,
        )
