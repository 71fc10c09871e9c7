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

from experiments.facts import ASKED, Facts, draw_facts
from hope_jax import context
from hope_jax.context.schedule import schedule_of
from hope_jax.context.writes import cross_entropy
from hope_jax.types import Array, Float, Int

CHOICE, CHOOSERS = 1_000_033, 8
"""Seed and number of the documents that the rates of fine-tuning are chosen on."""
RATES = {"sgd": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0), "adamw": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}
Predict = Callable[[Any], Float[Array, "R T vocab"]]  # of tokens [R, T]


def untouched(model: Any, params: Any, readers: int) -> Predict:
    """Readers that have read nothing."""
    return functools.partial(_static, model, params, model.init_state(params, readers))


def stored(model: Any, params: Any, documents: np.ndarray, forget: int | None = None) -> Predict:
    """Readers that have read the documents [R, T] once, as streams; then the level ``forget`` is set back."""
    state = context.start(model, params, documents.shape[0])
    _, state = context.surprise(model, params, state, documents)
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
    return functools.partial(_tuned, model, _tune(model, optimizer, chunk, params, documents, rate, passes))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _tune(model: Any, optimizer: str, chunk: int, params: Any, documents: Any, rate: Any, passes: Any) -> Any:
    tx = optax.sgd(rate) if optimizer == "sgd" else optax.adamw(rate, weight_decay=0.0)

    def loss(params: Any, state: Any, tokens: Any, labels: Any, known: Any) -> tuple[Array, Any]:
        logits, after = model.apply({"params": params}, tokens, state)
        return jnp.mean(cross_entropy(logits, labels) * known), after

    def step(carry: Any, chunk: Any) -> tuple[Any, None]:
        params, moments, state = carry
        slopes, state = jax.grad(loss, has_aux=True)(params, state, *chunk)
        updates, moments = tx.update(slopes, moments, params)
        return (optax.apply_updates(params, updates), moments, state), None

    def one(document: Int[Array, " T"]) -> Any:
        known = jnp.arange(document.shape[0]) < document.shape[0] - 1  # nothing comes after the last token
        parts = (document, jnp.roll(document, -1), known)
        chunks = jax.tree.map(lambda x: x.reshape(-1, 1, chunk), parts)

        def once(_: Any, kept: Any) -> Any:
            return jax.lax.scan(step, (*kept, model.init_state(params, 1)), chunks)[0][:2]

        return jax.lax.fori_loop(0, passes, once, (params, tx.init(params)))[0]

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
        right.append(predict(fact[:, :ASKED])[:, -1].argmax(-1) == fact[:, ASKED])
    return float(np.mean(right))


def bits_per_byte(predict: Predict, text: Int[np.ndarray, "R window"]) -> float:
    """Bits per byte of a text of bytes, each predicted from those before it in its window."""
    return float(cross_entropy(predict(text[:, :-1]), jnp.asarray(text[:, 1:])).mean()) / np.log(2)


def by_levels(model: Any, params: Any, facts: Facts) -> tuple[dict[str, Any], Predict]:
    """What was read by writes into levels; with the recall that is left when one of them is set back."""
    count = len(schedule_of(model, trained=True).periods)
    read = functools.partial(stored, model, params, _documents(facts))
    without = [recall(read(forget=level), facts) for level in range(count)] if count > 1 else []
    return {"without": without}, read()


def by_tuning(model: Any, params: Any, facts: Facts, how: str, chunk: int) -> tuple[dict[str, Any], Predict]:
    """What was read by fine-tuning, at the rate that recalls most of other facts; ``how``: "OPTIMIZER xPASSES"."""
    choice = draw_facts(CHOICE, 0, CHOOSERS, facts.told.shape[1], heldout=True)
    optimizer, passes = how.split(" x")
    read = functools.partial(tuned, model, params, chunk=chunk)

    def score(method: Method) -> float:
        return recall(read(_documents(choice), method=method), choice)

    best = max((Method(optimizer, rate, int(passes)) for rate in RATES[optimizer]), key=score)
    return {"rate": best.rate}, read(_documents(facts), method=best)


def _documents(facts: Facts) -> np.ndarray:
    return facts.told.reshape(len(facts.told), -1)
