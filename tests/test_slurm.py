"""docs/examples/slurm.sh with stand-ins for Slurm's programs and for the training script."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from both_scripts import ROOT
from fake_training import result

SCRIPT = ROOT / "docs" / "examples" / "slurm.sh"
STEPS = 40


@pytest.fixture
def cluster(tmp_path) -> Path:
    """A checkout with a script that counts, and a folder of programs before all others."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (tmp_path / "cleanrl").mkdir()
    shutil.copy(ROOT / "tests" / "fake_training.py", tmp_path / "cleanrl/qdagger_dqn_atari_impalacnn.py")
    options = f"--step-s 0.05 --total-timesteps {STEPS}"
    for name, text in {
        "python": f'exec "{sys.executable}" "$@" {options}',
        "srun": 'echo $$ > step.pid\nexec "$@"',
        "scontrol": 'echo "$@" >> scontrol.log',
    }.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    return tmp_path


def start_job(cluster: Path, task: int) -> subprocess.Popen:
    slurm = {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": str(task)}
    path = {"PATH": f"{cluster / 'programs'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        ["bash", str(SCRIPT)], cwd=cluster, env=os.environ | slurm | path,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_job_at_its_time_limit_is_queued_again_and_resumes(cluster):
    job = start_job(cluster, task=4)
    deadline = time.monotonic() + 60
    while not list(cluster.glob("runs/*/checkpoints/*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(int((cluster / "step.pid").read_text()), signal.SIGUSR1)  # to the job's steps, as Slurm does
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 138, output
    assert (cluster / "scontrol.log").read_text() == "requeue 77_4\n"

    again = start_job(cluster, task=4)
    output, _ = again.communicate(timeout=60)
    assert again.returncode == 0, output
    [run] = cluster.glob("runs/*")
    assert run.name.startswith("BreakoutNoFrameskip-v4__qdagger_dqn_atari_impalacnn__2__")
    first, second = map(json.loads, (run / "starts.jsonl").read_text().splitlines())
    assert first["step"] == 0 < second["step"] < STEPS
    assert (run / "qdagger_dqn_atari_impalacnn.cleanrl_model").read_text() == result(2, STEPS)
    assert (cluster / "scontrol.log").read_text() == "requeue 77_4\n"  # not after it has finished


def test_every_game_and_seed_has_a_job_and_the_signal_is_the_one_that_is_handled():
    text = SCRIPT.read_text()
    assert "#SBATCH --array=0-8\n" in text
    assert "#SBATCH --signal=USR1@" in text
    script = text.replace("srun python", "echo srun python").replace("status=$?", "exit 0")
    lines = {
        subprocess.run(
            ["bash", "-c", script], env=os.environ | {"SLURM_ARRAY_TASK_ID": str(task)}, check=True,
            capture_output=True, text=True,
        ).stdout
        for task in range(9)
    }  # fmt: skip
    assert len(lines) == 9
    for game in ("Pong", "Breakout", "BeamRider"):
        for seed in (1, 2, 3):
            assert (
                sum(f"--env-id {game}NoFrameskip-v4 --seed {seed} --resume auto" in line for line in lines)
                == 1
            )
