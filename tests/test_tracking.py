"""--track mirrors the curves to Weights & Biases: the real client, offline, and its file read back."""

import base64
import hashlib
import json
import os
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from both_scripts import ROOT, read_curves, run_python
from resume_runs import Command, tiny_options
from wandb.proto.wandb_internal_pb2 import Record

from cleanrl.utils.run.tracking import Tracker, check_tracking

PROJECT = ["--wandb-project-name", "pong"]


def run_tracked(folder: Path, **settings: str) -> tuple[int, str]:
    """A short run of `dqn_atari.py` with the given environment variables: its status and what it printed."""
    with mock.patch.dict(os.environ, {"HOME": str(folder)} | settings):
        for name in [name for name in os.environ if name.startswith("WANDB_") and name not in settings]:
            del os.environ[name]
        options = [*tiny_options("dqn_atari"), "--track", "--capture-video", *PROJECT]
        command = Command(folder, "dqn_atari", *options)
    return command.end(), command.output


def records(path: Path) -> Iterator[Record]:
    """Those of an offline run's file: LevelDB's log format, behind a header of 7 bytes."""
    data, position, content = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        content += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(content)
            content = b""


@pytest.mark.slow
def test_an_offline_run_holds_every_point_and_every_option(tmp_path):
    status, output = run_tracked(tmp_path, WANDB_MODE="offline")
    assert status == 0, output
    assert "wandb sync" in output  # says how to send it
    (run_folder,) = (tmp_path / "runs").iterdir()
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert path.name == f"run-{run_folder.name}.wandb"

    points: dict[str, list[tuple[int, float]]] = {}
    options, project, media, artifacts = {}, None, {}, []
    for record in records(path):
        if record.WhichOneof("record_type") == "request" and record.request.HasField("log_artifact"):
            artifacts.append(record.request.log_artifact.artifact)
        if record.WhichOneof("record_type") == "artifact":
            artifacts.append(record.artifact)
        if record.WhichOneof("record_type") == "run":
            options |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            project = record.run.project
        items = {}
        for item in record.history.item:
            tag, *part = item.nested_key or [item.key]
            if part:
                media.setdefault(tag, {})[part[0]] = json.loads(item.value_json)
            else:
                items[tag] = item.value_json
        for tag in items.keys() - {"step"}:
            if not tag.startswith("_"):
                points.setdefault(tag, []).append((int(items["step"]), float(items[tag])))
    assert project == "pong"
    assert (options["env_id"], options["seed"], options["gamma"]) == ("PongNoFrameskip-v4", 1, 0.99)

    expected = read_curves(run_folder)
    assert points.keys() == expected.keys() >= {"losses/td_loss", "charts/epsilon", "eval/episodic_return"}
    for tag, curve in expected.items():
        assert [step for step, _ in points[tag]] == [step for step, _ in curve]
        values = [value for _, value in points[tag]]
        assert values == pytest.approx([value for _, value in curve], rel=1e-6)  # TensorBoard's are float32

    (video,) = (run_folder / "videos" / "final").glob("*.mp4")
    files = path.parent / "files"
    assert (files / media["videos/final"]["path"]).read_bytes() == video.read_bytes()
    table = json.loads((files / media["eval/games"]["path"]).read_text())
    assert table["columns"] == ["game", "return"]
    assert table["data"] == [list(point) for point in expected["eval/episodic_return"]]
    (model,) = [artifact for artifact in artifacts if artifact.type == "model"]
    assert model.name == run_folder.name
    (entry,) = model.manifest.contents
    assert entry.path == "dqn_atari.cleanrl_model"
    content = (run_folder / entry.path).read_bytes()
    assert base64.b64decode(entry.digest) == hashlib.md5(content).digest()


@pytest.mark.slow
def test_where_nobody_is_logged_in_one_line_and_no_question_ends_the_command(tmp_path):
    status, output = run_tracked(tmp_path)
    assert status == 1
    (line,) = output.splitlines()
    assert line.startswith("error: --track: not logged in to Weights & Biases; run wandb login")
    assert "WANDB_MODE=offline" in line
    assert not (tmp_path / "runs").exists()


def test_a_resumed_run_stays_one(monkeypatch):
    wandb = mock.Mock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    Tracker("run", "project", "team", {"seed": 1})
    settings = wandb.init.call_args.kwargs
    assert (settings["id"], settings["resume"]) == ("run", "allow")
    assert (settings["project"], settings["entity"], settings["save_code"]) == ("project", "team", True)


def test_without_wandb_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit) as end:
        check_tracking("qdagger")
    assert end.value.code.startswith("error: --track needs Weights & Biases, which is not installed; ")
    assert "pip install -r requirements/requirements-track.txt" in end.value.code
    assert (ROOT / "requirements" / "requirements-track.txt").is_file()


def test_a_variable_that_wandb_refuses_is_one_line(tmp_path):
    program = "from cleanrl.utils.run.tracking import check_tracking; check_tracking('qdagger')"
    status, _, errors = run_python(tmp_path, "-c", program, WANDB_MODE="onlin", PYTHONPATH=str(ROOT))
    assert status == 1
    (line,) = errors.splitlines()
    assert re.match(
        "error: --track: Weights & Biases cannot be used (.*mode .*); check the WANDB variables", line
    )


@pytest.mark.parametrize("project", ["a:b", "a/b", "a#", "x" * 129])
def test_a_project_that_wandb_refuses_is_refused_before_the_run(project):
    with pytest.raises(
        SystemExit, match=r"--wandb-project-name .* must be at most 128 characters, none of them / . #"
    ):
        check_tracking(project)
