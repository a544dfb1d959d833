"""The replay buffer of every script: each frame once, in a ring of slots per environment.

All but the frames lies in NumPy arrays on the host, so that drawing never waits for a device.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from cleanrl.utils.games.parallel_envs import StepResult

# Every end of an episode comes after a transition, so at least half of all draws hit a transition.
MOST_DRAWS = 1000


class Frames(Protocol):
    """Frames uint8 (84, 84) by slot, in the memory of one device: the only part that knows a framework."""

    def write(self, slots: np.ndarray, frames: np.ndarray) -> None:
        """Puts `frames` (n, 84, 84) into `slots`, integers (n,), each of them once."""

    def read(self, slots: np.ndarray) -> np.ndarray:
        """Those at `slots`, integers (...): a NumPy array (..., 84, 84)."""

    def place(self, batch: "Batch", device: Any) -> tuple[Any, "Batch"]:
        """All frames, or a copy of the batch's own, on a device; and the batch, with its stacks in them."""


class Batch(NamedTuple):
    """Transitions: of one batch, where (...) is (batch,), or of k batches, where it is (k, batch).

    An observation is `frames[stacks]`, uint8 (..., 4, 84, 84): see `Frames.place`. `rewards` are discounted
    sums of up to n steps, `discounts` γ to the power of the steps summed, `next_stacks` the observations
    after them, `terminations` 1 where the episode terminated there.
    """

    stacks: np.ndarray  # int64 (..., 4): where each observation's frames lie, oldest first
    actions: np.ndarray  # int64 (...)
    rewards: np.ndarray  # float32 (...)
    next_stacks: np.ndarray  # int64 (..., 4)
    terminations: np.ndarray  # float32 (...)
    discounts: np.ndarray  # float32 (...)
    teacher_q_values: np.ndarray | None = None  # float32 (..., num_actions), if the buffer keeps some

    def at(self, index: int) -> "Batch":
        """One of k batches."""
        return Batch(*(None if column is None else column[index] for column in self))


COLUMNS = {  # of a slot, besides its frame and Q-values
    "stack_depths": np.uint8,  # earlier frames of the same episode in the observation's stack, at most 3
    "actions": np.uint8,
    "rewards": np.float32,
    "terminations": np.bool_,
    "episode_ends": np.bool_,
    "is_transition": np.bool_,
}


class ReplayBuffer:
    """Keeps each frame once, in a ring of slots per environment.

    A slot holds an observation's newest frame, how many earlier frames its stack reaches back to, Q-values of
    the observation that never change (a teacher's), and what followed: action, reward, whether the episode
    ended. The observation that ends an episode has a slot too, but no action.

    Contract: `draw` gives every transition in the buffer the same probability, except that the newest n - 1
    slots of each environment wait until their n rewards are known. No stack reaches across the start of an
    episode or into overwritten slots; spare slots ensure that this costs no transitions. A sum of n rewards
    ends with its episode. A truncated episode is bootstrapped from its true last observation.

    It holds no memory before `start` or `allocate`, and none after `free`.

    Args:
        capacity: slots over all environments; the oldest are overwritten.
        num_envs: environments that are added together.
        make_frames: makes the `Frames` for a number of slots.
        num_q_values: Q-values kept with each observation.
        n_step: n, rewards summed before the bootstrap.
        gamma: γ, the discount factor.
        num_actions: rows from files must have lower actions.
    """

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        make_frames: Callable[[int], Frames],
        num_q_values: int = 0,
        n_step: int = 1,
        gamma: float = 0.99,
        num_actions: int = 256,
    ):
        self.num_envs, self.num_q_values, self.n_step, self.gamma = num_envs, num_q_values, n_step, gamma
        self.num_actions = num_actions
        # At least 2, of which one is a transition. Spare: 3 for the oldest stack, n before the current one.
        self.num_slots = max(2, math.ceil(capacity / num_envs)) + 3 + n_step
        self.capacity, self._make_frames = capacity, make_frames
        self.free()

    @property
    def num_bytes(self) -> int:
        """Of all frames, columns and Q-values, once they are allocated."""
        of_columns = sum(np.dtype(dtype).itemsize for dtype in COLUMNS.values())
        return self.num_envs * self.num_slots * (84 * 84 + of_columns + 4 * self.num_q_values)

    def allocate(self) -> None:
        total = self.num_envs * self.num_slots
        self.frames = self._make_frames(total)
        self.columns = {name: np.zeros(total, dtype) for name, dtype in COLUMNS.items()}
        if self.num_q_values:
            self.columns["teacher_q_values"] = np.zeros((total, self.num_q_values), np.float32)

    def free(self) -> None:
        self.frames: Frames | None = None
        self.columns: dict[str, np.ndarray] = {}
        self.heads = np.zeros(self.num_envs, np.int64)  # positions of the current observations, ever growing

    def start(self, observations: np.ndarray) -> None:
        """Takes the first observations, uint8 (num_envs, 4, 84, 84), unless it holds them already.

        Raises:
            SystemExit: with a one-line error, if they are not one frame four times, as after a reset; for
                `sample` rebuilds observations from the newest frames.
        """
        if self.frames is None:
            if (observations != observations[:, -1:]).any():
                raise SystemExit(
                    "error: after a reset, an observation must be one frame four times: the replay buffer"
                    " stores only the newest; undo the change to make_env"
                )
            self.allocate()
            self._observe(np.arange(self.num_envs), observations, depths=0)

    def add(self, actions: np.ndarray, step: StepResult, q_values: np.ndarray | None = None) -> None:
        """Adds one step of every environment.

        Args:
            actions: integers (num_envs,), taken from the current observations.
            step: what the environments answered.
            q_values: float32 (num_envs, num_q_values), of the observations that were acted on.
        """
        slots = self._slots(np.arange(self.num_envs), self.heads)
        ended = step.terminations | step.truncations
        columns = self.columns
        columns["actions"][slots] = actions
        columns["rewards"][slots] = step.rewards
        columns["terminations"][slots] = step.terminations
        columns["episode_ends"][slots] = ended
        columns["is_transition"][slots] = True
        if self.num_q_values:
            columns["teacher_q_values"][slots] = q_values
        depths = np.minimum(columns["stack_depths"][slots] + 1, 3)
        self.heads += 1
        if ended.any():
            self._observe(np.flatnonzero(ended), step.final_observations[ended], depths[ended])
            self.heads[ended] += 1
        self._observe(np.arange(self.num_envs), step.observations, np.where(ended, 0, depths))

    def _observe(self, envs: np.ndarray, observations: np.ndarray, depths: np.ndarray | int) -> None:
        slots = self._slots(envs, self.heads[envs])
        self.frames.write(slots, observations[:, -1])
        self.columns["stack_depths"][slots] = depths
        self.columns["is_transition"][slots] = False

    def _slots(self, envs: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return envs * self.num_slots + positions % self.num_slots

    def drawable_per_env(self) -> np.ndarray:
        """How many positions of each environment `draw` chooses from; the newest is heads - n."""
        overwritten = np.maximum(self.heads + 1 - self.num_slots, 0)
        oldest = np.where(overwritten > 0, overwritten + 3, 0)
        return np.maximum(self.heads - self.n_step + 1 - oldest, 0)

    @property
    def can_sample(self) -> bool:
        """Whether n steps of every environment are known."""
        return bool((self.drawable_per_env() > 0).all())

    def draw(self, batch_size: int, rng: np.random.Generator) -> np.ndarray:
        """Draws the slots of transitions, int64 (batch_size,), uniformly and with replacement.

        Raises:
            SystemExit: with a one-line error, if the buffer has hardly any: no run wrote the file it is from.
        """
        ends = np.cumsum(self.drawable_per_env())
        slots = np.empty(batch_size, dtype=np.int64)
        missing = np.arange(batch_size)
        for _ in range(MOST_DRAWS if ends[-1] else 0):  # again, where the end of an episode was drawn
            drawn = rng.integers(ends[-1], size=len(missing))
            envs = np.searchsorted(ends, drawn, side="right")
            slots[missing] = self._slots(envs, self.heads[envs] - self.n_step - (ends[envs] - 1 - drawn))
            missing = missing[~self.columns["is_transition"][slots[missing]]]
            if not len(missing):
                return slots
        raise SystemExit("error: the replay buffer holds no transitions; start without the file it is from")

    def sample(self, batch_size: int, rng: np.random.Generator, num_batches: int = 1) -> Batch:
        """Draws `num_batches` batches: the same as one after the other would be.

        There are transitions to draw once it `can_sample`.
        """
        return self.gather(np.stack([self.draw(batch_size, rng) for _ in range(num_batches)]))

    def gather(self, slots: np.ndarray) -> Batch:
        """The transitions at `slots`, integers (...)."""
        columns = self.columns
        rewards = np.zeros(slots.shape, np.float32)
        terminations = np.zeros(slots.shape, np.float32)
        continues = np.ones(slots.shape, bool)
        steps = np.zeros(slots.shape, np.int64)
        for k in range(self.n_step):
            slots_k = self._ahead(slots, k)
            rewards += np.float32(self.gamma**k) * continues * columns["rewards"][slots_k]
            terminations += continues & columns["terminations"][slots_k]
            steps += continues
            continues &= ~columns["episode_ends"][slots_k]
        return Batch(
            stacks=self._stacks(slots),
            actions=columns["actions"][slots].astype(np.int64),
            rewards=rewards,
            next_stacks=self._stacks(self._ahead(slots, steps)),
            terminations=terminations,
            discounts=np.power(self.gamma, steps).astype(np.float32),
            teacher_q_values=columns["teacher_q_values"][slots] if self.num_q_values else None,
        )

    def observations(self, slots: np.ndarray) -> np.ndarray:
        """The observations at `slots`, integers (n,): uint8 (n, 4, 84, 84)."""
        return self.frames.read(self._stacks(slots))

    def _ahead(self, slots: np.ndarray, steps: int | np.ndarray) -> np.ndarray:
        """The slots that many steps later in the same rings; earlier, where negative."""
        ring_starts = slots // self.num_slots * self.num_slots
        return ring_starts + (slots - ring_starts + steps) % self.num_slots

    def _stacks(self, slots: np.ndarray) -> np.ndarray:
        """The slots (..., 4) of the frames of the observations at `slots`."""
        # A stack that starts with its episode repeats the first frame.
        back = np.minimum(np.arange(3, -1, -1), self.columns["stack_depths"][slots][..., None])
        return self._ahead(slots[..., None], -back.astype(np.int64))

    def read(self, slots: np.ndarray) -> dict[str, np.ndarray]:
        """What the slots, integers (n,), hold: arrays (n, …) by name."""
        return {"frames": self.frames.read(slots)} | {name: of[slots] for name, of in self.columns.items()}

    def write(self, slots: np.ndarray, rows: dict[str, np.ndarray]) -> None:
        """Puts back what `read` gave, all of it or some; the caller sets the heads."""
        for name in rows.keys() & self.columns.keys():
            self.columns[name][slots] = rows[name]
        self.frames.write(slots, rows["frames"])
