"""The flags ``--cms.*`` of ``pretrain``: levels of the continuum memory system that learn while text is read.

``check_reading``: whether sequences of training are long enough for levels in context, and whole periods.
"""

from dataclasses import dataclass
from typing import Literal

from hope_jax import LanguageModel, ModelConfig
from hope_jax.context.schedule import learns_in_context, schedule_of
from hope_jax.errors import UserError
from hope_jax.models import with_in_context
from hope_jax.nn.feed_forward.cms import Wiring
from hope_jax.nn.feed_forward.fast import Writes
from hope_jax.optim import INNER


@dataclass(frozen=True)
class InContextConfig:
    """Levels of the continuum memory system that are written while the text is read."""

    in_context: tuple[int, ...] = ()
    """Their periods in tokens, fastest first, such as 64 256; each a multiple of the one before, shorter than --length.
    The model's slower levels stay outer ones. None: all levels are outer ones."""
    wiring: Wiring = "sequential"
    """How levels are connected; nested sets a level back when the next slower one is written."""
    rate: float = Writes.rate  # Inner learning rate that every level starts from; it is learned.
    inner: Literal["sgd", "momentum", "adam", "muon"] = "sgd"  # Optimizer of the writes.
    bptt: tuple[int | None, ...] = ()
    """For each of these levels, how training differentiates its writes: None through all, 0 through none, n: every n-th
    write starts from a constant."""
    rank: int | None = None  # Rank of what is written; None: any.

    def apply(self, model: ModelConfig) -> ModelConfig:
        """The model with these levels. Raises UserError where there are none, or that model can have none."""
        if self == InContextConfig():
            return model
        if not self.in_context:
            raise UserError("The flags --cms.* are about levels in context; give their periods: --cms.in-context.")
        writes = Writes(self.rate, INNER[self.inner], self.bptt, self.rank)
        return with_in_context(model, self.in_context, self.wiring, writes)


def read_at_once(config: ModelConfig, length: int, remat_every: int | None) -> int:
    """Tokens of a sequence that training reads in one call of the model."""
    if learns_in_context(model := LanguageModel(config)):
        return schedule_of(model, trained=True).chunk
    return length if remat_every is None else remat_every


def check_reading(config: ModelConfig, length: int, remat_every: int | None = None, z_loss: float = 0.0) -> None:
    """Raise UserError where training writes levels of the model in context and cannot do so in sequences of ``length``.

    It must be a multiple of the fastest period, and longer than the slowest one: else the only write of that level
    would come after the last token that could read it.
    """
    if not learns_in_context(model := LanguageModel(config)):
        return
    periods = schedule_of(model, trained=True).distinct
    fastest, slowest = periods[0], periods[-1]
    whose = "of a level that is written in context"
    if length % fastest:
        raise UserError(f"--length must be a multiple of the period {whose}: {fastest} does not divide {length}.")
    if slowest >= length:
        raise UserError(f"--length must be more than the period {whose}: {slowest} tokens, got {length}.")
    for flag, given in (("--remat-every", remat_every is not None), ("--z-loss", z_loss != 0)):
        if given:
            raise UserError(f"{flag} does not go together with levels that are written in context; leave it out.")
