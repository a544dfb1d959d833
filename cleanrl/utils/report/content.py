"""What a report says: its summary and tables, around the learning curves and the figures over all games."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cleanrl.utils.report.all_games import over_all_games
from cleanrl.utils.report.curves import learning_curves
from cleanrl.utils.report.pages import (
    NONE,
    Block,
    Bullets,
    Heading,
    Paragraph,
    Table,
    count,
    to_html,
    to_markdown,
)
from cleanrl.utils.report.runs import Found
from cleanrl.utils.report.statistics import (
    Group,
    Spread,
    group_runs,
    looks_of,
    over_runs,
    range_text,
    score,
    spread,
    teacher_return,
    to_text,
    training_return,
    unfinished_of,
)
from cleanrl.utils.run.charts import EPISODIC_RETURN, EVALUATION_RETURN

# Mean ± std of the last episodic returns over 3 seeds: of the published scripts, from their documentation,
# and of the DQN student of Agarwal et al. (2022).
PUBLISHED = {
    "published, PyTorch, 10M steps": {
        "Breakout": (295.55, 12.30),
        "Pong": (19.72, 0.20),
        "BeamRider": (9284.99, 242.28),
    },
    "published, JAX, 10M steps": {
        "Breakout": (335.08, 19.12),
        "Pong": (18.75, 0.19),
        "BeamRider": (8024.75, 579.02),
    },
    "Agarwal et al. (2022), 10M frames": {"Breakout": (275.15, 20.65), "BeamRider": (6514.25, 411.10)},
}


def write_report(folder: Path, found: Found, args: Any) -> None:
    """Writes report.md, report.html and the pictures.

    `args` are those of `cleanrl.utils.report`.
    """
    groups = group_runs(found.runs)
    blocks = [
        Heading(1, "Report"),
        summary(groups, found),
        *results(groups, args.last_games),
        *learning_curves(groups, args.last_games, folder),
        *over_all_games(groups, args, folder),
        *runs_and_notes(found, args.last_games),
    ]
    (folder / "report.md").write_text(to_markdown(blocks), encoding="utf-8")
    (folder / "report.html").write_text(to_html(blocks, folder), encoding="utf-8")


def summary(groups: Sequence[Group], found: Found) -> Paragraph:
    text = (
        f"{count(len(found.runs), 'run')} of {count(len(looks_of(groups)), 'experiment')} on "
        f"{count(len({group.game for group in groups}), 'game')}."
    )
    if found.left_out:
        text += f" {count(len(found.left_out), 'folder')} left out: see the end."
    return Paragraph(text)


def results(groups: Sequence[Group], last_games: int) -> list[Block]:
    """The table of scores, beside published ones."""
    in_training = f"last {last_games} games in training"
    head = ["game", "experiment", "seeds", "online steps", "final evaluation", "games", in_training]
    rows = []
    for game, experiment, runs in groups:
        is_qdagger = any(run.is_qdagger for run in runs)
        teacher = teacher_return(runs)
        published = [of_games.get(game) if is_qdagger else None for of_games in PUBLISHED.values()]
        cells = [
            spread(over_runs(runs, score)),
            range_text([len(run.curves[EVALUATION_RETURN].steps) for run in runs]),
            spread(over_runs(runs, partial(training_return, last_games=last_games))),
            None if teacher is None else to_text(teacher),
            None if teacher is None else range_text([run.teacher_games for run in runs]),
            *(of_game and Spread(*of_game) for of_game in published),
        ]
        rows.append(
            [
                game,
                experiment,
                str(len(runs)) + unfinished_of(runs),
                range_text([run.online_steps for run in runs]),
                *(NONE if cell is None else str(cell) for cell in cells),
            ]
        )
    explanations = [
        "Final evaluation: a run's score, the mean return of the games it played after training; these"
        " were fixed beforehand. Games: how many each run played.",
        f"Last {last_games} games in training: only of runs that finished that many. They favour short games:"
        " if those are the wins, as in Pong, the mean is too high, and if they are the losses,"
        " too low.",
        "Both are the mean over seeds ± their sample standard deviation (n − 1), which a single seed lacks.",
        "Teacher: its mean return in the games it plays first in each run; its games: how many.",
        "Returns are of whole games, rewards unclipped; online steps are environment steps of 4 frames.",
        "Published: QDagger's last episodic returns, mean ± standard deviation over 3 seeds (whether n or"
        " n − 1 was the divisor is not known).",
    ]
    return [
        Heading(2, "Results"),
        Table([*head, "teacher", "its games", *PUBLISHED], rows),
        Bullets(explanations),
    ]


def runs_and_notes(found: Found, last_games: int) -> list[Block]:
    """Which runs were used, what to know about them, and which were left out."""
    rows, notes = [], [*found.notes]
    for run in found.runs:
        num_games = len(run.curves[EPISODIC_RETURN].steps)
        rows.append([str(run.folder), run.game, run.exp_name, str(run.seed), str(num_games)])
        if num_games < last_games:
            notes.append(
                f"{run.folder}: finished {count(num_games, 'game')} in training, fewer than {last_games}"
            )
    table = Table(["folder", "game", "experiment", "seed", "games finished in training"], rows)
    blocks: list[Block] = [Heading(2, "Runs"), table]
    if notes:
        blocks += [Heading(2, "Notes"), Bullets(notes)]
    if found.left_out:
        items = [f"{folder}: {reason}" for folder, reason in found.left_out]
        blocks += [Heading(2, "Left out"), Bullets(items)]
    return blocks
