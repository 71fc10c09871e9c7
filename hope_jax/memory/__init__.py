"""Memories: one recurrence, and the rules that fill its slots. Start with ``recurrence.py``, then ``rule.py``."""

from hope_jax.memory.architectures import Architecture, matrix, mlp, residual_mlp, unit
from hope_jax.memory.catalogue import RULES, rule_named
from hope_jax.memory.recurrence import Recurrence, gated_delta
from hope_jax.memory.rule import Fast, Gates, MemoryState, Rule

__all__ = [
    "RULES",
    "Architecture",
    "Fast",
    "Gates",
    "MemoryState",
    "Recurrence",
    "Rule",
    "gated_delta",
    "matrix",
    "mlp",
    "residual_mlp",
    "rule_named",
    "unit",
]
