"""The flags ``--cms.*`` of ``pretrain``: levels of the continuum memory system that learn while text is read."""

from dataclasses import dataclass
from typing import Literal

from hope_jax import ModelConfig
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
        """The model with these levels."""
        if not self.in_context:
            return model
        writes = Writes(self.rate, INNER[self.inner], self.bptt, self.rank)
        return with_in_context(model, self.in_context, self.wiring, writes)

    def check(self, length: int, remat_every: int | None, z_loss: float) -> None:
        """Raise UserError where these levels and the sequences do not fit."""
        if not self.in_context:
            if self != InContextConfig():
                raise UserError("The flags --cms.* are about levels in context; give their periods: --cms.in-context.")
            return
        fastest, slowest = self.in_context[0], self.in_context[-1]
        if length % fastest:
            raise UserError(f"--cms.in-context must divide --length, got {fastest} for {length}.")
        if slowest >= length:
            raise UserError(f"--cms.in-context {slowest} is never written in sequences of --length {length}.")
        for flag, given in (("--remat-every", remat_every is not None), ("--z-loss", z_loss != 0)):
            if given:
                raise UserError(f"{flag} does not go together with --cms.in-context; leave out one of them.")
