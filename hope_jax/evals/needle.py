"""How many needles a model finds: it reads each haystack once, carrying its state, and then writes the answer.

>>> haystack = noise_haystack(ByteTokenizer())
>>> needle.found(model, params, haystack, 4096, batches=8, batch=4, seed=1)      # the share that it finds, 0 to 1

``generate.sample`` reads the prompt in pieces of a few hundred tokens. At the end of a piece the state is all that is
left of it. Levels that training writes in context are written here, too. The answer is decoded greedily. As in RULER
(arXiv 2404.06654) a needle is found if the number stands in what the model writes.
"""

import contextlib
import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int32

from hope_jax import generate
from hope_jax.context.schedule import learns_in_context
from hope_jax.data import IGNORE, Haystack, Tokenizer, needle
from hope_jax.errors import NotFinite, UserError, whole


def found(model: Any, params: Any, haystack: Haystack, length: int, *, batches: int, batch: int, seed: int) -> float:
    """The share of the needles that the model finds in haystacks of ``length`` tokens; it may be longer than trained.

    Args:
        model, params: a language model; its vocabulary has the ids of ``haystack.tokenizer``.
        haystack, length, batch, seed: of ``data.needle``; the seed should be another one than that of training.
        batches: how many of them, from batch number 0; at least 1.

    Raises:
        UserError: a number out of range, a vocabulary that is too small, or logits that are not finite.
    """
    vocab, needed = model.config.vocab_size, haystack.tokenizer.vocab_size
    if vocab < needed:
        raise UserError(f"the model has {vocab} token ids and the tokenizer {needed}: give the model's own tokenizer")
    examples = (needle(seed, index, batch, length, haystack) for index in range(whole("batches", batches)))
    right = [answered(model, params, haystack.tokenizer, *example) for example in examples]
    return float(np.mean(right))


def found_at(
    model: Any, params: Any, haystack: Haystack, lengths: Iterable[int], *, needles: int, tokens: int, seed: int
) -> list[float | None]:
    """``found`` at each of the lengths; None where logits are not finite, as they may be beyond the training length.

    Args:
        needles: haystacks of each length, or a few more, so that all batches are full.
        tokens: of a batch; longer haystacks are read one at a time.
        model, params, haystack, seed: as in ``found``.

    Raises:
        UserError: as in ``found``, except for logits that are not finite.
    """
    shares: list[float | None] = []
    for length in lengths:
        batch, share = min(whole("needles", needles), max(1, tokens // length)), None
        with contextlib.suppress(NotFinite):
            batches = math.ceil(needles / batch)
            share = found(model, params, haystack, length, batches=batches, batch=batch, seed=seed)
        shares.append(share)
    return shares


def answered(
    model: Any,
    params: Any,
    tokenizer: Tokenizer,
    inputs: Int32[np.ndarray, "B T"],
    targets: Int32[np.ndarray, "B T"],
) -> Bool[np.ndarray, " B"]:
    """Whether the model, reading what comes before the answer, writes the answer.

    The answer is what ``targets`` has that is not IGNORE. The model writes as many tokens as there are from its
    beginning to the end.

    Raises:
        UserError: a row without an answer, or answers that begin at different positions.
    """
    start = _beginning(targets != IGNORE)
    state = model.init_state(params, len(inputs), inputs.shape[1])
    # Nothing is drawn.
    how: dict[str, Any] = {"temperature": 0, "key": jax.random.key(0), "learn": learns_in_context(model)}
    prompt, steps = inputs[:, : start + 1], inputs.shape[1] - start
    written, _ = generate.sample(model, params, state, prompt, steps=steps, **how)
    answers = (tokenizer.decode(row[row != IGNORE]).strip() for row in targets)
    known = np.where(written < tokenizer.vocab_size, written, 0)  # a model may have more ids than its tokenizer
    texts = map(tokenizer.decode, known)
    return np.array([answer in text for answer, text in zip(answers, texts, strict=True)])


def _beginning(scored: Bool[np.ndarray, "B T"]) -> int:
    """The position at which the answers of all rows begin."""
    empty = np.flatnonzero(~np.any(scored, axis=1))
    if empty.size:
        raise UserError(f"row {empty[0]} of the targets has no answer; give every row one")
    starts = np.argmax(scored, axis=1)
    if np.any(starts != starts[0]):
        raise UserError(f"answers begin at the positions {sorted({*starts.tolist()})}; let all begin at the same one")
    return int(starts[0])
