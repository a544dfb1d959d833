"""Looks for memory that leaks and steps that slow down over a long online phase of a script.

python tests/benchmarks/long_run.py [--script qdagger_dqn_atari_jax_impalacnn] [--minutes 30]

Starts the script on Pong with a small replay buffer, few gradient steps, so that there are many environment
steps, and a checkpoint every 30 s. Prints a row per tenth of the time: environment steps so far, steps per
second in it, and the memory at its end that the script's process and its workers do not share with others.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import psutil
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {
    "env_id": "PongNoFrameskip-v4",
    "teacher_model_path": ROOT / "cleanrl/teachers/PongNoFrameskip-v4.safetensors",
    "teacher_eval_episodes": 1,
    "return_normalization": "random",
    "teacher_steps": 400,
    "offline_steps": 0,
    "buffer_size": 20_000,
    "learning_starts": 1_000,
    "train_frequency": 200,
    "total_timesteps": 1_000_000_000,
    "checkpoint_interval": 30,
}
TENTHS = 10


def memory_mb(process: psutil.Process) -> int:
    """Of a process and all that it started, in MB."""
    processes = [process, *process.children(recursive=True)]
    return round(sum(p.memory_full_info().uss for p in processes) / 1e6)


def online_steps(folder: Path) -> list[tuple[float, int]]:
    """Unix times, and the environment steps of the online phase at each, as far as they are written."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    if "charts/epsilon" not in events.Tags()["scalars"]:
        return []
    return [(point.wall_time, point.step) for point in events.Scalars("charts/epsilon")]


def steps_until(points: list[tuple[float, int]], end: float) -> int:
    return max((steps for wall_time, steps in points if wall_time <= end), default=0)


def main(
    script: Literal[
        "qdagger_dqn_atari_impalacnn", "qdagger_dqn_atari_jax_impalacnn"
    ] = "qdagger_dqn_atari_impalacnn",
    minutes: float = 30.0,
) -> None:
    """Prints the table when the time is over, and ends the script.

    Args:
        script: which one to watch.
        minutes: of the online phase.
    """
    options = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, str(ROOT / "cleanrl" / f"{script}.py"), *options]
        running = subprocess.Popen(
            command, cwd=scratch, stdout=subprocess.DEVNULL, env=os.environ | {"TQDM_DISABLE": "1"}
        )
        try:
            while not (started := [*Path(scratch).glob("runs/*/")]) or not online_steps(started[0]):
                if running.poll() is not None:
                    raise SystemExit(f"error: {script} ended; its output is above")
                time.sleep(1)
            first = online_steps(started[0])[0][0]
            readings = []
            for tenth in range(1, TENTHS + 1):
                time.sleep(max(0, first + 60 * minutes * tenth / TENTHS - time.time()))
                readings.append((time.time(), memory_mb(psutil.Process(running.pid))))
        finally:
            running.terminate()
            running.wait()
        points = online_steps(started[0])
    print("| minutes | environment steps | steps/s | memory, MB |\n|---|---|---|---|")
    before = first
    for wall_time, memory in readings:
        steps = steps_until(points, wall_time)
        speed = (steps - steps_until(points, before)) / (wall_time - before)
        print(f"| {(wall_time - first) / 60:.0f} | {steps:,} | {speed:,.0f} | {memory:,} |")
        before = wall_time


if __name__ == "__main__":
    tyro.cli(main)
