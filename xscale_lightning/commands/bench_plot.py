"""The picture of a bench: one panel per metric, one row per model, a dot with its interval."""

import io
import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from xscale_lightning.commands.bench_results import Score

COLUMNS = 3


def draw(scores: Sequence[Score], models: Sequence[str]) -> bytes:
    """Dot plot as PNG: mean and 95 % interval, the value of every seed as a small dot, the best filled.

    Args:
        scores: all scores; a panel is made for every metric of every evaluation.
        models: names, from top to bottom.
    """
    panels = list(dict.fromkeys((score.evaluation, score.metric) for score in scores))
    rows = math.ceil(len(panels) / COLUMNS)
    columns = math.ceil(len(panels) / rows)  # as even as it gets
    # The object interface: pyplot would keep figures and choose a backend for the whole process.
    figure = Figure(figsize=(1.6 + 3.4 * columns, rows * (1.3 + 0.32 * len(models))), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for i, (evaluation, metric) in enumerate(panels):
        axes = grid[i // columns][i % columns]
        mine = {s.model: s for s in scores if (s.evaluation, s.metric) == (evaluation, metric)}
        _panel(axes, mine, models)
        axes.set_title(evaluation, fontsize=9, parse_math=False)
        axes.set_xlabel(metric, fontsize=8, parse_math=False)
        if i % columns:
            axes.tick_params(labelleft=False)
    for i in range(len(panels), rows * columns):
        grid[i // columns][i % columns].set_axis_off()
    note = "dot: mean, filled where the best is beyond doubt; line: 95 % interval; ticks: seeds"
    figure.supxlabel(note, fontsize=7, color="0.35")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _panel(axes: Axes, scores: dict[str, Score], models: Sequence[str]) -> None:
    for row, model in enumerate(models):
        score = scores.get(model)
        if score is None:
            continue
        if score.interval is not None:
            axes.plot(score.interval, [row, row], color="tab:blue", linewidth=1.5, solid_capstyle="butt")
        if len(score.values) > 1:
            axes.plot(score.values, [row] * len(score.values), "|", color="0.45", markersize=9, zorder=2)
        face = "tab:blue" if score.best else "white"
        axes.plot([score.mean], [row], "o", color="tab:blue", markerfacecolor=face, markersize=6, zorder=3)
    axes.set_yticks(range(len(models)), models, fontsize=8)
    axes.set_ylim(len(models) - 0.5, -0.5)  # the first on top
    axes.set_xlim(*_limits(list(scores.values())))
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _limits(scores: Sequence[Score]) -> tuple[float, float]:
    """Room for all values and intervals; of shares no more than from 0 to 1, however wide an interval of two seeds."""
    points = [value for score in scores for value in (*score.values, *(score.interval or ()))]
    low, high = min(points), max(points)
    if all(0 <= value <= 1 for score in scores for value in score.values):
        low, high = max(low, 0.0), min(high, 1.0)
    room = 0.06 * (high - low) or 0.05 * (abs(high) or 1.0)
    return low - room, high + room
