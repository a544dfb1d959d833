"""The learning curves of a report: each game over the plotted step, and QDagger beside DQN."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from cleanrl.utils.report.events import Curve
from cleanrl.utils.report.pages import Block, Heading, Paragraph, Picture, count
from cleanrl.utils.report.pictures import Level, Series, Shade, draw_curves
from cleanrl.utils.report.runs import RunResults
from cleanrl.utils.report.statistics import (
    Group,
    looks_of,
    mean_curve,
    online_curve,
    over_runs,
    score,
    spread,
    teacher_return,
    to_text,
    unfinished_of,
)
from cleanrl.utils.run.charts import OFFLINE_RETURN


def learning_curves(groups: Sequence[Group], last_games: int, folder: Path) -> list[Block]:
    """Draws the curves of every game, and QDagger beside DQN where it has both."""
    looks = looks_of(groups)
    curves, comparisons = [], []
    for game in sorted({group.game for group in groups}):
        of_game = [group for group in groups if group.game == game]
        runs = [run for group in of_game for run in group.runs]
        levels = teacher_levels(of_game, looks)
        picture = Picture(f"curves-{game}.png", f"Learning curves on {game}")
        draw_curves(
            folder / picture.file_name,
            f"{game}: learning curves",
            "offline gradient steps, then environment steps (of 4 frames)",
            last_games,
            [plotted_series(group, last_games, looks[group.experiment]) for group in of_game],
            levels,
            shade("offline phase", [run.offline_steps for run in runs]),
        )
        curves.append(picture)
        if len({run.is_qdagger for run in runs}) == 2:
            picture = Picture(f"comparison-{game}.png", f"QDagger beside DQN from scratch on {game}")
            draw_curves(
                folder / picture.file_name,
                f"{game}: QDagger beside DQN from scratch",
                "environment steps (of 4 frames), including those the teacher played",
                last_games,
                [environment_series(group, last_games, looks[group.experiment]) for group in of_game],
                levels,
                shade("the teacher plays", [run.teacher_steps for run in runs]),
            )
            comparisons.append(picture)
    explanation = (
        "Steps are those TensorBoard shows. A line is the mean over seeds of the mean return of the last"
        f" {last_games} games, from where every seed has finished one; its band, and the bars of evaluations,"
        " are ± one sample standard deviation over seeds."
    )
    blocks = [Heading(2, "Learning curves"), Paragraph(explanation), *curves]
    if comparisons:
        explanation = (
            "Steps are environment steps: first those in which QDagger's teacher played to fill the buffer,"
            " then those of the online phase. The offline phase takes none, so its last evaluation is plotted"
            " where the online phase begins. Evaluations are not counted, nor are the steps in which the"
            " teacher was trained, even if it saved its replay then."
        )
        blocks += [Heading(2, "QDagger beside DQN from scratch"), Paragraph(explanation), *comparisons]
    return blocks


def plotted_series(group: Group, last_games: int, look: int) -> Series:
    """Over the plotted step."""
    offline = [run.curves[OFFLINE_RETURN] for run in group.runs if run.has(OFFLINE_RETURN)]
    return series(group, last_games, look, offline, lambda run: 0)


def environment_series(group: Group, last_games: int, look: int) -> Series:
    """Over environment steps; the offline phase ends where the teacher's play ends."""
    offline = [
        Curve(np.array([run.teacher_steps]), run.curves[OFFLINE_RETURN].values[-1:])
        for run in group.runs
        if run.has(OFFLINE_RETURN)
    ]
    return series(group, last_games, look, offline, lambda run: run.teacher_steps - run.offline_steps)


def series(
    group: Group, last_games: int, look: int, offline: list[Curve], shift: Callable[[RunResults], int]
) -> Series:
    final = spread(over_runs(group.runs, score))
    return Series(
        f"{group.experiment}, {count(len(group.runs), 'seed')}{unfinished_of(group.runs)}",
        look,
        online_curve(group.runs, last_games, shift),
        mean_curve(offline, [curve.steps[-1] for curve in offline]),
        (max(run.last_step + shift(run) for run in group.runs), final) if final else None,
    )


def teacher_levels(groups: Sequence[Group], looks: dict[str, int]) -> list[Level]:
    """One line for all experiments if their teachers' returns are the same, else one in each one's colour."""
    returns = {group.experiment: teacher_return(group.runs) for group in groups}
    levels = [
        Level(f"teacher, {to_text(value)}", value, looks[experiment])
        for experiment, value in returns.items()
        if value is not None
    ]
    if len({level.label for level in levels}) == 1:
        return [levels[0]._replace(look=None)]
    return levels


def shade(label: str, steps: Iterable[int]) -> Shade | None:
    """The first steps of a plot, if the phase is equally long in all runs that have it."""
    lengths = set(steps) - {0}
    return Shade(label, lengths.pop()) if len(lengths) == 1 else None
