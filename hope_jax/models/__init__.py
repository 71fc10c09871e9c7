"""The named models, rows of architecture x size, and variants of a model: levels in context, no writes, a period."""

import re
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

from hope_jax.errors import UserError, closest, guess
from hope_jax.levels import Level, check_multiples
from hope_jax.memory.kernels import Impl
from hope_jax.models.parts import Row
from hope_jax.models.rows import ARCHITECTURES as ARCHITECTURES
from hope_jax.models.sizes import SIZES as SIZES
from hope_jax.models.sizes import Size as Size
from hope_jax.nn.config import ModelConfig as ModelConfig
from hope_jax.nn.config import PartConfig
from hope_jax.nn.feed_forward.cms import CMSConfig, Wiring
from hope_jax.nn.feed_forward.fast import Writes
from hope_jax.nn.language_model import LanguageModel as LanguageModel
from hope_jax.nn.mixers.attention import AttentionConfig
from hope_jax.nn.mixers.convolution import ConvolutionConfig

MODELS: dict[str, ModelConfig] = {
    f"{architecture}-{size}": build(SIZES[size]) for architecture, build in ARCHITECTURES.items() for size in SIZES
}
WITH_PERIOD = ("hope", "hope_tnt")  # architectures with an anchor period that can be set


def with_in_context(
    config: ModelConfig, periods: Sequence[int], wiring: Wiring = "sequential", writes: Writes | None = None
) -> ModelConfig:
    """A model whose fastest levels are written while it reads (SPEC 3.1), of the same size within rounding.

    Args:
      config: a model with a continuum memory system.
      periods: of those levels in tokens, fastest first, each a multiple of the one before. The model's own levels that
        are slower stay, as outer levels; all levels together keep the hidden features that there were.
      wiring, writes: as in ``CMSConfig``; None: the defaults.

    Raises:
      UserError: the model has no such system, or the periods do not fit.
    """
    part = config.feed_forward
    if not isinstance(part, CMSConfig) or not periods:
        raise UserError("levels in context need periods and a model with levels: hope, hope_attention or hope_tnt")
    slower = [level for level in part.levels if level.period > max(periods)]
    levels = (*map(Level, periods), *slower)
    check_multiples([level.period for level in levels])  # of all: after training every level can be written
    hidden = max(1, round(part.hidden * len(part.levels) / len(levels)))
    changed = dict(levels=levels, hidden=hidden, wiring=wiring, in_context=len(periods), writes=writes or Writes())
    return replace(config, feed_forward=replace(part, **changed))


def without_writes(config: ModelConfig) -> ModelConfig:
    """The same model, parameters included, whose memories never write: the inner learning rate is 0.

    Retention goes on: Hope's memories then fade from their learned start, at first by 1/horizon per token. Raises
    UserError where there is no memory, or one without a setting ``rate_max``.
    """
    mixers: list[Any] = [mixer for mixer, _ in config.pattern]
    memories = list(filter(_is_memory, mixers))
    if not memories or not all(_has(mixer, "rate_max") for mixer in memories):
        kinds = ", ".join(type(mixer).__name__ for mixer in mixers)
        raise UserError(f"the mixers are {kinds}; only memories with a setting rate_max can be told not to write")
    return _changed(config, lambda mixer: _with_fields(mixer, rate_max=0.0))


def with_period(config: ModelConfig, period: int) -> ModelConfig:
    """The same model, parameters included, whose self-modifying memories have an anchor every ``period`` tokens.

    All writes of a period are computed from the memories at its anchor (``SelfModifyingConfig``, ``c_memory`` and
    ``c_projections``). docs/defaults.md has what longer ones did to speed and training. Raises UserError where there
    are no such memories, where they refuse the period, or where it is longer than the model's context.
    """
    mixers: list[Any] = [mixer for mixer, _ in config.pattern]
    if not any(_has(mixer, "c_memory") for mixer in mixers):
        kinds, known = ", ".join(type(mixer).__name__ for mixer in mixers), " and ".join(WITH_PERIOD)
        raise UserError(f"the mixers are {kinds}; only {known} have an anchor period that can be set")
    if period > config.context:
        raise UserError(f"period is {period}; give at most the {config.context} tokens of the model's context")
    return _changed(config, lambda mixer: with_anchors(mixer, period))


def with_anchors(mixer: Any, period: int) -> Any:
    """The mixer whose self-modifying memories, and those of its parts, have an anchor every ``period`` tokens."""
    return _with_fields(mixer, c_memory=period, c_projections=period)


def has_memory(config: ModelConfig) -> bool:
    """Whether a mixer has a memory that is written token by token, and is not attention or a convolution alone."""
    return any(_is_memory(mixer) for mixer, _ in config.pattern)


def with_impl(config: ModelConfig, impl: Impl | None) -> ModelConfig:
    """The same model, parameters included, whose mixers are evaluated by ``impl`` (``memory/kernels``); None: as it is.

    Raises UserError for an unknown word, where there is no memory to choose for, and for "pallas" where one has several
    periods.
    """
    if impl is None:
        return config
    if impl != "auto" and not impls(config):
        kinds = ", ".join(type(mixer).__name__ for mixer, _ in config.pattern)
        raise UserError(f"impl is {impl!r}, of memories; the mixers are {kinds}: leave it out")
    return _changed(config, lambda mixer: _with_fields(mixer, impl=impl))


def impls(config: ModelConfig) -> set[Impl]:
    """The forms in which the memories of a model are evaluated; empty for a model without memories."""
    found: set[Impl] = set()
    parts: list[Any] = [mixer for mixer, _ in config.pattern]
    while parts:
        part = parts.pop()
        parts += _parts_of(part).values()
        found |= {part.impl} if hasattr(part, "impl") and _is_memory(part) else set()
    return found


def _parts_of(mixer: Any) -> dict[str, Any]:
    """The mixers that a mixer is made of."""
    values = {field.name: getattr(mixer, field.name) for field in fields(mixer)}
    return {name: value for name, value in values.items() if isinstance(value, PartConfig)}


def _is_memory(mixer: Any) -> bool:
    return not isinstance(mixer, AttentionConfig | ConvolutionConfig)


def _has(mixer: Any, name: str) -> bool:
    return hasattr(mixer, name) or any(_has(part, name) for part in _parts_of(mixer).values())


def _with_fields(mixer: Any, **values: Any) -> Any:
    """The mixer with these values, in its parts, too, wherever they have such fields."""
    parts = {name: _with_fields(part, **values) for name, part in _parts_of(mixer).items()}
    return replace(mixer, **parts, **{name: value for name, value in values.items() if hasattr(mixer, name)})


def _changed(config: ModelConfig, change: Callable[[Any], Any]) -> ModelConfig:
    """The model with ``change(mixer)`` in the place of each mixer."""
    mixers = tuple(change(mixer) for mixer, _ in config.pattern)
    return replace(config, mixer=mixers if isinstance(config.mixer, tuple) else mixers[0])


def row_named(name: str) -> Row:
    """The architecture of that name; NAME@PERIOD, such as hope@64, is NAME with that anchor period (``with_period``).

    Raises UserError with the closest name where there is none, and where the period is not written as in 64. The row
    raises it, too: for a period that its model cannot have, or has without being told.
    """
    architecture, period, size = _parsed(name)
    if size or architecture not in ARCHITECTURES:
        names = ARCHITECTURES if period is None else [f"{known}@{period}" for known in WITH_PERIOD]
        raise UserError(f"No architecture is called {name!r}; {closest(name, names)}")
    row = ARCHITECTURES[architecture]
    return lambda size: _with_other_period(row(size), period)


def model_named(name: str) -> ModelConfig:
    """The row of that name, ARCHITECTURE-SIZE or ARCHITECTURE@PERIOD-SIZE, see ``row_named``.

    Raises UserError with the closest names, and how names are made, otherwise.
    """
    architecture, period, size = _parsed(name)
    if architecture + size not in MODELS or (period is not None and not size):
        names = MODELS if period is None else [f"{row}@{period}-{size}" for row in WITH_PERIOD for size in SIZES]
        hint = guess(name, names) or "names are ARCHITECTURE-SIZE, such as hope-tiny."
        known = f"Architectures: {', '.join(ARCHITECTURES)}; sizes: {', '.join(SIZES)}."
        raise UserError(f"no model is called {name!r}; {hint} {known}")
    return _with_other_period(MODELS[architecture + size], period)


def _parsed(name: str) -> tuple[str, int | None, str]:
    """The parts of ARCHITECTURE, @PERIOD and -SIZE: the last with its dash, or empty; None: there is no period.

    One model has one spelling, as runs are told apart by name: a period has no zeros in front.
    """
    architecture, at, rest = name.partition("@")
    if not at:
        architecture, dash, size = name.partition("-")
        return architecture, None, dash + size
    period, dash, size = rest.partition("-")
    if not re.fullmatch("[1-9][0-9]{0,8}", period):
        raise UserError(f"after @ stands the anchor period in tokens, as in hope@64; got {period!r}")
    return architecture, int(period), dash + size


def _with_other_period(config: ModelConfig, period: int | None) -> ModelConfig:
    """``with_period``, but the model's own period is refused: one model has one name. None: the model as it is."""
    if period is None:
        return config
    other = with_period(config, period)
    if other == config:
        raise UserError(f"the anchor period is {period} without @{period}, too; leave that out of the name")
    return other
