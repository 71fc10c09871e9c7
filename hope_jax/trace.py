"""See what a memory does while it reads: surprise, inner rate and retention per token, what every level stores.

>>> seen, state = trace.watch(model, params, model.init_state(params, batch=1), document)
>>> trace.draw(seen, "document.png", "what was stored of it")

A document is read in pieces that end where chunks end, so that every write lies between two of them.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax import context
from hope_jax.context.schedule import schedule_of
from hope_jax.context.stream import State, check_room, entered
from hope_jax.errors import UserError, extra
from hope_jax.nn.feed_forward.fast import BlockState, ContextState, sizes
from hope_jax.nn.language_model import check_tokens
from hope_jax.types import Array, Float, Int


class Trace(NamedTuple):
    """What was seen over T tokens. Sizes are root mean squares of the numbers that Delta is kept in.

    Attributes:
      surprise: loss in nats, of the tokens from number ``first`` on.
      first: 0, or 1 where nothing predicts token 0 (see ``context.surprise``).
      rate, retention: eta and alpha of every token in the self-modifying mixers; None for models with other mixers.
      starts: first token of every piece. If levels are written, they are before a piece.
      written: size of the change of Delta before every piece, exactly 0 where there was none.
      drift: size of Delta while the piece is read: how far the level is from its initial weights.
      periods: of every tree of Delta and layer, in tokens; 0 where there is none (``LevelsConfig.periods``).
    """

    surprise: Float[np.ndarray, "B predicted"]
    first: int
    rate: Float[np.ndarray, "L B H T"] | None
    retention: Float[np.ndarray, "L B H T"] | None
    starts: Int[np.ndarray, " pieces"]
    written: Float[np.ndarray, "trees pieces L B"]
    drift: Float[np.ndarray, "trees pieces L B"]
    periods: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """T, how many were read."""
        return self.first + self.surprise.shape[1]

    def levels(self) -> Iterator[tuple[int, Float[np.ndarray, " pieces"], Float[np.ndarray, " pieces"]]]:
        """Period, sizes of changes and drift of every level, fastest first: means over its layers and the sequences."""
        found = {(period, tree) for tree, layers in enumerate(self.periods) for period in layers if period}
        for period, tree in sorted(found):
            layers = np.equal(self.periods[tree], period)
            yield period, *(kind[tree][:, layers].mean(axis=(1, 2)) for kind in (self.written, self.drift))

    def numbers(self) -> dict[str, Any]:
        """Plain lists for JSON: means over sequences, of a gate over heads too, one list for every layer."""
        gates = {"rate": self.rate, "retention": self.retention}
        means = {name: None if gate is None else gate.mean(axis=(1, 2)).tolist() for name, gate in gates.items()}
        levels = [{"period": p, "written": w.tolist(), "drift": d.tolist()} for p, w, d in self.levels()]
        surprise, starts = self.surprise.mean(axis=0).tolist(), self.starts.tolist()
        return {"first": self.first, "surprise": surprise, **means, "starts": starts, "levels": levels}


def watch(model: Any, params: Any, state: State, tokens: Any, progress: bool = False) -> tuple[Trace, ContextState]:
    """Read and store ``tokens``, a whole document, as ``context.surprise`` does: the same losses, state and errors.

    Losses and state are equal up to rounding; the state that was given is as good as before. ``progress`` shows a bar.
    """
    tokens = jnp.asarray(tokens)
    check_tokens(tokens, model.config.vocab_size)
    now, length = entered(model, state), tokens.shape[1]
    check_room(now, length)
    chunk, unfinished = schedule_of(model, trained=False).chunk, 0 if now.interrupted else int(now.unfinished)
    starts, seen = sorted({0, *range(-unfinished % chunk, length, chunk)}), []
    for at, end in _shown(list(itertools.pairwise([*starts, length])), progress):
        before = now
        nats, now = context.surprise(model, params, now, tokens[:, at:end])
        gates = [gate[..., : int(now.unfinished)] for gate in _gates(model, params, now)]
        seen.append((nats, gates, *_sizes(before.blocks.feed_forward, now.blocks.feed_forward)))
    nats, gates, written, drift = zip(*jax.device_get(seen), strict=True)
    nats, written, drift = np.concatenate(nats, axis=1), np.stack(written, axis=1), np.stack(drift, axis=1)
    # The first piece may complete a chunk: its gates begin with those of that chunk's earlier tokens.
    joined = [np.concatenate(gate, axis=-1)[..., -length:] for gate in zip(*gates, strict=True)]
    rate, retention = joined or (None, None)
    periods = model.config.feed_forward.periods(model.config.layers)
    return Trace(nats, length - nats.shape[1], rate, retention, np.array(starts), written, drift, periods), now


def _shown(pieces: list[tuple[int, int]], progress: bool) -> Iterable[tuple[int, int]]:
    """The pieces, counted by a bar if asked for."""
    if not progress:
        return pieces
    with extra("train"):
        from tqdm import tqdm
    return tqdm(pieces, "reading", unit="chunk")


@functools.partial(jax.jit, static_argnames="model")
def _gates(model: Any, params: Any, state: ContextState) -> tuple[Float[Array, "L B H C"], ...]:
    """eta and alpha of the unfinished chunk (or nothing), read once more from its start, with the same weights."""
    start = BlockState(state.anchor, state.blocks.feed_forward)
    _, sown = model.apply({"params": params}, state.tokens, start, state.unfinished, mutable=["intermediates"])
    mixer = sown["intermediates"]["blocks"]["mixer"] if sown else {}
    return tuple(mixer[name][0] for name in ("rate", "retention") if mixer)


@jax.jit
def _sizes(before: Any, after: Any) -> tuple[Float[Array, "trees L B"], Float[Array, "trees L B"]]:
    """Of the change of Delta and of Delta itself, for every tree."""
    changes = jax.tree.map(jnp.subtract, after, before)
    return jnp.stack([sizes(delta) for delta in changes]), jnp.stack([sizes(delta) for delta in after])


def draw(trace: Trace, path: str | Path, title: str, compare: Any = None) -> Path:
    """``figure`` as a PNG in the file ``path``, which is returned; its folder is made."""
    path, drawn = Path(path), figure(trace, title, compare)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=120, format="png")
    return path


def figure(trace: Trace, title: str, compare: Any = None) -> Any:
    """A matplotlib figure of one panel each: surprise, eta, 1 - alpha, drift and sizes of writes, where there are any.

    Of the gates, median and quartiles over heads and sequences; otherwise means over sequences, and a level's layers.
    Curves of tokens are running means over a fiftieth of the document. ``compare`` [B, n]: nats of the last n of these
    tokens, read without learning.

    Raises:
      UserError: ``compare`` has another shape, or matplotlib (the extra [train]) is missing.
    """
    with extra("train"):
        from matplotlib.figure import Figure
    batch, length, given = len(trace.surprise), trace.tokens, np.shape(compare)
    if compare is not None and given not in [(batch, n + 1) for n in range(length)]:
        raise UserError(f"compare has shape {given}; expected nats of these tokens, [{batch}, 1 to {length}]")
    panels = list(_panels(trace, compare))
    drawn = Figure(figsize=(9, 0.6 + 1.7 * len(panels)), layout="constrained")
    rows = drawn.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(rows, panels, strict=True):
        panel(axes)
        axes.grid(alpha=0.3)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    rows[0].set_title(title)
    rows[-1].set(xlabel="token", xlim=(0, length))
    return drawn


def _panels(trace: Trace, compare: Any) -> Iterator[Callable[[Any], None]]:
    curves = {"learning": trace.surprise} | ({} if compare is None else {"without": np.asarray(compare)})
    if trace.surprise.size:
        yield functools.partial(_draw_surprise, curves, trace.tokens)
    if trace.rate is not None:
        yield functools.partial(_draw_gate, trace.rate, "eta", "linear")
    if trace.retention is not None and np.any(trace.retention < 1):
        yield functools.partial(_draw_gate, 1 - trace.retention, "1 - alpha", "log")
    yield functools.partial(_draw_drift, trace)
    if np.any(trace.written):
        yield functools.partial(_draw_writes, trace)


def _draw_surprise(curves: dict[str, np.ndarray], length: int, axes: Any) -> None:
    for i, (name, nats) in enumerate(curves.items()):
        mean, start = nats.mean(axis=0), length - nats.shape[1]
        at, smooth = _smooth(mean)
        axes.plot(np.arange(start, length), mean, color=f"C{i}", linewidth=0.4, alpha=0.4)
        axes.plot(start + at, smooth, color=f"C{i}", label=name)
    axes.set(ylabel="surprise, nats", ylim=(0, None))


def _draw_gate(gate: Float[np.ndarray, "L B H T"], name: str, scale: str, axes: Any) -> None:
    from matplotlib import colormaps

    named = np.linspace(0, len(gate) - 1, min(len(gate), 6)).round()
    for layer, values in enumerate(gate):
        quartiles = np.quantile(values, (0.25, 0.5, 0.75), axis=(0, 1))
        (at, low), (_, median), (_, high) = map(_smooth, quartiles)
        color = colormaps["viridis"](layer / len(gate))
        axes.fill_between(at, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(at, median, color=color, linewidth=0.8, label=f"layer {layer}" if layer in named else None)
    axes.set(ylabel=name, yscale=scale)


def _smooth(values: Float[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
    """Running mean over a fiftieth of the values, and the places of its middles."""
    width = len(values) // 50 + 1
    return np.arange(len(values) - width + 1) + width // 2, np.convolve(values, np.full(width, 1 / width), "valid")


def _draw_drift(trace: Trace, axes: Any) -> None:
    for period, _, drift in trace.levels():
        at, values = [*trace.starts, trace.tokens], [*drift, drift[-1]]
        axes.step(at, values, where="post", label=f"every {period:,} tokens")
    axes.set(ylabel="drift, rms", ylim=(0, None))


def _draw_writes(trace: Trace, axes: Any) -> None:
    for period, written, _ in trace.levels():
        at, some = trace.starts[written > 0], written[written > 0]
        axes.plot(at, some, ".", label=f"every {period:,} tokens" if at.size else None)
    axes.set(ylabel="write, rms", yscale="log")
