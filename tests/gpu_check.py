"""What only a GPU can show, in one command that needs at most 8 minutes.

python tests/gpu_check.py [--json FILE] [--seconds 470] [--device cpu] [--parts NAME ...]

Needs, beside this repository: torch and jax with CUDA (any version near those of pyproject.toml), flax,
optax, gymnasium, ale-py, numpy, opencv-python-headless, stable-baselines3 (the baseline), tyro, tqdm,
tensorboard, psutil, filelock, safetensors, zstandard, huggingface-hub, imageio-ffmpeg and pillow.

Each part is a process of its own with a time limit of its own, and prints a line of JSON as soon as it ends;
one that fails says why and ends no other. What is wrong stands under "error" or "problems", and the exit
status is then 1. On a CPU the parts are shorter, and what needs a GPU is left out.
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
PONG, PONG_S = "train dqn_atari on Pong", 100
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
    return {"said": said, "problems": warnings}


# ------------------------------------------------------------------------------- what PyTorch computes


class RandomGames:
    """Stands in for ParallelEnvs: random frames and rewards; a tenth of the steps end an episode."""

    def __init__(self, num_envs: int):
        import numpy as np

        self.num_envs, self.rng = num_envs, np.random.default_rng(0)
        self.observations = np.zeros(
            (num_envs, 4, 84, 84), np.uint8
        )  # one frame four times, as after a reset

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


def create_state(script_name: str, device: str, **options: Any) -> tuple[Any, Any, Any]:
    """A script, its options, and a state whose replay buffer holds some random steps."""
    import importlib

    import numpy as np

    script = importlib.import_module(f"cleanrl.{script_name}")
    args = script.Args(num_envs=NUM_ENVS, buffer_size=20_000, cuda=device == "cuda", **options)
    if device == "cpu" and "jax" in script_name:  # also in a process that has used the GPU
        import jax

        chosen = jax.devices("cpu")[0]
    else:
        chosen = script.choose_device(args)
    state = script.create_train_state(args, NUM_ACTIONS, chosen)
    games, replay = RandomGames(NUM_ENVS), getattr(state, "teacher_replay", None) or state.replay
    replay.start(games.observations)
    for _ in range(100):
        q_values = games.rng.normal(size=(NUM_ENVS, NUM_ACTIONS)).astype(np.float32)
        replay.add(games.rng.integers(NUM_ACTIONS, size=NUM_ENVS), games.step_wait(), q_values)
    return script, args, state


def losses_of(
    script_name: str, device: str, num_steps: int, restore_at: int | None = None, **options: Any
) -> list[list[float]]:
    """The losses of gradient steps between which λ changes and the target network moves.

    Before the step `restore_at` a new state takes over all that a checkpoint keeps of the old one.
    """
    import numpy as np

    from cleanrl.utils.run.state import capture, restore
    from cleanrl.utils.storage import pack, unpack

    script, args, state = create_state(script_name, device, **options)
    losses = []
    for step in range(num_steps):
        if step == restore_at:
            before, state = state, create_state(script_name, device, **options)[2]
            restore(state, unpack(pack(capture(before))))
        if script_name.startswith("qdagger"):
            of_step = script.learn(args, state, state.teacher_replay, [1 / (1 + step / 9)])
        else:
            of_step = script.learn(args, state, 1)
        losses.append([float(value) for value in of_step.values()])
        if step % 10 == 9:
            script.update_target_network(state, 0.5)
    if not np.isfinite(losses).all():
        raise RuntimeError(f"a loss is not finite: {losses[-1]}")
    if "jax" not in script_name and options.get("cuda_graphs", True):
        check_captured(script, device)
    return losses


def check_captured(script: Any, device: str) -> None:
    """Raises RuntimeError if gradient steps were not launched as a CUDA graph on a GPU."""
    from cleanrl.utils.gpu_torch import OneLaunch

    if device == "cuda" and not (OneLaunch.enabled and script.update.graph.graph):
        raise RuntimeError("gradient steps were not captured; the warning on standard error says why")


PAPER = {"n_step": 3, "td_loss": "huber", "final_learning_rate": 1e-5, "distill_weight": 3.0}


def check_gradient_steps(script_name: str, device: str) -> dict[str, Any]:
    """Whether they give the same bits twice, as a CUDA graph or not, from host memory or not, and after a
    restart; and, but for roundings, the numbers of a CPU.
    """
    import numpy as np

    num_steps = 60 if device == "cuda" else 4
    options = PAPER if script_name.startswith("qdagger") else {}
    compute = partial(losses_of, script_name, device, num_steps, **options)
    first = compute()
    others = {
        "again": compute(),
        "buffer in host memory": compute(buffer_device="cpu"),
        "restored": compute(restore_at=num_steps // 2),
    }
    if "jax" not in script_name:  # whose graphs are XLA's own
        others["without graphs"] = compute(cuda_graphs=False)
    on_cpu = np.array(losses_of(script_name, "cpu", 4, **options))
    # On a GPU convolutions round their factors to TF32, to 10 bits.
    is_close = np.allclose(first[:4], on_cpu, rtol=0.02, atol=1e-3)
    return {
        "largest_difference_from_cpu": float(np.abs(np.array(first[:4]) - on_cpu).max()),
        "problems": [f"{name}: other bits" for name, losses in others.items() if losses != first]
        + ([] if is_close else [f"other numbers than on a CPU: {first[:4]}, {on_cpu.tolist()}"]),
    }


def check_frames(device: str) -> dict[str, Any]:
    """Whether frames of a buffer of more than 2 · 2^31 bytes are where they were written."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax
    import numpy as np
    import torch

    from cleanrl.utils.gpu_torch import OneLaunch
    from cleanrl.utils.replay.frames_jax import JaxFrames
    from cleanrl.utils.replay.frames_torch import TorchFrames

    num_slots = 640_000 if device == "cuda" else 1000
    most = min(num_slots, 2**31 // 84**2)
    slots = np.unique(np.array([0, 1, most - 1, most, most + 1, 2 * most, num_slots - 1]) % num_slots)
    written = np.random.default_rng(0).integers(256, size=(len(slots), 84, 84), dtype="uint8")
    problems = []

    def check(frames: Any, gather: Callable) -> None:
        frames.write(slots, written)
        for _ in range(5):  # then it is captured
            gathered = gather(frames.frames, slots)
        if not np.array_equal(np.asarray(gathered.cpu() if hasattr(gathered, "cpu") else gathered), written):
            problems.append(f"{type(frames).__name__}: other frames were gathered")
        if not np.array_equal(frames.read(slots), written):
            problems.append(f"{type(frames).__name__}: other frames were read")

    # One after the other: a small GPU has room for one such buffer.
    check(TorchFrames(num_slots, torch.device(device)), OneLaunch(lambda frames, slots: frames[slots]))
    torch.cuda.empty_cache()
    check(JaxFrames(num_slots, jax.devices()[0]), jax.jit(lambda frames, slots: frames[slots]))
    return {"problems": problems}


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
    from cleanrl.utils.gpu_torch import CudaGraph

    found: dict[str, Any] = {"problems": []}
    num_steps = 1600 if device == "cuda" else 80
    call_graph = CudaGraph.__call__

    def call_or_capture(graph: CudaGraph) -> Any:
        with waits_are("default", device) if graph.graph is None else contextlib.nullcontext():
            return call_graph(graph)  # to begin a capture waits

    CudaGraph.__call__ = call_or_capture
    for name in ("qdagger_dqn_atari_impalacnn", "dqn_atari"):
        short = {"total_timesteps": num_steps, "learning_starts": num_steps // 2}
        script, args, state = create_state(name, device, **short)
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
        check_captured(script, device)
        waits_per_step = sum(reads) / (num_steps / NUM_ENVS)
        found[name] = {"gradient_steps": state.gradient_steps, "waits_per_step": waits_per_step}
        if found[name] != {"gradient_steps": num_steps // 8, "waits_per_step": 1.0}:
            found["problems"].append(f"{name}: not a wait per step of all environments")
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
        if program_name == "torch" and device == "cuda" and not program.ask("is_captured"):
            found["problems"] = ["gradient steps were not captured"]
        if program_name.startswith("torch"):
            found["operators"], found["launches"] = program.ask("update_launches")
            if device == "cuda":
                found["peak_gb"] = program.ask("peak_bytes") / 1e9
        return found


def train_on_pong(seconds: float, device: str) -> dict[str, Any]:
    """The returns of games over steps, as far as dqn_atari.py comes in that time; for the last part of it the
    run is stopped and resumed.
    """
    resumed_for = 25.0
    options = LONG_DQN.split() if device == "cuda" else [*LONG_DQN.split(), "--no-cuda"]
    errors = train_for(seconds - resumed_for, options)
    (folder,) = Path("runs").iterdir()
    points, speed = returns_in(folder)
    errors += train_for(resumed_for, ["--resume", str(folder)])
    resumed_points, _ = returns_in(folder)
    problems = [line for line in errors.splitlines() if line.startswith(("warning:", "error:"))]
    if resumed_points[: len(points)] != points or resumed_points[-1][0] <= points[-1][0]:
        problems.append("the run was not continued where it was stopped")
    every = max(1, len(points) // 200)
    return {"return": points[::every], "steps_per_s": speed, "problems": problems}


def train_for(seconds: float, options: list[str]) -> str:
    """What dqn_atari.py says on standard error, until it is stopped after that time."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "cleanrl" / "dqn_atari.py"), *options],
        env=os.environ | {"TQDM_DISABLE": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.terminate()
    return process.communicate()[1]


def returns_in(folder: Path) -> tuple[list[tuple[int, float]], float]:
    """Step and return of each game of a run, and its newest speed in steps/s."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    if "charts/episodic_return" not in events.Tags()["scalars"]:
        raise RuntimeError("no game was finished")
    points = [(event.step, event.value) for event in events.Scalars("charts/episodic_return")]
    return points, events.Scalars("charts/SPS")[-1].value


# ------------------------------------------------------------------------------------------------- parts

Part = tuple[
    float, Callable[[str], dict[str, Any]]
]  # its time limit in seconds, and what it does on a device


def parts_of(device: str) -> dict[str, Part]:
    speeds = {
        f"speed {name}, {num_envs} environments": (limit_s, partial(measure_speed, name, num_envs, phases))
        for name, num_envs, phases, limit_s in [
            ("torch", 8, ("fill", "offline", "online"), 60),
            ("jax", 8, ("fill", "offline", "online"), 100),
            ("torch-eager", 8, ("offline", "online"), 60),
            ("torch", 16, ("online",), 40),
            ("jax", 16, ("online",), 80),
            ("baseline", 8, ("fill", "offline", "online"), 60),
            ("torch", 32, ("online",), 40),
            ("jax-autotuned", 8, ("offline",), 80),
        ]
    }
    gradient_steps = {
        f"gradient steps of {name}": (60, partial(check_gradient_steps, name))
        for name in (
            "qdagger_dqn_atari_impalacnn",
            "dqn_atari",
            "qdagger_dqn_atari_jax_impalacnn",
            "dqn_atari_jax",
        )
    }
    return {
        "machine": (60, check_machine),
        **gradient_steps,
        "waits": (60, check_waits),
        "frames": (60, check_frames),
        "qdagger_dqn_atari_impalacnn": (60, partial(run_script, "qdagger_dqn_atari_impalacnn", TINY_QDAGGER)),
        "dqn_atari": (50, partial(run_script, "dqn_atari", TINY_DQN)),
        "qdagger_dqn_atari_jax_impalacnn": (
            100, partial(run_script, "qdagger_dqn_atari_jax_impalacnn", TINY_QDAGGER)
        ),
        "dqn_atari_jax": (60, partial(run_script, "dqn_atari_jax", TINY_DQN)),
        PONG: (PONG_S, lambda device: train_on_pong(PONG_S - 30, device)),
        **speeds,
    }  # fmt: skip


# What JAX compiles serves all parts.
CACHE = {
    "JAX_COMPILATION_CACHE_DIR": os.path.join(tempfile.gettempdir(), "gpu-check-jax-cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


def run_part(name: str, limit_s: float, device: str) -> dict[str, Any]:
    """The part's result, or under "error" why there is none."""
    start_time = time.monotonic()
    command = [sys.executable, str(Path(__file__).resolve()), "--device", device, "--only", name]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command, cwd=folder, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | CACHE,
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
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="only those that begin so")
    parser.add_argument("--json", type=Path, help="where to write all results")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    parts = parts_of(options.device)
    if options.only:
        print(json.dumps(parts[options.only][1](options.device)))
        return
    deadline, results = time.monotonic() + options.seconds, {}
    for name, (limit_s, _) in parts.items():
        if options.parts and not name.startswith(tuple(options.parts)):
            continue
        left_s = deadline - time.monotonic()
        if left_s < min(limit_s, 20):
            results[name] = {"error": "no time left"}
        else:
            results[name] = run_part(name, min(left_s, limit_s), options.device)
        print(json.dumps({name: results[name]}), flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    if any(result.get("error") or result.get("problems") for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
