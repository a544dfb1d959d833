"""Measures what a full replay buffer of 1,000,000 frames takes, beside what stacked observations would take.

python tests/benchmarks/replay_memory.py
"""

import sys
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cleanrl.qdagger_dqn_atari_impalacnn import ReplayBuffer

CAPACITY, NUM_ENVS, NUM_ACTIONS = 1_000_000, 8, 18
process = psutil.Process()

before = process.memory_info().rss
replay = ReplayBuffer(CAPACITY, NUM_ENVS, NUM_ACTIONS, n_step=1, gamma=0.99, device=torch.device("cpu"))
for tensor in (replay.frames, replay.stack_depths, replay.actions, replay.rewards, replay.terminations,
               replay.episode_ends, replay.teacher_q_values):  # fmt: skip
    tensor.fill_(1)  # memory counts once it is written to
replay.is_transition.fill(True)
measured = process.memory_info().rss - before
computed = ReplayBuffer.num_bytes(CAPACITY, NUM_ENVS, NUM_ACTIONS, 1)
stacked = CAPACITY * (2 * 4 * 84 * 84 + 8 + 4 + 1)
print(f"measured {measured / 1e9:.2f} GB, computed {computed / 1e9:.2f} GB for {NUM_ACTIONS} actions")
print(f"as stacked observations: {stacked / 1e9:.2f} GB, {stacked / measured:.1f} times as much")
