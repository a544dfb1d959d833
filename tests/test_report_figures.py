"""The numbers of reports, computed by hand: tables, curves, intervals; and what the plots show."""

import itertools

import numpy as np
import pytest
import tyro
from made_runs import QDAGGER, groups_under, write_run
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.figure import Figure

from cleanrl.utils.games.atari import HUMAN_SCORES, MEASURED, RANDOM_SCORES
from cleanrl.utils.report.__main__ import Args
from cleanrl.utils.report.all_games import over_all_games
from cleanrl.utils.report.content import results
from cleanrl.utils.report.curves import environment_series, plotted_series
from cleanrl.utils.report.events import Curve
from cleanrl.utils.report.pictures import COLORS, GREY, Level, Series, Shade, draw_curves, spread_out
from cleanrl.utils.report.statistics import (
    MeanCurve,
    estimate,
    improvement_probability,
    interquartile_mean,
    mean_curve,
    spread,
    trailing_means,
)


def test_spread_is_that_of_a_sample():
    assert spread([10, 12, 17]) == (13, pytest.approx(13**0.5))  # √((9 + 1 + 16) / 2); of a population: √8.67
    assert str(spread([10, 12, 17])) == "13.00 ± 3.61"
    assert spread([-4.0]) == (-4, None)
    assert str(spread([-4.0])) == "−4.00"
    assert spread([]) is None


def test_trailing_means():
    assert trailing_means(np.array([4.0, 8.0, 0.0, 2.0]), 3) == pytest.approx([4, 6, 4, 10 / 3])


def test_a_mean_curve_is_where_every_seed_has_a_value():
    curves = [
        Curve(np.array([10, 30]), np.array([1.0, 3.0])),
        Curve(np.array([20, 40]), np.array([5.0, 9.0])),
    ]
    steps, means, stds = mean_curve(curves, last_steps=[40, 60])
    assert steps.tolist() == [20, 30, 40]  # of (1, 5), (3, 5), (3, 9)
    assert means.tolist() == [3, 4, 6]
    assert stds == pytest.approx([8**0.5, 2**0.5, 18**0.5])
    assert mean_curve(curves, last_steps=[19, 60]) is None
    assert mean_curve(curves[:1], last_steps=[50]).steps.tolist() == [10, 30, 50]
    assert mean_curve(curves[:1], last_steps=[50]).stds is None


def test_a_long_curve_is_thinned_but_keeps_its_ends():
    curve = Curve(np.arange(1, 10_001), np.arange(1, 10_001) / 2)
    steps, means, _ = mean_curve([curve], last_steps=[10_000])
    assert len(steps) == 500
    assert (steps[0], steps[-1]) == (1, 10_000)
    assert (means == steps / 2).all()


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([[0, 1, 2, 3], [5, 8, 13, 100]], 4.5),  # (2 + 3 + 5 + 8) / 4; the mean is 16.5, the median 4
        ([[100, 3, 8, 0], [5, 1, 13, 2]], 4.5),
        ([[1, 2, 6]], 3),  # a quarter of three is no run
        ([[1], [2, 3, 4, 90]], 3),  # games with different numbers of runs: (2 + 3 + 4) / 3
    ],
)
def test_interquartile_mean(samples, expected):
    assert interquartile_mean(*map(np.array, samples)) == pytest.approx(expected)


def test_improvement_probability():
    x, y = np.array([3.0, 1.0]), np.array([2.0, 1.0])
    assert improvement_probability(x, y) == 2.5 / 4  # 3 > 2, 3 > 1, 1 < 2, 1 = 1
    assert improvement_probability(y, x) == 1.5 / 4
    assert improvement_probability(x, x) == 0.5
    another_game = np.array([5.0]), np.array([7.0, 9.0, 5.0])
    assert improvement_probability(x, y, *another_game) == pytest.approx((2.5 / 4 + 0.5 / 3) / 2)


def test_intervals():
    both = np.array([0.0, 1.0])  # resampled: 0, 0.5, 0.5, 1
    assert estimate(interquartile_mean, [both], 500, seed=1) == (0.5, (0, 1))
    # Resampled within each game, nothing can change.
    assert estimate(interquartile_mean, [np.zeros(2), np.ones(2)], 500, seed=1) == (0.5, (0.5, 0.5))
    assert estimate(interquartile_mean, [both, np.ones(1)], 500, seed=1) == (pytest.approx(2 / 3), None)
    scores = np.arange(20.0) ** 2
    first, again, other = (estimate(interquartile_mean, [scores], 100, seed) for seed in (1, 1, 2))
    assert first == again
    assert first.interval != other.interval
    assert first.interval[0] < first.value < first.interval[1]


def test_every_human_has_a_random_player_who_is_worse():
    assert all(RANDOM_SCORES[game] < score for game, score in HUMAN_SCORES.items())
    assert set(RANDOM_SCORES) - set(HUMAN_SCORES) == {*MEASURED, "VideoPinball"}


# ------------------------------------------------------------------------------------------------ tables


def table_of(folder, last_games=10):
    _, table, _ = results(groups_under(folder), last_games)
    return [dict(zip(table.head, row, strict=True)) for row in table.rows]


def test_results_beside_the_published_ones(tmp_path):
    # The last two games of each: 10, 12, 17. The final evaluations: 2, 4, 6.
    for seed, returns in ((1, (900, 9, 11)), (2, (900, 8, 16)), (3, (900, 17, 17))):
        games = [(110 * i, value) for i, value in enumerate(returns, start=1)]
        options = {"evaluation": (seed, 3 * seed), "teacher": 20.0 + seed, "last_step": 400} | QDAGGER
        options["teacher_eval_episodes"] = 5 * seed
        write_run(tmp_path, "q", seed, games=games, **options)
    write_run(tmp_path, "dqn", games=[(5, 1.0), (6, 3.0)], last_step=1000, evaluation=(0.5, 1.0))
    dqn, qdagger = table_of(tmp_path, last_games=2)
    assert qdagger == {
        "game": "Breakout",
        "experiment": "q",
        "seeds": "3",
        "online steps": "300",
        "final evaluation": "4.00 ± 2.00",
        "games": "2",
        "last 2 games in training": "13.00 ± 3.61",
        "teacher": "22.00",
        "its games": "5 to 15",
        "published, PyTorch, 10M steps": "295.55 ± 12.30",
        "published, JAX, 10M steps": "335.08 ± 19.12",
        "Agarwal et al. (2022), 10M frames": "275.15 ± 20.65",
    }
    assert list(dqn.values()) == ["Breakout", "dqn", "1", "1,000", "0.75", "2", "2.00", *"–––––"]


def test_few_games_in_training_are_no_figure(tmp_path):
    """Short games finish first: where those are the won ones, the mean of the first few is too high."""
    write_run(tmp_path, "few", games=[(1, 4.0), (2, 6.0)])
    write_run(tmp_path, "few", seed=2, games=[(1, 4.0), (2, 6.0), (3, 8.0)], evaluation=(1.0, 2.0, 3.0))
    few = table_of(tmp_path, last_games=3)
    assert [(row["last 3 games in training"], row["games"]) for row in few] == [("6.00", "2 to 3")]
    assert [row["last 4 games in training"] for row in table_of(tmp_path, last_games=4)] == ["–"]


def figures(folder):
    """What `over_all_games` says: the tables' rows, and the bullets in one text."""
    args = tyro.cli(Args, args=["--bootstrap-samples", "20"])
    _, means, *others, notes = over_all_games(groups_under(folder), args, folder)
    pairs = others[0].rows if others and hasattr(others[0], "rows") else []
    return means.rows, pairs, "\n".join(notes.items)


def test_over_all_games(tmp_path):
    """Scores whose human-normalised values are 0, 1, 2, 3 on one game and 5, 8, 13, 100 on the other."""
    lost = [(200 + game, -21.0) for game in range(10)]  # in training, which does not count
    breakout, pong = (lambda x: [1.7 + 28.8 * x] * 2), (lambda x: [-20.7 + 35.3 * x] * 2)
    for seed, value in enumerate((0, 1, 2, 3)):
        options = {"evaluation": breakout(value), "teacher": 1.7 + 14.4} | QDAGGER
        write_run(tmp_path, "q", seed, games=lost, **options)
    for seed, value in enumerate((5, 8, 13, 100)):
        options = {"evaluation": pong(value), "teacher": -30.0} | QDAGGER
        write_run(tmp_path, "q", seed, game="Pong", games=lost, **options)
    for seed, value in enumerate((0, 0.5, 4, 2)):
        write_run(tmp_path, "dqn", seed, evaluation=breakout(value))
    write_run(tmp_path, "dqn", game="Pong", evaluation=pong(4))
    means, pairs, notes = figures(tmp_path)
    rows = {row[0]: row[1:] for row in means}
    assert rows["q"][0] == "Breakout (4 runs), Pong (4 runs)"
    assert rows["q"][1].startswith("4.50 [")
    # Pong's teacher is worse than the random player, so this is of Breakout alone: 0, 2, 4, 6.
    assert rows["q"][2].startswith("3.00 [")
    assert rows["dqn"][1] == "2.17"  # (0.5 + 2 + 4) / 3; one run of Pong
    # Breakout: 0 ties with 0; 1 beats 0, 0.5; 2 beats 0, 0.5, ties with 2; 3 beats 0, 0.5, 2. Pong: all.
    assert pairs == [["q", "dqn", "Breakout (4 and 4 runs), Pong (4 and 1 runs)", "0.75"]]
    assert "fewer than 5 runs" in notes
    assert "single run" in notes
    assert "because no teacher outperforms the random player: Pong." in notes
    assert "did not play the same games" not in notes


def test_of_many_experiments_only_some_pairs_are_compared(tmp_path):
    for number in range(9):
        write_run(tmp_path, f"dqn-{number}")
    _, pairs, notes = figures(tmp_path)
    assert len(pairs) == 30
    assert "Of 36 pairs, the first 30." in notes


def test_one_run_of_each_has_no_interval(tmp_path):
    write_run(tmp_path, "q", evaluation=(30.5, 30.5), teacher=30.5, **QDAGGER)
    write_run(tmp_path, "dqn", evaluation=(1.7, 1.7))
    write_run(tmp_path, "dqn", game="Pong", evaluation=(14.6, 14.6))
    means, pairs, notes = figures(tmp_path)
    assert [row[2:] for row in means] == [["0.50", "0.00"], ["1.00", "1.00"]]
    assert pairs == [["q", "dqn", "Breakout (1 and 1 runs)", "1.00"]]
    assert "single run" in notes
    assert "did not play the same games" in notes
    assert "fewer than 5 runs" not in notes


def test_games_without_known_scores_are_named(tmp_path):
    for game in ("VideoPinball", "OtherGame"):
        write_run(tmp_path, game=game)
    means, _, notes = figures(tmp_path)
    assert means == [["dqn", "OtherGame (1 run), VideoPinball (1 run)", "–", "–"]]
    assert "the human score is unknown: OtherGame, VideoPinball." in notes
    assert "the random player's score is unknown: OtherGame." in notes


# ------------------------------------------------------------------------------------------------ curves


def test_curves_over_plotted_and_over_environment_steps(tmp_path):
    for seed, high in ((1, 4.0), (2, 8.0)):
        games, offline = [(150, 0.0), (250, high)], [(50, 1.0), (100, high)]
        options = {"last_step": 300, "evaluation": (high, 0)} | QDAGGER
        write_run(tmp_path, "q", seed, games=games, offline=offline, **options)
    (group,) = groups_under(tmp_path)
    plotted = plotted_series(group, last_games=2, look=0)
    assert plotted.label == "q, 2 seeds"
    assert plotted.online.steps.tolist() == [150, 250, 300]
    assert plotted.online.means.tolist() == [0, 3, 3]  # of 0; of (0 + 4) / 2 and (0 + 8) / 2
    assert plotted.online.stds == pytest.approx([0, 2**0.5, 2**0.5])
    assert plotted.offline.steps.tolist() == [50, 100]
    assert plotted.offline.means.tolist() == [1, 6]
    assert plotted.final == (300, (3, pytest.approx(2**0.5)))
    by_environment = environment_series(group, last_games=2, look=0)
    # 8 environments make 24 steps of the teacher's 20; the 100 offline steps do not count.
    assert by_environment.online.steps.tolist() == [74, 174, 224]
    assert by_environment.online.means.tolist() == [0, 3, 3]
    assert by_environment.offline.steps.tolist() == [24]
    assert by_environment.offline.means.tolist() == [6]
    assert by_environment.final[0] == 224


def test_a_saved_replay_takes_no_steps_of_the_teacher(tmp_path):
    write_run(tmp_path, "q", games=[(150, 1.0)], **(QDAGGER | {"teacher_replay_path": "somewhere"}))
    (group,) = groups_under(tmp_path)
    assert environment_series(group, last_games=2, look=0).online.steps.tolist() == [50]


def test_labels_are_moved_apart():
    assert spread_out([0.0, 10.0, 0.0], 1.0) == pytest.approx([-0.5, 10, 0.5])
    assert spread_out([], 1.0) == []


def test_a_plot_shows_its_numbers_in_their_colors(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: drawn.append(figure))
    steps, means = np.array([10, 20]), np.array([1.0, 3.0])
    with_band = Series("a", 0, MeanCurve(steps, means, np.array([0.5, 0.25])), None, None)
    offline = MeanCurve(np.array([5]), np.array([2.0]), None)
    final = Series("b", 8, MeanCurve(steps, means + 0.01, None), offline, (20, spread([3.0, 5.0])))
    levels, shade = [Level("teacher, 3.00", 3.0, None)], Shade("offline phase", 6)
    draw_curves(tmp_path / "x.png", "title", "steps", 10, [with_band, final], levels, shade)
    (figure,) = drawn
    (axes,) = figure.axes
    assert axes.get_xlabel() == "steps"
    lines = [
        (line.get_color(), line.get_linestyle(), *map(list, line.get_data())) for line in axes.get_lines()
    ]
    assert (GREY, "--", [0, 1], [3, 3]) in lines
    assert (COLORS[0], "-", [10, 20], [1, 3]) in lines
    assert (COLORS[1], "-.", [10, 20], [1.01, 3.01]) in lines  # after seven colours, another line style
    assert (COLORS[1], ":", [5], [2]) in lines
    assert (COLORS[1], "None", [20], [4]) in lines
    (band,) = [one for one in axes.collections if isinstance(one, FillBetweenPolyCollection)]
    corners = {tuple(point) for point in band.get_paths()[0].vertices}
    assert corners >= {(10, 0.5), (10, 1.5), (20, 2.75), (20, 3.25)}
    assert {text.get_text(): text.get_color() for text in axes.texts} == {
        "a": COLORS[0], "b": COLORS[1], "teacher, 3.00": GREY
    }  # fmt: skip
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(boxes))
    assert {text.get_text() for text in figure.legends[0].texts} == {
        "mean of the last 10 games of training",
        "evaluation, offline phase",
        "final evaluation",
        "± one standard deviation over seeds",
        "teacher's mean return",
        "offline phase",
    }
