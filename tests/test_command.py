"""The scripts as their users start them, each in a process of its own."""

import os
import re
import select
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from both_scripts import (
    DQN_JAX,
    JAX,
    PONG_TEACHER,
    SCRIPTS,
    TORCH,
    device_of,
    is_qdagger,
    name_of,
    published_shapes,
    read_curves,
    read_model,
    run_python,
    start_python,
    uses_torch,
)

from cleanrl.utils.replay.ring import ReplayBuffer
from cleanrl.utils.replay.saved_replay import open_replay

SMOKE = [  # the published settings for a run of seconds
    "--learning-starts", "10", "--total-timesteps", "16", "--buffer-size", "10", "--batch-size", "4",
    "--eval-episodes", "1",
]  # fmt: skip
SMOKE_OF_QDAGGER = [*SMOKE, "--teacher-steps", "16", "--offline-steps", "16", "--teacher-eval-episodes", "1"]


def test_importing_a_script_has_no_effects(tmp_path):
    code = f"""
import multiprocessing, os, signal, sys, threading
from cleanrl import {", ".join(map(name_of, SCRIPTS))}
assert os.listdir() == []
assert threading.active_count() == 1
assert not multiprocessing.active_children()
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
assert not sys.modules["torch"].cuda.is_initialized()
"""
    assert run_python(tmp_path, "-c", code) == (0, "", "")


def run_without_the_other_framework(script, folder: Path, *options: str) -> tuple[Path, str]:
    """Its run's folder and what it printed."""
    hidden = folder / "hidden"
    hidden.mkdir()
    for name in ("jax", "jaxlib", "flax", "optax") if uses_torch(script) else ("torch",):
        (hidden / f"{name}.py").write_text(f"raise ImportError('no {name} here')")
    status, output, errors = run_python(folder, script.__file__, *options, PYTHONPATH=str(hidden))
    assert status == 0, errors
    assert "Traceback" not in errors
    (run_folder,) = (folder / "runs").iterdir()
    assert re.fullmatch(rf"BreakoutNoFrameskip-v4__{name_of(script)}__1__\d+", run_folder.name)
    assert all(np.isfinite(value) for points in read_curves(run_folder).values() for _, value in points)
    return run_folder, output


def saved_names(run_folder: Path) -> set[str]:
    return {path.name for path in run_folder.rglob("*") if "tfevents" not in path.name}


@pytest.mark.slow
def test_qdagger_with_the_published_smoke_settings(qdagger, tmp_path):
    teacher = ["--teacher-model-path", str(PONG_TEACHER.with_name("BreakoutNoFrameskip-v4.safetensors"))]
    options = [*SMOKE_OF_QDAGGER, *teacher, "--dense-width", "64"]
    run_folder, output = run_without_the_other_framework(qdagger, tmp_path, *options)
    name = name_of(qdagger)
    assert saved_names(run_folder) == {f"{name}-offline.cleanrl_model", f"{name}.cleanrl_model"}
    student = read_model(qdagger, run_folder / f"{name}.cleanrl_model")
    shapes = {name: array.shape for name, array in student.items()}
    assert shapes == published_shapes(qdagger, 4, dense_width=64)
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in student.values())
    assert "memory: 0.00 GB of host memory for the replay buffer" in output
    assert {"losses/loss", "charts/offline/loss"} <= read_curves(run_folder).keys()


@pytest.mark.slow
def test_dqn_makes_a_teacher_and_a_replay_that_qdagger_takes(dqn, tmp_path):
    options = [*SMOKE, "--num-envs", "2", "--total-timesteps", "600", "--learning-starts", "500"]
    options += ["--buffer-size", "400"]
    run_folder, _ = run_without_the_other_framework(
        dqn, tmp_path, *options, "--save-replay", "replays/breakout"
    )
    assert saved_names(run_folder) == {f"{name_of(dqn)}.cleanrl_model"}
    assert [step for step, _ in read_curves(run_folder)["losses/td_loss"]] == [600]
    model = run_folder / f"{name_of(dqn)}.cleanrl_model"
    weights = read_model(dqn, model)
    assert {name: array.shape for name, array in weights.items()} == published_shapes(dqn, 4)
    observations = np.random.default_rng(0).integers(256, size=(4, 4, 84, 84), dtype=np.uint8)
    q_values = []
    for script in (TORCH, JAX):
        teacher = script.load_teacher(script.Args(teacher_model_path=model), 4, device_of(script))
        q_values.append(script.compute_q_values(teacher, observations))
    np.testing.assert_allclose(*q_values, rtol=1e-4, atol=1e-5)

    args = SimpleNamespace(
        teacher_replay_path=tmp_path / "replays" / "breakout",
        env_id="BreakoutNoFrameskip-v4", batch_size=400, n_step=1,
    )  # fmt: skip
    saved = open_replay(args, 4)
    assert saved.num_envs == 2
    assert (saved.heads >= 300).all()
    replay = ReplayBuffer(400, 2, make_frames=None, num_actions=4)
    rows = [rows for _, rows in saved.rows(replay)]
    assert sum(len(part["frames"]) for part in rows) == saved.num_rows == 2 * 204
    assert sum(part["is_transition"].sum() for part in rows) >= 2 * 150


def wait_for_progress(process: subprocess.Popen, phase: str, least: int) -> None:
    """Waits until the log says that a phase has come so far."""
    errors, deadline = "", time.monotonic() + 600
    while time.monotonic() < deadline:
        if select.select([process.stderr], [], [], 1)[0]:
            chunk = os.read(process.stderr.fileno(), 1 << 16).decode(errors="replace")
            assert chunk, errors
            errors += chunk
            reached = re.findall(rf"^{phase}: +\d+% (\d+)/", errors, re.MULTILINE)
            if reached and int(reached[-1]) >= least:
                return
    raise AssertionError(errors)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "phase", "options", "least", "tag", "step"),
    [
        (TORCH, "offline", "--offline-steps 9999", 120, "charts/offline/loss", 100),
        # The first gradient step comes in environment step 12, the hundredth in step 12 + 99 · 4.
        (JAX, "online", "--offline-steps 0 --total-timesteps 1000000", 480, "losses/loss", 408),
        (DQN_JAX, "training", "--total-timesteps 1000000", 480, "losses/td_loss", 408),
    ],
    ids=["offline", "online", "dqn"],
)  # fmt: skip
def test_ctrl_c_leaves_a_saved_network_and_closed_event_files(
    tmp_path, script, phase, options, least, tag, step
):
    with_short_games = f"""
from functools import partial
from cleanrl import {name_of(script)} as script
from cleanrl.utils import progress
from cleanrl.utils.run import training_run
progress.LOG_INTERVAL_S = 0.1
training_run.evaluate = partial(training_run.evaluate, max_game_frames=300)
script.main(script.read_arguments(script.Args))
"""
    command = [*SMOKE, "--env-id", "PongNoFrameskip-v4", "--exp-name", "stopped"]
    if is_qdagger(script):
        command = [*SMOKE_OF_QDAGGER, *command, "--teacher-model-path", str(PONG_TEACHER)]
        command += ["--return-normalization", "random", "--dense-width", "64"]
    process = start_python(tmp_path, "-c", with_short_games, *command, *options.split())
    wait_for_progress(process, phase, least)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers as well
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    (run_folder,) = (tmp_path / "runs").iterdir()
    assert errors.strip().endswith(f"stopped by SIGINT; resume it with --resume runs/{run_folder.name}")
    saved = read_model(script, run_folder / "stopped.cleanrl_model")
    dense_width = 64 if is_qdagger(script) else None
    assert {name: array.shape for name, array in saved.items()} == published_shapes(script, 6, dense_width)
    assert all(np.isfinite(array).all() for array in saved.values())
    assert read_curves(run_folder)[tag][0][0] == step
