"""Reading with writes: the levels of a continuum memory system learn from the text while it is read (Eq. 71; SPEC 3.1).

The text is cut into chunks of C tokens, C the period of the fastest level. Per chunk, for all levels at once::

    loss  = mean over the chunk's tokens of the next-token loss, at the weights before this chunk's write
    gathered_l += d loss / d Delta_l                                  the state carried in is a constant here
    every C_l tokens:  Delta_l -= eta_l optimizer(gathered_l C / C_l);  gathered_l = 0

The label of a chunk's last token is the first of the next chunk, which is read with the new weights: causal. The chunks
are ``levels.scan_periods``, nested loops, slowest level outside. Training differentiates through all of it, but for
what ``bptt`` cuts. Read ``context.py`` next: the same for a stream that comes in pieces.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from hope_jax.errors import UserError
from hope_jax.levels import check_multiples, scan_periods
from hope_jax.nn.feed_forward.fast import FastState, LevelsConfig, Writes
from hope_jax.nn.language_model import BlockState
from hope_jax.optim import muon_step
from hope_jax.types import Array, Bool, Float, Int, Tokens

Nats = Float[Array, "B predicted"]


def _inner(name: str) -> optax.GradientTransformation:
    """The inner optimizer of one matrix."""
    muon = optax.stateless_with_tree_map(lambda u, _: muon_step(jnp.asarray(u)))
    return {
        "sgd": optax.identity(),
        "momentum": optax.trace(0.9),
        "adam": optax.scale_by_adam(0.9, 0.99, eps_root=1e-16),
        "muon": optax.chain(optax.trace(0.9), muon),
    }[name]


@dataclass(frozen=True)
class Plan:
    """Which levels are written, and when.

    Attributes:
      periods: for each tree of Delta the period in tokens of every layer; 0: that layer is never written.
      nested: a slower level's write sets the faster ones back.
      writes: the rest.
    """

    periods: tuple[tuple[int, ...], ...]
    nested: bool
    writes: Writes

    def __post_init__(self) -> None:
        if not any(self.distinct):
            raise UserError("the model has no level that can be written in context; use a hope or stacked model")
        check_multiples(self.distinct)

    @property
    def distinct(self) -> tuple[int, ...]:
        """All periods, fastest first."""
        return tuple(sorted({period for layers in self.periods for period in layers if period}))

    @property
    def chunk(self) -> int:
        """Tokens of a chunk, C."""
        return self.distinct[0]

    def bptt(self, level: int) -> int | None:
        """See ``Writes.bptt``."""
        return self.writes.bptt[level] if level < len(self.writes.bptt) else None


def plan_of(model: Any, *, trained: bool) -> Plan:
    """The plan of a model: of the levels that training writes in context, or of all that it has.

    Raises:
      UserError: it has none, or their periods are not multiples of one another.
    """
    part = model.config.feed_forward
    if not isinstance(part, LevelsConfig):
        kind = type(part).__name__
        raise UserError(f"the model's feed-forward part is {kind}, which has no levels; use a hope or stacked model")
    periods = part.periods(model.config.layers)
    return Plan(periods[: part.trained] if trained else periods, part.nested, part.writes)


def learns_in_context(model: Any) -> bool:
    """Whether training writes some of the model's levels in context."""
    part = model.config.feed_forward
    return isinstance(part, LevelsConfig) and part.trained > 0


class Carry(NamedTuple):
    """What a chunk leaves to the next: the mixers' states, Delta, gathered gradients, and the inner optimizers' states.

    Leaves of Delta and ``gathered`` are [L, B, rows, columns].
    """

    mixer: Any
    fast: tuple[Any, ...]
    gathered: tuple[Any, ...]
    optimizer: tuple[Any, ...]


def begin(model: Any, plan: Plan, blocks: BlockState, batch: int) -> Carry:
    """Nothing written yet; ``blocks`` is a fresh state of ``model``."""
    config = model.config
    layers = lambda leaf: jnp.zeros((config.layers, *leaf.shape), leaf.dtype)  # noqa: E731
    trees = config.feed_forward.blank(batch, config.width, config.dtype)
    fast = tuple(jax.tree.map(layers, tree) for tree in trees[: len(plan.periods)])
    return Carry(blocks.mixer, fast, jax.tree.map(jnp.zeros_like, fast), tuple(map(_begin(plan), fast)))


def _begin(plan: Plan) -> Any:
    return jax.vmap(jax.vmap(_inner(plan.writes.optimizer).init))


def reading_state(model: Any, carry: Carry) -> BlockState:
    """The state of the blocks that belongs to ``carry``: Delta for the levels that have it, None for the others."""
    count = len(model.config.feed_forward.periods(model.config.layers))
    return BlockState(carry.mixer, FastState(carry.fast + (None,) * (count - len(carry.fast))))


def read_chunks(
    model: Any, params: Any, plan: Plan, carry: Carry, inputs: Tokens, labels: Tokens, position: Int[Array, ""] | int
) -> tuple[Carry, Nats]:
    """Read whole chunks and write what they teach.

    Args:
      inputs, labels: [B, T], T a multiple of the plan's chunk; label t is the token after input t.
      position: tokens read with writes before, a multiple of the chunk.

    Returns:
      The carry after the last write, and the loss of every label in nats, at the weights it was read with.
    """
    rates = rates_of(model, params, plan)

    def segment(carry: Any, tokens: Any, active: Any, due: Any) -> tuple[Any, Any]:
        del active, due  # of the chunk's start; writes are due at its end
        ours, theirs, at = tokens
        carry, nats = gather(model, params, plan, carry, ours.T, theirs.T)
        return write(plan, rates, carry, at[0] + plan.chunk), nats.T

    at = position + jnp.arange(inputs.shape[1])
    carry, nats = scan_periods(segment, carry, (inputs.T, labels.T, at), position=position, periods=plan.distinct)
    return carry, nats.T


def gather(model: Any, params: Any, plan: Plan, carry: Carry, inputs: Tokens, labels: Tokens) -> tuple[Carry, Nats]:
    """Read up to one chunk and add the gradient of its loss to what is gathered; nothing is written."""

    def loss(fast: tuple[Any, ...]) -> tuple[Array, tuple[Nats, Any]]:
        logits, after = model.apply({"params": params}, inputs, reading_state(model, carry._replace(fast=fast)))
        nats = cross_entropy(logits, labels)
        return jnp.sum(nats) / plan.chunk, (nats, after.mixer)

    slopes, (nats, mixer) = jax.grad(loss, has_aux=True)(carry.fast)
    slopes = tuple(lax.stop_gradient(s) if plan.bptt(i) == 0 else s for i, s in enumerate(slopes))
    return carry._replace(mixer=mixer, gathered=jax.tree.map(jnp.add, carry.gathered, slopes)), nats


def cross_entropy(logits: Float[Array, "B T vocab"], labels: Tokens) -> Nats:
    """Nats per label, in at least float32."""
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return optax.softmax_cross_entropy_with_integer_labels(wide, labels)


def write(plan: Plan, rates: tuple[Array, ...], carry: Carry, at: Int[Array, ""] | int) -> Carry:
    """The writes that are due after token ``at``, a multiple of the chunk, and the nested set-backs."""
    due = [_ends(periods, at) for periods in plan.periods]
    levels = _write_where(plan, rates, carry, at, due)
    if plan.nested:
        slower = zip(due[1:], levels, strict=False)
        levels = [*(_where(ends, functools.partial(_fresh, plan), mine) for ends, mine in slower), levels[-1]]
    return Carry(carry.mixer, *zip(*levels, strict=True))


def write_rest(plan: Plan, rates: tuple[Array, ...], carry: Carry, at: Int[Array, ""], more: bool) -> Carry:
    """Writes of what is gathered, though no period ends: of levels inside a period at ``at``, of all if there is more.

    Nothing is set back: no slower period has ended.
    """
    waiting = [_has(periods) & (more | ~_ends(periods, at)) for periods in plan.periods]
    return Carry(carry.mixer, *zip(*_write_where(plan, rates, carry, at, waiting), strict=True))


Mine = tuple[Any, Any, Any]


def _write_where(plan: Plan, rates: tuple[Array, ...], carry: Carry, at: Any, layers: list[Any]) -> list[Mine]:
    """Delta, gathered gradients and optimizer of every level, written in those of its layers."""
    levels = zip(layers, rates, carry.fast, carry.gathered, carry.optimizer, strict=True)
    return [
        _where(where, functools.partial(_written, plan, i, rate, at), tuple(mine))
        for i, (where, rate, *mine) in enumerate(levels)
    ]


def _each(periods: tuple[int, ...]) -> np.ndarray:
    """Periods of the layers, or the one that all of them have."""
    return np.array(periods[0] if len(set(periods)) == 1 else periods)


def _has(periods: tuple[int, ...]) -> Bool[Array, ""] | Bool[Array, " L"]:
    """Whether there is a period at all."""
    return jnp.asarray(_each(periods) > 0)


def _ends(periods: tuple[int, ...], at: Any) -> Bool[Array, ""] | Bool[Array, " L"]:
    """Whether a period ends at token ``at``: of all layers alike, or of each."""
    return _has(periods) & (jnp.asarray(at) % jnp.asarray(np.maximum(_each(periods), 1)) == 0)


def _where(layers: Any, change: Any, mine: Mine) -> Mine:
    """``change(mine)`` in those layers, ``mine`` in the others; leaves [L, ...]."""
    if layers.ndim == 0:
        return lax.cond(layers, change, lambda same: same, mine)
    pick = lambda new, old: jnp.where(layers.reshape(-1, *[1] * (old.ndim - 1)), new, old)  # noqa: E731
    return jax.tree.map(pick, change(mine), mine)


def _fresh(plan: Plan, mine: Mine) -> Mine:
    zero = lambda tree: jax.tree.map(jnp.zeros_like, tree)  # noqa: E731
    return zero(mine[0]), zero(mine[1]), _begin(plan)(mine[0])


def _written(plan: Plan, level: int, rate: Float[Array, " L"], at: Any, mine: Mine) -> Mine:
    """One write of one level in all its layers."""
    fast, gathered, optimizer = mine
    period = np.maximum(np.array(plan.periods[level]), plan.chunk)
    per_layer = lambda scale, tree: jax.tree.map(lambda x: scale[:, None, None, None].astype(x.dtype) * x, tree)  # noqa: E731
    mean = per_layer(jnp.asarray(plan.chunk / period), gathered)
    count = plan.bptt(level)
    if count is not None and count > 0:
        cut = (jnp.asarray(at) // jnp.asarray(period)) % count == 0
        constant = lambda x: jnp.where(cut.reshape(-1, *[1] * (x.ndim - 1)), lax.stop_gradient(x), x)  # noqa: E731
        fast, optimizer = jax.tree.map(constant, (fast, optimizer))
    directions, optimizer = jax.vmap(jax.vmap(_inner(plan.writes.optimizer).update))(mean, optimizer)
    moved = jax.tree.map(jnp.subtract, fast, per_layer(rate, directions))
    zero = jax.tree.map(jnp.zeros_like, gathered)
    if count == 0:
        moved, optimizer = lax.stop_gradient((moved, optimizer))
    return moved, zero, optimizer


def rates_of(model: Any, params: Any, plan: Plan) -> tuple[Float[Array, " L"], ...]:
    """eta of every level and layer: the learned ones, and the configured one for levels that training never wrote."""
    ours = params["blocks"]["feed_forward"]
    learned = [ours["rate"][:, i] for i in range(ours["rate"].shape[-1])] if "rate" in ours else []
    fixed = jnp.full(model.config.layers, plan.writes.rate)
    return (*learned, *[fixed] * (len(plan.periods) - len(learned)))


def reading_loss(model: Any, params: Any, inputs: Tokens, labels: Tokens) -> Nats:
    """Nats of every label of fresh sequences that are read with writes: the loss that training differentiates."""
    plan = plan_of(model, trained=True)
    if inputs.shape[1] % plan.chunk:
        raise UserError(f"sequences have {inputs.shape[1]} tokens; expected a multiple of the period {plan.chunk}")
    blocks = model.init_state(params, batch=inputs.shape[0], capacity=inputs.shape[1])
    carry = begin(model, plan, blocks, inputs.shape[0])
    return read_chunks(model, params, plan, carry, inputs, labels, 0)[1]
