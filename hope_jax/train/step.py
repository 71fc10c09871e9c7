"""Loss, gradient accumulation and the training step: pure functions ``(state, batch) -> (state, metrics)``.

A batch of text is ``[B, T+1]`` token ids: inputs are all but the last, targets all but the first. Every sequence starts
from a fresh context *inside* the loss, so gradients reach the initial states of the memories. The number of tokens seen
is no part of a state: it is ``step * batch * length``, computed in Python, as an int32 would overflow. The position in
the data belongs to the iterator and is saved beside the state. Read ``loop.py`` next.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from hope_jax.context.schedule import learns_in_context
from hope_jax.context.writes import cross_entropy, reading_loss
from hope_jax.errors import UserError
from hope_jax.kept import keeping, scan_pieces
from hope_jax.optim.checks import check
from hope_jax.storage.programs import stored_shapes
from hope_jax.train.devices import on_first_device
from hope_jax.train.guard import is_sound, usual_norm
from hope_jax.train.optimizer import Rate
from hope_jax.types import Array, Int, PRNGKeyArray, Scalar


class TrainState(struct.PyTreeNode):
    """Everything that is trained or that training needs to go on. A pytree, so it can be sharded leaf by leaf.

    ``step``: batches trained on, int32 scalar. ``params``: nested dict of arrays. ``opt_state``: the optimizer's.
    ``usual_norm``: moving mean of the norms of gradients, float32 scalar. ``skipped``: batches that changed nothing,
    int32 scalar; the optimizer has not seen them, see ``guard.py``.
    Leaves are arrays, or shapes or placements of arrays, hence the open types.
    """

    step: Any
    params: Any
    opt_state: Any
    usual_norm: Any
    skipped: Any

    @classmethod
    def first(cls, params: Any, opt_state: Any) -> "TrainState":
        """The state before the first batch."""
        step, skipped = (jnp.zeros((), jnp.int32) for _ in range(2))  # an array for each: all are donated
        return cls(step, params, opt_state, jnp.zeros((), jnp.float32), skipped)


def init_params(model: Any, key: PRNGKeyArray) -> Any:
    """Parameters of a language model; they depend on ``key`` alone."""
    return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def abstract_params(model: Any) -> Any:
    """Shapes, dtypes and placement of ``init_params``."""
    return on_first_device(stored_shapes(init_params, model, jax.eval_shape(jax.random.key, 0)))


def count_parameters(params: Any) -> int:
    """Numbers in ``params``, arrays or their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def count_bytes(arrays: Any) -> int:
    """Bytes of a tree of arrays or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))


class Mean(NamedTuple):
    """A mean that can still be merged: over microbatches, evaluation batches or processes alike."""

    total: Any
    count: Any

    @property
    def value(self) -> Any:
        """The mean itself."""
        return self.total / self.count


Metrics = dict[str, Mean]
LossFn = Callable[[Any, Any], tuple[Scalar, Metrics]]
"""``(parameters, batch) -> (mean loss, metrics)``; a batch is an array [B, ...] or a pytree of such arrays."""
Sums = dict[str, Scalar]
StepFn = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
MEASURED_BY_STEP = ("gradient_norm", "parameter_norm", "learning_rate", "skipped")  # beside what the loss measures


def next_token_loss(
    model: Any, byte_lengths: np.ndarray, remat_every: int | None = None, z_loss: float = 0.0
) -> LossFn:
    """Mean cross-entropy in nats per token, in at least float32: ``loss(params, batch) -> (loss, metrics)``.

    ``byte_lengths[vocab]`` are the bytes of each token, which make ``bits_per_byte`` comparable between tokenizers.
    ``remat_every`` runs the model over pieces of that many tokens (it must divide T), carrying the state and keeping
    only the states between pieces for the backward pass, which computes the rest again (rematerialisation): the same
    numbers with memory for T / remat_every states.

    ``z_loss``, 0 or more, is the weight of the mean of log(Z)^2 in what is minimised, Z the sum of the exponentials of
    the logits: it keeps log(Z) near 0 (PaLM, Chowdhery et al. 2022, section 5). The metric "loss" is without it.

    A model with levels that learn in context is read with their writes (``writes.py``), in pieces of its own: together
    with ``remat_every`` or ``z_loss`` that is a UserError.
    """
    check("z_loss", z_loss, 0)
    if learns_in_context(model) and (remat_every is not None or z_loss):
        given = "z_loss" if remat_every is None else "remat_every"
        raise UserError(f"a model whose levels learn in context is read chunk by chunk already; leave out {given}")
    sizes = np.asarray(byte_lengths, np.float32)

    def loss(params: Any, batch: Int[Array, "B window"]) -> tuple[Scalar, Metrics]:
        inputs, targets = batch[:, :-1], batch[:, 1:]

        def piece(state: Any, cut: tuple[Array, Array]) -> tuple[Any, Sums]:
            tokens, wanted = cut
            logits, state = model.apply({"params": params}, tokens, state)
            return state, _sums(logits, wanted, z_loss)

        if learns_in_context(model):
            sums = {"loss": reading_loss(model, params, inputs, targets).sum()}
        elif remat_every is None:  # no state: a fresh sequence, whose chunks the compiler knows to be whole
            sums = piece(None, (inputs, targets))[1]
        else:
            state = model.init_state(params, batch=inputs.shape[0], capacity=inputs.shape[1])
            with keeping(model.remat_states):
                sums = _rematerialised(piece, state, (inputs, targets), remat_every)
        tokens = jnp.float32(targets.size)
        size = jnp.asarray(sizes)[targets].sum()
        metrics = {name: Mean(total, tokens) for name, total in sums.items()}
        bits = Mean(sums["loss"] / jnp.log(2.0), size)
        return sum(sums.values()) / tokens, metrics | {"bits_per_byte": bits}

    return loss


def _sums(logits: Array, wanted: Array, z_loss: float) -> Sums:
    """Sums over all targets: of the nats and, where there is one, of the z-loss."""
    sums = {"loss": cross_entropy(logits, wanted).sum()}
    if z_loss:
        wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        sums["z_loss"] = z_loss * jnp.square(jax.nn.logsumexp(wide, axis=-1)).sum()
    return sums


def answer_loss(model: Any, ignore: int, prompt: float = 0.0) -> LossFn:
    """Mean cross-entropy in nats, and accuracy, over the scored positions of a batch (inputs, targets) [B, T].

    The loss of ``data.tasks``. The metrics are of the scored positions alone.

    Args:
      model: a language model that training does not write in context.
      ignore: the target of all other positions.
      prompt: weight of the mean loss at these other positions; their targets are then the next inputs.

    Raises:
      UserError: levels of the model are written in context in training, too. What they are written from is the loss of
        the next token, which is not that of the answers.
    """
    if learns_in_context(model):
        raise UserError(
            "this model's levels are written in context in training, too, and the loss of answers is read without "
            "writes; leave the model out (ttt_e2e, --cms.in-context), or train it on text"
        )

    def loss(params: Any, batch: tuple[Int[Array, "B T"], Int[Array, "B T"]]) -> tuple[Scalar, Metrics]:
        inputs, targets = batch
        logits, _ = model.apply({"params": params}, inputs)
        scored = targets != ignore
        wanted = jnp.where(scored, targets, jnp.roll(inputs, -1, axis=1))
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
        count = scored.sum().astype(jnp.float32)
        total, right = jnp.sum(nats * scored), jnp.sum(scored & (logits.argmax(-1) == targets)).astype(jnp.float32)
        others = ~scored.at[:, -1].set(True)  # nothing comes after the last
        mean = total / count + (prompt * jnp.mean(nats, where=others) if prompt else 0.0)
        return mean, {"loss": Mean(total, count), "accuracy": Mean(right, count)}

    return loss


def _rematerialised(piece: Callable, state: Any, tokens: tuple[Array, Array], every: int) -> Sums:
    """The sums of ``piece`` over the whole sequence, in rematerialised pieces of ``every`` tokens."""
    cuts = jax.tree.map(lambda z: jnp.moveaxis(z.reshape(z.shape[0], -1, every), 1, 0), tokens)
    _, sums = scan_pieces(piece, state, cuts, functools.partial(jax.checkpoint, prevent_cse=False))
    return jax.tree.map(jnp.sum, sums)


def mean_gradient(loss: LossFn, params: Any, batch: Any, accumulate: int) -> tuple[Any, Metrics]:
    """Gradient of the mean loss and merged metrics, over ``accumulate`` equal slices of the batch one after another.

    Equal to the gradient of the whole batch up to rounding, if the loss is a mean over equally many targets in every
    slice; it needs the memory of one slice. A slice takes every ``accumulate``-th sequence, so that devices that share
    the batch share each slice, too.
    """
    gradient = jax.grad(loss, has_aux=True)
    if accumulate == 1:
        return gradient(params, batch)
    slices = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total: tuple[Any, Metrics], part: Any) -> tuple[tuple[Any, Metrics], None]:
        return jax.tree.map(jnp.add, total, gradient(params, part)), None

    first = jax.tree.map(lambda x: x[0], slices)
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(gradient, params, first))
    (total, metrics), _ = jax.lax.scan(add, zero, slices)
    return jax.tree.map(lambda leaf: leaf / accumulate, total), metrics


def train_step(
    loss: LossFn,
    tx: optax.GradientTransformation,
    rate: Rate,
    accumulate: int = 1,
    placement: Any = None,
    spike: float | None = None,
) -> StepFn:
    """One optimizer update, compiled; the incoming state is donated and must not be used again.

    A step whose loss or gradient is not finite, or whose gradient is a ``spike`` (see ``guard.py``), changes nothing
    but ``step``. ``placement``: where the outgoing state lies, shardings shaped like it; None: where JAX puts it.

    Metrics beside those of the loss: ``gradient_norm`` before clipping, ``parameter_norm`` after the update (finite
    exactly as long as the run is sound), ``learning_rate`` of this update (its schedule waits while batches are
    skipped), and ``skipped``, 1 where nothing changed.
    """

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        gradient, metrics = mean_gradient(loss, state.params, batch, accumulate)
        norm = optax.tree.norm(gradient)
        sound = is_sound(metrics["loss"].total, norm, state.usual_norm, spike)
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        new = optax.apply_updates(state.params, updates), opt_state
        params, opt_state = jax.tree.map(functools.partial(jnp.where, sound), new, (state.params, state.opt_state))
        single = norm, optax.tree.norm(params), rate(state.step - state.skipped), 1 - sound.astype(jnp.float32)
        pairs = zip(MEASURED_BY_STEP, single, strict=True)
        metrics |= {name: Mean(value, jnp.float32(1)) for name, value in pairs}
        usual = usual_norm(state.usual_norm, norm, spike)
        return TrainState(state.step + 1, params, opt_state, usual, state.skipped + ~sound), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=None if placement is None else (placement, None))


def mean_over(measure: Callable[[Any, Any], Metrics], batches: Iterable[Any], params: Any) -> dict[str, float]:
    """Means of ``measure(params, batch)`` over ``batches`` together. Waits for the device once, at the end."""
    parts = [measure(params, batch) for batch in batches]
    sums = jax.tree.map(lambda *leaves: sum(float(leaf) for leaf in leaves), *jax.device_get(parts))
    return {name: mean.value for name, mean in sums.items()}
