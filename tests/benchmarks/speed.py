"""Measures both scripts side by side, phase by phase:  python tests/benchmarks/speed.py [--rounds 3]

Each measurement is a process of its own, as PyTorch and JAX would take the cores from each other. It calls
the script's own phase twice: first for a few steps, so that all is compiled and warm, then for those that
count. The rounds are interleaved, so that whatever else the machine does falls on both alike; the table shows
medians.
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cleanrl.utils.evaluation import evaluate
from cleanrl.utils.parallel_envs import ParallelEnvs

TEACHER = Path(__file__).resolve().parents[2] / "cleanrl/teachers/PongNoFrameskip-v4.safetensors"
SCRIPTS = {"torch": "qdagger_dqn_atari_impalacnn", "jax": "qdagger_dqn_atari_jax_impalacnn"}
NUM_ACTIONS = 6  # of Pong
GAMES = 16
PHASES = {  # unit; steps before the clock starts; steps that count, on a CPU and on a GPU
    "fill": ("steps/s", 400, 6_000, 50_000),
    "offline": ("gradient steps/s", 10, 60, 10_000),
    "online": ("steps/s", 96, 400, 40_000),
    "evaluation": ("steps/s", 400, 6_000, 50_000),
}


class NoWriter:
    def add_scalar(self, *_: Any) -> None:
        pass


def phases_of(
    framework: str, script: ModuleType, args: Any, envs: ParallelEnvs
) -> dict[str, Callable[[int], None]]:
    """The script's phases as functions of a number of steps."""
    if framework == "torch":
        import torch

        device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
        make_replay, on_device = script.ReplayBuffer, (device,)
    else:
        device = script.choose_device(args)
        make_replay, on_device = script.ReplayBuffer.create, ()
    settings = (args.buffer_size, args.num_envs, NUM_ACTIONS, args.n_step, args.gamma, device)
    teacher = script.load_teacher(args, NUM_ACTIONS, device)
    state = script.create_train_state(args, NUM_ACTIONS, device)
    replay = make_replay(*settings)

    def fill(steps: int) -> None:
        nonlocal replay
        fill_args = replace(args, teacher_steps=steps)
        filled = script.fill_teacher_buffer(fill_args, state, teacher, envs, replay)
        replay = filled or replay  # JAX's takes the place of the one it was given

    def offline(steps: int) -> None:
        offline_args = replace(args, offline_steps=state.offline_step + steps)
        script.train_offline(offline_args, state, replay, NoWriter(), lambda: 0.0)

    def online(steps: int) -> None:
        online_args = replace(args, total_timesteps=state.online_step + steps)
        empty = make_replay(*settings)
        script.train_online(online_args, state, teacher, lambda *_: 1.0, envs, empty, NoWriter())

    def evaluation(steps: int) -> None:
        make_game = partial(script.make_env, args.env_id)
        q_values = partial(script.compute_q_values, teacher, *on_device)
        # games that are all cut off at the same length
        evaluate(make_game, q_values, GAMES, seed=0, epsilon=0.01, max_game_frames=4 * steps // GAMES)

    return {"fill": fill, "offline": offline, "online": online, "evaluation": evaluation}


def measure(framework: str, phase: str) -> float:
    """Steps per second of one phase in one script."""
    script = importlib.import_module(f"cleanrl.{SCRIPTS[framework]}")
    args = script.Args(
        env_id="PongNoFrameskip-v4",
        teacher_model_path=TEACHER,
        buffer_size=60_000,
        learning_starts=0,
        offline_eval_frequency=10**9,
    )
    with ParallelEnvs([partial(script.make_env, args.env_id)] * args.num_envs) as envs:
        phases = phases_of(framework, script, args, envs)
        _, warm_up_steps, steps_on_cpu, steps_on_gpu = PHASES[phase]
        steps = steps_on_gpu if has_gpu() else steps_on_cpu
        phases["fill"](400)
        phases[phase](warm_up_steps)
        start_time = time.perf_counter()
        phases[phase](steps)
        return steps / (time.perf_counter() - start_time)


def has_gpu() -> bool:
    return Path("/proc/driver/nvidia").exists()


def main(
    rounds: int = 3,
    phases: tuple[str, ...] = tuple(PHASES),
    json_path: Path | None = None,
    measured: tuple[str, str] | None = None,
) -> None:
    """Prints a table of both scripts' speeds and their ratio.

    Args:
        rounds: measurements of each phase in each script.
        phases: which of fill, offline, online, evaluation.
        json_path: where to write every single measurement as well.
        measured: framework and phase: print that one speed alone, as the processes do that this one starts.
    """
    if measured:
        print(json.dumps(measure(*measured)))
        return
    speeds: dict[str, dict[str, list[float]]] = {phase: {name: [] for name in SCRIPTS} for phase in phases}
    for _ in range(rounds):
        for phase in phases:
            for framework in SCRIPTS:
                command = [sys.executable, __file__, "--measured", framework, phase]
                quiet = os.environ | {"TQDM_DISABLE": "1"}
                output = subprocess.run(command, check=True, capture_output=True, text=True, env=quiet).stdout
                speeds[phase][framework].append(json.loads(output.splitlines()[-1]))
    print("| phase | PyTorch | JAX | JAX : PyTorch |\n|---|---|---|---|")
    for phase, of_framework in speeds.items():
        torch_speed, jax_speed = (statistics.median(of_framework[name]) for name in SCRIPTS)
        unit = PHASES[phase][0]
        ratio = jax_speed / torch_speed
        print(f"| {phase} | {torch_speed:,.1f} {unit} | {jax_speed:,.1f} {unit} | {ratio:.2f} |")
    if json_path:
        json_path.write_text(json.dumps(speeds, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
