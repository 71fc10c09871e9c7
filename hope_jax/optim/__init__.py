"""Optimizers as optax transformations: ``scale_by_x`` is the mathematics, ``x(learning_rate, ...)`` the optimizer.

All of them raise UserError, by name, for an argument that is out of range or of another kind, and in ``init`` for a
parameter that is no floating-point array.
"""

from hope_jax.optim.by_level import by_level as by_level
from hope_jax.optim.delta_momentum import delta_momentum as delta_momentum
from hope_jax.optim.delta_momentum import delta_retention as delta_retention
from hope_jax.optim.delta_momentum import scale_by_delta_momentum as scale_by_delta_momentum
from hope_jax.optim.dgd import delta_dense as delta_dense
from hope_jax.optim.dgd import dgd_update as dgd_update
from hope_jax.optim.dgd import ggd_step as ggd_step
from hope_jax.optim.dmgd import MLPMemory as MLPMemory
from hope_jax.optim.dmgd import dmgd as dmgd
from hope_jax.optim.dmgd import scale_by_dmgd as scale_by_dmgd
from hope_jax.optim.dmgd import signed_powers as signed_powers
from hope_jax.optim.generalized import KeyedMemory as KeyedMemory
from hope_jax.optim.generalized import LinearMemory as LinearMemory
from hope_jax.optim.generalized import Memory as Memory
from hope_jax.optim.generalized import dot as dot
from hope_jax.optim.generalized import generalized_momentum as generalized_momentum
from hope_jax.optim.generalized import l2 as l2
from hope_jax.optim.generalized import scale_by_generalized_momentum as scale_by_generalized_momentum
from hope_jax.optim.inner import INNER as INNER
from hope_jax.optim.inner import InnerOptimizer as InnerOptimizer
from hope_jax.optim.inner import inner as inner
from hope_jax.optim.m3 import m3 as m3
from hope_jax.optim.m3 import scale_by_m3 as scale_by_m3
from hope_jax.optim.m3_rules import M3State as M3State
from hope_jax.optim.m3_rules import MomentumScale as MomentumScale
from hope_jax.optim.matrices import MatrixView as MatrixView
from hope_jax.optim.matrices import MuonDimensionNumbers as MuonDimensionNumbers
from hope_jax.optim.matrices import matrix_labels as matrix_labels
from hope_jax.optim.matrices import matrix_views as matrix_views
from hope_jax.optim.newton_schulz import NewtonSchulz as NewtonSchulz
from hope_jax.optim.newton_schulz import muon_step as muon_step
from hope_jax.optim.newton_schulz import orthogonalize as orthogonalize
from hope_jax.optim.preconditioned import learned_preconditioner as learned_preconditioner
from hope_jax.optim.preconditioned import preconditioned_momentum as preconditioned_momentum
from hope_jax.optim.preconditioned import scale_by_preconditioned_momentum as scale_by_preconditioned_momentum
from hope_jax.optim.recipe import with_state_dtype as with_state_dtype
from hope_jax.optim.table import DMGD as DMGD
from hope_jax.optim.table import M3 as M3
from hope_jax.optim.table import OPTIMIZERS as OPTIMIZERS
from hope_jax.optim.table import SGD as SGD
from hope_jax.optim.table import AdamW as AdamW
from hope_jax.optim.table import DeltaMomentum as DeltaMomentum
from hope_jax.optim.table import Lion as Lion
from hope_jax.optim.table import Muon as Muon
from hope_jax.optim.table import Optimizer as Optimizer
from hope_jax.optim.table import PreconditionedMomentum as PreconditionedMomentum
