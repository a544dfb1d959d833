"""The replay buffers of both scripts under one interface, which speaks NumPy."""

import jax
import numpy as np
import torch

from cleanrl import qdagger_dqn_atari_impalacnn as torch_script
from cleanrl import qdagger_dqn_atari_jax_impalacnn as jax_script
from cleanrl.utils.games.parallel_envs import StepResult


class TorchReplay:
    script = torch_script
    integer = np.int64  # of drawn slots and gathered actions

    def __init__(self, capacity: int, num_envs: int, num_actions: int, n_step: int, gamma: float):
        self.num_envs = num_envs
        self.buffer = torch_script.ReplayBuffer(
            capacity, num_envs, num_actions, n_step, gamma, torch.device("cpu")
        )

    @property
    def num_slots(self) -> int:
        return self.buffer.num_slots

    def start(self, observations: np.ndarray) -> None:
        self.buffer.start(observations)

    def add(self, actions: np.ndarray, step: StepResult, teacher_q_values: np.ndarray) -> None:
        self.buffer.add(actions, step, teacher_q_values)

    def drawable_per_env(self) -> np.ndarray:
        return self.buffer._drawable_per_env()

    def draw(self, batch_size: int, seed: int) -> np.ndarray:
        return self.buffer.draw(batch_size, np.random.default_rng(seed))

    def gather(self, slots: np.ndarray) -> torch_script.Batch:
        return torch_script.Batch(*(values.numpy() for values in self.buffer.gather(torch.from_numpy(slots))))

    def bytes_taken(self) -> int:
        return sum(values.nbytes for values in vars(self.buffer).values() if hasattr(values, "nbytes"))


# As in the script, compiled; once for every size of buffer and batch, which takes seconds.
jax_draw = jax.jit(jax_script.ReplayBuffer.draw, static_argnames="batch_size")
jax_gather = jax.jit(jax_script.ReplayBuffer.gather)


class JaxReplay:
    script = jax_script
    integer = np.int32

    def __init__(self, capacity: int, num_envs: int, num_actions: int, n_step: int, gamma: float):
        self.num_envs = num_envs
        self.buffer = jax_script.ReplayBuffer.create(
            capacity, num_envs, num_actions, n_step, gamma, jax.devices("cpu")[0]
        )

    @property
    def num_slots(self) -> int:
        return self.buffer.num_slots

    def start(self, observations: np.ndarray) -> None:
        self.buffer = self.buffer.start(observations)

    def add(self, actions: np.ndarray, step: StepResult, teacher_q_values: np.ndarray) -> None:
        self.buffer = self.buffer.add(actions, step, teacher_q_values)

    def drawable_per_env(self) -> np.ndarray:
        return np.asarray(self.buffer._drawable_per_env())

    def draw(self, batch_size: int, seed: int) -> np.ndarray:
        return np.asarray(jax_draw(self.buffer, jax.random.key(seed), batch_size))

    def gather(self, slots: np.ndarray) -> jax_script.Batch:
        return jax_script.Batch(*(np.asarray(values) for values in jax_gather(self.buffer, slots)))

    def bytes_taken(self) -> int:
        return sum(values.nbytes for values in jax.tree.leaves(self.buffer))


Replay = TorchReplay | JaxReplay
