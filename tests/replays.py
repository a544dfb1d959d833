"""Random steps of several environments, and replay buffers filled with them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np

from cleanrl.qdagger_dqn_atari_impalacnn import Args
from cleanrl.utils.games.parallel_envs import StepResult
from cleanrl.utils.replay import saved_replay
from cleanrl.utils.replay.frames_jax import JaxFrames
from cleanrl.utils.replay.frames_torch import TorchFrames
from cleanrl.utils.replay.ring import ReplayBuffer
from cleanrl.utils.run.memory import plan_replays

NUM_ACTIONS = 6
GAMMA = 0.9
FRAMES = {"torch": TorchFrames, "jax": JaxFrames}
FramesType = type[TorchFrames] | type[JaxFrames]
Key = tuple[int, int]  # an environment and a position


class Transition(NamedTuple):
    observation: np.ndarray
    action: int
    reward: float
    next_observation: np.ndarray
    terminated: bool
    ended: bool
    q_values: np.ndarray
    depth: int  # earlier frames of the same episode in the observation, at most 3


class Stream:
    """Random steps of several environments, all of them kept the simple way.

    `logs[env]` holds what takes up room in a buffer, by position: a transition, or None for the observation
    that ended an episode. The first pixels of a frame are its environment and position.

    Args:
        num_envs: environments.
        num_steps: steps of each.
        end_probability: that a step terminates, and that it truncates; one number, or one of each environment
            and step (num_steps, num_envs).
        seed: of everything.
    """

    def __init__(self, num_envs: int, num_steps: int, end_probability: float | Sequence, seed: int = 0):
        rng = np.random.default_rng(seed)
        probabilities = np.broadcast_to(end_probability, (num_steps, num_envs))

        def frame(env: int, position: int) -> np.ndarray:
            pixels = rng.integers(256, size=(84, 84), dtype=np.uint8)
            pixels[0, :3] = env, *divmod(position, 256)
            return pixels

        self.logs: list[list[Transition | None]] = [[] for _ in range(num_envs)]
        self.lengths: list[list[int]] = []  # of the logs, after each step
        self.steps: list[tuple[np.ndarray, StepResult, np.ndarray]] = []  # what `ReplayBuffer.add` takes
        stacks, depths = [np.stack([frame(env, 0)] * 4) for env in range(num_envs)], [0] * num_envs
        self.observations = [np.stack(stacks)]  # those that each step is taken from
        for probability in probabilities:
            actions = rng.integers(NUM_ACTIONS, size=num_envs)
            rewards = rng.normal(size=num_envs).astype(np.float32)
            q_values = rng.normal(size=(num_envs, NUM_ACTIONS)).astype(np.float32)
            terminations, truncations = rng.random((2, num_envs)) < probability
            final_observations = np.full((num_envs, 4, 84, 84), 7, np.uint8)  # means nothing where none ended
            for env, log in enumerate(self.logs):
                next_stack = np.stack([*stacks[env][1:], frame(env, len(log) + 1)])
                ended = bool(terminations[env] or truncations[env])
                taken = stacks[env], actions[env], rewards[env], next_stack, terminations[env], ended
                log.append(Transition(*taken, q_values[env], depths[env]))
                stacks[env], depths[env] = next_stack, min(depths[env] + 1, 3)
                if ended:
                    log.append(None)
                    final_observations[env] = next_stack
                    stacks[env], depths[env] = np.stack([frame(env, len(log))] * 4), 0
            result = StepResult(np.stack(stacks), rewards, terminations, truncations, final_observations, [])
            self.steps.append((actions, result, q_values))
            self.observations.append(result.observations)
            self.lengths.append([len(log) for log in self.logs])

    def newest(self, capacity_per_env: int, n_step: int, step: int = -1) -> set[Key]:
        """The transitions in each environment's newest slots after that step, without the last n - 1."""
        return {
            (env, position)
            for env, length in enumerate(self.lengths[step])
            for position in range(max(length - (n_step - 1), 0))[-capacity_per_env:]
            if self.logs[env][position] is not None
        }

    def at(self, key: Key) -> Transition:
        transition = self.logs[key[0]][key[1]]
        assert transition is not None
        return transition

    def sum_rewards(self, key: Key, n: int) -> tuple[float, Transition, int]:
        """The discounted sum of up to n rewards, the transition of the last of them, and their number."""
        total = 0.0
        for k in range(n):
            transition = self.at((key[0], key[1] + k))
            total += GAMMA**k * transition.reward
            if transition.ended:
                break
        return total, transition, k + 1


def make_replay(
    frames_type: FramesType, capacity: int, num_envs: int, n_step: int = 1, num_q_values: int = NUM_ACTIONS
) -> ReplayBuffer:
    def make_frames(num_slots: int) -> TorchFrames | JaxFrames:
        return frames_type(num_slots, frames_type.host())

    return ReplayBuffer(capacity, num_envs, make_frames, num_q_values, n_step, GAMMA)


def fill(replay: ReplayBuffer, stream: Stream) -> Iterator[int]:
    """Adds the stream to the replay, and yields after each step how many came before it."""
    replay.start(stream.observations[0])
    for index, step in enumerate(stream.steps):
        replay.add(*step)
        yield index


def filled(replay: ReplayBuffer, stream: Stream) -> ReplayBuffer:
    for _ in fill(replay, stream):
        pass
    return replay


class ImpatientGenerator:
    """A generator of random numbers that a loop without end cannot draw from."""

    def __init__(self):
        self.rng, self.draws_left = np.random.default_rng(0), 100

    def integers(self, *arguments, **settings) -> np.ndarray:
        assert self.draws_left, "drawing does not end"
        self.draws_left -= 1
        return self.rng.integers(*arguments, **settings)


class Transitions(NamedTuple):
    """A `Batch` with its observations (batch, 4, 84, 84) in place of their frames' slots."""

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    next_observations: np.ndarray
    terminations: np.ndarray
    discounts: np.ndarray
    teacher_q_values: np.ndarray | None


def gather(replay: ReplayBuffer, slots: np.ndarray) -> Transitions:
    """The transitions at `slots`, integers (batch,)."""
    batch = replay.gather(slots)
    stacks = np.stack([batch.stacks, batch.next_stacks])
    observations = replay.frames.read(stacks.reshape(-1)).reshape(*stacks.shape, 84, 84)
    _, actions, rewards, _, *others = batch
    return Transitions(observations[0], actions, rewards, observations[1], *others)


def draw_everything(replay: ReplayBuffer) -> Transitions:
    """Every transition that can be drawn, once."""
    assert replay.can_sample
    num_draws = 40 * replay.num_envs * replay.num_slots  # misses one: e^-40
    return gather(replay, np.unique(replay.draw(num_draws, ImpatientGenerator())))


def keys_of(batch: Transitions) -> list[Key]:
    """Which transitions of the stream they are; each once."""
    keys = [(int(env), 256 * int(high) + int(low)) for env, high, low in batch.observations[:, -1, 0, :3]]
    assert len(set(keys)) == len(keys)
    return keys


def assert_transitions(batch: Transitions, stream: Stream, keys: Sequence[Key], n_step: int = 1) -> None:
    """The batch holds those transitions of the stream, with sums of up to n rewards."""
    transitions = [stream.at(key) for key in keys]
    totals, last, steps = zip(*(stream.sum_rewards(key, n_step) for key in keys), strict=True)
    assert np.array_equal(batch.observations, [t.observation for t in transitions])
    np.testing.assert_array_equal(batch.actions, [t.action for t in transitions])
    np.testing.assert_allclose(batch.rewards, totals, rtol=1e-5, atol=1e-5)
    assert np.array_equal(batch.next_observations, [t.next_observation for t in last])
    np.testing.assert_array_equal(batch.terminations, [t.terminated for t in last])
    np.testing.assert_allclose(batch.discounts, np.power(GAMMA, steps), rtol=1e-6)


def equal(one: Iterable, other: Iterable) -> bool:
    """Whether two batches are."""
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


# ------------------------------------------------------------------------------------------- on the disk

PONG = "PongNoFrameskip-v4"


def save(folder: Path, replay: ReplayBuffer, rows_per_file: int = 17) -> None:
    """Saves it as a replay of Pong, in many files."""
    many_files = partial(saved_replay.rows_between, rows_per_file=rows_per_file)
    with mock.patch.object(saved_replay, "rows_between", many_files):
        saved_replay.save_replay(folder, replay, PONG, NUM_ACTIONS, "saved-it")


def load(
    frames_type: FramesType,
    folder: Path,
    compute_q_values: Callable[[np.ndarray], np.ndarray],
    buffer_size: int = 10**6,
    n_step: int = 1,
) -> ReplayBuffer:
    """The QDagger scripts' teacher replay, planned and loaded as they do it."""
    args = Args(
        env_id=PONG, teacher_replay_path=folder, buffer_size=buffer_size, n_step=n_step, gamma=GAMMA,
        batch_size=1, total_timesteps=1,
    )  # fmt: skip
    replay, _ = plan_replays(args, NUM_ACTIONS, frames_type, frames_type.host())
    with mock.patch.object(saved_replay, "STACKS_AT_A_TIME", 5):
        saved_replay.load_replay(args, replay, compute_q_values, checkpoint=lambda: None)
    return replay
