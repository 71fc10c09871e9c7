"""The flags of commands that use a trained model and what it has learned: ``learn``, ``ask``, ``watch``."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from hope_jax import LanguageModel, context
from hope_jax import train as training
from hope_jax.context.files import check_place
from hope_jax.errors import UserError
from hope_jax.levels import Level, check_multiples
from hope_jax.nn.feed_forward.cms import CMSConfig
from hope_jax.storage.locks import locked
from hope_jax.train.run import Trained, load_run, named_step


@dataclass(frozen=True, kw_only=True)
class Source:
    """The flags of a trained model and of what it has learned since."""

    checkpoint: Path  # Run folder of a trained model, for its latest step; or one step of it, RUN/checkpoints/STEP.
    context: Path | None = None  # File of what it has learned since. None: RUN/contexts/STEP.safetensors.
    periods: tuple[int, ...] = ()  # Other periods of the model's levels, in tokens, fastest first, such as 64 256.
    rate: float | None = None
    """Inner learning rate of all levels; 0 writes nothing. None: the learned rates, or the configured one of levels
    that have none."""

    def __post_init__(self) -> None:
        if self.rate is not None and not 0 <= self.rate < math.inf:
            raise UserError(f"--rate must be 0 or more, got {self.rate}.")

    def trained(self) -> Trained:
        """The model. Raises UserError where there is none, or its levels cannot have these periods or this rate."""
        run, _ = named_step(self.checkpoint)
        training.keep_programs(run.absolute().parent / ".cache")
        return with_levels(load_run(self.checkpoint), self.periods, self.rate)

    def place(self, trained: Trained) -> Path:
        """Where its context is: it belongs to the parameters of one step."""
        return trained.run / "contexts" / f"{trained.step}.safetensors" if self.context is None else self.context

    @contextlib.contextmanager
    def alone(self, trained: Trained) -> Iterator[Path]:
        """Lock that place for this process. Raises UserError where it cannot be written, or another process has it."""
        place = self.place(trained)
        check_place(place)  # an error now is better than one after the reading
        busy = f"Another command writes the context in {place}; wait for it or name another --context."
        with locked(place.absolute().with_name(f".{place.name}.lock"), busy):
            yield place

    def saved(self, trained: Trained) -> Any:
        """The state of that context; None where nothing was learned yet.

        Raises UserError where it is damaged or of another model, or was named and is not there.
        """
        place = self.place(trained)
        if self.context is None and not place.exists():
            return None
        return context.load(place, trained.model, trained.params)

    def flags(self) -> list[str]:
        """The same flags for another command."""
        given = {"--checkpoint": self.checkpoint, "--context": self.context, "--rate": self.rate}
        words = [word for pair in given.items() if pair[1] is not None for word in pair]
        words += ["--periods", *self.periods] if self.periods else []
        return list(map(str, words))


def readings(place: Path) -> dict[str, Any]:
    """The note of a saved context: tokens read by each reading that was stopped, and the one that it is inside of."""
    note = context.note(place) if place.exists() else None
    nothing = {"stopped": {}, "inside": None}
    return note if isinstance(note, dict) and note.keys() == nothing.keys() else nothing


def with_levels(trained: Trained, periods: tuple[int, ...], rate: float | None) -> Trained:
    """The same parameters, with other ``periods`` of the levels (fastest first; (): as they are).

    ``rate`` replaces the configured inner rate and the learned ones; None: they stay.

    Raises:
        UserError: the model has no continuum memory system, another number of levels,
            or a period that is no multiple of the one before.
    """
    part, params = trained.model.config.feed_forward, trained.params
    if not periods and rate is None:
        return trained
    if not isinstance(part, CMSConfig):
        use = "use a run of hope, hope_attention or hope_tnt"
        raise UserError(f"The model in {trained.run} has no levels to be written; {use}.")
    if periods:
        if len(periods) != len(part.levels):
            raise UserError(f"--periods are {list(periods)}; give one for each of the {len(part.levels)} levels.")
        part = dataclasses.replace(part, levels=tuple(map(Level, periods)))
        check_multiples(periods)
    if rate is not None:
        part = dataclasses.replace(part, writes=dataclasses.replace(part.writes, rate=rate))
        of_levels = params["blocks"]["feed_forward"]
        if "rate" in of_levels:
            of_levels = of_levels | {"rate": jnp.full_like(of_levels["rate"], rate)}
            params = params | {"blocks": params["blocks"] | {"feed_forward": of_levels}}
    config = dataclasses.replace(trained.model.config, feed_forward=part)
    return trained._replace(model=LanguageModel(config), params=params)
