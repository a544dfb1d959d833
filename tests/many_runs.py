"""Benchmarks as users start them, of tests/fake_training.py, and the results of their runs."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from resume_runs import read_events

from cleanrl.utils.run.charts import EPISODIC_RETURN
from cleanrl.utils.run.checkpoint import newest_checkpoint
from cleanrl.utils.run.folders import manifests

ROOT = Path(__file__).resolve().parents[1]
GAME = "PongNoFrameskip-v4"


class Benchmark:
    """A benchmark of the fake training script, copied to `folder`; its output goes into files."""

    started: ClassVar[list["Benchmark"]] = []

    def __init__(self, folder: Path, options: str, *arguments: str, command: str = "python fake_training.py"):
        self.folder = folder
        shutil.copy(ROOT / "tests" / "fake_training.py", folder)
        with (folder / "output").open("w") as output, (folder / "errors").open("w") as errors:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "cleanrl.utils.benchmark", "--env-ids", GAME,
                    "--command", f"{command} {options}", *arguments,
                ],
                cwd=folder, stdout=output, stderr=errors, env=os.environ | {"PYTHONPATH": str(ROOT)},
                start_new_session=True,
            )  # fmt: skip

        self.started.append(self)

    @classmethod
    def end_all(cls) -> None:
        """Ends what a failed test has left running."""
        for benchmark in cls.started:
            if benchmark.process.poll() is None:
                benchmark.process.kill()
                benchmark.process.wait()
        cls.started.clear()

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text()

    @property
    def errors(self) -> str:
        return (self.folder / "errors").read_text()

    def wait_until(self, condition: Callable[[], Any], timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"it has ended:\n{self.output}{self.errors}"
            assert time.monotonic() < deadline, f"nothing came:\n{self.output}{self.errors}"
            time.sleep(0.05)

    def end(self, signal_number: int | None = None, timeout_s: float = 120.0) -> int:
        """Sends a signal, if one is given, and waits for the end; returns the exit status."""
        if signal_number is not None:
            self.process.send_signal(signal_number)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end:\n{self.output}{self.errors}") from None


def the_folder(folder: Path, seed: int, game: str = GAME) -> Path | None:
    """The newest folder of a seed's runs."""
    return max((folder / "runs").glob(f"{game}__fake_training__{seed}__*"), default=None)


def model(folder: Path, seed: int, game: str = GAME) -> str:
    """The result of a seed's run."""
    return (the_folder(folder, seed, game) / "fake_training.cleanrl_model").read_text()


def starts(folder: Path, seed: int, game: str = GAME) -> list[dict[str, Any]]:
    """What the run of a seed noted at each of its starts."""
    path = (the_folder(folder, seed, game) or Path("none")) / "starts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def saved_step(folder: Path, seed: int) -> int:
    """The step of the newest checkpoint of a seed's run; -1 if there is none yet."""
    run_folder = the_folder(folder, seed)
    if not manifests(run_folder):
        return -1
    return newest_checkpoint(run_folder).read_state()["state"]["step"]


def curve(run_folder: Path) -> list[int]:
    """The steps of its curve, on which each value is its step."""
    points = read_events(run_folder)[EPISODIC_RETURN]
    assert all(step == value for step, value in points)
    return [step for step, _ in points]
