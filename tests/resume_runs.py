"""Tiny runs of the training scripts, to be killed and resumed, and what must come out the same.

As a program, with a script's name and options, it is that script with its evaluation games cut short.
"""

import functools
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHONPATH = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
SCRIPTS = ("dqn_atari", "dqn_atari_jax", "qdagger_dqn_atari_impalacnn", "qdagger_dqn_atari_jax_impalacnn")
GAME_FRAMES = 60  # of an evaluation game, here
KILLED = -signal.SIGKILL
COMMON = [
    "--env-id", "PongNoFrameskip-v4", "--repeat-action-probability", "0.25", "--num-envs", "2",
    "--buffer-size", "40", "--batch-size", "4", "--train-frequency", "2", "--target-network-frequency", "6",
    "--learning-starts", "10", "--total-timesteps", "60", "--eval-episodes", "1", "--no-cuda",
]  # fmt: skip
TEACHER = [
    "--teacher-model-path", str(ROOT / "cleanrl" / "teachers" / "PongNoFrameskip-v4.safetensors"),
    "--teacher-steps", "24", "--teacher-eval-episodes", "1", "--offline-steps", "8",
    "--offline-eval-frequency", "4", "--n-step", "3", "--return-normalization", "random",
]  # fmt: skip


def tiny_options(script: str) -> list[str]:
    return COMMON + (TEACHER if script.startswith("qdagger") else [])


# ------------------------------------------------------------------------------------------ what came out


def the_run(folder: Path) -> Path:
    """The last run that was started in a folder; those before were killed before their first checkpoint."""
    return max((folder / "runs").iterdir())


def read_events(run_folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every point of every curve, also those of the same step, in the order in which they were written."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_folder), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def outcome(folder: Path) -> dict[str, Any]:
    """What a resumed run has in common with an uninterrupted one: all but the time it took."""
    run_folder = the_run(folder)
    weights = {path.name: path.read_bytes() for path in run_folder.glob("*.cleanrl_model")}
    curves = {tag: points for tag, points in read_events(run_folder).items() if tag != "charts/SPS"}
    return {"weights": weights, "curves": curves}


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """A line for each thing that is not the same in two runs' outcomes."""
    lines = []
    for kind in ("weights", "curves"):
        for name in sorted(expected[kind].keys() | found[kind].keys()):
            before, after = (content[kind].get(name) for content in (expected, found))
            if before is None or after is None:
                lines.append(f"{kind}: {name} is {'new' if before is None else 'missing'}")
            elif before != after:
                lines.append(f"{kind}: {name} differs" + (f": {before} {after}" if kind == "curves" else ""))
    if not expected["weights"] or len(expected["curves"]) < 4:
        lines.append("the uninterrupted run has too little to compare")
    return lines


# ------------------------------------------------------------------------------------------ whole commands


class Command:
    """A script as its users start it; what it prints goes into a file."""

    def __init__(self, folder: Path, script: str, *options: str, short_games: bool = True):
        file = [str(Path(__file__).resolve()), script]
        command = file if short_games else [str(ROOT / "cleanrl" / f"{script}.py")]
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.output_path = folder / f"output-{len(list(folder.glob('output-*')))}"
        with self.output_path.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, *command, *options], cwd=folder, stdout=output, stderr=output,
                env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": PYTHONPATH}, start_new_session=True,
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self.output_path.read_text().replace("\r", "\n")

    def wait_for_checkpoints(self, number: int = 1, timeout_s: float = 120.0) -> bool:
        """Waits for so many checkpoints from now on; False if the command ends before."""
        deadline, last = time.monotonic() + timeout_s, self._last_checkpoint() + number
        while self._last_checkpoint() < last:
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, f"nothing came:\n{self.output}"
            time.sleep(0.01)
        return True

    def _last_checkpoint(self) -> int:
        paths = self.folder.glob("runs/*/checkpoints/checkpoint-*.json")
        return max((int(path.stem[-6:]) for path in paths), default=0)

    def workers(self) -> list[psutil.Process]:
        """Its environments' processes, which fork from a server."""
        return [worker for own in psutil.Process(self.process.pid).children() for worker in own.children()]

    def end(self, signal_number: int | None = None, timeout_s: float = 240.0) -> int:
        """Sends a signal, if one is given, and waits for the end; returns the exit status."""
        if signal_number is not None:
            self.process.send_signal(signal_number)
        return self.process.wait(timeout_s)


def shorten(monkeypatch: pytest.MonkeyPatch, script: ModuleType) -> None:
    """Cuts off the evaluation's games, and plots more often."""
    from cleanrl.utils.run import training_run

    evaluate = functools.partial(training_run.evaluate, max_game_frames=GAME_FRAMES)
    monkeypatch.setattr(training_run, "evaluate", evaluate)
    monkeypatch.setattr(script, "LOSS_INTERVAL", 2)
    monkeypatch.setattr(script, "CHART_INTERVAL", 10)


def run_script(module: ModuleType, options: list[str]) -> None:
    sys.argv = [module.__name__, *options]
    module.prepare_command()
    module.main(module.read_arguments(module.Args))


if __name__ == "__main__":
    the_script = importlib.import_module(f"cleanrl.{sys.argv[1]}")
    shorten(pytest.MonkeyPatch(), the_script)
    run_script(the_script, sys.argv[2:])
