"""Deep momentum gradient descent: the momentum is a network that learns from the gradients (Eq. 50-52; SPEC 5.3).

``generalized.py`` has the machinery, m <- decay m - inner_rate grad_m L2(m; G) and W <- W + learning_rate sigma(m(G)).
Here are the network, ``MLPMemory``, what it is asked for (``TARGETS``), and higher-order features of the gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hope_jax.errors import UserError, closest, whole
from hope_jax.optim.checks import check, check_decay, check_transformation
from hope_jax.optim.generalized import (
    LinearMemory,
    Memory,
    Objective,
    check_memory,
    dot,
    l2,
    scale_by_generalized_momentum,
)
from hope_jax.optim.matrices import Labels, MatrixView, by_largest, squared_norm
from hope_jax.optim.recipe import recipe
from hope_jax.types import Array, Float, Scalar

TARGETS = {
    "precond": optax.scale_by_rms(decay=0.999, eps=1e-8, eps_in_sqrt=False),
    "momentum": optax.ema(0.9, debias=False),
    "self": optax.identity(),
}
"""What a memory is to make of the gradient, up to its sign: ``G / (sqrt(V) + eps)``, an average of G, or G."""


class MLPState(NamedTuple):
    """How far an ``MLPMemory`` has moved from its start: W1 [*batch, in, hidden], W2 [*batch, hidden, in]."""

    outer: Array
    inner: Array


@dataclass(frozen=True)
class MLPMemory:
    """A residual two-layer network per matrix, from gradients to steps: ``m(u) = -(u + W1 gelu(W2 u))``.

    In the orientation W [out, in] (a Flax kernel's transpose) with n = out rows, ``s = ||G|| / sqrt(n)``: the keys are
    the rows of ``U = G / s``, of mean squared norm 1; the values are minus the rows of the target T, rescaled to the
    norm of U; ``L2 = 1/n sum_i objective(m(u_i), -t_i)``; the answer to G is ``s m(U)``. W1 starts at 0, so before the
    first write this is gradient descent; W2 starts normal(0, 1). A vector is one row.

    State: ``8 hidden / out`` bytes a parameter at float32 (a vector: ``8 hidden``, prefer a fallback for it). FLOPs:
    about ``16 hidden`` a parameter and step. Real parameters only.

    Attributes:
      hidden: features of the hidden layer, 1 or more.
      seed: of the start of W2, which is drawn anew at each step instead of kept; parameters of one shape share it.
    """

    hidden: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        whole("hidden", self.hidden, 1, "features")
        whole("seed", self.seed, 0)

    def init(self, leaf: Array, view: MatrixView) -> MLPState:
        """At the start. Raises UserError for a complex parameter."""
        if jnp.iscomplexobj(leaf):
            raise UserError(f"MLPMemory got a parameter of type {leaf.dtype}; expected real ones. Use memory='linear'")
        column = view.to_matrices(jnp.zeros_like(leaf))[..., :1]  # of the parameter, hence on its devices
        outer = jnp.repeat(column, self.hidden, axis=-1)
        return MLPState(outer, outer.mT)

    def loss(self, state: MLPState, gradient: Array, target: Array, objective: Objective, view: MatrixView) -> Scalar:
        """The objective's mean over the rows of each matrix; matrices are added up, each has its own network."""
        keys, values = _unit_rows(gradient, view)[0], -_unit_rows(target, view)[0]
        return objective(self._answer(state, keys), values) / keys.shape[-2]

    def read(self, state: MLPState, gradient: Array, view: MatrixView) -> Array:
        """The network's answer at the gradient's own scale."""
        keys, scale = _unit_rows(gradient, view)
        return view.from_matrices((scale * self._answer(state, keys)).mT)

    def _answer(self, state: MLPState, keys: Float[Array, "*batch n b"]) -> Float[Array, "*batch n b"]:
        inner = jax.random.normal(jax.random.key(self.seed), state.inner.shape, keys.dtype) + state.inner
        return -(keys + jax.nn.gelu(keys @ inner.mT) @ state.outer.mT)


def _unit_rows(leaf: Array, view: MatrixView) -> tuple[Float[Array, "*batch n b"], Float[Array, "*batch 1 1"]]:
    """Rows [out, in] divided by the root of their mean squared norm, and that root; rows of zeros stay zero."""
    rows = view.to_matrices(leaf).mT
    u, largest = by_largest(rows)
    size = jnp.sqrt(squared_norm(u) / rows.shape[-2])
    return u / jnp.where(size > 0, size, 1), largest * size


def signed_powers(coefficients: Sequence[float]) -> optax.GradientTransformation:
    """Higher-order features of the gradient, ``phi(G) = sum_k c_k r sign(G) |G / r|^k`` (Eq. 51), entry by entry.

    With r the root mean square of a leaf, phi(c G) = c phi(G) for c >= 0; the sign keeps every power an ascent
    direction. ``(1.0,)`` is the identity; ``(0.0, 1.0)`` stresses the large entries, as squaring does.

    ``optax.chain(signed_powers(...), dmgd(...))`` writes a memory with them. ``coefficients``: c_1, c_2, ..., none of
    them negative: it would turn the gradient around.
    """
    if not isinstance(coefficients, tuple | list) or not coefficients:
        raise UserError(f"coefficients is {coefficients}; expected one or more numbers of 0 or more")
    for k, c in enumerate(coefficients):
        check(f"coefficients[{k}]", c, 0)

    def phi(leaf: Array) -> Array:
        rms = jnp.sqrt(jnp.mean(jnp.square(jnp.abs(leaf))))
        size = jnp.abs(leaf) / jnp.where(rms > 0, rms, 1)
        return leaf * sum(c * size**k for k, c in enumerate(coefficients))

    return optax.stateless(lambda updates, _: jax.tree.map(phi, updates))


MEMORIES: dict[str, Memory] = {"linear": LinearMemory(), "mlp": MLPMemory()}


def scale_by_dmgd(
    memory: str | Memory = "mlp",
    decay: Any = None,
    inner_rate: Any = None,
    target: str | optax.GradientTransformation | None = None,
    output: Callable[[Array], Array] | None = None,
    matrices: Labels | None = None,
    state_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """``m <- decay m - inner_rate grad_m L2(m; G)``, update ``-sigma(m(G))`` with the new m (Eq. 50, 52).

    ``memory="linear"`` is momentum, ``B <- decay B + G``, exactly (Eq. 33), and Muon with ``output=orthogonalize``.
    ``memory="mlp"`` is ``MLPMemory()``, whose loss is the squared distance of its answer to ``target``; what decays is
    its distance from the start, and the gradient is taken before the decay.

    State: the memory's, and the target's (4 bytes a parameter for "precond" and "momentum", at float32). FLOPs: see the
    memory; those of ``orthogonalize`` on top.

    Args:
      memory: "linear" (``LinearMemory()``), "mlp", or a memory such as ``MLPMemory(hidden=64, seed=1)``; one of your
        own has the settings of "mlp".
      decay: alpha in [0, 1]. None: 0.9 for "linear", 0.99 for "mlp".
      inner_rate: 0 or more. None: 1 for "linear", 0.1 for "mlp", where 0 is gradient descent for ever.
      target: "precond", "momentum" or "self" (see ``TARGETS``), or any optax transformation that makes one of the
        gradient. None: "self" for "linear", "precond" for "mlp", whose loss with "self" is 0 from the start: gradient
        descent for ever.
      output: sigma on [..., rows, columns], such as ``orthogonalize`` or ``muon_step``. None: the identity.
      matrices: ``params -> labels``, see ``matrices.py``; None: every leaf of two axes is a matrix, embeddings too.
        A leaf that is none is one row of the paper's W.
      state_dtype: see ``with_state_dtype``.
    """
    network: Any = _known("memory", memory, MEMORIES)
    check_memory(network)
    linear = type(network) is LinearMemory
    decay = (0.9 if linear else 0.99) if decay is None else decay
    inner_rate = (1.0 if linear else 0.1) if inner_rate is None else inner_rate
    target = ("self" if linear else "precond") if target is None else target
    check_decay("decay", decay, state_dtype)
    check("inner_rate", inner_rate, 0)
    precondition = _known("target", target, TARGETS)
    check_transformation("target", precondition)
    return scale_by_generalized_momentum(
        dot if linear else l2, network, decay, inner_rate, precondition, output, matrices, state_dtype
    )


def _known(name: str, value: Any, table: dict[str, Any]) -> Any:
    """What a word means, and all else as it is. Raises UserError for an unknown word."""
    if not isinstance(value, str):
        return value
    if value not in table:
        raise UserError(f"{name} is {value!r}; {closest(value, table)}")
    return table[value]


def dmgd(
    learning_rate: optax.ScalarOrSchedule,
    memory: str | Memory = "mlp",
    decay: Any = None,
    inner_rate: Any = None,
    target: str | optax.GradientTransformation | None = None,
    output: Callable[[Array], Array] | None = None,
    matrices: Labels | None = None,
    state_dtype: Any = None,
    *,
    weight_decay: Any = 0.0,
    mask: Any = None,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """``scale_by_dmgd`` with decoupled weight decay and a learning rate: see there and ``recipe``."""
    scale = scale_by_dmgd(memory, decay, inner_rate, target, output, matrices, state_dtype)
    return recipe(scale, learning_rate, weight_decay, mask, fallback, matrices)
