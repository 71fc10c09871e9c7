"""Two ways to keep a document: writes into levels, and fine-tuning; and what each kept and lost (see ``knowledge.py``).

A *reader* predicts tokens in an empty context after it has read: parameters and a state for each of R documents.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.facts import ASKED, Facts
from hope_jax import context
from hope_jax.context.writes import cross_entropy
from hope_jax.types import Array, Float, Int

Predict = Callable[[Int[Array, "R T"]], Float[Array, "R T vocab"]]


def untouched(model: Any, params: Any, readers: int) -> Predict:
    """Readers that have read nothing."""
    return functools.partial(_static, model, params, model.init_state(params, readers))


def stored(model: Any, params: Any, documents: np.ndarray, forget: int | None = None) -> Predict:
    """Readers that have read the documents [R, T] once, as streams; then the level ``forget`` is set back."""
    state = context.start(model, params, documents.shape[0])
    _, state = context.surprise(model, params, state, jnp.asarray(documents))
    state = context.clear(model, params, context.finish(model, params, state))
    if forget is not None:
        state = context.reset(model, state, forget)
    return functools.partial(_static, model, params, state)


class Method(NamedTuple):
    """How to fine-tune: "sgd" or "adamw", its rate, and how often to read everything."""

    optimizer: str
    rate: float
    passes: int


def tuned(model: Any, params: Any, documents: np.ndarray, chunk: int, method: Method) -> Predict:
    """Readers whose parameters were all fine-tuned on the documents [R, T], a step for each ``chunk`` tokens in turn.

    As the levels do: the loss of a chunk is taken with the context before it, at the weights before its step.
    """
    optimizer, rate, passes = method
    return functools.partial(
        _tuned, model, _tune(model, params, jnp.asarray(documents), rate, passes, chunk, optimizer)
    )


@functools.partial(jax.jit, static_argnames=("model", "chunk", "optimizer"))
def _tune(
    model: Any, params: Any, documents: Int[Array, "R T"], rate: Any, passes: Any, chunk: int, optimizer: str
) -> Any:
    tx = optax.sgd(rate) if optimizer == "sgd" else optax.adamw(rate, weight_decay=0.0)

    def one(document: Int[Array, " T"]) -> Any:
        labels = jnp.concatenate([document[1:], document[:1]])
        known = jnp.arange(document.shape[0]) < document.shape[0] - 1  # nothing comes after the last token
        chunks = jax.tree.map(lambda x: x.reshape(-1, 1, chunk), (document, labels, known))
        read = functools.partial(jax.lax.scan, step)
        repeat = lambda _, kept: read((*kept, model.init_state(params, 1)), chunks)[0][:2]  # noqa: E731
        return jax.lax.fori_loop(0, passes, repeat, (params, tx.init(params)))[0]

    def step(carry: Any, chunk: Any) -> tuple[Any, None]:
        params, moments, state = carry
        tokens, labels, known = chunk

        def loss(params: Any) -> tuple[Array, Any]:
            logits, after = model.apply({"params": params}, tokens, state)
            return jnp.mean(cross_entropy(logits, labels) * known), after

        slopes, state = jax.grad(loss, has_aux=True)(params)
        updates, moments = tx.update(slopes, moments, params)
        return (optax.apply_updates(params, updates), moments, state), None

    return jax.vmap(one)(documents)


@functools.partial(jax.jit, static_argnames="model")
def _static(model: Any, params: Any, state: Any, tokens: Int[Array, "R T"]) -> Float[Array, "R T vocab"]:
    return model.apply({"params": params}, tokens, state)[0]


@functools.partial(jax.jit, static_argnames="model")
def _tuned(model: Any, params: Any, tokens: Int[Array, "R T"]) -> Float[Array, "R T vocab"]:
    return jax.vmap(lambda params, one: model.apply({"params": params}, one[None])[0][0])(params, tokens)


def recall(predict: Predict, facts: Facts) -> float:
    """Share of the facts whose word is named when asked for in an empty context: its first byte is the likeliest."""
    right = []
    for fact in np.moveaxis(facts.asked, 1, 0):
        named = predict(jnp.asarray(fact[:, :ASKED]))[:, -1].argmax(-1)
        right.append(np.asarray(named) == fact[:, ASKED])
    return float(np.mean(right))


def bits_per_byte(predict: Predict, text: Int[np.ndarray, "R window"]) -> float:
    """Of bytes, each predicted from those before it in its window."""
    tokens = jnp.asarray(text)
    return float(cross_entropy(predict(tokens[:, :-1]), tokens[:, 1:]).mean()) / np.log(2)
