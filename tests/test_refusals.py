"""What makes no sense is refused in one line, before any work. Each option's bounds: test_options.py."""

import dataclasses
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import torch
from both_scripts import DQN_JAX, DQN_TORCH, JAX, PONG_TEACHER, TORCH, run_python, use_network
from rehearsal import tiny_args
from safetensors.numpy import load_file, save_file
from torch import nn

from cleanrl.utils.run import memory

PONG = [  # short, so that a test fails soon if nothing is refused
    "--env-id", "PongNoFrameskip-v4", "--buffer-size", "10", "--batch-size", "4", "--learning-starts", "10",
    "--total-timesteps", "104", "--eval-episodes", "1",
]  # fmt: skip
TEACHER = [
    "--teacher-model-path", str(PONG_TEACHER), "--teacher-eval-episodes", "1", "--teacher-steps", "104",
    "--offline-steps", "4",
]  # fmt: skip


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """The line with which the PyTorch and the JAX script refuse a command line, having done nothing."""
    monkeypatch.chdir(tmp_path)

    def refuse(scripts: tuple[ModuleType, ModuleType], *options: str) -> str:
        files, lines = set(tmp_path.iterdir()), []
        for script in scripts:
            use_network(monkeypatch, script, "number")
            monkeypatch.setattr(sys, "argv", [script.__file__, *options])
            with pytest.raises(SystemExit) as stop:
                script.main(script.read_arguments(script.Args))
            assert capsys.readouterr().err == ""
            assert set(tmp_path.iterdir()) == files
            lines.append(stop.value.code)
        assert lines[0] == lines[1]
        assert re.fullmatch("error: .+", lines[0])
        return lines[0]

    return refuse


NONSENSE = [
    ("--num-envs 0", ["--num-envs 0", "between 1 and 1024"]),
    ("--seed 4294967296", ["--seed 4294967296", "between 0 and 4294967295"]),
    ("--batch-size 11 --buffer-size 10", ["--batch-size 11", "--buffer-size 10"]),
    ("--tau 0", ["--tau 0.0 must be above 0"]),
    ("--buffer-device cuda --no-cuda", ["--buffer-device cuda", "--no-cuda"]),
    ("--upload-model --no-save-model", ["--upload-model", "--no-save-model"]),
    ("--env-id CartPole-v1", ["CartPole-v1", "not an Atari game"]),
    ("--env-id PnogNoFrameskip-v4", ["PnogNoFrameskip-v4", "PongNoFrameskip-v4"]),
    ("--buffer-size 1000000000 --total-timesteps 1000000000", ["1,000,000,000", "use --buffer-size"]),
]
NONSENSE_OF_QDAGGER = [
    ("--teacher-steps 20 --n-step 3", ["--teacher-steps 20", "--n-step", "24"]),
    ("--average-decay 1", ["--average-decay 1.0 must be below 1"]),
    ("--teacher-model-path no.such.file", ["no.such.file", "does not exist"]),
    ("--teacher-replay-path no_such_folder", ["no_such_folder", "is not a folder"]),
    ("--env-id BreakoutNoFrameskip-v4", [str(PONG_TEACHER), "6 actions", "4"]),
]


@pytest.mark.parametrize(("options", "words"), NONSENSE + NONSENSE_OF_QDAGGER)
def test_qdagger_refuses_nonsense(refusal, monkeypatch, options, words):
    monkeypatch.setattr(memory, "available_host_memory", lambda: 10 * 10**9)
    line = refusal((TORCH, JAX), *PONG, *TEACHER, *options.split())
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("options", "words"), [*NONSENSE, ("--save-replay .", ["--save-replay .", "new folder"])]
)
def test_dqn_refuses_nonsense(refusal, monkeypatch, options, words):
    monkeypatch.setattr(memory, "available_host_memory", lambda: 10 * 10**9)
    Path("mine").touch()
    line = refusal((DQN_TORCH, DQN_JAX), *PONG, *options.split())
    assert all(word in line for word in words), line


@pytest.mark.slow
def test_nonsense_ends_the_command_with_status_1_and_one_line(tmp_path):
    for script in (TORCH, DQN_JAX):
        status, output, errors = run_python(
            tmp_path, script.__file__, "--batch-size", "11", "--buffer-size", "10"
        )
        assert (status, output) == (1, "")
        assert re.fullmatch("error: --batch-size 11 .*\n", errors)


def test_the_buffer_size_that_is_advised_fits(qdagger, monkeypatch):
    monkeypatch.setattr(memory, "available_host_memory", lambda: 10 * 10**9)
    use_network(monkeypatch, qdagger, "number")
    monkeypatch.setattr(qdagger, "load_teacher", mock.Mock(side_effect=RuntimeError("far enough")))
    args = tiny_args(qdagger, buffer_size=10**9, teacher_steps=10**7, buffer_device="cpu")
    with pytest.raises(SystemExit, match="GB more host memory") as stop:
        qdagger.main(args)
    advised = int(re.search(r"use --buffer-size (\d+)", str(stop.value))[1])
    with pytest.raises(RuntimeError, match="far enough"):
        qdagger.main(dataclasses.replace(args, buffer_size=advised))


# --------------------------------------------------------------------------------------------- teachers


def write_state_dict(path: Path, **changes: torch.Tensor) -> None:
    weights = {name: torch.from_numpy(array) for name, array in load_file(PONG_TEACHER).items()}
    torch.save(weights | changes, path)


def write_part(path: Path) -> None:
    write_state_dict(path)
    path.write_bytes(path.read_bytes()[:-1000])


def write_nan(path: Path) -> None:
    weights = load_file(PONG_TEACHER)
    weights[next(iter(weights))] *= np.nan
    save_file(weights, path)


TEACHER_FAULTS = {
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "folder": (Path.mkdir, "is not a file"),
    "text": (lambda path: path.write_text("a teacher"), "neither a torch state dict nor flax msgpack"),
    "half a safetensors file": (
        lambda path: path.write_bytes(PONG_TEACHER.read_bytes()[:-1000]),
        "truncated",
    ),
    "part of a torch file": (write_part, "truncated"),
    "part of a flax file": (lambda path: path.write_bytes(b"\x81\xa6params\x81\xa6Conv_0"), "truncated"),
    "another architecture": (lambda path: torch.save(nn.Linear(4, 6).state_dict(), path), "architecture"),
    "another layer": (partial(write_state_dict, extra=torch.ones(1)), "unexpected 'extra'"),
    "another dtype": (
        partial(write_state_dict, **{"network.9.bias": torch.ones(6, dtype=int)}),
        "floating-point",
    ),
    "NaN": (write_nan, "NaN"),
}


@pytest.mark.parametrize("fault", TEACHER_FAULTS)
def test_a_teacher_that_cannot_be_used_is_refused(refusal, tmp_path, fault):
    write, words = TEACHER_FAULTS[fault]
    write(tmp_path / "teacher")
    line = refusal((TORCH, JAX), *PONG, *TEACHER, "--teacher-model-path", "teacher")
    assert line.startswith("error: teacher")
    assert words in line


@pytest.mark.parametrize(("game_return", "normalization"), [(0.0, "none"), (-3.0, "none"), (-20.7, "random")])
def test_a_teacher_whose_return_means_nothing_for_the_coefficient_is_refused(
    qdagger, train, game_return, normalization
):
    remedy = {"none": "--return-normalization random", "random": "a better teacher"}[normalization]
    line = rf"^error: the teacher's mean return, {game_return:.2f}, .*; use {remedy}$"
    with pytest.raises(SystemExit, match=line):
        train(qdagger, game_return=game_return, return_normalization=normalization)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("cleanrl/PongNoFrameskip-v4-{0}-seed1", "{0}.cleanrl_model", None)),
        ({"teacher_model_exp_name": "x"}, ("cleanrl/PongNoFrameskip-v4-x-seed1", "x.cleanrl_model", None)),
        (
            {"teacher_policy_hf_repo": "me/PongNoFrameskip-v4-mine-seed3", "teacher_revision": "v1"},
            ("me/PongNoFrameskip-v4-mine-seed3", "mine.cleanrl_model", "v1"),
        ),
        ({"teacher_policy_hf_repo": "me/x", "teacher_hf_file": "y.zip"}, ("me/x", "y.zip", None)),
    ],
)
def test_the_teacher_is_downloaded_under_its_published_name(qdagger, monkeypatch, options, expected):
    """How, and what can go wrong: test_hub.py."""
    default_name = "dqn_atari" if qdagger is TORCH else "dqn_atari_jax"
    download = mock.Mock(side_effect=RuntimeError("far enough"))
    monkeypatch.setattr(qdagger, "download", download)
    with pytest.raises(RuntimeError, match="far enough"):
        qdagger.load_teacher(tiny_args(qdagger, teacher_model_path=None, **options), 6, None)
    download.assert_called_once_with(*(part and part.format(default_name) for part in expected))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "Connection refused"),
        ({"HF_HUB_OFFLINE": "1"}, "unset HF_HUB_OFFLINE"),
    ],
)
def test_a_hub_that_gives_no_teacher_is_one_line(tmp_path, settings, words):
    code = """
from cleanrl import qdagger_dqn_atari_impalacnn, qdagger_dqn_atari_jax_impalacnn
for script in (qdagger_dqn_atari_impalacnn, qdagger_dqn_atari_jax_impalacnn):
    try:
        script.load_teacher(script.Args(env_id="PongNoFrameskip-v4"), 6, None)
    except SystemExit as stop:
        print(stop)
"""
    status, output, errors = run_python(tmp_path, "-c", code, HF_HOME=str(tmp_path / "home"), **settings)
    assert (status, errors) == (0, "")
    torch_line, jax_line = (line for line in output.splitlines() if line.startswith("error: "))
    assert "dqn_atari.cleanrl_model from cleanrl/PongNoFrameskip-v4-dqn_atari-seed1" in torch_line
    assert jax_line == torch_line.replace("dqn_atari", "dqn_atari_jax")
    assert words in torch_line
