"""Learn one text, then another, with levels that keep their periods or not (see ``domains.py``)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hope_jax import LanguageModel, ModelConfig
from hope_jax import train as training
from hope_jax.cli.results import Row
from hope_jax.data import TextData, Tokenizer
from hope_jax.optim.by_level import STATIC, level_labels

SHOWN = ("first_before", "first", "forgotten", "second")
"""Bits per byte of a line: of the first text at the switch and at the end, their difference; of the second text."""


class Learner:
    """A model on both texts of a ``DomainsConfig``: programs that all its rows, rates and seeds share."""

    def __init__(self, config: Any, architecture: ModelConfig, tokenizer: Tokenizer, texts: Sequence[TextData]):
        self._config, self._texts = config, texts
        self.every = architecture.update_every(config.batch * config.length)
        of_texts = [text.heldout_batches(batch=config.batch, limit=config.eval_batches) for text in texts]
        self._heldout: dict[str, Any] = dict(zip(("first", "second"), of_texts, strict=True))
        loss = training.next_token_loss(model := LanguageModel(architecture), tokenizer.byte_lengths)
        self.setups = {periods: self._setup(model, loss, periods) for periods in (False, True)}

    def _setup(self, model: LanguageModel, loss: Any, periods: bool) -> training.Setup:
        """Levels that keep their periods, or that all move every batch."""
        config, every = self._config, self.every if periods else dict.fromkeys(self.every, 1)
        tokens = config.batch * config.length
        return training.model_setup(model, loss, config.optimizer, config.steps, tokens, every=every).for_any_rate()

    def first(self, seed: int, periods: bool, run: training.Run | None) -> training.Result:
        """Learn the first text."""
        return self._learn(0, seed, periods, self.setups[periods].start(seed), run, "first text")

    def second(self, first: training.Result, seed: int, periods: bool, rate: float, run: training.Run | None) -> Any:
        """Go on with the second text, at that multiple of the learning rate."""
        start = training.at_rate(self.setups[periods].start(seed, first.params), rate)
        return self._learn(1, seed, periods, start, run, f"second text at {rate:g}")

    def _learn(
        self, text: int, seed: int, periods: bool, start: Any, run: training.Run | None, said: str
    ) -> training.Result:
        config = self._config
        batches = self._texts[text].train_batches(batch=config.batch, seed=seed)
        steps = training.Steps(config.steps, config.eval_every)
        label = f"{len(self.every) - 1} levels, seed {seed}, {said}"
        return training.fit(self.setups[periods], batches, self._heldout, steps, start=start, run=run, label=label)

    def line(self, learn_first: Any, seed: int, later: bool, rate: float, run: training.Run | None) -> Row:
        """What a JSON line says, see ``parts`` for more than the curve."""
        first = learn_first()
        second = self.second(first, seed, later, rate, run)
        curve = [*_curve(first, 0), *_curve(second, first.step)[1:]]
        before, (_, after, learned) = curve[len(first.heldout) - 1][1], curve[-1]
        bits = dict(zip(SHOWN, (before, after, after - before, learned), strict=True))
        return bits | self.parts(first.params, second.params) | {"curve": curve}

    def parts(self, first: Any, second: Any) -> Row:
        """``moved``: how far each level went on the second text, over the norm it had before. ``alone``: bits per byte
        of the first text with one part as it is after the second text, and all others as they were before it."""
        labels, went = level_labels(first, self.every), jax.tree.map(jnp.subtract, second, first)
        parts = ["embedding", "mixer", *(name for name in self.every if name != STATIC)]
        moved = {name: float(_norm(went, labels, name) / _norm(first, labels, name)) for name in self.every}
        alone = {name: self._alone(first, second, name) for name in parts}
        return {"parameters": training.count_parameters(first), "moved": moved, "alone": alone}

    def _alone(self, first: Any, second: Any, part: str) -> float:
        labels = level_labels(first, {part: 1})
        mixed = jax.tree.map(lambda a, b, label: b if label == part else a, first, second, labels)
        return self.setups[True].evaluator(self._heldout["first"])(mixed)["bits_per_byte"]


def _curve(found: training.Result, before: int) -> list[list[float]]:
    """[batches, bits per byte of the first text, of the second], ``before`` batches after the beginning."""
    names = ("first/bits_per_byte", "second/bits_per_byte")
    return [[before + step, *(means[name] for name in names)] for step, means in found.heldout.items()]


def _norm(tree: Any, labels: Any, name: str) -> Any:
    """Norm of the leaves with that label."""
    return optax.tree.norm(jax.tree.map(lambda x, label: x * (label == name), tree, labels))
