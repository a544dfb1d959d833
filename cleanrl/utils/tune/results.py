"""What a study found: a table of its trials, best first, and a picture of what each option does."""

from pathlib import Path

import optuna
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from cleanrl.utils.report.pages import NONE
from cleanrl.utils.report.pictures import COLORS, DPI, GREY, STYLE
from cleanrl.utils.report.statistics import to_text


def last_value(trial: FrozenTrial) -> float | None:
    """Its final return or, of a pruned trial, that of its last evaluation; else none."""
    if trial.state == TrialState.COMPLETE:
        return trial.value
    is_pruned = trial.state == TrialState.PRUNED
    return trial.intermediate_values.get(trial.last_step) if is_pruned else None


def table(study: optuna.Study) -> list[str]:
    """Lines: those that finished, the best first, then the others."""
    finished = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    others = [trial for trial in study.trials if trial.state != TrialState.COMPLETE]
    trials = sorted(finished, key=lambda trial: trial.value, reverse=True) + others
    searched = [text.partition("=")[0] for text in study.user_attrs["search"]]
    rows = [["trial", "state", "return", *searched]]
    for trial in trials:
        value = last_value(trial)
        shown = NONE if value is None else to_text(value)
        values = (trial.params.get(name, NONE) for name in searched)
        params = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in values]
        rows.append([str(trial.number), trial.state.name.lower(), shown, *params])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def draw(study: optuna.Study, space: dict[str, BaseDistribution], path: Path) -> None:
    """A plot for each option: its value and the return of each trial; pruned ones are hollow."""
    with style.context(STYLE):
        figure = Figure(figsize=(3.2 * len(space) + 1, 3.6), layout="constrained")
        for axes, (name, values) in zip(
            figure.subplots(1, len(space), sharey=True, squeeze=False)[0], space.items(), strict=True
        ):
            for trial in study.trials:
                value = last_value(trial)
                if value is not None and name in trial.params:
                    is_complete = trial.state == TrialState.COMPLETE
                    color = COLORS[0] if is_complete else GREY
                    axes.scatter(
                        trial.params[name], value, color=color, facecolors=None if is_complete else "none"
                    )
            if getattr(values, "log", False):
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.xaxis.set_major_formatter("{x:g}")  # by default a formula, which the style does not draw
                axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel(f"--{name}")
        figure.axes[0].set_ylabel("mean return (hollow: pruned)")
        figure.savefig(path, dpi=DPI)
