"""Figures of many curves: each has a look of its own, and the legend hides none."""

import numpy as np
import pytest

from hope_jax.cli.plots import draw_mean, look, plot


def test_every_curve_has_a_look_of_its_own_and_only_controls_are_dashed():
    looks = [look(number) for number in range(40)]
    assert len(set(map(str, looks))) == 40 and not any(one["linestyle"] == "--" for one in looks)
    assert look(13, control=True) == {"color": "C3", "linestyle": "--"}


@pytest.mark.parametrize("count", [3, 31])
def test_a_legend_of_many_labels_is_beside_the_axes_and_whole(count, tmp_path):
    curves = np.random.default_rng(0).normal(size=(count, 2, 5))
    with plot(tmp_path / "x.png") as axes:
        for number, of_seeds in enumerate(curves):
            draw_mean(axes, range(5), of_seeds, f"the row of number {number}", control=number == 12)
    figure, legend, lines = axes.figure, axes.get_legend(), axes.lines
    figure.draw_without_rendering()
    box, outside = legend.get_window_extent(), count > 8
    assert (box.x0 >= axes.bbox.x1, axes.bbox.width > 5 * figure.dpi) == (outside, True)
    assert min(box.x0, box.y0) >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    assert [line.get_color() for line in lines] == [f"C{number % 10}" for number in range(count) for _ in range(3)]
    np.testing.assert_allclose(lines[0].get_ydata(), curves[0].mean(axis=0))
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
