"""What batches and gradient steps cost:  python tests/benchmarks/batch_cost.py --framework torch|jax

Prints a table with one row: microseconds per batch of 32 transitions, drawn and gathered one at a time or 10
in one call; microseconds to add one step of 8 environments; milliseconds per gradient step with its batch.
Each number is the median of 7 rounds. The buffer holds random frames; episodes are 100 steps long on average.
"""

import importlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cleanrl.utils.games.parallel_envs import StepResult

NUM_ENVS, NUM_ACTIONS, ROUNDS = 8, 6, 7
NUM_STEPS = 100  # different ones, added again and again


def make_steps() -> list[tuple[np.ndarray, StepResult, np.ndarray]]:
    """What `ReplayBuffer.add` takes, of steps of all environments."""
    rng = np.random.default_rng(0)
    steps = []
    for _ in range(NUM_STEPS):
        observations, final_observations = rng.integers(0, 256, (2, NUM_ENVS, 4, 84, 84), np.uint8)
        rewards = rng.integers(-1, 2, NUM_ENVS).astype(np.float32)
        terminations, truncations = rng.random((2, NUM_ENVS)) < 0.005
        step = StepResult(observations, rewards, terminations, truncations, final_observations, [])
        actions = rng.integers(NUM_ACTIONS, size=NUM_ENVS)
        steps.append((actions, step, rng.normal(size=(NUM_ENVS, NUM_ACTIONS)).astype(np.float32)))
    return steps


def seconds_per_call(work: Callable[[], Any], calls: int) -> float:
    """The median of the rounds. What is compiled in the first call, before them, does not count."""
    work()
    seconds = []
    for _ in range(ROUNDS):
        start_time = time.perf_counter()
        for _ in range(calls):
            work()
        seconds.append((time.perf_counter() - start_time) / calls)
    return statistics.median(seconds)


def main(
    framework: Literal["torch", "jax"],
    device: Literal["cpu", "cuda"] = "cpu",
    stored: int = 50_000,
) -> None:
    """Prints the table.

    Args:
        framework: whose frames and gradient steps.
        device: where frames and networks lie.
        stored: frames in the replay buffer, which is full.
    """
    suffix = {"torch": "", "jax": "_jax"}[framework]
    script = importlib.import_module(f"cleanrl.qdagger_dqn_atari{suffix}_impalacnn")
    args = script.Args(num_envs=NUM_ENVS, buffer_size=stored, batch_size=32, cuda=device == "cuda")
    training_device = script.choose_device(args)
    steps = make_steps()

    def wait_for(arrays: Any) -> None:
        if framework == "jax":
            script.jax.block_until_ready(arrays)
        elif device == "cuda":
            script.torch.cuda.synchronize()

    def create_state(n_step: int) -> Any:
        state = script.create_train_state(replace(args, n_step=n_step), NUM_ACTIONS, training_device)
        state.teacher_replay.start(np.zeros_like(steps[0][1].observations))
        for _ in range(stored // (NUM_ENVS * NUM_STEPS) + 1):
            add(state)
        return state

    def add(state: Any) -> None:
        for step in steps:
            state.teacher_replay.add(*step)
        wait_for(state.teacher_replay.frames.frames)

    def sample(state: Any, num_batches: int) -> None:
        replay = state.teacher_replay
        frames, batches = replay.frames.place(
            replay.sample(args.batch_size, state.rng, num_batches), training_device
        )
        wait_for((frames[batches.stacks], frames[batches.next_stacks]))

    def learn(state: Any, coefficients: list[float]) -> None:
        wait_for(script.learn(args, state, state.teacher_replay, coefficients))

    numbers = []
    for n_step in (1, 3):
        state = create_state(n_step)
        for num_batches, calls in ((1, 200), (10, 20)):
            seconds = seconds_per_call(partial(sample, state, num_batches), calls)
            numbers.append(f"{seconds / num_batches * 1e6:,.0f}")
    numbers.append(f"{seconds_per_call(partial(add, state), calls=2) / NUM_STEPS * 1e6:,.0f}")
    coefficients = [1.0] * script.steps_per_call(state)
    seconds = seconds_per_call(partial(learn, state, coefficients), calls=3)
    numbers.append(f"{seconds / len(coefficients) * 1e3:,.1f}")
    print("| | batch, µs | of 10 | n-step 3: batch, µs | of 10 | add, µs | gradient step, ms |")
    print("|---" * 7 + "|")
    print(f"| {framework} | {' | '.join(numbers)} |")


if __name__ == "__main__":
    tyro.cli(main)
