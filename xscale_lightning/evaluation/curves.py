"""Curves of a score over the scale of the images, as plain uint8 arrays."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator


@dataclass(frozen=True)
class Curve:
    """One line of the plot."""

    label: str
    """What it is, for the legend."""
    scores: Mapping[float, float]
    """Score by share of the native size."""
    errors: Mapping[float, float] = field(default_factory=dict)
    """Standard error by share, where it is known."""
    base_line: bool = False
    """Drawn dashed and grey."""


def plot_curves(
    curves: Sequence[Curve], title: str, score: str, sizes: Mapping[float, tuple[int, int]] | None = None
) -> np.ndarray:
    """Plot scores over the share of the native size; bars are one standard error.

    Args:
        curves: lines, drawn in this order.
        title: above the plot.
        score: what the vertical axis shows.
        sizes: height and width in pixels at a share, to stand below the percentages.

    Returns:
        `[height, width, 3]` uint8.
    """
    # The object interface: pyplot would keep figures and choose a backend for the whole process.
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for curve in curves:
        shares = sorted(curve.scores)
        axes.errorbar(
            shares,
            [curve.scores[share] for share in shares],
            yerr=[curve.errors.get(share, math.nan) for share in shares] if curve.errors else None,
            label=curve.label,
            color="grey" if curve.base_line else "tab:blue",
            linestyle="--" if curve.base_line else "-",
            marker="o",
            capsize=3,
        )
    ticks = sorted({share for curve in curves for share in curve.scores})
    names = [f"{100 * share:g} %" for share in ticks]
    for i, share in enumerate(ticks):
        if sizes and share in sizes:
            names[i] += "\n{} x {}".format(*sizes[share])
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, names)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("share of the native size" + (", pixels" if sizes else ""))
    axes.set_ylabel(score)
    axes.set_title(title, parse_math=False)  # a dollar in a data set's name is no formula
    axes.grid(alpha=0.3)
    axes.legend()
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
