"""Reports of runs whose numbers were computed by hand; the event files are mostly torch's SummaryWriter's."""

import base64
import dataclasses
import errno
import itertools
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tyro
from matplotlib import image
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from cleanrl.utils.games.atari import HUMAN_SCORES, RANDOM_SCORES
from cleanrl.utils.report import __main__ as report
from cleanrl.utils.report import content as report_content
from cleanrl.utils.report import runs as report_runs
from cleanrl.utils.report.content import environment_series, over_all_games, plotted_series, results
from cleanrl.utils.report.pages import Bullets, Paragraph, Table, block_to_html, block_to_markdown
from cleanrl.utils.report.pictures import COLORS, GREY, Level, Series, Shade, draw_curves, spread_out
from cleanrl.utils.report.runs import (
    EVALUATION,
    GAMES,
    OFFLINE,
    TEACHER,
    Curve,
    UnusableError,
    find_runs,
    read_run,
)
from cleanrl.utils.report.statistics import (
    MeanCurve,
    estimate,
    group_runs,
    improvement_probability,
    interquartile_mean,
    mean_curve,
    spread,
    trailing_means,
)
from cleanrl.utils.run.events import EventWriter

ROOT = Path(__file__).resolve().parents[1]
PONG_RUNS = ROOT / "docs" / "results" / "pong"
QDAGGER = {"offline_steps": 100, "teacher_steps": 20, "teacher_replay_path": None}


def options_text(options):
    return "\n".join(["|option|value|", "|-|-|", *(f"|{name}|{value}|" for name, value in options.items())])


def write_run(
    folder, experiment="dqn", seed=1, start_time=1000, game="Breakout", games=(), evaluation=(5.0, 7.0),
    teacher=None, offline=(), last_step=None, **options,
):  # fmt: skip
    """A finished run in `folder`; `games` and `offline` are (step as it is plotted, return)."""
    run = folder / f"{game}NoFrameskip-v4__{experiment}__{seed}__{start_time}"
    options = {"seed": seed, "num_envs": 8, "total_timesteps": 1000, "eval_episodes": 2} | options
    with SummaryWriter(str(run)) as writer:
        writer.add_text("hyperparameters", options_text(options))
        if teacher is not None:
            writer.add_scalar(TEACHER, teacher, 0)
        for step, value in offline:
            writer.add_scalar(OFFLINE, value, step)
        for step, value in games:
            writer.add_scalar(GAMES, value, step)
        if last_step is not None:
            writer.add_scalar("charts/epsilon", 0.01, last_step)
        for number, value in enumerate(evaluation):
            writer.add_scalar(EVALUATION, value, number)
    return run


def event_file(run):
    (path,) = run.glob("events.*")
    return path


def groups_under(folder, include_unfinished=False):
    return group_runs(find_runs([folder], include_unfinished).runs)


def parse(*arguments):
    return tyro.cli(report.Args, args=[*map(str, arguments)])


def make(*arguments):
    report.main(parse("--bootstrap-samples", 50, *arguments))


# ----------------------------------------------------------------------------------------------- numbers


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
    assert (
        improvement_probability(x, y, np.array([5.0]), np.array([7.0, 9.0, 5.0])) == (2.5 / 4 + 0.5 / 3) / 2
    )
    assert improvement_probability(x, x) == 0.5


def test_intervals():
    both = np.array([0.0, 1.0])  # drawn anew: 0, 0.5, 0.5, 1
    assert estimate(interquartile_mean, [both], 500, seed=1) == (0.5, (0, 1))
    # Drawn from each game for itself, nothing can change.
    assert estimate(interquartile_mean, [np.zeros(2), np.ones(2)], 500, seed=1) == (0.5, (0.5, 0.5))
    assert estimate(interquartile_mean, [both, np.ones(1)], 500, seed=1) == (pytest.approx(2 / 3), None)
    scores = np.arange(20.0) ** 2
    first, again, other = (estimate(interquartile_mean, [scores], 100, seed) for seed in (1, 1, 2))
    assert first == again
    assert first.interval != other.interval
    assert first.interval[0] < first.value < first.interval[1]


def test_labels_are_moved_apart():
    assert spread_out([0.0, 10.0, 0.0], 1.0) == pytest.approx([-0.5, 10, 0.5])
    assert spread_out([], 1.0) == []


# ------------------------------------------------------------------------------------------------ tables


def table_of(folder, last_games=10):
    _, table, _ = results(groups_under(folder), last_games)
    return [dict(zip(table.head, row, strict=True)) for row in table.rows]


def test_results_beside_the_published_ones(tmp_path):
    # The last two games of each: 10, 12, 17.
    for seed, returns in ((1, (900, 9, 11)), (2, (900, 8, 16)), (3, (900, 17, 17))):
        games = [(110 * i, value) for i, value in enumerate(returns, start=1)]
        evaluation = (seed, 3 * seed)  # means 2, 4, 6
        write_run(
            tmp_path,
            "q",
            seed,
            games=games,
            evaluation=evaluation,
            teacher=20.0 + seed,
            last_step=400,
            **QDAGGER,
        )
    write_run(tmp_path, "dqn", games=[(5, 1.0), (6, 3.0)], last_step=1000, evaluation=(0.5, 1.0))
    dqn, qdagger = table_of(tmp_path, last_games=2)
    assert qdagger == {
        "game": "Breakout",
        "experiment": "q",
        "seeds": "3",
        "online steps": "300",
        "last 2 games": "13.00 ± 3.61",
        "final evaluation": "4.00 ± 2.00",
        "teacher": "22.00",
        "published, PyTorch, 10M steps": "295.55 ± 12.30",
        "published, JAX, 10M steps": "335.08 ± 19.12",
        "Agarwal et al. (2022), 10M frames": "275.15 ± 20.65",
    }
    assert list(dqn.values()) == ["Breakout", "dqn", "1", "1,000", "2.00", "0.75", "–", "–", "–", "–"]


def test_a_run_with_few_games_or_none(tmp_path):
    write_run(tmp_path, "few", games=[(1, 4.0), (2, 6.0)])
    write_run(tmp_path, "none", last_step=1000)
    few, none = table_of(tmp_path)
    assert (few["last 10 games"], none["last 10 games"]) == ("5.00", "–")
    assert (none["final evaluation"], none["online steps"]) == ("6.00", "1,000")


def test_over_all_games(tmp_path):
    """Scores whose human-normalised values are 0, 1, 2, 3 on one game and 5, 8, 13, 100 on the other."""
    for seed, value in enumerate((0, 1, 2, 3)):
        write_run(tmp_path, "q", seed, games=[(200, 1.7 + 28.8 * value)], teacher=1.7 + 14.4, **QDAGGER)
    for seed, value in enumerate((5, 8, 13, 100)):
        write_run(
            tmp_path, "q", seed, game="Pong", games=[(200, -20.7 + 35.3 * value)], teacher=-30.0, **QDAGGER
        )
    for seed, value in enumerate((0, 0.5, 4, 2)):
        write_run(tmp_path, "dqn", seed, games=[(200, 1.7 + 28.8 * value)])
    write_run(tmp_path, "dqn", game="Pong", games=[(200, -20.7 + 35.3 * 4)])
    args = parse("--bootstrap-samples", 20)
    _, means, pairs, _, notes = over_all_games(groups_under(tmp_path), args, tmp_path)
    rows = {row[0]: row[1:] for row in means.rows}
    assert rows["q"][0] == "Breakout (4 runs), Pong (4 runs)"
    assert rows["q"][1].startswith("4.50 [")
    # Pong's teacher is worse than the random player, so this is of Breakout alone: 0, 2, 4, 6.
    assert rows["q"][2].startswith("3.00 [")
    assert rows["dqn"][1] == "2.17"  # (0.5 + 2 + 4) / 3; one run of Pong
    # Breakout: 0 ties with 0; 1 beats 0, 0.5; 2 beats 0, 0.5, ties with 2; 3 beats 0, 0.5, 2. Pong: all.
    assert pairs.rows == [["q", "dqn", "Breakout, Pong", "0.75"]]
    assert any("fewer than 5 runs" in note for note in notes.items)
    assert any("single run" in note for note in notes.items)
    assert any(note.endswith("better than the random player: Pong.") for note in notes.items)
    assert not any("not played the same games" in note for note in notes.items)


def test_one_run_of_each_has_no_interval(tmp_path):
    write_run(tmp_path, "q", games=[(200, 30.5)], teacher=30.5, **QDAGGER)
    write_run(tmp_path, "dqn", games=[(200, 1.7)])
    write_run(tmp_path, "dqn", game="Pong", games=[(200, 14.6)])
    _, means, pairs, _, notes = over_all_games(groups_under(tmp_path), parse(), tmp_path)
    assert [row[2:] for row in means.rows] == [["0.50", "0.00"], ["1.00", "1.00"]]
    assert pairs.rows == [["q", "dqn", "Breakout", "1.00"]]
    assert any("single run" in note for note in notes.items)
    assert any("not played the same games" in note for note in notes.items)
    assert not any("fewer than 5 runs" in note for note in notes.items)


def test_games_without_known_scores_are_named(tmp_path):
    write_run(tmp_path, game="VideoPinball", games=[(200, 100.0)])
    write_run(tmp_path, game="AirRaid", games=[(200, 100.0)])
    _, means, notes = over_all_games(groups_under(tmp_path), parse(), tmp_path)
    assert means.rows == [["dqn", "AirRaid (1 run), VideoPinball (1 run)", "–", "–"]]
    assert any("no human's score is known: AirRaid, VideoPinball." in note for note in notes.items)
    assert any("no random player's score is known: AirRaid." in note for note in notes.items)


def test_every_human_has_a_random_player_who_is_worse():
    assert all(RANDOM_SCORES[game] < score for game, score in HUMAN_SCORES.items())
    assert set(RANDOM_SCORES) - set(HUMAN_SCORES) == {"VideoPinball"}


# ------------------------------------------------------------------------------------------------ curves


def test_curves_over_plotted_and_over_environment_steps(tmp_path):
    for seed, high in ((1, 4.0), (2, 8.0)):
        games = [(150, 0.0), (250, high)]
        offline = [(50, 1.0), (100, high)]
        write_run(
            tmp_path, "q", seed, games=games, offline=offline, last_step=300, evaluation=(high, 0), **QDAGGER
        )
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
    # The 8 copies of the game make 24 steps of the teacher's 20; the 100 offline steps do not count.
    assert by_environment.online.steps.tolist() == [74, 174, 224]
    assert by_environment.online.means.tolist() == [0, 3, 3]
    assert by_environment.offline.steps.tolist() == [24]
    assert by_environment.offline.means.tolist() == [6]
    assert by_environment.final[0] == 224


def test_a_saved_replay_takes_no_steps_of_the_teacher(tmp_path):
    write_run(tmp_path, "q", games=[(150, 1.0)], **(QDAGGER | {"teacher_replay_path": "somewhere"}))
    (group,) = groups_under(tmp_path)
    assert environment_series(group, last_games=2, look=0).online.steps.tolist() == [50]


def test_a_picture_shows_its_numbers_in_each_ones_color(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: figures.append(figure))
    steps, means = np.array([10, 20]), np.array([1.0, 3.0])
    with_band = Series("a", 0, MeanCurve(steps, means, np.array([0.5, 0.25])), None, None)
    offline = MeanCurve(np.array([5]), np.array([2.0]), None)
    final = Series("b", 8, MeanCurve(steps, means + 0.01, None), offline, (20, spread([3.0, 5.0])))
    levels, shade = [Level("teacher, 3.00", 3.0, None)], Shade("offline phase", 6)
    draw_curves(tmp_path / "x.png", "title", "steps", 10, [with_band, final], levels, shade)
    (figure,) = figures
    (axes,) = figure.axes
    drawn = [
        (line.get_color(), line.get_linestyle(), *map(list, line.get_data())) for line in axes.get_lines()
    ]
    assert (GREY, "--", [0, 1], [3, 3]) in drawn
    assert (COLORS[0], "-", [10, 20], [1, 3]) in drawn
    assert (COLORS[1], "-.", [10, 20], [1.01, 3.01]) in drawn  # after seven colours, another line
    assert (COLORS[1], ":", [5], [2]) in drawn
    assert (COLORS[1], "None", [20], [4]) in drawn
    (band,) = [one for one in axes.collections if isinstance(one, FillBetweenPolyCollection)]
    assert {tuple(point) for point in band.get_paths()[0].vertices} >= {
        (10, 0.5),
        (10, 1.5),
        (20, 2.75),
        (20, 3.25),
    }
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
    assert axes.get_xlabel() == "steps"


# -------------------------------------------------------------------------------------------------- runs


def test_a_resumed_run_is_its_files_together(tmp_path):
    """Written by the writer of the scripts, and read by TensorBoard itself as well."""
    run = tmp_path / "PongNoFrameskip-v4__dqn__1__7"
    run.mkdir()
    for steps in ((10, 20), (30, 40)):
        writer = EventWriter(run)
        if steps[0] == 10:
            writer.add_options({"seed": 1, "eval_episodes": 1, "exp_name": "a|b"})
        for step in steps:
            writer.add_scalar(GAMES, step / 8, step)
        if steps[0] == 30:
            writer.add_scalar(EVALUATION, 3, 0)
        writer.close()
    assert len(list(run.glob("events.*"))) == 2
    found = read_run(run, include_unfinished=False)
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    expected = [(event.step, event.value) for event in events.Scalars(GAMES)]
    assert list(zip(*map(list, found.curves[GAMES]), strict=True)) == expected
    assert len(expected) == 4
    assert found.options == {"seed": "1", "eval_episodes": "1", "exp_name": "a|b"}
    assert (found.env_id, found.exp_name, found.seed, found.last_step) == ("PongNoFrameskip-v4", "dqn", 1, 40)


def test_points_of_a_newer_writer_are_read(tmp_path):
    run = write_run(tmp_path, evaluation=(5.0,))
    with SummaryWriter(str(run)) as writer:
        writer.add_scalar(EVALUATION, 0.5, 1, new_style=True)
    assert read_run(run, include_unfinished=False).curves[EVALUATION].values.tolist() == [5, 0.5]


def test_a_file_cut_short_is_read_up_to_there(tmp_path):
    run = write_run(tmp_path, games=[(1, 4.0)], evaluation=(1.0, 2.0, 3.0))
    path = event_file(run)
    path.write_bytes(path.read_bytes()[:-5])
    found = find_runs([tmp_path], include_unfinished=False)
    assert found.runs[0].curves[EVALUATION].values.tolist() == [1, 2]
    assert found.notes == [f"{run}: {path.name} is cut short; its last record is lost"]


def test_a_cut_that_takes_the_end_leaves_a_run_unfinished(tmp_path):
    run = write_run(tmp_path, games=[(1, 4.0)])
    path = event_file(run)
    path.write_bytes(path.read_bytes()[:-5])
    found = find_runs([tmp_path], include_unfinished=False)
    assert found.runs == []
    assert found.left_out == [(run, "unfinished: it has 1 of the 2 games of its final evaluation")]


def test_a_damaged_run_is_left_out(tmp_path):
    run = write_run(tmp_path, games=[(step, 4.0) for step in range(100)])
    path = event_file(run)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    # TensorBoard's reader stops there without a word.
    assert len(EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload().Scalars(GAMES)) < 100
    with pytest.raises(UnusableError, match=f"damaged: a checksum in {path.name} is wrong"):
        read_run(run, include_unfinished=True)


@pytest.mark.parametrize(
    ("options", "games", "fault"),
    [
        ({"offline_steps": "many"}, [(1, 1.0)], "damaged: its options make no sense"),
        ({"offline_steps": 5}, [(1, 1.0)], "damaged: its options make no sense"),  # and no teacher_steps
        ({}, [(1, 1.0), (7, float("nan"))], "damaged: charts/episodic_return is nan at step 7"),
    ],
)
def test_what_makes_no_sense_is_left_out(tmp_path, options, games, fault):
    run = write_run(tmp_path, games=games, **options)
    with pytest.raises(UnusableError, match=fault):
        read_run(run, include_unfinished=True)


def test_empty_runs_are_left_out(tmp_path):
    nothing, no_bytes, no_points, no_options, misnamed = (
        tmp_path / name
        for name in (*(f"PongNoFrameskip-v4__dqn__{seed}__7" for seed in (1, 2, 3, 4)), "PyTorch")
    )
    nothing.mkdir()
    no_bytes.mkdir()
    (no_bytes / "events.out.tfevents.7").touch()
    SummaryWriter(str(no_points)).close()
    for folder in (no_options, misnamed):
        with SummaryWriter(str(folder)) as writer:
            writer.add_scalar(GAMES, 1.0, 1)
    found = find_runs([tmp_path], include_unfinished=True)
    assert found.runs == []
    assert dict(found.left_out) == {
        nothing: "empty: no event files",
        no_bytes: "empty: nothing in its event files",
        no_points: "empty: nothing in its event files",
        no_options: "its event files lack the run's options (hyperparameters/text_summary)",
        misnamed: "its name is not a run's, {env_id}__{exp_name}__{seed}__{unix time}",
    }


def test_unfinished_runs_count_on_demand(tmp_path):
    stopped = write_run(tmp_path, seed=1, games=[(1, 1.0)])
    (stopped / "checkpoints").mkdir()
    without_end = write_run(tmp_path, seed=2, games=[(1, 1.0)], evaluation=())
    reasons = {
        stopped: "unfinished: it still has checkpoints",
        without_end: "unfinished: it has 0 of the 2 games of its final evaluation",
    }
    found = find_runs([tmp_path], include_unfinished=False)
    assert found.runs == []
    assert dict(found.left_out) == reasons
    found = find_runs([tmp_path], include_unfinished=True)
    assert [run.folder for run in found.runs] == [stopped, without_end]
    assert found.notes == [f"{run}: {reason}" for run, reason in reasons.items()]


def test_the_newest_finished_run_of_a_seed_counts(tmp_path):
    oldest = write_run(tmp_path, start_time=999, games=[(1, 1.0)])
    newest = write_run(tmp_path, start_time=1000, games=[(1, 2.0)])
    unfinished = write_run(tmp_path, start_time=1001, games=[(1, 3.0)], evaluation=())
    other_seed = write_run(tmp_path, seed=2, start_time=5, games=[(1, 4.0)])
    for include_unfinished in (False, True):
        found = find_runs([tmp_path], include_unfinished)
        assert [run.folder for run in found.runs] == [newest, other_seed]
        assert {folder for folder, _ in found.left_out} == {oldest, unfinished}
    assert found.left_out[1] == (oldest, f"the same game, experiment and seed as {newest}, which counts")


def test_a_run_is_found_once_however_it_is_reached(tmp_path, monkeypatch):
    run = write_run(tmp_path / "runs" / "cloud", games=[(1, 1.0)])
    (tmp_path / "runs" / "around").symlink_to(tmp_path / "runs")
    (tmp_path / "link").symlink_to(run)
    looked_at, event_files = [], report_runs.event_files
    monkeypatch.setattr(report_runs, "event_files", lambda path: looked_at.append(path) or event_files(path))
    found = find_runs([tmp_path, tmp_path / "runs", run, tmp_path / "link"], include_unfinished=False)
    assert len(found.runs) == 1
    assert found.left_out == []
    assert len(looked_at) < 20  # around in a circle it would be 40 times


def test_runs_with_other_options_are_named(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path, seed=seed, games=[(1, 1.0)], learning_rate=seed / 8, track=seed == 1, gamma=0.99)
    (note,) = find_runs([tmp_path], include_unfinished=False).notes
    assert note == "the runs of dqn on Breakout differ in --learning-rate (0.125, 0.25)"


# ------------------------------------------------------------------------------------------------- pages


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def test_text_is_shown_as_it_is():
    name = "a|b <i>*x*</i> __y__ [z](w) & \\ `c`"
    assert Tags(block_to_html(Paragraph(name), Path())).texts == [name]
    assert Tags(block_to_html(Table(["head"], [[name]]), Path())).texts.count(name) == 1
    assert block_to_markdown(Bullets([name])) == r"- a\|b \<i>\*x\*\</i> \__y_\_ [z\](w) \& \\ \`c\`"
    assert block_to_markdown(Table(["h"], [["1|2"]])) == "| h |\n| --- |\n| 1\\|2 |"


@pytest.fixture(scope="module")
def pong(tmp_path_factory):
    """The report of the kept Pong runs, made as a user makes it."""
    folder = tmp_path_factory.mktemp("reports") / "pong"
    command = [
        sys.executable,
        "-m",
        "cleanrl.utils.report.__main__",
        "docs/results/pong",
        "--include-unfinished",
    ]
    done = subprocess.run(
        [*command, "--output", str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return folder, done


def test_the_report_of_the_kept_runs(pong):
    folder, done = pong
    assert {path.name for path in folder.iterdir()} == {
        "report.md", "report.html", "curves-Pong.png", "comparison-Pong.png", "over-all-games.png"
    }  # fmt: skip
    assert done.stdout == f"report: {folder / 'report.html'}, of 3 runs; 0 left out\n"
    assert re.search(r"note: .*__dqn_atari__1__\d+: unfinished: it has 0 of the 30 games", done.stderr)
    markdown = (folder / "report.md").read_text("utf-8")
    # As docs/qdagger.md and docs/dqn.md say.
    assert (
        "| Pong | qdagger_dqn_atari_impalacnn | 1 | 16,000 | 18.40 | 16.60 | 19.40 | 19.72 ± 0.20 |"
        in markdown
    )
    assert "| Pong | qdagger_dqn_atari_jax_impalacnn | 1 | 16,000 | 21.00 | 11.20 | 19.40 |" in markdown
    assert re.search(r"\| dqn_atari \| 1 \(1 unfinished\) \| 292,\d+ \| −20.60 \| – \| – \|", markdown)
    assert "finished 5 games in training, fewer than 10" in markdown
    for name in re.findall(r"!\[.*?\]\((.*?)\)", markdown):
        assert (folder / name).is_file()


def test_the_page_needs_nothing_beside_it(pong):
    folder, _ = pong
    text = (folder / "report.html").read_text("utf-8")
    page = Tags(text)
    assert {"script", "link", "iframe", "object", "base", "a"}.isdisjoint(tag for tag, _ in page.tags)
    assert not re.search(r"@import|url\(|https?:", re.sub(r"base64,[^\"]+", "", text))
    sources = [attributes["src"] for _, attributes in page.tags if "src" in attributes]
    embedded = {base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources}
    assert embedded == {path.read_bytes() for path in folder.glob("*.png")}
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")
    assert "prefers-color-scheme: dark" in text
    assert "18.40" in page.texts


def has_color(picture, color):
    rgb = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return (np.abs(picture[:, :, :3] - rgb).max(axis=2) < 0.02).sum() > 20


@pytest.mark.parametrize("name", ["curves-Pong.png", "comparison-Pong.png", "over-all-games.png"])
def test_pictures_show_every_experiment(pong, name):
    picture = image.imread(pong[0] / name)
    height, width, _ = picture.shape
    assert 900 <= width <= 1600
    assert 400 <= height <= 1600
    assert all(has_color(picture, color) for color in COLORS[:3])
    assert not has_color(picture, COLORS[3])


def test_a_run_that_finished_no_game_in_training(tmp_path):
    offline = [(50, 1.0), (100, 2.0)]
    # Between two $ would stand a formula, which this is not.
    run = write_run(tmp_path / "runs", "q$^$q", teacher=9.0, offline=offline, last_step=200, **QDAGGER)
    make(tmp_path / "runs", "--output", tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "No run has finished a game in training" in text
    assert f"{run.name}: finished 0 games in training, fewer than 10" in text
    assert sorted(path.suffix for path in (tmp_path / "report").iterdir()) == [".html", ".md", ".png"]


# ---------------------------------------------------------------------------------------------- commands


@pytest.fixture
def one_run(tmp_path):
    write_run(tmp_path / "runs", games=[(1, 1.0)])
    return tmp_path / "runs"


@pytest.fixture
def small_report(monkeypatch):
    """Without pictures, which take most of the time."""

    def write_report(folder, found, args):
        (folder / "report.html").write_text(str(len(found.runs)))

    monkeypatch.setattr(report_content, "write_report", write_report)


def error_of(*arguments):
    with pytest.raises(SystemExit) as caught:
        make(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_left_out_is_named_in_the_report_and_on_stderr(one_run, tmp_path, capsys):
    empty = one_run / "PongNoFrameskip-v4__dqn__1__7"
    empty.mkdir()
    make(one_run, "--output", tmp_path / "report")
    captured = capsys.readouterr()
    assert captured.err == f"left out: {empty}: empty: no event files\n"
    assert captured.out == f"report: {tmp_path / 'report' / 'report.html'}, of 1 run; 1 left out\n"
    for name in ("report.md", "report.html"):
        text = (tmp_path / "report" / name).read_text("utf-8")
        assert f"{empty}: empty: no event files" in text
        assert "1 folder left out" in text


def test_no_run_that_can_be_used(tmp_path, capsys):
    assert error_of(tmp_path) == f"error: no run in {tmp_path} can be used: there is none"
    (tmp_path / "PongNoFrameskip-v4__dqn__1__7").mkdir()
    assert error_of(tmp_path) == f"error: no run in {tmp_path} can be used: 1 left out"
    assert capsys.readouterr().err.count("left out: ") == 1
    assert (
        error_of(tmp_path / "no")
        == f"error: {tmp_path / 'no'} is not a folder; name a run's, or one above it"
    )
    assert error_of().startswith("error: name at least one folder of runs")


@pytest.mark.parametrize("package", ["matplotlib", "rliable"])
def test_a_package_that_is_missing(one_run, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    error = error_of(one_run, "--output", tmp_path / "report")
    assert error == f"error: a report needs {package}: pip install -r requirements/requirements-report.txt"


@pytest.mark.parametrize(
    ("option", "value", "demand"),
    [
        ("last-games", 0, "at least 1"),
        ("bootstrap-samples", 0, "at least 1"),
        ("bootstrap-seed", -1, "at least 0"),
    ],
)
def test_numbers_that_make_no_sense(one_run, option, value, demand):
    assert error_of(one_run, f"--{option}", value) == f"error: --{option} {value} must be {demand}"


@pytest.mark.parametrize("field", dataclasses.fields(report.Args)[1:], ids=lambda field: field.name)
def test_every_option_stands_in_the_docs(field):
    text = (ROOT / "docs" / "report.md").read_text("utf-8")
    assert f"| `--{field.name.replace('_', '-')}` | {field.default} |" in text


@pytest.mark.usefixtures("small_report")
def test_an_older_report_is_replaced(one_run, tmp_path):
    output = tmp_path / "report"
    output.mkdir()
    for name in ("report.html", "report.md", "curves-Pong.png", "comparison-Pong.png", "over-all-games.png"):
        (output / name).write_text("old")
    make(one_run, "--output", output)
    assert [path.name for path in output.iterdir()] == ["report.html"]
    assert (output / "report.html").read_text() == "1"
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "report"}


def test_nothing_else_is_replaced(one_run, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "find_runs", lambda *arguments: pytest.fail("it reads runs first"))
    output = tmp_path / "report"
    output.mkdir()
    (output / "report.html").write_text("old")
    file = output / "notes.txt"
    file.write_text("mine")
    assert error_of(one_run, "--output", output) == (
        f"error: --output {output} holds notes.txt, which is no part of a report; name another folder"
    )
    assert error_of(one_run, "--output", file) == f"error: --output {file} is a file; name a folder"
    assert file.read_text() == "mine"
    assert (output / "report.html").read_text() == "old"


def test_a_file_that_came_while_runs_were_read_is_kept(one_run, tmp_path, monkeypatch):
    file = tmp_path / "report" / "notes.txt"

    def write_report(folder, found, args):
        file.parent.mkdir()
        file.write_text("mine")

    monkeypatch.setattr(report_content, "write_report", write_report)
    assert "holds notes.txt" in error_of(one_run, "--output", file.parent)
    assert file.read_text() == "mine"


def test_a_full_disk_leaves_the_older_report(one_run, tmp_path, monkeypatch):
    output = tmp_path / "report"
    output.mkdir()
    (output / "report.html").write_text("old")

    def write_report(folder, found, args):
        (folder / "report.html").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report_content, "write_report", write_report)
    error = error_of(one_run, "--output", output)
    assert error == f"error: --output {output} cannot be written (No space left on device)"
    assert (output / "report.html").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "report"}
