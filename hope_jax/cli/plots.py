"""One figure with axes, as the experiments draw their curves."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure


@contextlib.contextmanager
def plot(path: Path, count: int = 1, size: tuple[float, float] = (7, 4)) -> Iterator[Any]:
    """``count`` axes side by side to draw into (the axes themselves where it is one); written as a PNG at the end.

    Every axes gets a grid, and a legend where something in it has a label.
    """
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    yield axes[0] if count == 1 else axes
    for one in axes:
        one.grid(alpha=0.3)
        if one.get_legend_handles_labels()[0]:
            one.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def draw_mean(axes: Any, x: Any, curves: Any, label: str, style: str = "-") -> None:
    """The mean of the curves [curve, point] over ``x`` [point], and each of them thin in the same colour."""
    (mean,) = axes.plot(x, np.mean(curves, axis=0), style, label=label)
    axes.plot(x, np.transpose(curves), style, color=mean.get_color(), linewidth=0.5, alpha=0.4)
