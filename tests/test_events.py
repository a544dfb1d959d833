"""Event files as TensorBoard itself reads them, also after a disk that was full."""

import errno
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from cleanrl.utils.events import EventWriter


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return events


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def test_points_are_read_back(tmp_path):
    writer = EventWriter(tmp_path)
    for step, value in enumerate([0.5, np.float32(1.5), torch.tensor(-2.0), 3]):
        writer.add_scalar("charts/a", value, 10 * step)
    writer.add_scalar("charts/b", float("nan"), 7)
    writer.close()
    assert points(tmp_path, "charts/a") == [(0, 0.5), (10, 1.5), (20, -2.0), (30, 3.0)]
    assert [step for step, _ in points(tmp_path, "charts/b")] == [7]


def test_options_are_a_table(tmp_path):
    writer = EventWriter(tmp_path)
    writer.add_options({"seed": 1, "env_id": "Pong"})
    writer.close()
    events = read(tmp_path)
    assert events.Tags()["tensors"] == ["hyperparameters/text_summary"]
    assert events.SummaryMetadata("hyperparameters/text_summary").plugin_data.plugin_name == "text"
    (event,) = events.Tensors("hyperparameters/text_summary")
    assert event.tensor_proto.string_val == [b"|option|value|\n|-|-|\n|seed|1|\n|env_id|Pong|"]


def test_what_is_flushed_is_all_there(tmp_path):
    writer = EventWriter(tmp_path)
    sizes = []
    for step in range(20):
        writer.add_scalar("a", step, step)
        writer.flush()
        sizes.append(writer.path.stat().st_size)
        assert points(tmp_path, "a")[-1] == (step, step)
    assert len(set(np.diff(sizes))) <= 2  # step 0 takes no bytes


def test_two_files_of_a_run_are_one_curve(tmp_path):
    for steps in (range(3), range(3, 6)):
        writer = EventWriter(tmp_path)
        for step in steps:
            writer.add_scalar("a", step, step)
        writer.close()
    assert points(tmp_path, "a") == [(step, step) for step in range(6)]


@pytest.mark.parametrize("records_that_fit", [0, 1, 3])
def test_a_full_disk_loses_and_doubles_nothing(tmp_path, monkeypatch, capsys, records_that_fit):
    writer = EventWriter(tmp_path)
    writer.add_scalar("a", 0, 0)
    writer.flush()
    size = writer.path.stat().st_size
    write, left = RecordWriter.write, [records_that_fit]

    def write_until_full(self, data):
        if not left[0]:
            self._writer.write(b"half a record")
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", write_until_full)
        for step in range(1, 5):
            writer.add_scalar("a", step, step)
        writer.flush()
        assert writer.path.stat().st_size == size
        assert "No space left on device" in capsys.readouterr().err
        writer.add_scalar("a", 5, 5)
        left[0] = 0
        writer.flush()
    writer.add_scalar("a", 6, 6)
    writer.close()
    assert points(tmp_path, "a") == [(step, step) for step in range(7)]


def test_the_mirror_sees_every_point(tmp_path):
    seen = []
    writer = EventWriter(tmp_path, mirror=lambda *point: seen.append(point))
    writer.add_scalar("a", np.float32(0.5), 3)
    writer.close()
    assert seen == [("a", 0.5, 3)]
