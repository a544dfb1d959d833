"""cleanrl/utils/report/runs.py: which runs are found and used, and what is read of whole and damaged ones."""

import os
import shutil
import struct

import pytest
from made_runs import QDAGGER, write_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.summary.writer.record_writer import masked_crc32c
from torch.utils.tensorboard import SummaryWriter

from cleanrl.utils.report import runs
from cleanrl.utils.report.runs import UnusableError, find_runs, read_run
from cleanrl.utils.run.charts import EPISODIC_RETURN, EVALUATION_RETURN
from cleanrl.utils.run.events import EventWriter


def cut(run):
    """Truncates a run's event file within its last record."""
    (path,) = run.glob("events.*")
    path.write_bytes(path.read_bytes()[:-5])
    return path


def test_a_resumed_run_is_its_files_together(tmp_path):
    """Written by the scripts' writer, and read by TensorBoard itself as well."""
    run = tmp_path / "PongNoFrameskip-v4__dqn__1__7"
    run.mkdir()
    for steps in ((10, 20), (30, 40)):
        writer = EventWriter(run)
        if steps[0] == 10:
            writer.add_options({"seed": 1, "eval_episodes": 1, "exp_name": "a|b"}, [])
        for step in steps:
            writer.add_scalar(EPISODIC_RETURN, step / 8, step)
        if steps[0] == 30:
            writer.add_scalar(EVALUATION_RETURN, 3, 0)
        writer.flush()
    assert len(list(run.glob("events.*"))) == 2
    found = read_run(run, include_unfinished=False)
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    expected = [(event.step, event.value) for event in events.Scalars(EPISODIC_RETURN)]
    assert list(zip(*map(list, found.curves[EPISODIC_RETURN]), strict=True)) == expected
    assert len(expected) == 4
    assert found.options == {"seed": "1", "eval_episodes": "1", "exp_name": "a|b"}
    assert (found.env_id, found.exp_name, found.seed, found.last_step) == ("PongNoFrameskip-v4", "dqn", 1, 40)


def test_points_of_a_newer_writer_are_read(tmp_path):
    run = write_run(tmp_path, evaluation=(5.0,))
    with SummaryWriter(str(run)) as writer:
        writer.add_scalar(EVALUATION_RETURN, 0.5, 1, new_style=True)
    assert read_run(run, include_unfinished=False).curves[EVALUATION_RETURN].values.tolist() == [5, 0.5]


def test_a_truncated_file_is_read_up_to_there(tmp_path):
    run = write_run(tmp_path, games=[(1, 4.0)], evaluation=(1.0, 2.0, 3.0))
    path = cut(run)
    found = find_runs([tmp_path], include_unfinished=False)
    assert found.runs[0].curves[EVALUATION_RETURN].values.tolist() == [1, 2]
    assert found.notes == [f"{run}: {path.name} is truncated; its last record is lost"]


def test_a_damaged_run_is_left_out(tmp_path):
    run = write_run(tmp_path, games=[(step, 4.0) for step in range(100)])
    (path,) = run.glob("events.*")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    # TensorBoard's reader silently stops there.
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    assert len(events.Scalars(EPISODIC_RETURN)) < 100
    with pytest.raises(UnusableError, match=f"damaged: a checksum in {path.name} is wrong"):
        read_run(run, include_unfinished=True)


@pytest.mark.parametrize(
    ("options", "games", "fault"),
    [
        ({"offline_steps": "many"}, [(1, 1.0)], "damaged: its options are invalid"),
        ({"offline_steps": 5}, [(1, 1.0)], "damaged: its options are invalid"),  # and no teacher_steps
        (
            {"offline_steps": 5, "teacher_steps": 9, "num_envs": 0},
            [(1, 1.0)],
            "damaged: its options are invalid",
        ),
        (
            {"offline_steps": 5, "teacher_steps": "9" * 400},
            [(1, 1.0)],
            r"damaged: its options are invalid \(teacher_steps is 9+… \(400 characters\)\)$",
        ),
        (
            {"offline_steps": 5, "teacher_steps": 9, "num_envs": -3},
            [(1, 1.0)],
            r"damaged: its options are invalid \(num_envs is -3\)$",
        ),
        ({}, [(1, 1.0), (7, float("nan"))], "damaged: charts/episodic_return is nan at step 7"),
        ({}, [(1, 1.0), (2**63 - 1, 3.0)], f"damaged: charts/episodic_return is 3.0 at step {2**63 - 1}$"),
    ],
)
def test_invalid_runs_are_left_out(tmp_path, options, games, fault):
    run = write_run(tmp_path, games=games, **options)
    with pytest.raises(UnusableError, match=fault):
        read_run(run, include_unfinished=True)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ({"dtype": 1, "float_val": [1, 2], "tensor_shape": {"dim": [{"size": 2}]}}, "no number"),
        ({"dtype": 1, "float_val": [1], "tensor_shape": {"dim": [{"size": 10**14}]}}, "no number"),
        ({"dtype": 20, "tensor_content": b"1"}, "no number"),  # a resource
        ({"dtype": 8, "scomplex_val": [1, 1]}, "no number"),
        ({"dtype": 2, "double_val": [1e300]}, "1e+300"),  # the mean of a few of these is infinite
    ],
)
def test_a_point_that_is_no_number_is_not_read(tmp_path, content, fault):
    run = write_run(tmp_path)
    with SummaryWriter(str(run)) as writer:
        plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"))
        value = Summary.Value(tag=EVALUATION_RETURN, metadata=plugin, tensor=TensorProto(**content))
        writer.file_writer.add_summary(Summary(value=[value]), 3)
    fault = f"damaged: eval/episodic_return is {fault} at step 3"
    assert find_runs([tmp_path], include_unfinished=True).left_out == [(run, fault)]


@pytest.mark.parametrize("damage", [2**62, 2**26, "fifo", "any"])
def test_a_damaged_run_does_not_cost_the_report_of_others(tmp_path, monkeypatch, damage):
    good, bad = write_run(tmp_path, seed=1), write_run(tmp_path, seed=2)
    (path,) = bad.glob("events.*")
    if damage == "any":
        read = runs.read_curves
        monkeypatch.setattr(runs, "read_curves", lambda paths, faults: read(paths, 1 / (path not in paths)))
        fault = "cannot be read (ZeroDivisionError('division by zero'))"
    elif damage == "fifo":
        path.unlink()
        os.mkfifo(path)  # reading it would wait for ever
        fault = "empty: no event files"
    else:
        header = struct.pack("<Q", damage)
        with path.open("ab") as file:
            file.write(header + struct.pack("<I", masked_crc32c(header)))
            file.truncate(file.tell() + 2**26)  # all zeros, so it takes no room on the disk
        fault = f"damaged: a record in {path.name} is not an event"
    found = find_runs([tmp_path], include_unfinished=False)
    assert [run.folder for run in found.runs] == [good]
    assert found.left_out == [(bad, fault)]


def test_a_run_whose_name_cannot_be_shown_is_left_out(tmp_path):
    of_name = "its name has control characters, or its game's is too long to name a plot"
    faults = {
        b"Breakout__bad\xff__1__7": of_name,
        b"Breakout__b\x1b[2J__1__7": of_name,
        b"G" * 240 + b"__dqn__1__7": of_name,
        b"\xff/Breakout__dqn__1__8": "its path is not in UTF-8; rename it",
    }
    good = write_run(tmp_path)
    (events,) = good.glob("events.*")
    for name in faults:
        folder = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(folder)
        shutil.copy(events, os.fsdecode(folder))
    found = find_runs([tmp_path], include_unfinished=False)
    assert [run.folder for run in found.runs] == [good]
    assert dict(found.left_out) == {tmp_path / os.fsdecode(name): fault for name, fault in faults.items()}


def test_empty_runs_are_left_out(tmp_path):
    nothing, no_bytes, no_points, no_options = (
        tmp_path / f"PongNoFrameskip-v4__dqn__{i}__7" for i in range(4)
    )
    misnamed = tmp_path / "PyTorch"
    nothing.mkdir()
    no_bytes.mkdir()
    (no_bytes / "events.out.tfevents.7").touch()
    SummaryWriter(str(no_points)).close()
    for folder in (no_options, misnamed):
        with SummaryWriter(str(folder)) as writer:
            writer.add_scalar(EPISODIC_RETURN, 1.0, 1)
    found = find_runs([tmp_path], include_unfinished=True)
    assert found.runs == []
    assert dict(found.left_out) == {
        nothing: "empty: no event files",
        no_bytes: "empty: nothing in its event files",
        no_points: "empty: nothing in its event files",
        no_options: "its event files lack the run's options (hyperparameters/text_summary)",
        misnamed: "not named like a run, {env_id}__{exp_name}__{seed}__{unix time}",
    }


def test_unfinished_runs_count_on_demand(tmp_path):
    stopped, no_games, too_few = (write_run(tmp_path, seed=seed, games=[(1, 1.0)]) for seed in (1, 2, 3))
    (stopped / "checkpoints").mkdir()
    no_games.joinpath(next(no_games.glob("events.*")).name).unlink()
    write_run(tmp_path, seed=2, games=[(1, 1.0)], evaluation=())
    cut(too_few)
    reasons = {
        stopped: "unfinished: it still has checkpoints",
        no_games: "unfinished: it has 0 of the 2 games of its final evaluation",
        too_few: "unfinished: it has 1 of the 2 games of its final evaluation",
    }
    found = find_runs([tmp_path], include_unfinished=False)
    assert found.runs == []
    assert dict(found.left_out) == reasons
    found = find_runs([tmp_path], include_unfinished=True)
    assert [run.folder for run in found.runs] == list(reasons)
    assert set(found.notes) >= {f"{run}: {reason}" for run, reason in reasons.items()}


def test_the_newest_finished_run_of_a_seed_counts(tmp_path):
    oldest = write_run(tmp_path, start_time=999, games=[(1, 1.0)])
    newest = write_run(tmp_path, start_time=1000, games=[(1, 2.0)])
    unfinished = write_run(tmp_path, start_time=1001, games=[(1, 3.0)], evaluation=())
    other_seed = write_run(tmp_path, seed=2, start_time=5, games=[(1, 4.0)])
    for include_unfinished in (False, True):
        found = find_runs([tmp_path], include_unfinished)
        assert [run.folder for run in found.runs] == [newest, other_seed]
        assert {folder for folder, _ in found.left_out} == {oldest, unfinished}
    assert found.left_out[1] == (oldest, f"same game, experiment and seed as {newest}, which is used")


def test_a_run_is_found_once_however_it_is_reached(tmp_path):
    run = write_run(tmp_path / "runs" / "cloud", games=[(1, 1.0)])
    for name in ("around", "again"):  # two circles: following them all would take 2 ** 40 steps
        (tmp_path / "runs" / name).symlink_to(tmp_path / "runs")
    (tmp_path / "link").symlink_to(run)
    found = find_runs([tmp_path, tmp_path / "runs", run, tmp_path / "link"], include_unfinished=False)
    assert len(found.runs) == 1
    assert found.left_out == []


def test_runs_with_other_options_are_named(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path, seed=seed, games=[(1, 1.0)], learning_rate=seed / 8, track=seed == 1, gamma=0.99)
    (note,) = find_runs([tmp_path], include_unfinished=False).notes
    assert note == "the runs of dqn on Breakout differ in --learning-rate (0.125, 0.25)"


def test_runs_of_different_algorithms_under_one_name_are_noted(tmp_path):
    write_run(tmp_path, seed=1, games=[(1, 1.0)])
    write_run(tmp_path, seed=2, games=[(1, 1.0)], **QDAGGER)
    (note,) = find_runs([tmp_path], include_unfinished=False).notes
    assert note == "the runs of dqn on Breakout are of different algorithms"
