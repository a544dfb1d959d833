"""What only a GPU can show, in one command that needs at most 8 minutes.

python tests/gpu_check.py [--json FILE] [--seconds 470] [--device cpu] [--parts NAME ...]

Needs, beside this repository: torch and jax with CUDA (any version near those of pyproject.toml), flax,
optax, gymnasium, ale-py, numpy, opencv-python-headless, stable-baselines3 (the baseline), tyro, tqdm,
tensorboard, psutil, filelock, safetensors, zstandard, huggingface-hub, imageio-ffmpeg and pillow.

Each part is a process of its own with a time limit of its own, and prints a line of JSON as soon as it ends;
one that fails says why and ends no other. The last part trains dqn_atari.py on Pong for the rest of the time.
On a CPU the parts are shorter, and what needs a GPU is left out.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]

ENV_ID, NUM_ACTIONS, NUM_ENVS = "PongNoFrameskip-v4", 6, 8
TEACHER = ROOT / "cleanrl" / "teachers" / f"{ENV_ID}.safetensors"
TINY = f"--env-id {ENV_ID} --num-envs 2 --learning-starts 200 --total-timesteps 1200 --buffer-size 5000"
TINY_DQN = [*TINY.split(), "--eval-episodes", "1"]
OF_TEACHER = "--teacher-eval-episodes 1 --teacher-steps 1000 --offline-steps 60 --return-normalization random"
TINY_QDAGGER = [*TINY_DQN, *OF_TEACHER.split(), "--teacher-model-path", str(TEACHER)]
LONG_DQN = f"--env-id {ENV_ID} --learning-starts 10000 --buffer-size 500000 --exploration-fraction 0.02"


def check_machine(device: str) -> dict[str, Any]:
    import jax
    import torch

    found = {"torch": torch.__version__, "jax": jax.__version__, "cores": len(os.sched_getaffinity(0))}
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["gpu_gb"] = torch.cuda.get_device_properties(0).total_memory / 1e9
        found["jax_devices"] = str(jax.devices())
    return found


def run_script(name: str, options: list[str], device: str) -> dict[str, Any]:
    """A whole run, in the current folder; returns what it said."""
    command = [sys.executable, str(ROOT / "cleanrl" / f"{name}.py"), *options]
    command += [] if device == "cuda" else ["--no-cuda"]
    process = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TQDM_DISABLE": "1"})
    said = [
        line for line in process.stdout.splitlines() if line.startswith(("training on", "memory:", "final"))
    ]
    warnings = [line for line in process.stderr.splitlines() if line.startswith("warning:")]
    if process.returncode:
        raise RuntimeError(process.stderr[-500:])
    return {"said": said, "warnings": warnings}


# ------------------------------------------------------------------------------- what PyTorch computes


class RandomGames:
    """Stands in for ParallelEnvs: random frames and rewards; a tenth of the steps end an episode."""

    def __init__(self, num_envs: int):
        import numpy as np

        self.num_envs, self.rng = num_envs, np.random.default_rng(0)
        self.observations = self._random_observations()

    def _random_observations(self) -> Any:
        return self.rng.integers(256, size=(self.num_envs, 4, 84, 84), dtype="uint8")

    def step_async(self, actions: Any) -> None:
        assert len(actions) == self.num_envs

    def step_wait(self) -> Any:
        import numpy as np

        from cleanrl.utils.games.parallel_envs import StepResult

        self.observations = self._random_observations()
        rewards = self.rng.choice([-1, 0, 1], self.num_envs).astype(np.float32)
        ends, final = self.rng.random((2, self.num_envs)) < 0.1, self._random_observations()
        return StepResult(self.observations, rewards, *ends, final, [])


class QuietRun:
    """Stands in for TrainingRun: reads and keeps nothing."""

    def __init__(self, games: RandomGames):
        self.games = games

    @contextlib.contextmanager
    def open_envs(self, num_envs: int, seed: Any) -> Iterator[RandomGames]:
        yield self.games

    @contextlib.contextmanager
    def progress(self, *_: Any) -> Iterator["QuietRun"]:
        yield self

    def nothing(self, *_: Any, **__: Any) -> None:
        pass

    checkpoint = plot = plot_game = say = save_model = update = set_postfix = nothing

    def play(self, *_: Any, **__: Any) -> list[float]:
        return [0.0]


def create_torch_state(script_name: str, device: str, **options: Any) -> tuple[Any, Any, Any]:
    """A script, its options, and a state whose replay buffer holds some random steps."""
    import importlib

    import numpy as np

    script = importlib.import_module(f"cleanrl.{script_name}")
    args = script.Args(num_envs=NUM_ENVS, buffer_size=20_000, cuda=device == "cuda", **options)
    state = script.create_train_state(args, NUM_ACTIONS, script.choose_device(args))
    games, replay = RandomGames(NUM_ENVS), getattr(state, "teacher_replay", None) or state.replay
    replay.start(games.observations)
    for _ in range(100):
        q_values = games.rng.normal(size=(NUM_ENVS, NUM_ACTIONS)).astype(np.float32)
        replay.add(games.rng.integers(NUM_ACTIONS, size=NUM_ENVS), games.step_wait(), q_values)
    return script, args, state


def losses_of(script_name: str, device: str, num_steps: int, **options: Any) -> list[list[float]]:
    """The losses of gradient steps between which λ changes and the target network moves."""
    script, args, state = create_torch_state(script_name, device, **options)
    losses = []
    for step in range(num_steps):
        if script_name.startswith("qdagger"):
            of_step = script.learn(args, state, state.teacher_replay, [1 / (1 + step / 9)])
        else:
            of_step = script.learn(args, state, 1)
        losses.append([float(value) for value in of_step.values()])
        if step % 10 == 9:
            script.update_target_network(state, 0.5)
    return losses


def check_graphs_equal_eager(device: str) -> dict[str, Any]:
    """Whether captured gradient steps give the bits of those that are not, and those the same bits twice."""
    import numpy as np

    num_steps, found = (60 if device == "cuda" else 4), {}
    paper = {"n_step": 3, "td_loss": "huber", "final_learning_rate": 1e-5, "distill_weight": 3.0}
    for name, options in (("qdagger_dqn_atari_impalacnn", paper), ("dqn_atari", {})):
        compute = partial(losses_of, name, device, num_steps, **options)
        eager, again, graph, host = (
            compute(cuda_graphs=cuda_graphs, buffer_device=buffer_device)
            for cuda_graphs, buffer_device in (
                (False, "auto"),
                (False, "auto"),
                (True, "auto"),
                (True, "cpu"),
            )
        )
        difference = np.abs(np.array(graph) - np.array(eager)).max()
        found[name] = {
            "eager_equals_eager": eager == again,
            "graph_equals_eager": graph == eager,
            "host_buffer_equals_eager": host == eager,
            "largest_difference": float(difference),
        }
    return found


@contextlib.contextmanager
def waits_are(mode: Literal["error", "default"], device: str) -> Iterator[None]:
    """Within it, what makes the host wait for the GPU is an error, or is not."""
    import torch

    if device == "cpu":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def check_waits(device: str) -> dict[str, Any]:
    """Whether the host waits for the GPU for nothing but actions: everything else is an error here."""
    found: dict[str, Any] = {}
    num_steps = 1600 if device == "cuda" else 80
    for name in ("qdagger_dqn_atari_impalacnn", "dqn_atari"):
        short = {"total_timesteps": num_steps, "learning_starts": num_steps // 2}
        script, args, state = create_torch_state(name, device, **short)
        run, compute_q_values, reads = QuietRun(RandomGames(NUM_ENVS)), script.compute_q_values, []

        def read(*arguments: Any, compute_q_values: Callable = compute_q_values, reads: list = reads) -> Any:
            reads.append(1)
            with waits_are("default", device):
                return compute_q_values(*arguments)

        script.compute_q_values = read
        if name.startswith("qdagger"):
            state.teacher_return = 20.0
            teacher = script.TeacherNetwork(NUM_ACTIONS).to(state.device)
            train = partial(script.train_online, args, state, teacher, run)
        else:
            train = partial(script.train, args, state, run)
        with waits_are("error", device):
            train()
        waits_per_step = sum(reads) / (num_steps / NUM_ENVS)
        found[name] = {"gradient_steps": state.gradient_steps, "waits_per_step": waits_per_step}
        script.compute_q_values = compute_q_values
    return found


# ------------------------------------------------------------------------------------------------ speed

AMOUNTS = {  # of fill, offline and online: environment steps, gradient steps, environment steps
    "cuda": {"baseline": (2_000, 400, 800), "other": (16_000, 3_000, 12_000)},
    "cpu": {"baseline": (400, 3, 16), "other": (400, 4, 16)},
}


def measure_speed(program_name: str, num_envs: int, phases: tuple[str, ...], device: str) -> dict[str, Any]:
    """Environment steps/s of fill and online, gradient steps/s of offline; most memory on the GPU."""
    from programs import Program

    amounts = AMOUNTS[device].get(program_name, AMOUNTS[device]["other"])
    with Program(program_name, device, num_envs) as program:
        named = zip(("fill", "offline", "online"), amounts, strict=True)
        found = {phase: round(program.ask(phase, amount), 1) for phase, amount in named if phase in phases}
        found["startup_s"] = round(program.startup_s, 1)
        if program_name.startswith("torch"):
            found["operators"], found["launches"] = program.ask("update_launches")
            if device == "cuda":
                found["peak_gb"] = program.ask("peak_bytes") / 1e9
        return found


def train_on_pong(seconds: float, device: str) -> dict[str, Any]:
    """The returns of games over steps, as far as dqn_atari.py comes in that time; a checkpoint is left."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    command = [sys.executable, str(ROOT / "cleanrl" / "dqn_atari.py"), *LONG_DQN.split()]
    command += [] if device == "cuda" else ["--no-cuda"]
    process = subprocess.Popen(
        command, env=os.environ | {"TQDM_DISABLE": "1"}, stderr=subprocess.PIPE, text=True
    )
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.terminate()
    errors = process.communicate()[1]
    (folder,) = Path("runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    if "charts/episodic_return" not in events.Tags()["scalars"]:
        raise RuntimeError(f"no game was finished: {errors[-300:]}")
    points = events.Scalars("charts/episodic_return")
    every = max(1, len(points) // 200)
    return {
        "return": [(point.step, point.value) for point in points[::every]],
        "steps_per_s": events.Scalars("charts/SPS")[-1].value,
    }


# ------------------------------------------------------------------------------------------------- parts

Part = tuple[
    float, Callable[[str], dict[str, Any]]
]  # its time limit in seconds, and what it does on a device


def parts_of(device: str) -> dict[str, Part]:
    speeds = {
        f"speed {name}, {num_envs} environments": (limit_s, partial(measure_speed, name, num_envs, phases))
        for name, num_envs, phases, limit_s in [
            ("baseline", 8, ("fill", "offline", "online"), 60),
            ("torch-eager", 8, ("offline", "online"), 60),
            ("torch", 8, ("fill", "offline", "online"), 60),
            ("jax", 8, ("fill", "offline", "online"), 100),
            ("torch", 16, ("online",), 40),
            ("torch", 32, ("online",), 40),
            ("jax", 16, ("online",), 80),
            ("jax", 32, ("online",), 80),
        ]
    }
    return {
        "machine": (60, check_machine),
        "qdagger_dqn_atari_impalacnn": (60, partial(run_script, "qdagger_dqn_atari_impalacnn", TINY_QDAGGER)),
        "dqn_atari": (50, partial(run_script, "dqn_atari", TINY_DQN)),
        "qdagger_dqn_atari_jax_impalacnn": (
            100, partial(run_script, "qdagger_dqn_atari_jax_impalacnn", TINY_QDAGGER)
        ),
        "dqn_atari_jax": (60, partial(run_script, "dqn_atari_jax", TINY_DQN)),
        "graphs": (60, check_graphs_equal_eager),
        "waits": (60, check_waits),
        **speeds,
    }  # fmt: skip


def run_part(name: str, limit_s: float, device: str) -> dict[str, Any]:
    """The part's result, or under "error" why there is none."""
    start_time = time.monotonic()
    command = [sys.executable, str(Path(__file__).resolve()), "--device", device, "--only", name]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [*command, "--seconds", str(limit_s)], cwd=folder, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            output, errors = process.communicate(timeout=limit_s)
            result = (
                json.loads(output.splitlines()[-1]) if process.returncode == 0 else {"error": errors[-500:]}
            )
        except subprocess.TimeoutExpired:
            result = {"error": f"not done after {limit_s:.0f} s"}
        except (IndexError, ValueError):
            result = {"error": f"no result: {errors[-500:]}"}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
    return result | {"seconds": round(time.monotonic() - start_time, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=470, help="for all parts together")
    parser.add_argument(
        "--parts", nargs="+", metavar="NAME", help="only those that begin so; dqn: train on Pong"
    )
    parser.add_argument("--json", type=Path, help="where to write all results")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    parts = parts_of(options.device)
    pong = "train dqn_atari on Pong"
    if options.only:
        if options.only == pong:
            result = train_on_pong(options.seconds - 30, options.device)
        else:
            result = parts[options.only][1](options.device)
        print(json.dumps(result))
        return
    deadline, results = time.monotonic() + options.seconds, {}
    for name in [*parts, pong]:
        if options.parts and not name.startswith(tuple(options.parts)):
            continue
        left_s = deadline - time.monotonic()
        limit_s = left_s if name == pong else min(left_s, parts[name][0])
        if limit_s < (60 if name == pong else 5):
            results[name] = {"error": "no time left"}
        else:
            results[name] = run_part(name, limit_s, options.device)
        print(json.dumps({name: results[name]}), flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
