"""The replay buffer against Stable-Baselines3's, transition by transition, and against brute-force loops."""

from collections.abc import Iterator
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.buffers import ReplayBuffer as StableBaselines3Buffer

from cleanrl.qdagger_dqn_atari_impalacnn import Batch, ReplayBuffer
from cleanrl.utils.parallel_envs import StepResult

NUM_ACTIONS = 6
GAMMA = 0.9
CPU = torch.device("cpu")
NO_END, FEW_ENDS, MANY_ENDS = 0.0, 0.03, 0.3  # the probability that a step terminates, or truncates


@pytest.fixture(autouse=True)
def one_thread():
    """These tensors are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Transition(NamedTuple):
    observation: np.ndarray
    action: int
    reward: float
    next_observation: np.ndarray
    terminated: bool
    ended: bool


class Recording:
    """What a stream of steps has put into a buffer, kept the simple way: everything, per environment.

    `log[env]` holds what takes up room in the buffer: the time of each transition, None for each observation
    that ended an episode. Transitions are known by (time, env).
    """

    def __init__(self, num_envs: int):
        self.transitions: dict[tuple[int, int], Transition] = {}
        self.log: list[list[int | None]] = [[] for _ in range(num_envs)]

    def newest(self, slots: int, n_step: int) -> set[tuple[int, int]]:
        """The transitions in the newest `slots` slots of each environment, save for the newest n - 1."""
        return {
            (time, env)
            for env, log in enumerate(self.log)
            for time in log[: len(log) - (n_step - 1)][-slots:]
            if time is not None
        }

    def n_step(self, time: int, env: int, n: int) -> tuple[float, np.ndarray, bool, float]:
        """The discounted sum of rewards, the observation after it, whether it terminated, its discount."""
        total = 0.0
        for k in range(n):
            transition = self.transitions[time + k, env]
            total += GAMMA**k * transition.reward
            if transition.ended:
                break
        return total, transition.next_observation, transition.terminated, GAMMA ** (k + 1)


def random_frames(rng: np.random.Generator, num_envs: int) -> np.ndarray:
    return rng.integers(256, size=(num_envs, 1, 84, 84), dtype=np.uint8)


def fill(
    replay: ReplayBuffer, num_steps: int, end_probability: float, seed: int, stable_baselines3=None
) -> Iterator[Recording]:
    """Adds random steps of all environments to `replay`; yields what it was given so far after each.

    The teacher's Q-values of an observation start with its time and its environment.
    """
    rng = np.random.default_rng(seed)
    num_envs = replay.num_envs
    recording = Recording(num_envs)
    observations = np.repeat(random_frames(rng, num_envs), 4, axis=1)
    replay.start(observations)
    for time in range(num_steps):
        actions = rng.integers(NUM_ACTIONS, size=num_envs)
        rewards = rng.normal(size=num_envs).astype(np.float32)
        next_observations = np.concatenate([observations[:, 1:], random_frames(rng, num_envs)], axis=1)
        terminations, truncations = rng.random((2, num_envs)) < end_probability
        ended = terminations | truncations
        new_observations, final_observations = next_observations.copy(), np.full_like(next_observations, 7)
        new_observations[ended] = np.repeat(random_frames(rng, num_envs), 4, axis=1)[ended]
        final_observations[ended] = next_observations[ended]
        teacher_q_values = rng.normal(size=(num_envs, NUM_ACTIONS)).astype(np.float32)
        teacher_q_values[:, 0], teacher_q_values[:, 1] = time, np.arange(num_envs)
        step = StepResult(new_observations, rewards, terminations, truncations, final_observations, [])

        replay.add(actions, step, teacher_q_values)
        if stable_baselines3:  # it wants what its own training loop would give it
            infos = [{"TimeLimit.truncated": timeout} for timeout in truncations & ~terminations]
            stable_baselines3.add(observations, next_observations, actions, rewards, ended, infos)
        for env in range(num_envs):
            recording.transitions[time, env] = Transition(
                *(values[env] for values in (observations, actions, rewards, next_observations)),
                *(values[env] for values in (terminations, ended)),
            )
            recording.log[env] += [time, None] if ended[env] else [time]
        observations = new_observations
        yield recording


def make_replay(capacity: int, num_envs: int, n_step: int = 1) -> ReplayBuffer:
    return ReplayBuffer(capacity, num_envs, NUM_ACTIONS, n_step, GAMMA, CPU)


def draw_everything(replay: ReplayBuffer) -> tuple[Batch, list[tuple[int, int]]]:
    """Everything that can be drawn, each once, and its (time, env)."""
    draws = 40 * replay.num_envs * replay.num_slots  # misses a transition with probability e^-40
    slots = np.unique(replay.draw(draws, np.random.default_rng(0)))
    batch = replay.gather(torch.from_numpy(slots))
    keys = [(int(time), int(env)) for time, env in batch.teacher_q_values[:, :2]]
    assert len(set(keys)) == len(keys)
    return batch, keys


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("end_probability", [NO_END, FEW_ENDS, MANY_ENDS])
def test_every_transition_that_can_be_drawn_equals_stable_baselines3s(num_envs, end_probability):
    num_steps, capacity_per_env = 130, 30
    stable_baselines3 = StableBaselines3Buffer(
        num_steps * num_envs,
        gym.spaces.Box(0, 255, (4, 84, 84), np.uint8),
        gym.spaces.Discrete(NUM_ACTIONS),
        device="cpu",
        n_envs=num_envs,
        handle_timeout_termination=True,
    )
    replay = make_replay(capacity_per_env * num_envs, num_envs)
    ends = 0
    for time, recording in enumerate(fill(replay, num_steps, end_probability, 0, stable_baselines3)):
        if time % 9 and time < num_steps - 1:
            continue
        batch, keys = draw_everything(replay)
        at = tuple(np.array(keys).T)
        dones = stable_baselines3.dones[at] * (1 - stable_baselines3.timeouts[at])
        np.testing.assert_array_equal(batch.observations, stable_baselines3.observations[at])
        np.testing.assert_array_equal(batch.actions, stable_baselines3.actions[at][:, 0])
        np.testing.assert_array_equal(batch.rewards, stable_baselines3.rewards[at])
        np.testing.assert_array_equal(batch.next_observations, stable_baselines3.next_observations[at])
        np.testing.assert_array_equal(batch.terminations, dones)
        np.testing.assert_array_equal(batch.discounts, np.full(len(keys), np.float32(GAMMA)))
        ends += sum(recording.transitions[key].ended for key in keys)
    assert set(keys) == recording.newest(capacity_per_env, n_step=1)
    assert (ends > 0) == (end_probability > 0)


def test_without_ends_it_keeps_the_same_transitions_as_stable_baselines3_of_the_same_size():
    capacity, num_envs = 36, 3
    stable_baselines3 = StableBaselines3Buffer(
        capacity,
        gym.spaces.Box(0, 255, (4, 84, 84), np.uint8),
        gym.spaces.Discrete(NUM_ACTIONS),
        device="cpu",
        n_envs=num_envs,
    )
    replay = make_replay(capacity, num_envs)
    for _ in fill(replay, 50, NO_END, 0, stable_baselines3):
        pass
    batch, _ = draw_everything(replay)
    np.testing.assert_array_equal(np.sort(batch.rewards), np.sort(stable_baselines3.rewards.ravel()))


@pytest.mark.parametrize("n_step", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(8))
def test_n_step_transitions_equal_a_loop_over_the_stream(n_step, seed):
    """Small buffers of random sizes, looked at after each step: every way to wrap around, to end, to wait."""
    rng = np.random.default_rng((seed, n_step))
    num_envs, capacity_per_env = int(rng.integers(1, 4)), int(rng.integers(2, 13))
    end_probability = float(rng.choice([NO_END, FEW_ENDS, 0.1, MANY_ENDS]))
    replay = make_replay(capacity_per_env * num_envs, num_envs, n_step)
    for time, recording in enumerate(fill(replay, 50, end_probability, seed)):
        waits = all(len(log) < n_step for log in recording.log)
        assert replay.can_draw() != waits
        if waits:
            continue
        batch, keys = draw_everything(replay)
        assert set(keys) >= recording.newest(capacity_per_env, n_step)
        if time > 2 * capacity_per_env + 10:
            assert set(keys) == recording.newest(capacity_per_env, n_step)
        transitions = [recording.transitions[key] for key in keys]
        totals, next_observations, terminations, discounts = zip(
            *(recording.n_step(*key, n_step) for key in keys), strict=True
        )
        np.testing.assert_array_equal(batch.observations, np.stack([t.observation for t in transitions]))
        np.testing.assert_array_equal(batch.actions, [t.action for t in transitions])
        np.testing.assert_allclose(batch.rewards, totals, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(batch.next_observations, np.stack(next_observations))
        np.testing.assert_array_equal(batch.terminations, terminations)
        np.testing.assert_allclose(batch.discounts, discounts, rtol=1e-6)


def end_after(step_kinds: str, n_step: int) -> tuple[Batch, list[tuple[int, int]]]:
    """A hand-written stream of one environment: "." goes on, "T" terminates, "U" truncates; all rewards 1."""
    replay = make_replay(20, 1, n_step)
    frames = iter(range(100))
    observation = np.full((1, 4, 84, 84), next(frames), dtype=np.uint8)
    replay.start(observation)
    for time, kind in enumerate(step_kinds):
        new_frame = np.full((1, 1, 84, 84), next(frames), dtype=np.uint8)
        final = np.concatenate([observation[:, 1:], new_frame], axis=1)
        first = np.full_like(final, next(frames)) if kind != "." else final
        one = np.ones(1, dtype=np.float32)
        step = StepResult(first, one, np.array([kind == "T"]), np.array([kind == "U"]), final, [])
        replay.add(np.zeros(1, dtype=int), step, np.array([[time, 0, 0, 0, 0, 0]], dtype=np.float32))
        observation = first
    return draw_everything(replay)


# steps, n: for the first transition the rewards summed, the newest frame to bootstrap from, terminated
HAND_WRITTEN = {
    "nothing ends": ("...", 3, 3, 3, 0),
    "termination at the end of the window": ("..T", 3, 3, 3, 1),
    "termination inside the window": (".T..", 3, 2, 2, 1),
    "truncation inside the window": (".U..", 3, 2, 2, 0),
    "truncation at the first step": ("U...", 3, 1, 1, 0),
    "truncation, then a termination in the next episode": (".UT.", 5, 2, 2, 0),
}


@pytest.mark.parametrize("case", HAND_WRITTEN)
def test_n_step_window_of_the_first_transition(case):
    steps, n, summed, newest_frame, terminated = HAND_WRITTEN[case]
    batch, keys = end_after(steps, n)
    first = keys.index((0, 0))
    assert batch.rewards[first].item() == pytest.approx(sum(GAMMA**k for k in range(summed)))
    assert batch.discounts[first].item() == pytest.approx(GAMMA**summed)
    assert batch.next_observations[first, -1, 0, 0] == newest_frame
    assert batch.terminations[first] == terminated


def test_the_newest_transitions_wait_for_their_n_rewards():
    assert set(end_after("......", 3)[1]) == {(0, 0), (1, 0), (2, 0), (3, 0)}


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("capacity", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("end_probability", [NO_END, MANY_ENDS, 1.0])
def test_tiny_buffers_always_have_something_to_draw_once_n_steps_are_in(
    capacity, num_envs, n_step, end_probability
):
    replay = make_replay(capacity, num_envs, n_step)
    assert not replay.can_draw()
    for time, recording in enumerate(fill(replay, 25, end_probability, 0)):
        if time >= n_step - 1:
            assert replay.can_draw()
            _, keys = draw_everything(replay)
            assert set(keys) >= recording.newest(max(2, capacity // num_envs), n_step)


@pytest.mark.parametrize(
    ("capacity", "num_envs", "n_step", "end_probability"),
    [
        (60, 1, 1, NO_END),
        (60, 1, 1, MANY_ENDS),
        (90, 3, 3, MANY_ENDS),
        (40, 2, 1, 0.6),
        (5, 1, 1, 0.6),
        (1000, 3, 5, FEW_ENDS),
    ],
)
def test_draws_are_uniform(capacity, num_envs, n_step, end_probability):
    replay = make_replay(capacity, num_envs, n_step)
    for _ in fill(replay, 120, end_probability, 1):
        pass
    slots, counts = np.unique(replay.draw(200_000, np.random.default_rng(2)), return_counts=True)
    assert set(slots) == set(np.unique(replay.draw(200_000, np.random.default_rng(3))))
    expected = counts.sum() / len(counts)
    degrees_of_freedom = len(counts) - 1
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < degrees_of_freedom + 5 * np.sqrt(2 * degrees_of_freedom) + 5


def test_draw_depends_on_nothing_but_the_generator():
    replay = make_replay(50, 2)
    for _ in fill(replay, 60, FEW_ENDS, 0):
        pass
    first, second = (replay.draw(32, np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.dtype == np.int64
    assert first.shape == (32,)


def test_a_batch_has_the_documented_shapes_and_types():
    replay = make_replay(50, 2)
    for _ in fill(replay, 60, FEW_ENDS, 0):
        pass
    batch = replay.gather(torch.from_numpy(replay.draw(8, np.random.default_rng(0))))
    described = {name: (tuple(value.shape), value.dtype) for name, value in batch._asdict().items()}
    assert described == {
        "observations": ((8, 4, 84, 84), torch.uint8),
        "actions": ((8,), torch.int64),
        "rewards": ((8,), torch.float32),
        "next_observations": ((8, 4, 84, 84), torch.uint8),
        "terminations": ((8,), torch.float32),
        "discounts": ((8,), torch.float32),
        "teacher_q_values": ((8, NUM_ACTIONS), torch.float32),
    }


@pytest.mark.parametrize(
    ("capacity", "num_envs", "num_actions", "n_step"), [(2000, 1, 18, 1), (3000, 8, 4, 3)]
)
def test_num_bytes_is_what_the_buffer_takes(capacity, num_envs, num_actions, n_step):
    replay = ReplayBuffer(capacity, num_envs, num_actions, n_step, GAMMA, CPU)
    taken = sum(value.nbytes for value in vars(replay).values() if hasattr(value, "nbytes"))
    assert ReplayBuffer.num_bytes(capacity, num_envs, num_actions, n_step) == pytest.approx(taken, rel=0.01)


def test_a_million_transitions_take_less_than_7_3_gb():
    assert ReplayBuffer.num_bytes(1_000_000, num_envs=8, num_actions=18, n_step=1) <= 7.3e9
