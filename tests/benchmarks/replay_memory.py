"""Measures what a full replay buffer takes, beside what stacked observations would take.

python tests/benchmarks/replay_memory.py [--frames 1000000]
"""

import sys
from pathlib import Path

import psutil
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cleanrl.qdagger_dqn_atari_impalacnn import ReplayBuffer

NUM_ENVS, NUM_ACTIONS = 8, 18


def main(frames: int = 1_000_000) -> None:
    """Prints gigabytes (10⁹ bytes), measured and computed.

    Args:
        frames: that the buffer holds.
    """
    process = psutil.Process()
    before = process.memory_info().rss
    replay = ReplayBuffer(frames, NUM_ENVS, NUM_ACTIONS, n_step=1, gamma=0.99, device=torch.device("cpu"))
    for tensor in (replay.frames, replay.stack_depths, replay.actions, replay.rewards, replay.terminations,
                   replay.episode_ends, replay.teacher_q_values):  # fmt: skip
        tensor.fill_(1)  # memory counts once it is written to
    replay.is_transition.fill(True)
    measured = process.memory_info().rss - before
    computed = ReplayBuffer.num_bytes(frames, NUM_ENVS, NUM_ACTIONS, 1)
    stacked = frames * (2 * 4 * 84 * 84 + 8 + 4 + 1)
    print(f"measured {measured / 1e9:.2f} GB, computed {computed / 1e9:.2f} GB for {NUM_ACTIONS} actions")
    print(f"as stacked observations: {stacked / 1e9:.2f} GB, {stacked / measured:.1f} times as much")


if __name__ == "__main__":
    tyro.cli(main)
