"""Runs of a PyTorch script that need hardly any time and can be killed at an exact instant.

As a program, with a script's name, it makes the runs that a `Server` asks for.
"""

import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from both_scripts import NUM_ACTIONS, is_qdagger, linear_teacher, use_network
from resume_runs import GAME_FRAMES, PYTHONPATH, run_script, shorten, tiny_options

from cleanrl.utils import evaluation
from cleanrl.utils.evaluation import MAX_GAME_FRAMES
from cleanrl.utils.games.env_state import get_state, set_state
from cleanrl.utils.games.parallel_envs import IDLE, FinishedGame, StepResult
from cleanrl.utils.run import training_run


class Server:
    """A process that has imported a PyTorch script and forks a run of it whenever one is asked for.

    The runs have small networks and can be killed at an exact instant: before or after one of the calls that
    change a file or bring it to the disk. A kill before a file is on the disk leaves half of it.
    """

    def __init__(self, script: str):
        self.script = script
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), script],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env=os.environ | {"PYTHONPATH": PYTHONPATH},
        )  # fmt: skip

    def run(
        self,
        folder: Path,
        *options: str,
        kill_at: int | None = None,
        full_disk: tuple[int, int] | None = None,
    ) -> tuple[int, int, str]:
        """Returns the exit status, how many instants it saw, and what it printed.

        Args:
            folder: where it runs.
            options: of the script, beside the tiny ones.
            kill_at: the instant at which it is killed.
            full_disk: while it sees these instants, from the first until before the last, the disk is full
                for checkpoints and event files.
        """
        folder.mkdir(parents=True, exist_ok=True)
        options = [*tiny_options(self.script), "--checkpoint-interval", "1e-9", *options]
        request = {"folder": str(folder.resolve()), "options": options}
        print(json.dumps(request | {"kill_at": kill_at, "full_disk": full_disk}), file=self.process.stdin)
        status = json.loads(self.process.stdout.readline())
        output = (folder / "output").read_text().replace("\r", "\n")
        instants = folder / "instants"
        return status, int(instants.read_text()) if instants.exists() else 0, output

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.stdin.close()
        self.process.wait(60)


def serve(script: str) -> None:
    module = importlib.import_module(f"cleanrl.{script}")
    simplify(pytest.MonkeyPatch(), module)
    module.make_env = MadeEnvs(module.make_env).take
    torch.set_num_threads(1)
    importlib.import_module("torch._dynamo")  # or every run would: half of its time
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = serve_run(module, **request)
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps(status), flush=True)


def serve_run(
    module: ModuleType,
    folder: str,
    options: list[str],
    kill_at: int | None,
    full_disk: tuple[int, int] | None,
) -> int:
    os.chdir(folder)
    output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    Path("instants").unlink(missing_ok=True)
    os.dup2(output, 1)
    os.dup2(output, 2)
    instants = Instants(kill_at, full_disk)
    status = 0
    try:
        run_script(module, options)
    except SystemExit as end:
        status = end.code
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    Path("instants").write_text(str(instants.number))
    return status


class Instants:
    """Counts the instants before and after each call that changes files, and kills at one of them.

    Event files do not count, but for what is cut off them: there are as many as there were kills.
    """

    def __init__(self, kill_at: int | None, full_disk: tuple[int, int] | None):
        self.number, self.kill_at, self.full_disk = 0, kill_at, full_disk
        for name in ("replace", "rename", "unlink", "mkdir", "rmdir"):
            setattr(os, name, self._around(getattr(os, name)))
        self.truncate, os.truncate = self._around(os.truncate), self._cut
        self.sync, os.fsync = self._around(lambda descriptor: None), self._fsync

    def _around(self, call: Callable) -> Callable:
        def around(*args: Any, **keywords: Any) -> Any:
            self._pass()
            result = call(*args, **keywords)
            self._pass()
            return result

        return around

    def _cut(self, path: Path, size: int) -> None:
        if path.stat().st_size != size:
            self.truncate(path, size)

    def _fsync(self, descriptor: int) -> None:
        """Only counts: what was written outlives a killed process, synced or not."""
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        is_full = self.full_disk and self.full_disk[0] <= self.number < self.full_disk[1]
        if "events." in name and not (is_full and self.number % 2):  # so small that it fits every other time
            return
        if is_full and ("events." in name or "checkpoints" in name):
            self._pass()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.number == self.kill_at and os.path.isfile(name):
            with open(name, "r+b") as file:
                file.truncate(os.fstat(descriptor).st_size // 2)
        self.sync(descriptor)

    def _pass(self) -> None:
        if self.number == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.number += 1


class MadeEnvs:
    """Environments that are made once, for all runs: that takes longer than to play them."""

    def __init__(self, make_env: Callable):
        self.envs = {
            frames: [make_env("PongNoFrameskip-v4", 0.25, frames) for _ in range(5)]
            for frames in (MAX_GAME_FRAMES, GAME_FRAMES)
        }

    def take(
        self,
        env_id: str,
        repeat: float = 0.0,
        max_game_frames: int = MAX_GAME_FRAMES,
        video_folder: None = None,
    ) -> gym.Env:
        return self.envs[max_game_frames].pop()


def simplify(monkeypatch: pytest.MonkeyPatch, script: ModuleType) -> None:
    """Has a script learn with small networks, and play short games in its own process."""
    shorten(monkeypatch, script)
    use_network(monkeypatch, script, "linear")
    if is_qdagger(script):
        kernel = np.random.default_rng(0).normal(size=(196, NUM_ACTIONS)).astype(np.float32)
        teacher = linear_teacher(script, kernel, np.zeros(NUM_ACTIONS, np.float32))
        monkeypatch.setattr(script, "load_teacher", lambda args, num_actions, device: teacher)
    for module in (training_run, evaluation):
        monkeypatch.setattr(module, "ParallelEnvs", EnvsInThisProcess)


class EnvsInThisProcess:
    """The same as ParallelEnvs, one environment after the other."""

    def __init__(self, env_fns: list[Callable], probe_fn: Callable | None = None):
        self.envs = [env_fn() for env_fn in env_fns]
        self.action_space = self.envs[0].action_space

    def reset(self, seed: Any) -> np.ndarray:
        seeds = np.random.SeedSequence(seed).generate_state(len(self.envs))
        pairs = zip(self.envs, seeds, strict=True)
        self.observations = np.stack([env.reset(seed=int(own_seed))[0] for env, own_seed in pairs])
        return self.observations

    def get_states(self) -> list[dict[str, Any]]:
        pairs = zip(self.envs, self.observations, strict=True)
        return [{"env": get_state(env), "observation": observation} for env, observation in pairs]

    def set_states(self, states: list[dict[str, Any]]) -> None:
        for env, state in zip(self.envs, states, strict=True):
            env.reset()
            set_state(env, state["env"])
        self.observations = np.stack([state["observation"] for state in states])

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    def step_wait(self) -> StepResult:
        steps, games = [], []
        for index, (env, action) in enumerate(zip(self.envs, self.actions, strict=True)):
            observation, reward, terminated, truncated = self.observations[index], 0.0, False, False
            if action != IDLE:
                observation, reward, terminated, truncated, _ = env.step(int(action))
            last = observation
            if terminated or truncated:
                observation, info = env.reset()
                if "episode" in info:
                    games.append(FinishedGame(index, info["episode"]["r"], info["episode"]["l"]))
            steps.append((observation, np.float32(reward), terminated, truncated, last))
        result = StepResult(*(np.stack(column) for column in zip(*steps, strict=True)), games)
        self.observations = result.observations
        return result

    def __enter__(self) -> "EnvsInThisProcess":
        return self

    def __exit__(self, *exception: object) -> None:
        pass


if __name__ == "__main__":
    serve(sys.argv[1])
