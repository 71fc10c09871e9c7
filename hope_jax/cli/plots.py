"""One figure with axes, as the experiments draw their curves; every curve has a look of its own."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

COLOURS = 10  # of matplotlib's cycle, "C0" to "C9"
STYLES = ("-", ":", "-.", (0, (8, 2, 1, 2, 1, 2)))  # "--" is for controls
INSIDE = 8  # labels that a legend inside of the axes can have without hiding curves
COLUMN = 20  # labels in one column of a legend


@contextlib.contextmanager
def plot(path: Path, count: int = 1, size: tuple[float, float] = (7, 4)) -> Iterator[Any]:
    """``count`` axes side by side to draw into (the axes themselves where it is one); written as a PNG at the end.

    Every axes gets a grid, and a legend if a curve has a label. A legend with many labels stands beside the axes, and
    makes the figure wider.
    """
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    yield axes[0] if count == 1 else axes
    for one in axes:
        one.grid(alpha=0.3)
        _add_legend(figure, one)
    figure.savefig(path, dpi=120)


def _add_legend(figure: Figure, axes: Any) -> None:
    """A legend of whatever has a label."""
    labels = axes.get_legend_handles_labels()[1]
    if len(labels) > INSIDE:
        columns = -(-len(labels) // COLUMN)
        inches = columns * (0.9 + 0.075 * max(map(len, labels)))
        figure.set_size_inches(figure.get_figwidth() + inches, max(figure.get_figheight(), 4.5))
        axes.legend(fontsize="small", ncols=columns, handlelength=4, loc="center left", bbox_to_anchor=(1, 0.5))
    elif labels:
        axes.legend(fontsize="small")


def look(number: int, control: bool = False) -> dict[str, Any]:
    """Colour and line of curve ``number``, from 0: the first 40 all differ. A control is dashed, in 10 colours."""
    colour, style = number % COLOURS, number // COLOURS % len(STYLES)
    return {"color": f"C{colour}", "linestyle": "--" if control else STYLES[style]}


def draw_mean(axes: Any, x: Any, curves: Any, label: str, control: bool = False, **line: Any) -> None:
    """Draw the mean of the curves [curve, point] over ``x`` [point] with the next ``look``, and each of them, thin.

    ``line``: more settings of a line of matplotlib, such as its marker.
    """
    style = look(len(axes.get_legend_handles_labels()[0]), control) | line
    axes.plot(x, np.mean(curves, axis=0), label=label, **style)
    axes.plot(x, np.transpose(curves), linewidth=0.5, alpha=0.4, **style)
