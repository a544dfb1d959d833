"""Event files as TensorBoard itself reads them, also after the disk was full."""

import errno
import io
import json
import os
import time
import urllib.parse
import urllib.request
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from cleanrl.utils.games.animation import Animation
from cleanrl.utils.run import events
from cleanrl.utils.run.events import EventWriter


def read(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def test_points_are_read_back(tmp_path):
    writer = EventWriter(tmp_path)
    for step, value in enumerate([0.5, np.float32(1.5), torch.tensor(-2.0), 3]):
        writer.add_scalar("charts/a", value, 10 * step)
    writer.add_scalar("charts/b", float("nan"), 7)
    writer.flush()
    assert points(tmp_path, "charts/a") == [(0, 0.5), (10, 1.5), (20, -2.0), (30, 3.0)]
    assert [step for step, _ in points(tmp_path, "charts/b")] == [7]


def test_options_are_a_table(tmp_path):
    writer = EventWriter(tmp_path)
    writer.add_options({"seed": 1, "env_id": "Pong"}, [])
    writer.flush()
    accumulator = read(tmp_path)
    assert "hyperparameters/text_summary" in accumulator.Tags()["tensors"]
    assert accumulator.SummaryMetadata("hyperparameters/text_summary").plugin_data.plugin_name == "text"
    (event,) = accumulator.Tensors("hyperparameters/text_summary")
    assert event.tensor_proto.string_val == [b"|option|value|\n|-|-|\n|seed|1|\n|env_id|Pong|"]


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer")  # of TensorBoard's own pages
def test_tensorboard_shows_the_charts_of_the_layout_and_the_animation(tmp_path, monkeypatch):
    """Asked as its pages ask."""
    from tensorboard.program import TensorBoard  # warns

    (tmp_path / "run").mkdir()
    writer = EventWriter(tmp_path / "run")
    curves = {
        "losses/loss": [3.0, 2.0],
        "losses/loss_of_another": [9.0],
        "charts/a+b": [0.5],
        "eval/a": [7.0],
    }
    for tag, values in curves.items():
        for step, value in enumerate(values):
            writer.add_scalar(tag, value, 10 * step)
    layout = {
        "losses": {"all": ["losses/loss", "charts/a+b"], "none": ["losses/los"]},
        "ε": {"ε": ["eval/a"]},
    }
    writer.add_layout(layout)
    options = {"learning_rate": 1e-4, "seed": 3, "cuda": False, "env_id": "Pong", "resume": None}
    writer.add_options(options, ["eval/a"])
    gif = io.BytesIO()
    Image.new("RGB", (8, 6)).save(gif, "GIF", save_all=True, append_images=[Image.new("RGB", (8, 6), "red")])
    monkeypatch.setattr(events, "animate", {"game.mp4": Animation(gif.getvalue(), 8, 6)}.get)
    writer.add_video("videos/final", "game.mp4", step=40)
    writer.flush()

    server = TensorBoard()
    server.configure(logdir=str(tmp_path), host="127.0.0.1", port=0, load_fast="false")
    url = server.launch()

    def ask(path: str, **query: str) -> bytes:
        with urllib.request.urlopen(f"{url}data/plugin/{path}?{urllib.parse.urlencode(query)}") as answer:
            return answer.read()

    deadline = time.monotonic() + 30
    while not json.loads(ask("images/tags")) and time.monotonic() < deadline:
        time.sleep(0.1)
    shown = {}
    for section in json.loads(ask("custom_scalars/layout"))["category"]:
        for chart in section["chart"]:
            found = shown[section["title"], chart["title"]] = {}
            for tag in chart["multiline"]["tag"]:
                answer = json.loads(ask("custom_scalars/scalars", run="run", tag=tag))
                for name, of_tag in answer["tag_to_events"].items():
                    found[name] = [(step, value) for _, step, value in of_tag]
    assert shown == {
        ("losses", "all"): {"losses/loss": [(0, 3.0), (10, 2.0)], "charts/a+b": [(0, 0.5)]},
        ("losses", "none"): {},
        ("ε", "ε"): {"eval/a": [(0, 7.0)]},
    }
    request = {
        "allowedStatuses": ["STATUS_UNKNOWN"],
        "sliceSize": 9,
        "colParams": [{"metric": {"group": "", "tag": "eval/a"}}],
    }
    answer = json.loads(ask("hparams/session_groups", request=json.dumps(request)))
    (session,) = answer["sessionGroups"]
    assert session["hparams"] == options | {"resume": "None"}
    assert [(metric["name"]["tag"], metric["value"]) for metric in session["metricValues"]] == [
        ("eval/a", 7.0)
    ]
    (image,) = json.loads(ask("images/images", run="run", tag="videos/final", sample="0"))
    assert image["step"] == 40
    query = dict(urllib.parse.parse_qsl(image["query"]))
    assert ask("images/individualImage", **query) == gif.getvalue()


def test_what_is_flushed_is_all_there(tmp_path):
    writer = EventWriter(tmp_path)
    sizes = []
    for step in range(20):
        writer.add_scalar("a", step, step)
        assert writer.flush()
        sizes.append(writer.path.stat().st_size)
        assert points(tmp_path, "a")[-1] == (step, step)
    assert len(set(np.diff(sizes))) <= 2  # step 0 takes no bytes


def test_two_files_of_a_run_are_one_curve(tmp_path):
    for steps in (range(3), range(3, 6)):
        writer = EventWriter(tmp_path)
        for step in steps:
            writer.add_scalar("a", step, step)
        writer.flush()
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
        assert not writer.flush()
        assert writer.path.stat().st_size == size
        assert "No space left on device" in capsys.readouterr().err
        writer.add_scalar("a", 5, 5)
        left[0] = 0
        writer.flush()
    writer.add_scalar("a", 6, 6)
    writer.flush()
    assert points(tmp_path, "a") == [(step, step) for step in range(7)]


def test_a_disk_that_becomes_read_only_loses_and_doubles_nothing(tmp_path, monkeypatch, capsys):
    """In the middle of a record, which then cannot even be cut off; later, the disk is mounted anew."""
    writer = EventWriter(tmp_path)
    writer.add_scalar("a", 0, 0)
    writer.flush()

    def fail(*args: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    def write_half(self, data):
        self._writer.write(b"half a record")
        self._writer.flush()
        fail()

    writer.add_scalar("a", 1, 1)
    size = writer.path.stat().st_size
    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", write_half)
        patch.setattr(os, "truncate", fail)
        assert not writer.flush()
        patch.setattr(Path, "open", fail)
        assert not writer.flush()
    assert capsys.readouterr().err.count("Read-only file system") == 2
    assert writer.path.stat().st_size > size
    writer.flush()
    assert points(tmp_path, "a") == [(0, 0), (1, 1)]


def test_the_mirror_sees_every_point(tmp_path):
    mirror = mock.Mock()
    writer = EventWriter(tmp_path, mirror)
    writer.add_scalar("a", np.float32(0.5), 3)
    writer.flush()
    assert mirror.method_calls == [mock.call.add_scalar("a", 0.5, 3)]
