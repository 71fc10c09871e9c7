"""Optimizers as optax transformations: ``scale_by_x`` is the mathematics, ``x(learning_rate, ...)`` the optimizer."""

from hope_jax.optim.by_level import by_level
from hope_jax.optim.delta_dense import delta_dense
from hope_jax.optim.dgd import dgd_update, ggd_step
from hope_jax.optim.generalized import (
    GeneralizedMomentumState,
    KeyedMemory,
    LinearMemory,
    dot,
    generalized_momentum,
    l2,
    scale_by_generalized_momentum,
)
from hope_jax.optim.matrices import MatrixView, MuonDimensionNumbers, matrix_labels, matrix_views
from hope_jax.optim.newton_schulz import NewtonSchulz, muon_step, orthogonalize
from hope_jax.optim.precision import with_state_dtype

__all__ = [
    "GeneralizedMomentumState",
    "KeyedMemory",
    "LinearMemory",
    "MatrixView",
    "MuonDimensionNumbers",
    "NewtonSchulz",
    "by_level",
    "delta_dense",
    "dgd_update",
    "dot",
    "generalized_momentum",
    "ggd_step",
    "l2",
    "matrix_labels",
    "matrix_views",
    "muon_step",
    "orthogonalize",
    "scale_by_generalized_momentum",
    "with_state_dtype",
]
