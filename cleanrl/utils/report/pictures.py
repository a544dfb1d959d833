"""The plots of a report, drawn by Matplotlib without a display."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter

from cleanrl.utils.report.statistics import CONFIDENCE, Estimate, MeanCurve, Spread, to_text

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "-.", ":")  # when there are more experiments than colours
GREY = "#555555"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "text.parse_math": False,  # a name may contain $
}
DPI = 120
HALO = [withStroke(linewidth=3, foreground="white")]
LINE_HEIGHT = 0.055  # of a label, as a fraction of the axes' height
FEW_POINTS = 30  # up to so many are also drawn as dots


class Series(NamedTuple):
    """An experiment in a plot."""

    label: str
    look: int
    """index of its colour and line style"""
    online: MeanCurve | None
    offline: MeanCurve | None
    """evaluations in the offline phase"""
    final: tuple[int, Spread] | None
    """step and return of the final evaluation"""


class Level(NamedTuple):
    """A teacher's mean return."""

    label: str
    value: float
    look: int | None
    """that of the teacher's experiment; None: all experiments have this teacher"""


class Shade(NamedTuple):
    label: str
    last_step: int


class End(NamedTuple):
    """Where the label of a curve belongs."""

    x: float
    y: float
    label: str
    color: str


class Panel(NamedTuple):
    """Rows of estimates."""

    title: str
    rows: list[tuple[str, Estimate, int]]
    """label, estimate, look"""
    is_probability: bool


def color_of(look: int | None) -> str:
    return GREY if look is None else COLORS[look % len(COLORS)]


def draw_curves(
    path: Path,
    title: str,
    x_label: str,
    last_games: int,
    series: Sequence[Series],
    levels: Sequence[Level],
    shade: Shade | None,
) -> None:
    """Plots returns over steps: the mean curve of each experiment with its band, evaluations as dots."""
    with style.context(("default", STYLE)):  # regardless of the user's matplotlibrc
        figure = Figure(figsize=(9.5, 5), layout="constrained")
        axes = figure.subplots()
        if shade:
            axes.axvspan(0, shade.last_step, color="#eeeeee", zorder=0, linewidth=0)
        ends = []
        for level in levels:
            axes.axhline(level.value, linestyle="--", linewidth=1.2, color=color_of(level.look))
            ends.append(End(math.inf, level.value, level.label, color_of(level.look)))
        for one in series:
            end = draw_series(axes, one)
            if end:
                ends.append(End(*end, one.label, color_of(one.look)))
        axes.set(title=title, xlabel=x_label, ylabel="return of a game")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.margins(y=0.08)
        label_ends(axes, ends)
        draw_key(figure, last_games, series, levels, shade)
        figure.savefig(path, dpi=DPI)


def draw_series(axes: Axes, one: Series) -> tuple[float, float] | None:
    """Draws an experiment; returns the position of its last mark."""
    color, line = color_of(one.look), LINES[one.look // len(COLORS) % len(LINES)]
    end = None
    if one.offline:
        axes.errorbar(
            one.offline.steps,
            one.offline.means,
            one.offline.stds,
            fmt="o:",
            markersize=5,
            markerfacecolor="white",
            linewidth=1,
            capsize=2,
            color=color,
        )
        end = one.offline.steps[-1], one.offline.means[-1]
    if one.online:
        steps, means, stds = one.online
        marker = "." if len(steps) <= FEW_POINTS else None
        axes.plot(steps, means, line, marker=marker, color=color, linewidth=1.8)
        if stds is not None:
            axes.fill_between(steps, means - stds, means + stds, color=color, alpha=0.18, linewidth=0)
        end = steps[-1], means[-1]
    if one.final:
        step, returns = one.final
        axes.errorbar(step, returns.mean, returns.std, fmt="D", markersize=6, capsize=3, color=color)
        end = end if one.online else (step, returns.mean)
    return end


def label_ends(axes: Axes, ends: Sequence[End]) -> None:
    """Labels each curve at its end, or at the right edge if it ends near that."""
    right = axes.get_xlim()[1]
    distance = LINE_HEIGHT * np.ptp(axes.get_ylim())
    inside, at_edge = (
        [end for end in ends if end.x < 0.8 * right],
        [end for end in ends if end.x >= 0.8 * right],
    )
    for column in (inside, at_edge):
        heights = spread_out([end.y for end in column], distance)
        for end, height in zip(column, heights, strict=True):
            axes.annotate(
                end.label,
                (right if column is at_edge else end.x, height),
                xytext=(8, 0),
                textcoords="offset points",
                verticalalignment="center",
                color=end.color,
                fontsize=9,
                annotation_clip=False,
                path_effects=HALO,
            )


def spread_out(heights: Sequence[float], distance: float) -> list[float]:
    """Moves heights apart until they are `distance` from each other, in the same order."""
    order = np.argsort(heights, kind="stable")
    moved = np.array(heights, np.float64)[order]
    for _ in range(100):
        lacking = np.maximum(distance - np.diff(moved), 0) / 2
        moved[:-1] -= lacking
        moved[1:] += lacking
    return moved[np.argsort(order)].tolist()


def draw_key(
    figure: Figure, last_games: int, series: Sequence[Series], levels: Sequence[Level], shade: Shade | None
) -> None:
    """Explains the marks below the plot."""
    curves = [curve for one in series for curve in (one.online, one.offline) if curve]
    spreads = [one.final[1].std for one in series if one.final]
    has_band = any(curve.stds is not None for curve in curves) or any(std is not None for std in spreads)
    keys = []
    if any(one.online for one in series):
        label = f"mean of the last {last_games} games of training"
        keys.append(Line2D([], [], color=GREY, linewidth=1.8, label=label))
    if any(one.offline for one in series):
        keys.append(
            Line2D(
                [],
                [],
                color=GREY,
                marker="o",
                markerfacecolor="white",
                linestyle=":",
                label="evaluation, offline phase",
            )
        )
    if any(one.final for one in series):
        keys.append(Line2D([], [], color=GREY, marker="D", linestyle="", label="final evaluation"))
    if has_band:
        keys.append(Patch(color=GREY, alpha=0.3, linewidth=0, label="± one standard deviation over seeds"))
    if levels:
        keys.append(Line2D([], [], color=GREY, linestyle="--", linewidth=1.2, label="teacher's mean return"))
    if shade:
        keys.append(Patch(facecolor="#eeeeee", edgecolor="#bbbbbb", linewidth=0.5, label=shade.label))
    figure.legend(handles=keys, loc="outside lower center", ncols=3, fontsize=8.5, frameon=False)


def draw_estimates(path: Path, panels: Sequence[Panel]) -> None:
    """Draws estimates with their intervals, one panel below the other."""
    with style.context(("default", STYLE)):
        num_lines = [sum(1 + label.count("\n") for label, _, _ in panel.rows) for panel in panels]
        figure = Figure(figsize=(9.5, 0.8 * len(panels) + 0.32 * sum(num_lines)), layout="constrained")
        all_axes = figure.subplots(
            len(panels), squeeze=False, height_ratios=[1 + lines for lines in num_lines]
        )
        for axes, panel in zip(all_axes[:, 0], panels, strict=True):
            for row, (_, one, look) in enumerate(panel.rows):
                color = color_of(look)
                if one.interval:
                    axes.plot(
                        one.interval, (row, row), color=color, linewidth=7, alpha=0.3, solid_capstyle="butt"
                    )
                axes.plot(one.value, row, "D", color=color, markersize=6)
                axes.annotate(
                    to_text(one.value),
                    (one.value, row),
                    (0, 7),
                    textcoords="offset points",
                    horizontalalignment="center",
                    fontsize=8.5,
                    path_effects=HALO,
                )
            if panel.is_probability:
                axes.axvline(0.5, color=GREY, linestyle="--", linewidth=1.2)
                axes.set_xlim(-0.05, 1.05)
            axes.set_yticks(range(len(panel.rows)), [label for label, _, _ in panel.rows])
            axes.set_ylim(len(panel.rows) - 0.4, -0.8)
            axes.grid(axis="y", visible=False)
            axes.set_title(panel.title)
        if any(one.interval for panel in panels for _, one, _ in panel.rows):
            figure.supxlabel(f"bars: {CONFIDENCE:.0%} bootstrap intervals", fontsize=8.5)
        figure.savefig(path, dpi=DPI)
