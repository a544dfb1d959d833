"""What a report says: its tables, pictures and explanations."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cleanrl.utils.games.atari import HUMAN_SCORES, RANDOM_SCORES
from cleanrl.utils.report.pages import (
    Block,
    Bullets,
    Heading,
    Paragraph,
    Picture,
    Table,
    to_html,
    to_markdown,
)
from cleanrl.utils.report.pictures import Level, Panel, Series, Shade, draw_curves, draw_estimates
from cleanrl.utils.report.runs import EVALUATION, GAMES, OFFLINE, TEACHER, Curve, Found, RunResults
from cleanrl.utils.report.statistics import (
    CONFIDENCE,
    Estimate,
    Group,
    Spread,
    estimate,
    group_runs,
    improvement_probability,
    interquartile_mean,
    mean_curve,
    mean_value,
    normalise,
    online_curve,
    over_runs,
    score,
    spread,
    to_text,
)

# Mean ± std over 3 seeds of the last episodic returns: of the published scripts, as their documentation gives
# it, and of the DQN student of Agarwal et al. (2022).
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
FEW_RUNS = 5  # of a game; what is drawn from so few again and again differs too little
NONE = "–"

Scores = dict[str, dict[str, np.ndarray]]  # by experiment and game: those of its runs (runs,)
Interval = Callable[[Callable[..., float], Sequence[np.ndarray]], Estimate]


def write_report(folder: Path, found: Found, args: Any) -> None:
    """Writes report.md, report.html and the pictures.

    `args` are those of `cleanrl.utils.report.__main__`.
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


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")


def unfinished_of(runs: Iterable[RunResults]) -> str:
    """What to add to a number of runs if not all are finished."""
    number = sum(run.unfinished is not None for run in runs)
    return f" ({number} unfinished)" if number else ""


def looks_of(groups: Iterable[Group]) -> dict[str, int]:
    """A number for each experiment, so that it looks the same in every picture."""
    return {name: look for look, name in enumerate(sorted({group.experiment for group in groups}))}


# ------------------------------------------------------------------------------------------------- table


def results(groups: Sequence[Group], last_games: int) -> list[Block]:
    """The table of scores, beside what was published."""
    head = ["game", "experiment", "seeds", "online steps", f"last {last_games} games", "final evaluation"]
    rows = []
    for game, experiment, runs in groups:
        steps = [run.online_steps for run in runs]
        is_qdagger = any(run.is_qdagger for run in runs)
        teacher = teacher_return(runs)
        published = [of_games.get(game) if is_qdagger else None for of_games in PUBLISHED.values()]
        cells = [
            spread(over_runs(runs, partial(score, last_games=last_games))),
            spread(over_runs(runs, partial(mean_value, tag=EVALUATION))),
            None if teacher is None else to_text(teacher),
            *(of_game and Spread(*of_game) for of_game in published),
        ]
        rows.append(
            [
                game,
                experiment,
                str(len(runs)) + unfinished_of(runs),
                f"{min(steps):,}" + (f" to {max(steps):,}" if min(steps) < max(steps) else ""),
                *(NONE if cell is None else str(cell) for cell in cells),
            ]
        )
    explanations = [
        f"Last {last_games} games: a run's score, the mean return of the last games that it finished in"
        " training.",
        "Final evaluation: the mean return of the games that it played after training.",
        "Both are the mean over seeds ± their sample standard deviation (n − 1), which one seed lacks.",
        "Teacher: its mean return in the games that it played first.",
        "Returns are of whole games, rewards unclipped; online steps are environment steps of 4 frames.",
        "Published: QDagger, the last episodic returns, mean ± standard deviation over 3 seeds; whether n or"
        " n − 1 divides that one is not known.",
    ]
    return [Heading(2, "Results"), Table([*head, "teacher", *PUBLISHED], rows), Bullets(explanations)]


def teacher_return(runs: Iterable[RunResults]) -> float | None:
    """The mean over runs; None if none of them has a teacher."""
    of_runs = spread(over_runs(runs, partial(mean_value, tag=TEACHER)))
    return of_runs.mean if of_runs else None


# ---------------------------------------------------------------------------------------------- pictures


def learning_curves(groups: Sequence[Group], last_games: int, folder: Path) -> list[Block]:
    """Draws every game's, and QDagger beside DQN where there are both."""
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
            picture = Picture(f"comparison-{game}.png", f"QDagger beside DQN from nothing on {game}")
            draw_curves(
                folder / picture.file_name,
                f"{game}: QDagger beside DQN from nothing",
                "environment steps (of 4 frames), those that the teacher played included",
                last_games,
                [environment_series(group, last_games, looks[group.experiment]) for group in of_game],
                levels,
                shade("the teacher plays", [run.teacher_steps for run in runs]),
            )
            comparisons.append(picture)
    explanation = (
        "Over the step as TensorBoard shows it. A line is the mean over seeds of the mean return of the"
        f" last {last_games} games, from where every seed has finished one; its band, and the bars of"
        " evaluations, are ± one sample standard deviation over seeds."
    )
    blocks = [Heading(2, "Learning curves"), Paragraph(explanation), *curves]
    if comparisons:
        explanation = (
            "Over environment steps: those in which QDagger's teacher played to fill the buffer, then those"
            " of the online phase. The offline phase takes none, so its last evaluation stands where the"
            " online phase begins. Evaluations are not counted, nor are the steps in which the teacher was"
            " trained and may have saved its replay."
        )
        blocks += [Heading(2, "QDagger beside DQN from nothing"), Paragraph(explanation), *comparisons]
    return blocks


def plotted_series(group: Group, last_games: int, look: int) -> Series:
    """Over the step as it is plotted."""
    offline = [run.curves[OFFLINE] for run in group.runs if run.has(OFFLINE)]
    return series(group, last_games, look, offline, lambda run: 0)


def environment_series(group: Group, last_games: int, look: int) -> Series:
    """Over environment steps, with the end of the offline phase where the teacher's play ends."""
    offline = [
        Curve(np.array([run.teacher_steps]), run.curves[OFFLINE].values[-1:])
        for run in group.runs
        if run.has(OFFLINE)
    ]
    return series(group, last_games, look, offline, lambda run: run.teacher_steps - run.offline_steps)


def series(
    group: Group, last_games: int, look: int, offline: list[Curve], shift: Callable[[RunResults], int]
) -> Series:
    final = spread(over_runs(group.runs, partial(mean_value, tag=EVALUATION)))
    return Series(
        f"{group.experiment}, {count(len(group.runs), 'seed')}{unfinished_of(group.runs)}",
        look,
        online_curve(group.runs, last_games, shift),
        mean_curve(offline, [curve.steps[-1] for curve in offline]),
        (max(run.last_step + shift(run) for run in group.runs), final) if final else None,
    )


def teacher_levels(groups: Sequence[Group], looks: dict[str, int]) -> list[Level]:
    """One line for all experiments if their teachers' returns are the same, else one in each's colour."""
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
    """The first steps of a picture, if as many belong to a phase in all runs that have it."""
    lengths = set(steps) - {0}
    return Shade(label, lengths.pop()) if len(lengths) == 1 else None


# ----------------------------------------------------------------------------------------- over all games


def over_all_games(groups: Sequence[Group], args: Any, folder: Path) -> list[Block]:
    """Interquartile means and probabilities of improvement, with their intervals."""
    scores: Scores = defaultdict(dict)
    for game, experiment, runs in groups:
        of_runs = over_runs(runs, partial(score, last_games=args.last_games))
        if of_runs:
            scores[experiment][game] = np.array(of_runs)
    scores = dict(sorted(scores.items()))
    heading = Heading(2, "Over all games")
    if not scores:
        return [heading, Paragraph("No run has finished a game in training, so there is nothing to compare.")]
    units = {"human-normalised": HUMAN_SCORES, "random-normalised": teachers_above_random(groups)}
    interval = partial(estimate, num_resamples=args.bootstrap_samples, seed=args.bootstrap_seed)
    means_table, panels = interquartile_means(scores, units, interval, looks_of(groups))
    qdagger = {group.experiment for group in groups if any(run.is_qdagger for run in group.runs)}
    pairs = list(combinations(sorted(scores, key=lambda name: (name not in qdagger, name)), 2))
    pairs_table, panel = improvements(scores, pairs, interval, looks_of(groups))
    blocks = [heading, means_table]
    if panel.rows:
        blocks.append(pairs_table)
        panels.append(panel)
    if panels:
        draw_estimates(folder / "over-all-games.png", panels)
        blocks.append(Picture("over-all-games.png", "Interquartile means and probabilities of improvement"))
    explanations = [
        "IQM: the interquartile mean of the scores, that of all runs of all games without the lowest and the"
        " highest quarter of them.",
        "Human-normalised: (score − random player's) / (human's − random player's).",
        "Random-normalised: (score − random player's) / (teacher's − random player's).",
        "P(X > Y): the probability that a run of X has a higher score than one of Y on the same game, a tie"
        " being a half; the mean over games.",
        f"In brackets: {CONFIDENCE:.0%} intervals, percentiles over {args.bootstrap_samples:,} bootstrap"
        " samples, in which the runs of each game are drawn anew.",
    ]
    return [*blocks, Bullets([*explanations, *caveats(scores, units)])]


def teachers_above_random(groups: Iterable[Group]) -> dict[str, float]:
    """By game, the mean return of the teachers of all experiments, if it is a unit to measure in."""
    runs = defaultdict(list)
    for group in groups:
        runs[group.game] += group.runs
    returns = {game: teacher_return(of_game) for game, of_game in runs.items()}
    return {
        game: value
        for game, value in returns.items()
        if value is not None and value > RANDOM_SCORES.get(game, value)
    }


def interquartile_means(
    scores: Scores, units: dict[str, dict[str, float]], interval: Interval, looks: dict[str, int]
) -> tuple[Table, list[Panel]]:
    rows = {
        experiment: [
            experiment,
            ", ".join(f"{game} ({count(len(of_runs), 'run')})" for game, of_runs in of_games.items()),
        ]
        for experiment, of_games in scores.items()
    }
    panels = []
    for name, unit in units.items():
        panel = Panel(f"Interquartile mean, {name}", [], is_probability=False)
        for experiment, of_games in scores.items():
            normalised = normalise(of_games, RANDOM_SCORES, unit)
            if normalised:
                mean = interval(interquartile_mean, list(normalised.values()))
                panel.rows.append((experiment, mean, looks[experiment]))
            rows[experiment].append(str(mean) if normalised else NONE)
        if panel.rows:
            panels.append(panel)
    return Table(["experiment", "games", *(f"IQM, {name}" for name in units)], list(rows.values())), panels


def improvements(
    scores: Scores, pairs: Sequence[tuple[str, str]], interval: Interval, looks: dict[str, int]
) -> tuple[Table, Panel]:
    """Of the pairs that share a game, on the games that they share."""
    table = Table(["X", "Y", "games", "P(X > Y)"], [])
    panel = Panel("Probability of improvement, P(X > Y)", [], is_probability=True)
    for x, y in tqdm(pairs, desc="resampling", unit=" pairs", leave=False, disable=None):
        shared = [game for game in scores[x] if game in scores[y]]
        if shared:
            samples = [scores[experiment][game] for game in shared for experiment in (x, y)]
            probability = interval(improvement_probability, samples)
            table.rows.append([x, y, ", ".join(shared), str(probability)])
            panel.rows.append((f"{x}\n> {y}", probability, looks[x]))
    return table, panel


def caveats(scores: Scores, units: dict[str, dict[str, float]]) -> list[str]:
    """What keeps these figures from saying what they seem to."""
    games = sorted({game for of_games in scores.values() for game in of_games})
    num_runs = [len(of_runs) for of_games in scores.values() for of_runs in of_games.values()]
    lines = []
    if min(num_runs) == 1:
        lines.append("Where a game has a single run there is no interval: nothing is known of its spread.")
    if any(1 < number < FEW_RUNS for number in num_runs):
        lines.append(
            f"With fewer than {FEW_RUNS} runs of a game the intervals mean little: they are too narrow."
        )
    if len({tuple(of_games) for of_games in scores.values()}) > 1:
        lines.append("The experiments have not played the same games: compare them by P(X > Y), not by IQM.")
    missing = {
        "no random player's score is known": [game for game in games if game not in RANDOM_SCORES],
        "no human's score is known": [game for game in games if game not in units["human-normalised"]],
        "there is no teacher better than the random player": [
            game for game in games if game not in units["random-normalised"]
        ],
    }
    for reason, left_out in missing.items():
        if left_out:
            lines.append(f"Left out where it would be needed, as {reason}: {', '.join(left_out)}.")
    return lines


# -------------------------------------------------------------------------------------------------- runs


def runs_and_notes(found: Found, last_games: int) -> list[Block]:
    """Which runs were used, what is to be known of them, and which were left out."""
    rows = [
        [str(run.folder), run.game, run.exp_name, str(run.seed), str(len(run.curves[GAMES].steps))]
        for run in found.runs
    ]
    blocks: list[Block] = [
        Heading(2, "Runs"),
        Table(["folder", "game", "experiment", "seed", "games finished in training"], rows),
    ]
    notes = [*found.notes]
    for run in found.runs:
        num_games = len(run.curves[GAMES].steps)
        if num_games < last_games:
            notes.append(
                f"{run.folder}: finished {count(num_games, 'game')} in training, fewer than {last_games}"
            )
    if notes:
        blocks += [Heading(2, "Notes"), Bullets(notes)]
    if found.left_out:
        items = [f"{folder}: {reason}" for folder, reason in found.left_out]
        blocks += [Heading(2, "Left out"), Bullets(items)]
    return blocks
