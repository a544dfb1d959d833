"""What a checkpoint costs with a full replay buffer:  python tests/benchmarks/checkpoint_cost.py

Fills the buffer with real frames of a game played at random: 20,000 steps, again and again, too far apart for
the compression to notice. Prints the time and the disk space of the first checkpoint, which holds all of the
buffer, and of those that add the steps of 10 minutes; and the time to read it back.
"""

import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cleanrl.qdagger_dqn_atari_impalacnn import make_env
from cleanrl.utils.games.parallel_envs import ParallelEnvs
from cleanrl.utils.replay.frames_torch import TorchFrames
from cleanrl.utils.replay.ring import ReplayBuffer
from cleanrl.utils.run.checkpoint import CheckpointWriter, newest_checkpoint

NUM_ENVS = 8


@dataclass
class Args:
    env_id: str = "PongNoFrameskip-v4"
    """the game"""
    frames: int = 1_000_000
    """frames in the buffer"""
    played_steps: int = 20_000
    """steps that are really played"""
    steps_in_10_minutes: int = 18_000
    """steps between two checkpoints"""


def play(args: Args) -> list[tuple]:
    rng = np.random.default_rng(0)
    with ParallelEnvs([partial(make_env, args.env_id)] * NUM_ENVS) as envs:
        steps = [envs.reset(0)]
        for _ in range(args.played_steps // NUM_ENVS):
            actions = rng.integers(envs.action_space.n, size=NUM_ENVS)
            envs.step_async(actions)
            steps.append((actions, envs.step_wait()))
    return steps


def main(args: Args) -> None:
    num_actions = int(make_env(args.env_id).action_space.n)
    observations, *steps = play(args)

    def make_frames(num_slots: int) -> TorchFrames:
        return TorchFrames(num_slots, torch.device("cpu"))

    replay = ReplayBuffer(args.frames, NUM_ENVS, make_frames, num_actions)
    replay.start(observations)
    rng = np.random.default_rng(1)

    def add(number: int) -> None:
        for index in range(number // NUM_ENVS):
            q_values = rng.normal(size=(NUM_ENVS, num_actions)).astype(np.float32)
            replay.add(*steps[index % len(steps)], q_values)

    add(args.frames)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "checkpoints").mkdir()
        writer = CheckpointWriter(folder, resumed=None)

        def save(what: str) -> None:
            before, start = size(folder), time.perf_counter()
            writer.save("cost", {}, {}, {"replay": replay})
            seconds, num_bytes = time.perf_counter() - start, size(folder) - before
            print(f"{what}: {seconds:.1f} s, {num_bytes / 1e6:.0f} MB")

        save(f"the whole buffer, {args.frames:,} frames")
        for _ in range(2):
            add(args.steps_in_10_minutes)
            save(f"{args.steps_in_10_minutes:,} steps more")
        start = time.perf_counter()
        newest_checkpoint(folder).restore_replay("replay", replay)
        print(f"read back: {time.perf_counter() - start:.1f} s; on the disk: {size(folder) / 1e6:.0f} MB")


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main(tyro.cli(Args))
