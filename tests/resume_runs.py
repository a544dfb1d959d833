"""Tiny runs of the training scripts, to be killed and resumed, and what must come out the same.

python tests/resume_runs.py SCRIPT OPTIONS…     the script, its evaluation games cut short
python tests/resume_runs.py serve SCRIPT        many runs of it, as `Server` asks for them
"""

import errno
import functools
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

SCRIPTS = ("dqn_atari", "dqn_atari_jax", "qdagger_dqn_atari_impalacnn", "qdagger_dqn_atari_jax_impalacnn")
MAX_GAME_FRAMES, GAME_FRAMES = 108_000, 60  # of a game; of an evaluation game, here
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
    """Every point of every curve, also those of the same step; in the order of steps."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    curves: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(run_folder.glob("events.out.tfevents.*"), key=lambda path: path.name.split(".")[3]):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tensor.float_val:
                    curves.setdefault(value.tag, []).append((event.step, value.tensor.float_val[0]))
    return {tag: sorted(points, key=lambda point: point[0]) for tag, points in curves.items()}


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
                env=os.environ | {"PYTHONUNBUFFERED": "1"}, start_new_session=True,
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


# ------------------------------------------------------------------------- runs that need hardly any time


class Server:
    """A process that has imported a PyTorch script and forks a run of it whenever one is asked for.

    The runs have small networks and can be killed at an exact instant: before or after one of the calls that
    change a file or bring it to the disk. A kill before a file is on the disk leaves half of it.
    """

    def __init__(self, script: str):
        self.script = script
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "serve", script],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
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
    for change in [*shortened(module), *simplified(module), *forked(module)]:
        setattr(*change)
    importlib.import_module("torch._dynamo")  # or every run would: half of its time
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.setsid()
                status = serve_run(module, **request)
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # its environments: forks do not notice that they are alone
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
        if self.number == self.kill_at and name.endswith(".partial"):
            with open(name, "r+b") as file:
                file.truncate(os.fstat(descriptor).st_size // 2)
        self.sync(descriptor)

    def _pass(self) -> None:
        if self.number == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.number += 1


Change = tuple[Any, str, Any]  # an object, the name of an attribute, and its new value


def shortened(module: ModuleType) -> list[Change]:
    """What cuts off the evaluation's games, and plots more often."""
    from cleanrl.utils.run import training_run

    evaluate = functools.partial(training_run.evaluate, max_game_frames=GAME_FRAMES)
    return [
        (training_run, "evaluate", evaluate),
        (module, "LOSS_INTERVAL", 2),
        (module, "CHART_INTERVAL", 10),
    ]


def simplified(module: ModuleType) -> list[Change]:
    """What has a PyTorch script learn with small networks, on one core."""
    import torch

    class SmallNetwork(torch.nn.Module):
        """Its Q-values tell every pixel and every action apart, more or less."""

        def __init__(self, num_actions: int, dense_width: int = 0):
            super().__init__()
            self.pool = torch.nn.AvgPool2d(12)
            self.linear = torch.nn.Linear(4 * 7 * 7, num_actions)

        def forward(self, observations: torch.Tensor) -> torch.Tensor:
            return self.linear(self.pool(observations / 255.0).flatten(1))

    torch.set_num_threads(1)
    if not hasattr(module, "StudentNetwork"):
        return [(module, "QNetwork", SmallNetwork)]
    torch.manual_seed(0)
    teacher = SmallNetwork(6).requires_grad_(False)
    return [
        (module, "StudentNetwork", SmallNetwork),
        (module, "load_teacher", lambda args, num_actions, device: teacher),
    ]


def forked(module: ModuleType) -> list[Change]:
    """What has every environment play in a fork of this process, and be made only once, before it forks."""
    from cleanrl.utils.games import parallel_envs

    fork, make_env = multiprocessing.get_context("fork"), functools.cache(module.make_env)
    for max_game_frames in (MAX_GAME_FRAMES, GAME_FRAMES):
        make_env("PongNoFrameskip-v4", 0.25, max_game_frames)

    def made_env(
        env_id: str, repeat: float, max_game_frames: int = MAX_GAME_FRAMES, video_folder: None = None
    ):
        return make_env(env_id, repeat, max_game_frames)

    return [
        (module, "make_env", made_env),
        (parallel_envs, "available_cores", lambda: 2),  # one for each, or they would be the same
        (multiprocessing, "get_context", lambda method: fork),
        (multiprocessing, "get_all_start_methods", lambda: ["fork"]),
    ]


def run_script(module: ModuleType, options: list[str]) -> None:
    sys.argv = [module.__name__, *options]
    module.exit_on_ctrl_c()
    module.main(module.parse_arguments(module.Args))


if __name__ == "__main__":
    name, *rest = sys.argv[1:]
    if name == "serve":
        serve(*rest)
    else:
        script = importlib.import_module(f"cleanrl.{name}")
        for change in shortened(script):
            setattr(*change)
        run_script(script, rest)
