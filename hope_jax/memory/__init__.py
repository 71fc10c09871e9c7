"""Memories: one recurrence, and the rules that fill its slots. Start with ``recurrence.py``, then ``rule.py``."""

from hope_jax.memory.catalogue import RULES
from hope_jax.memory.diagonal import Erase
from hope_jax.memory.recurrence import Recurrence, gated_delta
from hope_jax.memory.rule import Rule

__all__ = ["RULES", "Erase", "Recurrence", "Rule", "gated_delta"]
