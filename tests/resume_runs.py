"""Tiny runs of the training scripts, to be killed and gone on with; and what must come out the same.

python tests/resume_runs.py SCRIPT OPTIONS…     the script, its evaluation games cut short
python tests/resume_runs.py serve SCRIPT        many runs of it, as `Server` asks for them
"""

import errno
import functools
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

SCRIPTS = ("dqn_atari", "dqn_atari_jax", "qdagger_dqn_atari_impalacnn", "qdagger_dqn_atari_jax_impalacnn")
GAME_FRAMES = 100  # of an evaluation game, here
KILLED = -signal.SIGKILL
COMMON = [
    "--env-id", "PongNoFrameskip-v4", "--num-envs", "2", "--buffer-size", "60", "--batch-size", "4",
    "--train-frequency", "2", "--target-network-frequency", "6", "--learning-starts", "10",
    "--total-timesteps", "80", "--eval-episodes", "1", "--no-cuda",
]  # fmt: skip
TEACHER = [
    "--teacher-model-path", str(ROOT / "cleanrl" / "teachers" / "PongNoFrameskip-v4.safetensors"),
    "--teacher-steps", "40", "--teacher-eval-episodes", "1", "--offline-steps", "12",
    "--offline-eval-frequency", "6", "--return-normalization", "random",
]  # fmt: skip


def tiny_options(script: str) -> list[str]:
    return COMMON + (TEACHER if script.startswith("qdagger") else [])


# ------------------------------------------------------------------------------------------ what came out


def the_run(folder: Path) -> Path:
    """The last run that was made in a folder; those before were killed before their first checkpoint."""
    return max((folder / "runs").iterdir())


def read_events(run_folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every value of every curve, in order of the files and in them; nothing is left out or sorted."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    curves: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(run_folder.glob("events.out.tfevents.*"), key=lambda path: path.name.split(".")[3]):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tensor.float_val:
                    curves.setdefault(value.tag, []).append((event.step, value.tensor.float_val[0]))
    return {tag: sorted(points, key=lambda point: point[0]) for tag, points in curves.items()}


def outcome(folder: Path) -> dict[str, Any]:
    """What a run gone on with has in common with an uninterrupted one: all but the time it took."""
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
        lines.append("the uninterrupted run came out with too little to compare")
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

    def wait_until(self, condition: Callable[[], Any], timeout_s: float = 120.0) -> bool:
        """Waits for it; False if the command ended before."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, f"nothing came:\n{self.output}"
            time.sleep(0.01)
        return True

    def wait_for_checkpoints(self, number: int = 1) -> bool:
        """Waits for so many checkpoints from now on."""
        numbers = [int(path.stem[-6:]) for path in self._manifests()]
        last = max(numbers, default=0) + number
        return self.wait_until(lambda: any(int(path.stem[-6:]) >= last for path in self._manifests()))

    def _manifests(self) -> list[Path]:
        return list(self.folder.glob("runs/*/checkpoints/checkpoint-*.json"))

    def workers(self) -> list[int]:
        """Process ids of its environment workers."""
        table = [path.read_text().rpartition(") ")[2].split() for path in process_files("stat")]
        ids = [int(path.parent.name) for path in process_files("stat")]
        children: dict[int, list[int]] = {}
        for process_id, fields in zip(ids, table, strict=False):
            children.setdefault(int(fields[1]), []).append(process_id)
        servers = [own for own in children.get(self.process.pid, []) if children.get(own)]
        return [worker for server in servers for worker in children[server]]

    def end(self, signal_number: int | None = None, timeout_s: float = 240.0) -> int:
        """Sends a signal, if one is given, and waits for the end; gives the exit status."""
        if signal_number is not None:
            self.process.send_signal(signal_number)
        return self.process.wait(timeout_s)


def process_files(name: str) -> list[Path]:
    """A file of each process of this user that is still there."""
    found = []
    for path in Path("/proc").glob(f"[0-9]*/{name}"):
        try:
            path.read_text()
        except OSError:
            continue
        found.append(path)
    return found


def storm(
    folder: Path, script: str, options: list[str], kills: int, seed: int, short_games: bool = True
) -> list[tuple[float, str]]:
    """Kills a run at random instants and goes on with it, until it has been killed so often and has ended.

    A run that ends before is followed by another; it must come out like the one before. Gives for each kill
    the seconds it had and the last line it had printed.
    """
    rng, done = random.Random(seed), []
    attempt = 0
    options = [*options, "--checkpoint-interval", "0.3", "--resume", "auto"]
    while True:
        command = Command(folder / f"run-{attempt}", script, *options, short_games=short_games)
        start = time.monotonic()
        if len(done) < kills and command.wait_for_checkpoints(rng.randint(1, 4)):
            time.sleep(rng.uniform(0, 0.5))  # the instant
            if command.process.poll() is None and command.end(signal.SIGKILL) == KILLED:
                lines = [line for line in command.output.splitlines() if line.strip()]
                done.append((time.monotonic() - start, lines[-1] if lines else ""))
                continue
        status = command.end()
        if status != 0:
            raise RuntimeError(f"exit status {status}:\n{command.output}")
        attempt += 1
        if len(done) >= kills:
            return done


# ------------------------------------------------------------------------- runs that need hardly any time


class Server:
    """A process that has imported a script and forks a run of it whenever one is asked for.

    The runs have small networks, play in their own process, and can be killed at an exact instant: before or
    after one of the calls that change a file or see it onto the disk. A kill before a file is on the disk
    leaves half of it.
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
        """Gives the exit status, how many instants it saw, and what it printed.

        Args:
            folder: where it runs.
            options: of the script, beside the tiny ones.
            kill_at: the instant at which it is killed.
            full_disk: while it sees these instants, from the first until before the last, the disk is full.
        """
        folder.mkdir(parents=True, exist_ok=True)
        options = [*tiny_options(self.script), "--checkpoint-interval", "1e-9", *options]
        request = {
            "folder": str(folder.resolve()),
            "options": options,
            "kill_at": kill_at,
            "full_disk": full_disk,
        }
        print(json.dumps(request), file=self.process.stdin)
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
    module = import_script(script)
    simplify(module)
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
    module: Any, folder: str, options: list[str], kill_at: int | None, full_disk: tuple[int, int] | None
) -> int:
    import traceback

    os.chdir(folder)
    output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    Path("instants").unlink(missing_ok=True)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = [module.__name__, *options]
    instants = Instants(kill_at, full_disk)
    status = 0
    try:
        module.exit_on_ctrl_c()
        module.main(module.parse_arguments(module.Args))
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
        for name in ("replace", "unlink", "mkdir", "rmdir"):
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
        if "events." in name:
            return
        if self.full_disk and self.full_disk[0] <= self.number < self.full_disk[1]:
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


def import_script(script: str) -> Any:
    return importlib.import_module(f"cleanrl.{script}")


def shorten_games(module: Any) -> None:
    """Cuts off the evaluation's games."""
    module.evaluate = functools.partial(module.evaluate, max_game_frames=GAME_FRAMES)
    module.LOSS_INTERVAL, module.CHART_INTERVAL = 5, 10


def simplify(module: Any) -> None:
    """Has a PyTorch script learn with small networks, on one core, and play in its own process."""
    import torch

    from cleanrl.utils import evaluation
    from cleanrl.utils.games.env_state import get_state, set_state
    from cleanrl.utils.games.parallel_envs import IDLE, FinishedGame, ParallelEnvs

    class SmallNetwork(torch.nn.Module):
        """Its Q-values tell every pixel and every action apart, more or less."""

        def __init__(self, num_actions: int, dense_width: int = 0):
            super().__init__()
            self.pool = torch.nn.AvgPool2d(12)
            self.linear = torch.nn.Linear(4 * 7 * 7, num_actions)

        def forward(self, observations: torch.Tensor) -> torch.Tensor:
            return self.linear(self.pool(observations / 255.0).flatten(1))

    class EnvsInThisProcess(ParallelEnvs):
        def __init__(self, env_fns: list, num_workers: int | None = None, probe_fn: Any = None):
            self.envs = [env_fn() for env_fn in env_fns]
            self.num_envs = len(env_fns)
            self.observation_space = self.envs[0].observation_space
            self.action_space = self.envs[0].action_space
            stacked = np.zeros((self.num_envs, *self.observation_space.shape), np.uint8)
            rewards, ends = np.zeros(self.num_envs, np.float32), np.zeros(self.num_envs, bool)
            self._arrays = [stacked, rewards, ends, ends.copy(), stacked.copy()]

        def _send(self, command: str, arguments: list) -> None:
            self.answer: list = []
            observations, rewards, terminations, truncations, final_observations = self._arrays
            for index, env in enumerate(self.envs):
                if command == "get_states":
                    self.answer.append((index, get_state(env)))
                elif command == "set_states":
                    env.reset()
                    set_state(env, arguments[index]["env"])
                    observations[index] = arguments[index]["observation"]
                elif command == "reset":
                    observations[index], _ = env.reset(seed=arguments[index])
                elif arguments[index] != IDLE:
                    observation, reward, terminated, truncated, _ = env.step(arguments[index])
                    if terminated or truncated:
                        final_observations[index] = observation
                        observation, info = env.reset()
                        if "episode" in info:
                            game = info["episode"]
                            self.answer.append(FinishedGame(index, game["r"], game["l"]))
                    observations[index], rewards[index] = observation, reward
                    terminations[index], truncations[index] = terminated, truncated

        def _receive(self) -> list:
            return self.answer

        def close(self) -> None:
            for env in self.envs:
                env.close()

    torch.set_num_threads(1)
    shorten_games(module)
    module.LOSS_INTERVAL = 1
    module.ParallelEnvs = evaluation.ParallelEnvs = EnvsInThisProcess
    if hasattr(module, "StudentNetwork"):
        torch.manual_seed(0)
        teacher = SmallNetwork(6).requires_grad_(False)
        module.StudentNetwork = SmallNetwork
        module.load_teacher = lambda args, num_actions, device: teacher
    else:
        module.QNetwork = SmallNetwork


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        the_script = import_script(sys.argv.pop(1))
        shorten_games(the_script)
        the_script.exit_on_ctrl_c()
        the_script.main(the_script.parse_arguments(the_script.Args))
