"""Summaries of runs: scores, mean curves, interquartile means, probabilities of improvement."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from cleanrl.utils.report.events import Curve
from cleanrl.utils.report.runs import RunResults
from cleanrl.utils.run.charts import EPISODIC_RETURN, EVALUATION_RETURN, TEACHER_RETURN

CONFIDENCE = 0.95
CURVE_POINTS = 500


class Group(NamedTuple):
    """The runs of one experiment on one game."""

    game: str
    experiment: str
    runs: list[RunResults]


class Spread(NamedTuple):
    mean: float
    """over runs"""
    std: float | None
    """their sample standard deviation (n − 1); None for one run"""

    def __str__(self) -> str:
        return to_text(self.mean) + (f" ± {to_text(self.std)}" if self.std is not None else "")


class Estimate(NamedTuple):
    value: float
    interval: tuple[float, float] | None
    """bounds of its bootstrap interval; None with too few runs"""

    def __str__(self) -> str:
        bounds = f" [{to_text(self.interval[0])}, {to_text(self.interval[1])}]" if self.interval else ""
        return to_text(self.value) + bounds


class MeanCurve(NamedTuple):
    steps: np.ndarray
    """int64 (n,)"""
    means: np.ndarray
    """float64 (n,): over runs"""
    stds: np.ndarray | None
    """float64 (n,): their sample standard deviations; None for one run"""


def to_text(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def group_runs(runs: Iterable[RunResults]) -> list[Group]:
    """Sorted by game, then by experiment."""
    groups = defaultdict(list)
    for run in runs:
        groups[run.game, run.exp_name].append(run)
    return [Group(*key, of_group) for key, of_group in sorted(groups.items())]


def looks_of(groups: Iterable[Group]) -> dict[str, int]:
    """A number for each experiment, so that it looks the same in every plot."""
    return {name: look for look, name in enumerate(sorted({group.experiment for group in groups}))}


def unfinished_of(runs: Iterable[RunResults]) -> str:
    """The remark beside a number of runs, if some are unfinished."""
    number = sum(run.unfinished is not None for run in runs)
    return f" ({number} unfinished)" if number else ""


def spread(values: Sequence[float]) -> Spread | None:
    """None for no values."""
    if not values:
        return None
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def over_runs(runs: Iterable[RunResults], number: Callable[[RunResults], float | None]) -> list[float]:
    """`number` of each run that has one."""
    return [value for value in map(number, runs) if value is not None]


def mean_value(run: RunResults, tag: str) -> float | None:
    """The mean of all points of a curve."""
    return float(run.curves[tag].values.mean()) if run.has(tag) else None


def score(run: RunResults) -> float | None:
    """The mean return of the games of the final evaluation."""
    return mean_value(run, EVALUATION_RETURN)


def training_return(run: RunResults, last_games: int) -> float | None:
    """The mean return of the last games a run finished in training; None if it finished fewer."""
    returns = run.curves[EPISODIC_RETURN].values[-last_games:]
    return float(returns.mean()) if len(returns) == last_games else None


def range_text(numbers: Sequence[int]) -> str:
    """One number if all are the same, else the least and the greatest."""
    least, most = min(numbers), max(numbers)
    return f"{least:,}" + (f" to {most:,}" if least < most else "")


def teacher_return(runs: Iterable[RunResults]) -> float | None:
    """The mean over runs; None if none of them has a teacher."""
    returns = over_runs(runs, lambda run: mean_value(run, TEACHER_RETURN))
    return statistics.fmean(returns) if returns else None


def trailing_means(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and the `window` − 1 before it, or as many as exist."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def mean_curve(curves: Sequence[Curve], last_steps: Sequence[int]) -> MeanCurve | None:
    """The mean over runs at the steps where every run has a value; a point holds until the next one.

    Args:
        curves: one per run, not empty.
        last_steps: the step up to which each run's last value holds.

    Returns:
        At most CURVE_POINTS points; None if there is no such step, or no curve.
    """
    if not curves:
        return None
    first, last = max(curve.steps[0] for curve in curves), min(last_steps)
    steps = np.unique(np.concatenate([*(curve.steps for curve in curves), [last]]))
    steps = steps[(steps >= first) & (steps <= last)]
    if len(steps) == 0:
        return None
    if len(steps) > CURVE_POINTS:
        steps = steps[np.linspace(0, len(steps) - 1, CURVE_POINTS).round().astype(int)]
    values = np.stack([curve.values[np.searchsorted(curve.steps, steps, "right") - 1] for curve in curves])
    return MeanCurve(steps, values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else None)


def online_curve(
    runs: Sequence[RunResults], last_games: int, shift: Callable[[RunResults], int]
) -> MeanCurve | None:
    """The mean over runs of the mean return of the last games; `shift` is added to each run's steps."""
    runs = [run for run in runs if run.has(EPISODIC_RETURN)]
    curves = []
    for run in runs:
        steps, returns = run.curves[EPISODIC_RETURN]
        curves.append(Curve(steps + shift(run), trailing_means(returns, last_games)))
    return mean_curve(curves, [run.last_step + shift(run) for run in runs])


def normalise(
    scores: dict[str, np.ndarray], zeros: dict[str, float], ones: dict[str, float]
) -> dict[str, np.ndarray]:
    """Scores by game, scaled so that `zeros` become 0 and `ones` 1; games that either lacks are left out."""
    return {
        game: (of_game - zeros[game]) / (ones[game] - zeros[game])
        for game, of_game in scores.items()
        if game in zeros and game in ones
    }


def interquartile_mean(*samples: np.ndarray) -> float:
    """The mean over all runs of all games, without the lowest and the highest quarter.

    Args:
        samples: for each game, the scores of its runs (runs,).
    """
    from scipy import stats

    return float(stats.trim_mean(np.concatenate(samples), 0.25))


def improvement_probability(*samples: np.ndarray) -> float:
    """The probability that a run of X scores higher than one of Y, a tie counting half; the mean over games.

    Args:
        samples: for each game, the scores of X's runs (runs,), then those of Y's.
    """
    pairs = zip(samples[::2], samples[1::2], strict=True)
    return statistics.fmean((1 + np.sign(x[:, None] - y).mean()) / 2 for x, y in pairs)


def estimate(
    statistic: Callable[..., float], samples: Sequence[np.ndarray], num_resamples: int, seed: int
) -> Estimate:
    """A statistic with its stratified bootstrap interval: the runs of each sample are resampled.

    Args:
        statistic: takes the samples.
        samples: scores of runs (runs,). If one is a single run, there is no interval.
        num_resamples: number of resamples.
        seed: of the resampling.
    """
    from scipy import stats

    value = statistic(*samples)
    if min(len(sample) for sample in samples) < 2:
        return Estimate(value, None)
    result = stats.bootstrap(
        samples,
        statistic,
        n_resamples=num_resamples,
        vectorized=False,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=seed,
    )
    return Estimate(value, (float(result.confidence_interval.low), float(result.confidence_interval.high)))
