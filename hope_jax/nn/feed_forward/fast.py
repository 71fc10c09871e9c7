"""Fast weights: numbers that a sequence adds to the matrices of its levels while it is read ("in-context", SPEC 3.1).

A level's matrices are ``theta_0 + Delta``: theta_0 are parameters, Delta belongs to one sequence and starts at 0. The
feed-forward parts only *read* Delta: they take that of every level, fastest first (None for a level that is not
written in context), or () for the static model, whose numbers are bit for bit those of Delta = 0.
``context/writes.py`` writes Delta, from the loss of the whole model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from hope_jax.errors import UserError, whole
from hope_jax.nn.layers import param_dtype
from hope_jax.optim.inner import SGD, InnerOptimizer
from hope_jax.types import Array, Bool, Float, Int

Fast = Mapping[str, Float[Array, "..."]]
"""Delta of one level: name of a linear map -> a matrix for each sequence (and layer, in a model)."""


@dataclass(frozen=True)
class Writes:
    """How levels are written in context.

    Attributes:
      rate: start of a level's learned rate eta, or the rate of levels without a learned one; 0 writes nothing.
      optimizer: makes the write from the mean gradient of a period; an optax transformation of each matrix. The
        plain gradient is Eq. 71; others carry their moments from period to period (see ``optim/inner.py``).
      bptt: for each level written in context, fastest first, how training differentiates its writes: None through all,
        0 through none (the rate is then not learned), n: every n-th write starts from a constant, so that the last 1
        to n add up with gradients. The gradients that are written always depend on the weights. (): None for all.
      rank: of Delta; None: any. A low rank keeps ``rank x columns`` numbers per matrix and sequence in the place of
        ``rows x columns``: ``Delta = basis F``, the basis [rows, rank] a parameter, F fast.
      clip: largest norm of the mean gradient of one sequence, over all matrices and layers of a level that are written
        together; a longer gradient is scaled down to it. None: any norm.
    """

    rate: float = 1.0
    optimizer: InnerOptimizer = SGD
    bptt: tuple[int | None, ...] = ()
    rank: int | None = None
    clip: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rate < np.inf:
            raise UserError(f"the rate of writes is {self.rate}; expected 0 or more")
        if not isinstance(self.optimizer, InnerOptimizer):
            example = "an InnerOptimizer such as optim.inner(optax.trace, decay=0.9)"
            raise UserError(f"the optimizer of writes is {self.optimizer!r}; expected {example}")
        if any(count is not None and count < 0 for count in self.bptt):
            raise UserError(f"bptt is {self.bptt}; expected 0 or more writes for each level, or None for all")
        if self.rank is not None:
            whole("rank", self.rank, 1, "or None")
        if self.clip is not None and not self.clip > 0:
            raise UserError(f"clip is {self.clip}; expected a length above 0, or None for any")


@runtime_checkable
class LevelsConfig(Protocol):
    """A feed-forward part with levels that can be written in context. A *tree* is the Delta of one level.

    ``periods(layers)``: for each tree the period of every layer in tokens, 0 for a layer that has no such level.
    ``trained``: how many trees, from the first, are written in context in training; the others are outer levels.
    ``nested``: a slower level's write sets the faster ones back to their start.
    ``blank``: Delta = 0 of ``batch`` sequences in one layer, for every tree. ``kernels``: the parameters behind each.
    """

    writes: Writes

    @property
    def trained(self) -> int: ...
    @property
    def nested(self) -> bool: ...
    def periods(self, layers: int) -> tuple[tuple[int, ...], ...]: ...
    def blank(self, batch: int, width: int, dtype: DTypeLike) -> tuple[dict[str, Array], ...]: ...
    def kernels(self, params: Any) -> tuple[dict[str, Any], ...]: ...


class BlockState(NamedTuple):
    """States of the two parts of a block; in a model every leaf is stacked over layers, [L, ...]."""

    mixer: Any
    feed_forward: Any


class LevelState(NamedTuple):
    """State of one level: fast weights, gradients, and the state of its inner optimizer.

    ``delta`` [L, B, rows, columns] is the sum of its writes, ``gathered`` the sum of the gradients since its last
    write.
    """

    delta: Any
    gathered: Any
    optimizer: Any


class ContextState(NamedTuple):
    """The state of a model whose levels learn while it reads; ``context.start`` makes it.

    The tokens of the unfinished chunk have been read, but not learned: they are read again when the chunk is complete.

    Attributes:
      mixer: states of the mixers after the last token that was read; leaves [L, B, ...].
      anchor: states of the mixers at the start of the unfinished chunk.
      levels: the state of each level, fastest first.
      tokens: those of the unfinished chunk, then zeros; C is the period of the fastest level.
      unfinished: how many tokens the unfinished chunk has, 0 to C.
      interrupted: whether ``mixer`` has read more tokens since, by ``model.apply``; the chunk ends before them.
      position: tokens learned since the periods of all levels began together, a multiple of C.
    """

    mixer: Any
    anchor: Any
    levels: tuple[LevelState, ...]
    tokens: Int[Array, "B C"]
    unfinished: Int[Array, ""]
    interrupted: Bool[Array, ""]
    position: Int[Array, ""]

    @property
    def blocks(self) -> BlockState:
        """State of the blocks after the last token that was read, Delta of every level in it."""
        return BlockState(self.mixer, tuple(level.delta for level in self.levels))

    def within_chunk(self, tokens: Int[np.ndarray, "B n"], mixer: Any) -> "ContextState":
        """The state after reading ``tokens``, for which the unfinished chunk has room."""
        held, start, end = np.array(self.tokens), int(self.unfinished), int(self.unfinished) + tokens.shape[1]
        held[:, start:end] = tokens
        return self._replace(mixer=mixer, tokens=jnp.asarray(held), unfinished=jnp.asarray(end, jnp.int32))

    def read_on(self, mixer: Any) -> "ContextState":
        """The state after reading more tokens that are not learned."""
        return self._replace(mixer=mixer, interrupted=jnp.ones((), bool))


def blank(shapes: Mapping[str, tuple[int, int]], batch: int, rank: int | None, dtype: DTypeLike) -> dict[str, Array]:
    """Delta = 0 for matrices of these shapes [rows, columns], in at least float32."""
    sizes = {name: (batch, rank or rows, columns) for name, (rows, columns) in shapes.items()}
    return {name: jnp.zeros(size, param_dtype(dtype)) for name, size in sizes.items()}


def moved(y: Array, x: Array, fast: Fast | None, name: str, basis: Array | None = None) -> Array:
    """``y = x theta_0`` and ``x Delta`` with each sequence's own Delta; y itself where there is none."""
    if fast is None:
        return y
    x = x if basis is None else x @ basis.astype(x.dtype)
    delta = fast[name].astype(x.dtype)
    if x.shape[0] == 1:  # an axis of length 1 is slow on CPUs
        return y + (x[0] @ delta[0])[None]
    return y + jnp.einsum("btr,brc->btc", x, delta)


def as_matrix(fast: Array, basis: Float[Array, "*layers rows rank"] | None) -> Array:
    """Delta [..., rows, columns], also where it is kept at a low rank."""
    return fast if basis is None else jnp.einsum("...dr,...brc->...bdc", basis, fast)


def sizes(fast: Any) -> Any:
    """Root mean square of the entries of Delta over all its matrices, per layer and sequence: [L, B]."""
    squares = [jnp.sum(jnp.square(leaf), axis=(-2, -1)) for leaf in jax.tree.leaves(fast)]
    count = sum(leaf.shape[-2] * leaf.shape[-1] for leaf in jax.tree.leaves(fast))
    return jnp.sqrt(sum(squares) / count)
