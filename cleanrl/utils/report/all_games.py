"""The figures of a report over all games: interquartile means and probabilities of improvement."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cleanrl.utils.games.atari import HUMAN_SCORES, RANDOM_SCORES
from cleanrl.utils.report.pages import NONE, Block, Bullets, Heading, Paragraph, Picture, Table, count
from cleanrl.utils.report.pictures import Panel, draw_estimates
from cleanrl.utils.report.statistics import (
    CONFIDENCE,
    Estimate,
    Group,
    estimate,
    improvement_probability,
    interquartile_mean,
    looks_of,
    normalise,
    over_runs,
    score,
    teacher_return,
)

MOST_PAIRS = 30  # of experiments that are compared
FEW_RUNS = 5  # with fewer runs of a game, resamples differ too little

Scores = dict[str, dict[str, np.ndarray]]  # those of the runs (runs,), by experiment and game
Interval = Callable[[Callable[..., float], Sequence[np.ndarray]], Estimate]


def over_all_games(groups: Sequence[Group], args: Any, folder: Path) -> list[Block]:
    """Interquartile means and probabilities of improvement, with their intervals."""
    scores: Scores = defaultdict(dict)
    for game, experiment, runs in groups:
        of_runs = over_runs(runs, score)
        if of_runs:
            scores[experiment][game] = np.array(of_runs)
    scores = dict(sorted(scores.items()))
    heading = Heading(2, "Over all games")
    if not scores:
        return [heading, Paragraph("No run has a final evaluation, so there is nothing to compare.")]
    units = {"human-normalised": HUMAN_SCORES, "random-normalised": teachers_above_random(groups)}
    interval = partial(estimate, num_resamples=args.bootstrap_samples, seed=args.bootstrap_seed)
    means_table, panels = interquartile_means(scores, units, interval, looks_of(groups))
    qdagger = {group.experiment for group in groups if any(run.is_qdagger for run in group.runs)}
    pairs = list(combinations(sorted(scores, key=lambda name: (name not in qdagger, name)), 2))
    pairs_table, panel = improvements(scores, pairs[:MOST_PAIRS], interval, looks_of(groups))
    blocks = [heading, means_table]
    if panel.rows:
        blocks.append(pairs_table)
        panels.append(panel)
    if panels:
        draw_estimates(folder / "over-all-games.png", panels)
        blocks.append(Picture("over-all-games.png", "Interquartile means and probabilities of improvement"))
    explanations = [
        "A score is the mean return of a run's final evaluation.",
        "IQM: the interquartile mean, over the scores of all runs of all games without the lowest and the"
        " highest quarter.",
        "Human-normalised: (score − random player's) / (human's − random player's).",
        "Random-normalised: (score − random player's) / (teacher's − random player's).",
        "P(X > Y): the probability that a run of X scores higher than one of Y on the same game, a tie"
        " counting half; the mean over games.",
        *([f"Of {len(pairs)} pairs, the first {MOST_PAIRS}."] if len(pairs) > MOST_PAIRS else []),
        f"In brackets: {CONFIDENCE:.0%} intervals, percentiles over {args.bootstrap_samples:,} bootstrap"
        " samples, for which the runs of each game are resampled.",
    ]
    return [*blocks, Bullets([*explanations, *caveats(scores, units)])]


def teachers_above_random(groups: Iterable[Group]) -> dict[str, float]:
    """By game, the mean return of the teachers of all experiments, where it exceeds the random player's."""
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
    """For the pairs that share games, on those games."""
    table = Table(["X", "Y", "games", "P(X > Y)"], [])
    panel = Panel("Probability of improvement, P(X > Y)", [], is_probability=True)
    for x, y in tqdm(pairs, desc="resampling", unit=" pairs", leave=False, disable=None):
        shared = [game for game in scores[x] if game in scores[y]]
        if shared:
            samples = [scores[experiment][game] for game in shared for experiment in (x, y)]
            probability = interval(improvement_probability, samples)
            games = ", ".join(
                f"{game} ({len(scores[x][game])} and {len(scores[y][game])} runs)" for game in shared
            )
            table.rows.append([x, y, games, str(probability)])
            panel.rows.append((f"{x}\n> {y}", probability, looks[x]))
    return table, panel


def caveats(scores: Scores, units: dict[str, dict[str, float]]) -> list[str]:
    """What limits the meaning of these figures."""
    games = sorted({game for of_games in scores.values() for game in of_games})
    num_runs = [len(of_runs) for of_games in scores.values() for of_runs in of_games.values()]
    lines = []
    if min(num_runs) == 1:
        lines.append("With a single run of a game there is no interval: its spread is unknown.")
    if any(1 < number < FEW_RUNS for number in num_runs):
        lines.append(
            f"With fewer than {FEW_RUNS} runs of a game the intervals mean little: they are too narrow."
        )
    if len({tuple(of_games) for of_games in scores.values()}) > 1:
        lines.append(
            "The experiments did not play the same games: compare them by P(X > Y), not by their IQM."
        )
    missing = {
        "the random player's score is unknown": [game for game in games if game not in RANDOM_SCORES],
        "the human score is unknown": [game for game in games if game not in units["human-normalised"]],
        "no teacher outperforms the random player": [
            game for game in games if game not in units["random-normalised"]
        ],
    }
    for reason, left_out in missing.items():
        if left_out:
            lines.append(f"Not in all figures, because {reason}: {', '.join(left_out)}.")
    return lines
