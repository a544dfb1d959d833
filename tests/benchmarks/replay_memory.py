"""Measures the memory of a full replay buffer, and compares it with stacked observations.

python tests/benchmarks/replay_memory.py [--frames 1000000]
"""

import sys
from pathlib import Path

import psutil
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cleanrl.utils.replay.frames_torch import TorchFrames
from cleanrl.utils.replay.ring import ReplayBuffer

NUM_ENVS, NUM_ACTIONS = 8, 18


def main(frames: int = 1_000_000) -> None:
    """Prints gigabytes (10⁹ bytes), measured and computed.

    Args:
        frames: that the buffer holds.
    """
    process = psutil.Process()
    before = process.memory_info().rss
    replay = ReplayBuffer(
        frames, NUM_ENVS, lambda num_slots: TorchFrames(num_slots, torch.device("cpu")), NUM_ACTIONS
    )
    replay.allocate()
    for array in (replay.frames.frames.numpy(), *replay.columns.values()):
        array.fill(1)  # memory counts once it is written to
    measured, computed = process.memory_info().rss - before, replay.num_bytes
    stacked = frames * (2 * 4 * 84 * 84 + 8 + 4 + 1)
    print(f"measured {measured / 1e9:.2f} GB, computed {computed / 1e9:.2f} GB for {NUM_ACTIONS} actions")
    print(f"as stacked observations: {stacked / 1e9:.2f} GB, {stacked / measured:.1f} times as much")


if __name__ == "__main__":
    tyro.cli(main)
