"""Draw the figure of the README from the numbers on file: ``python docs/figures/draw.py``.

Left: associative recall while training, with and without writes. Middle: made-up facts read once, the context emptied,
then asked for. Right: steps through a winding valley. Each point or bar is from ``experiments/results``.
"""

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "results"


def rows(name: str) -> list[dict[str, Any]]:
    """The JSON lines of a file of results."""
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def recall(axes: Any) -> None:
    """Accuracy against batches: every seed of Hope and DeltaNet, and of the same models that never write."""
    colours = {"hope": "C0", "titans": "C4", "deltanet": "C5"}
    seen = set()
    for row in rows("recall.jsonl"):
        if (row["length"], row["pairs"], row["vocab"]) != (64, 4, 64) or row["row"] not in colours:
            continue
        name = row["row"] + ("" if row["writes"] else ", no writes")
        steps, accuracy = zip(*row["curve"], strict=True)
        style = "-" if row["writes"] else ":"
        axes.plot(steps, accuracy, style, color=colours[row["row"]], label=None if name in seen else name)
        seen.add(name)
    axes.set(xlabel="batches of training", ylabel="accuracy", title="A memory that stores: recall of 4 pairs")
    axes.set(xlim=(40, 310), ylim=(0, 1.03))
    axes.legend(fontsize="small", loc="center right")


def knowledge(axes: Any) -> None:
    """Share of 8 facts recalled after one reading: levels, and fine-tuning at equal and at 32 times the compute."""
    names = {"levels": "3 levels", "sgd x1": "SGD", "adamw x1": "AdamW"}
    names |= {"sgd x32": "SGD, x 32", "adamw x32": "AdamW, x 32"}
    found = defaultdict(list)
    for row in rows("knowledge.jsonl"):
        if row["facts"] == 8 and (row["how"] != "levels" or row["levels"] == 3):
            found[row["how"]].append(row["recall"])
    bars(axes, [names[how] for how in names], [found[how] for how in names])
    axes.axhline(1 / 16, color="black", linestyle=":", linewidth=1)
    axes.set(ylim=(0, 1.03), ylabel="facts recalled", title="A memory that keeps learning: facts read once")


def valley(axes: Any) -> None:
    """Steps to the minimum of the winding valley at a decay of 0.9, the best of 54 settings each."""
    names = {"momentum": "momentum", "adam": "Adam", "delta_gram": "delta momentum"}
    steps = {row["optimizer"]: row["steps"] for row in rows("optimizers_toy.jsonl") if _is_valley(row)}
    bars(axes, list(names.values())[::-1], [[steps[name]] for name in names][::-1])
    axes.set(ylabel="steps", title="Optimizers: steps through a valley")


def _is_valley(row: dict[str, Any]) -> bool:
    return row["problem"] == "valley" and row["decay"] == 0.9 and row["steps"] is not None


def bars(axes: Any, names: list[str], values: list[list[float]]) -> None:
    """Mean of each, with the single runs as points."""
    axes.bar(names, [statistics.mean(of) for of in values], color=["C0"] + ["0.75"] * (len(names) - 1))
    for place, of in enumerate(values):
        if len(of) > 1:
            axes.plot([place] * len(of), of, "k.", markersize=5)
    axes.tick_params(axis="x", labelsize="small")


def main(path: Path = ROOT / "docs" / "figures" / "overview.png") -> None:
    """Write the figure."""
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    for axes, panel in zip(figure.subplots(1, 3), (recall, knowledge, valley), strict=True):
        panel(axes)
        axes.grid(alpha=0.3, axis="y")
        axes.title.set_fontsize("medium")
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
