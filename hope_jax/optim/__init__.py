"""Optimizers as optax transformations: ``scale_by_x`` is the mathematics, ``x(learning_rate, ...)`` the optimizer."""

from hope_jax.optim.by_level import by_level
from hope_jax.optim.delta_dense import delta_dense
from hope_jax.optim.delta_momentum import delta_momentum, delta_retention, scale_by_delta_momentum
from hope_jax.optim.dgd import dgd_update, ggd_step
from hope_jax.optim.dmgd import MLPMemory, dmgd, scale_by_dmgd, signed_powers
from hope_jax.optim.generalized import (
    GeneralizedMomentumState,
    KeyedMemory,
    LinearMemory,
    Memory,
    dot,
    generalized_momentum,
    l2,
    scale_by_generalized_momentum,
)
from hope_jax.optim.inner import INNER, InnerOptimizer, inner
from hope_jax.optim.m3 import M3State, m3, scale_by_m3
from hope_jax.optim.m3_rules import MomentumScale
from hope_jax.optim.matrices import MatrixView, MuonDimensionNumbers, matrix_labels, matrix_views
from hope_jax.optim.newton_schulz import NewtonSchulz, muon_step, orthogonalize
from hope_jax.optim.precision import with_state_dtype
from hope_jax.optim.preconditioned import (
    LearnedPreconditionerState,
    learned_preconditioner,
    preconditioned_momentum,
    scale_by_preconditioned_momentum,
)
from hope_jax.optim.table import (
    DMGD,
    M3,
    OPTIMIZERS,
    SGD,
    AdamW,
    DeltaMomentum,
    Lion,
    Muon,
    Optimizer,
    PreconditionedMomentum,
)

__all__ = [
    "DMGD",
    "INNER",
    "M3",
    "OPTIMIZERS",
    "SGD",
    "AdamW",
    "DeltaMomentum",
    "GeneralizedMomentumState",
    "InnerOptimizer",
    "KeyedMemory",
    "LearnedPreconditionerState",
    "LinearMemory",
    "Lion",
    "M3State",
    "MLPMemory",
    "MatrixView",
    "Memory",
    "MomentumScale",
    "Muon",
    "MuonDimensionNumbers",
    "NewtonSchulz",
    "Optimizer",
    "PreconditionedMomentum",
    "by_level",
    "delta_dense",
    "delta_momentum",
    "delta_retention",
    "dgd_update",
    "dmgd",
    "dot",
    "generalized_momentum",
    "ggd_step",
    "l2",
    "inner",
    "learned_preconditioner",
    "m3",
    "matrix_labels",
    "matrix_views",
    "muon_step",
    "orthogonalize",
    "preconditioned_momentum",
    "scale_by_delta_momentum",
    "scale_by_dmgd",
    "scale_by_generalized_momentum",
    "scale_by_m3",
    "scale_by_preconditioned_momentum",
    "signed_powers",
    "with_state_dtype",
]
