"""Momentum is an associative memory of gradients (Eq. 33, 48-52): objective x memory x retention, and nothing else.

At every step the memory m is asked to make of the gradient G what the objective wants, by one step of gradient descent,
after the retention has let some of the past go; the parameters then move by what the memory says of G:

    m <- retention(m, G) - rate grad_m objective(m(G), value)          gradient taken at the old m
    W <- W + learning_rate output(m(G))

The value is -P, the preconditioner, for the key G; the famous optimizers are settings:

    momentum (Eq. 33)         objective=dot, memory=LinearMemory(), retention=0.9: all defaults
    EMA of gradients          objective=l2, rate=1 - decay, retention=1
    preconditioned (Eq. 47)   precondition=optax.scale_by_rms() or any other, see ``preconditioned.py``
    delta momentum (Eq. 49)   objective=l2, memory=KeyedMemory(); or a retention of ``delta_momentum.py``
    Muon (Eq. 42)             output=muon_step
    deep momentum (Eq. 50)    a memory that is an MLP

``Memory`` is the protocol of a new one. ``recipe.py`` has the rest of an optimizer: weight decay, learning rate.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from hope_jax.errors import UserError
from hope_jax.optim.checks import check, check_decay, check_function, check_transformation
from hope_jax.optim.matrices import Labels, MatrixView, labels_or_default, matrix_or_column_views
from hope_jax.optim.recipe import recipe, with_state_dtype
from hope_jax.types import Array, Scalar

Objective = Callable[[Array, Array], Scalar]
Retention = Callable[[Any, Array, MatrixView], Any]


def dot(prediction: Array, value: Array) -> Scalar:
    """Similarity, -<prediction, value>: Hebbian, the objective of plain momentum."""
    return -jnp.sum((prediction * value.conj()).real)


def l2(prediction: Array, value: Array) -> Scalar:
    """Regression, 1/2 ||prediction - value||^2: the delta rule. What is written already is not written again."""
    return 0.5 * jnp.sum(jnp.square(jnp.abs(prediction - value)))


@runtime_checkable
class Memory(Protocol):
    """A memory of one parameter's gradients. Arrays come in the parameter's shape; ``view`` makes them matrices.

    ``init(leaf, view)`` gives the state: a pytree of floating-point arrays, all of them learned, from the parameter, of
    which only shape and dtype matter. ``loss`` is the inner loss of mapping the key ``gradient`` to ``target``, the
    preconditioned gradient (less its sign: the memory is to answer -target), as the objective measures it. ``read`` is
    the memory's answer to the gradient, in the parameter's shape: a direction of descent.
    """

    def init(self, leaf: Array, view: MatrixView) -> Any: ...
    def loss(self, state: Any, gradient: Array, target: Array, objective: Objective, view: MatrixView) -> Scalar: ...
    def read(self, state: Any, gradient: Array, view: MatrixView) -> Array: ...


def check_memory(memory: Any) -> None:
    """Raise UserError for what is no ``Memory``."""
    if isinstance(memory, type) or not isinstance(memory, Memory):
        raise UserError(f"memory is {memory!r}; expected an object with init, loss and read, such as LinearMemory()")


@dataclass(frozen=True)
class LinearMemory:
    """One cell shaped like the parameter, asked for -target whatever the key: m(G) = m. With ``dot`` this is Eq. 33."""

    def init(self, leaf: Array, view: MatrixView) -> Array:
        return jnp.zeros_like(leaf)

    def loss(self, state: Array, gradient: Array, target: Array, objective: Objective, view: MatrixView) -> Scalar:
        return objective(state, -target)

    def read(self, state: Array, gradient: Array, view: MatrixView) -> Array:
        return state


@dataclass(frozen=True)
class KeyedMemory(LinearMemory):
    """The gradient's columns are the keys: m maps G to ``m^T G``, [columns, columns], and is asked for -I (Eq. 48).

    With ``l2`` a write is ``m <- m - rate (G G^T m + G)``: delta momentum, one rate for erase and write; with ``dot``
    it is Eq. 33 again, since ``<m^T G, I> = <m, G>``. The value is the identity, so no preconditioner applies.
    Costs ``4 rows columns^2`` FLOPs and two transient matrices of [columns, columns].
    """

    def loss(self, state: Array, gradient: Array, target: Array, objective: Objective, view: MatrixView) -> Scalar:
        prediction = view.to_matrices(state).mT.conj() @ view.to_matrices(gradient)
        return objective(prediction, -jnp.broadcast_to(jnp.eye(prediction.shape[-1]), prediction.shape))


class GeneralizedMomentumState(NamedTuple):
    """The memory of every parameter, and the preconditioner's own state."""

    memory: Any
    precondition: Any


def scale_by_generalized_momentum(
    objective: Objective | None = None,
    memory: Memory | None = None,
    retention: Any = 0.9,
    rate: Any = 1.0,
    precondition: optax.GradientTransformation | None = None,
    output: Callable[[Array], Array] | None = None,
    matrices: Labels | None = None,
    state_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum as any associative memory (Eq. 33, 47-52), without the learning rate.

    ::

        m <- retention(m, G) - rate grad_m objective(m(G), -P G)        gradient taken at the old m
        update = -output(m(G))                                          at the new m

    State: the memory's (one value per parameter for the linear ones, 4 bytes at float32) and the preconditioner's.
    FLOPs: a few per parameter for ``LinearMemory``; a memory's gradient is taken by automatic differentiation.

    Args:
      objective: ``(prediction, value) -> scalar``, such as ``l2``; None: ``dot``.
      memory: what is written and read; None: ``LinearMemory()``.
      retention: share of the state kept at each step, 0 to 1, or ``(state, gradient, view) -> state``. States are
        deviations from what a memory starts as, so keeping nothing means starting again.
      rate: step of the inner gradient descent, 0 or more.
      precondition: P, any optax transformation of the gradients (Eq. 47); None: the identity. ``KeyedMemory`` has none.
      output: the nonlinearity sigma of Eq. 52 on [..., rows, columns], such as ``muon_step``; None: the identity.
      matrices: ``params -> labels``, see ``matrices.py``; None: every leaf of two axes is a matrix, embeddings too.
        A leaf that is none is one column, [size, 1].
      state_dtype: see ``with_state_dtype``; of the memory. A preconditioner's state is its own affair.
    """
    if not callable(retention):
        check_decay("retention", retention, state_dtype)
    objective = dot if objective is None else objective
    memory = LinearMemory() if memory is None else memory
    labels = labels_or_default(matrices, exclude=())
    rules = _Rules(objective, memory, retention, rate, precondition, output, labels)
    transformation = optax.GradientTransformationExtraArgs(rules.init, rules.update)
    return with_state_dtype(transformation, state_dtype, lambda state, cast: state._replace(memory=cast(state.memory)))


@dataclass(frozen=True)
class _Rules:
    """``scale_by_generalized_momentum`` at work: its arguments, checked, and what they do."""

    objective: Objective
    memory: Memory
    retention: Any
    rate: Any
    precondition: Any
    output: Any
    labels: Labels

    def __post_init__(self) -> None:
        check_memory(self.memory)
        check("rate", self.rate, 0)
        check_function("objective", self.objective, "(prediction, value) -> scalar, such as l2")
        check_function("output", self.output, "of [..., rows, columns], such as muon_step")
        check_transformation("precondition", self.precondition)
        if isinstance(self.memory, KeyedMemory) and self.precondition is not None:
            raise UserError("KeyedMemory's values are the identity, so it takes no preconditioner; see delta_momentum")

    @property
    def prepare(self) -> optax.GradientTransformationExtraArgs:
        """P, the identity if there is none."""
        return optax.with_extra_args_support(self.precondition or optax.identity())

    def init(self, params: Any) -> GeneralizedMomentumState:
        """Empty memories."""
        memories = jax.tree.map(self.memory.init, params, matrix_or_column_views(params, self.labels))
        return GeneralizedMomentumState(memories, self.prepare.init(params))

    def update(
        self, updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, GeneralizedMomentumState]:
        """Write every gradient, then read."""
        views = matrix_or_column_views(updates, self.labels)
        targets, inner = self.prepare.update(updates, state.precondition, params, **extra)
        written = jax.tree.map(self._write, updates, targets, state.memory, views)
        return jax.tree.map(self._answer, updates, written, views), GeneralizedMomentumState(written, inner)

    def _write(self, gradient: Array, target: Array, state: Any, view: MatrixView) -> Any:
        slope = jax.grad(self.memory.loss)(state, gradient, target, self.objective, view)
        if callable(self.retention):
            kept = self.retention(state, gradient, view)
        else:
            kept = jax.tree.map(lambda m: self.retention * m, state)
        return jax.tree.map(lambda m, d: m - self.rate * d.conj(), kept, slope)

    def _answer(self, gradient: Array, state: Any, view: MatrixView) -> Array:
        found = -self.memory.read(state, gradient, view)
        if self.output is None:
            return found
        x = view.to_matrices(found)
        if (y := self.output(x)).shape != x.shape:
            raise UserError(f"output makes {y.shape} of matrices {x.shape}; expected the same shape")
        return view.from_matrices(y)


def generalized_momentum(
    learning_rate: optax.ScalarOrSchedule,
    objective: Objective | None = None,
    memory: Memory | None = None,
    retention: Any = 0.9,
    rate: Any = 1.0,
    precondition: optax.GradientTransformation | None = None,
    output: Callable[[Array], Array] | None = None,
    matrices: Labels | None = None,
    state_dtype: Any = None,
    *,
    weight_decay: Any = 0.0,
    mask: Any = None,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """``scale_by_generalized_momentum`` with decoupled weight decay and a learning rate: see there and ``recipe``."""
    scale = scale_by_generalized_momentum(
        objective, memory, retention, rate, precondition, output, matrices, state_dtype
    )
    return recipe(scale, learning_rate, weight_decay, mask, fallback, matrices)
