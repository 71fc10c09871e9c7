"""A model trained in stages: the same parameters in a model with other periods (TNT, arXiv 2511.07343)."""

from dataclasses import replace
from typing import Any

from hope_jax.errors import UserError
from hope_jax.models import with_anchors
from hope_jax.nn.config import ModelConfig
from hope_jax.nn.mixers.memory import MemoryMixerConfig
from hope_jax.nn.mixers.tnt import TNTConfig


def with_local_period(config: ModelConfig, period: int) -> ModelConfig:
    """Stage two of a TNT model: local memories with anchors of ``period`` tokens, everything else as it was.

    Memories do worse in other periods than those they were trained in, so a short second training follows. Raises
    UserError where no mixer is a ``TNTConfig``, or a shard is no multiple of the period.
    """
    mixers: list[Any] = [mixer for mixer, _ in config.pattern]
    if not any(isinstance(mixer, TNTConfig) for mixer in mixers):
        kinds = ", ".join(type(mixer).__name__ for mixer in mixers)
        raise UserError(f"{kinds} has no local memories; stage two is for models with the mixer of TNT")
    moved = [_with_period(mixer, period) if isinstance(mixer, TNTConfig) else mixer for mixer in mixers]
    return replace(config, mixer=tuple(moved) if isinstance(config.mixer, tuple) else moved[0])


def _with_period(mixer: TNTConfig, period: int) -> TNTConfig:
    local = mixer.local
    if isinstance(local, MemoryMixerConfig):
        return replace(mixer, local=replace(local, rule=replace(local.rule, period=period)))
    return replace(mixer, local=with_anchors(local, period))
