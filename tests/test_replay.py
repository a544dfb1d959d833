"""Both scripts' replay buffers against Stable-Baselines3's, brute-force loops over a stream, and each other.

JAX compiles for every new size: the cases that it gets are fewer, and share their sizes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import gymnasium as gym
import jax
import numpy as np
import pytest
import torch
from replay_adapters import JaxReplay, Replay, TorchReplay
from stable_baselines3.common.buffers import ReplayBuffer as StableBaselines3Buffer

from cleanrl.qdagger_dqn_atari_jax_impalacnn import ReplayBuffer as JaxReplayBuffer
from cleanrl.utils.games.parallel_envs import StepResult

NUM_ACTIONS = 6
GAMMA = 0.9
# The probability that a step terminates, and the one that it truncates.
NO_END, FEW_ENDS, SOME_ENDS, MANY_ENDS = 0.0, 0.03, 0.1, 0.3
REPLAYS = {"torch": TorchReplay, "jax": JaxReplay}


@pytest.fixture(params=REPLAYS)
def replay_type(request) -> type[Replay]:
    return REPLAYS[request.param]


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
    replay: Replay, num_steps: int, end_probability: float, seed: int, stable_baselines3=None
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


def make_replay(replay_type: type[Replay], capacity: int, num_envs: int, n_step: int = 1) -> Replay:
    return replay_type(capacity, num_envs, NUM_ACTIONS, n_step, GAMMA)


def draw_slots(replay: Replay) -> np.ndarray:
    """All slots that can be drawn, each once, in order."""
    assert replay.drawable_per_env().any()  # else `draw` would not end
    return np.unique(replay.draw(40 * replay.num_envs * replay.num_slots, seed=0))  # misses one: e^-40


def gather(replay: Replay, slots: np.ndarray):
    """The batch of any number of slots; JAX compiles for one number only, which is that of all slots."""
    batch = replay.gather(np.resize(slots, replay.num_envs * replay.num_slots))
    return batch._make(values[: len(slots)] for values in batch)


def draw_everything(replay: Replay) -> tuple[NamedTuple, list[tuple[int, int]]]:
    """Everything that can be drawn, each once, and its (time, env)."""
    batch = gather(replay, draw_slots(replay))
    keys = [(int(time), int(env)) for time, env in batch.teacher_q_values[:, :2]]
    assert len(set(keys)) == len(keys)
    return batch, keys


@pytest.mark.parametrize(("num_envs", "capacity_per_env"), [(1, 30), (3, 12)])
@pytest.mark.parametrize("end_probability", [NO_END, FEW_ENDS, MANY_ENDS])
def test_every_transition_that_can_be_drawn_equals_stable_baselines3s(
    replay_type, num_envs, capacity_per_env, end_probability
):
    num_steps = 130
    stable_baselines3 = StableBaselines3Buffer(
        num_steps * num_envs,
        gym.spaces.Box(0, 255, (4, 84, 84), np.uint8),
        gym.spaces.Discrete(NUM_ACTIONS),
        device="cpu",
        n_envs=num_envs,
        handle_timeout_termination=True,
    )
    replay = make_replay(replay_type, capacity_per_env * num_envs, num_envs)
    ends = 0
    for time, recording in enumerate(fill(replay, num_steps, end_probability, 0, stable_baselines3)):
        if (time + 1) % 9 and time < num_steps - 1:
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


def test_without_ends_it_keeps_the_same_transitions_as_stable_baselines3_of_the_same_size(replay_type):
    capacity, num_envs = 36, 3
    stable_baselines3 = StableBaselines3Buffer(
        capacity,
        gym.spaces.Box(0, 255, (4, 84, 84), np.uint8),
        gym.spaces.Discrete(NUM_ACTIONS),
        device="cpu",
        n_envs=num_envs,
    )
    replay = make_replay(replay_type, capacity, num_envs)
    for _ in fill(replay, 50, NO_END, 0, stable_baselines3):
        pass
    batch, _ = draw_everything(replay)
    np.testing.assert_array_equal(np.sort(batch.rewards), np.sort(stable_baselines3.rewards.ravel()))


def check_drawable(replay: Replay, recording: Recording, capacity_per_env: int, n_step: int) -> None:
    """All that its n rewards are known of, as far as it fits; nothing before n slots are full."""
    known = np.maximum([len(log) - n_step + 1 for log in recording.log], 0)
    assert (replay.drawable_per_env() >= np.minimum(known, capacity_per_env)).all()
    assert (replay.drawable_per_env() <= known).all()


SIZES = [(1, 2), (3, 12)]  # environments, capacity per environment


@pytest.mark.parametrize("n_step", [1, 2, 3, 5])
@pytest.mark.parametrize("end_probability", [NO_END, SOME_ENDS, MANY_ENDS])
@pytest.mark.parametrize(
    ("replay_type", "num_envs", "capacity_per_env"),
    [(TorchReplay, *size) for size in [*SIZES, (2, 7)]] + [(JaxReplay, *size) for size in SIZES],
)
def test_n_step_transitions_equal_a_loop_over_the_stream(
    replay_type, num_envs, capacity_per_env, end_probability, n_step
):
    """Small buffers, looked at after each step: every way to wrap around, to end, to wait."""
    replay = make_replay(replay_type, capacity_per_env * num_envs, num_envs, n_step)
    for time, recording in enumerate(fill(replay, 50, end_probability, seed=n_step)):
        check_drawable(replay, recording, capacity_per_env, n_step)
        if not replay.drawable_per_env().any():
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


def end_after(
    replay_type: type[Replay], step_kinds: str, n_step: int
) -> tuple[NamedTuple, list[tuple[int, int]]]:
    """A hand-written stream of one environment: "." goes on, "T" terminates, "U" truncates; all rewards 1."""
    replay = make_replay(replay_type, 2, 1, n_step)  # never full: it has 3 + n slots more
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
def test_n_step_window_of_the_first_transition(replay_type, case):
    steps, n, summed, newest_frame, terminated = HAND_WRITTEN[case]
    batch, keys = end_after(replay_type, steps, n)
    first = keys.index((0, 0))
    assert batch.rewards[first].item() == pytest.approx(sum(GAMMA**k for k in range(summed)))
    assert batch.discounts[first].item() == pytest.approx(GAMMA**summed)
    assert batch.next_observations[first, -1, 0, 0] == newest_frame
    assert batch.terminations[first] == terminated


def test_the_newest_transitions_wait_for_their_n_rewards(replay_type):
    assert set(end_after(replay_type, "......", 3)[1]) == {(0, 0), (1, 0), (2, 0), (3, 0)}


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize(
    ("replay_type", "capacity", "num_envs"),
    [(TorchReplay, capacity, num_envs) for capacity in [1, 2, 3, 4, 5] for num_envs in [1, 3]]
    + [(JaxReplay, capacity, num_envs) for capacity, num_envs in [(1, 1), (5, 3)]],
)
@pytest.mark.parametrize("end_probability", [NO_END, MANY_ENDS, 1.0])
def test_tiny_buffers_always_have_something_to_draw_once_n_steps_are_in(
    replay_type, capacity, num_envs, n_step, end_probability
):
    replay = make_replay(replay_type, capacity, num_envs, n_step)
    assert not replay.drawable_per_env().any()
    for time, recording in enumerate(fill(replay, 25, end_probability, 0)):
        capacity_per_env = max(2, capacity // num_envs)
        check_drawable(replay, recording, capacity_per_env, n_step)
        if time >= n_step - 1:
            assert replay.drawable_per_env().all()
            _, keys = draw_everything(replay)
            assert set(keys) >= recording.newest(capacity_per_env, n_step)


@pytest.mark.parametrize(
    ("capacity", "num_envs", "n_step", "end_probability"),
    [
        (30, 1, 1, NO_END),
        (30, 1, 1, MANY_ENDS),
        (36, 3, 3, MANY_ENDS),
        (40, 2, 1, 0.6),
        (5, 1, 1, 0.6),
        (1000, 3, 5, FEW_ENDS),
    ],
)
def test_draws_are_uniform(replay_type, capacity, num_envs, n_step, end_probability):
    replay = make_replay(replay_type, capacity, num_envs, n_step)
    for _ in fill(replay, 120, end_probability, 1):
        pass
    slots, counts = np.unique(replay.draw(100_000, seed=2), return_counts=True)
    assert set(slots) == set(np.unique(replay.draw(100_000, seed=3)))
    expected = counts.sum() / len(counts)
    degrees_of_freedom = len(counts) - 1
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < degrees_of_freedom + 5 * np.sqrt(2 * degrees_of_freedom) + 5


def test_draws_depend_on_nothing_but_the_seed_and_where_the_transitions_lie(replay_type):
    drawn = []
    for stream in (0, 1):
        replay = make_replay(replay_type, 40, 2)
        for _ in fill(replay, 60, NO_END, stream):
            pass
        drawn += [replay.draw(32, seed=5), replay.draw(32, seed=5)]
    for slots in drawn:
        np.testing.assert_array_equal(slots, drawn[0])
    assert set(replay.draw(32, seed=6)) != set(drawn[0])
    assert drawn[0].dtype == replay_type.integer
    assert drawn[0].shape == (32,)


def test_a_batch_has_the_documented_shapes_and_types(replay_type):
    replay = make_replay(replay_type, 40, 2)
    for _ in fill(replay, 60, FEW_ENDS, 0):
        pass
    batch = replay.gather(replay.draw(32, seed=0))
    described = {name: (values.shape, values.dtype) for name, values in batch._asdict().items()}
    assert described == {
        "observations": ((32, 4, 84, 84), np.uint8),
        "actions": ((32,), replay_type.integer),
        "rewards": ((32,), np.float32),
        "next_observations": ((32, 4, 84, 84), np.uint8),
        "terminations": ((32,), np.float32),
        "discounts": ((32,), np.float32),
        "teacher_q_values": ((32, NUM_ACTIONS), np.float32),
    }


@pytest.mark.parametrize("n_step", [1, 2, 3, 5])
@pytest.mark.parametrize(("num_envs", "capacity_per_env"), SIZES)
def test_torch_and_jax_give_the_same_transitions_for_the_same_slots(num_envs, capacity_per_env, n_step):
    replays = [
        make_replay(replay_type, capacity_per_env * num_envs, num_envs, n_step)
        for replay_type in (TorchReplay, JaxReplay)
    ]
    num_steps = 60
    assert num_steps > 2 * replays[0].num_slots
    terminated, truncated = 0, 0
    streams = (fill(replay, num_steps, SOME_ENDS, seed=7) for replay in replays)
    for time, (recording, _) in enumerate(zip(*streams, strict=True)):
        for env in range(num_envs):
            transition = recording.transitions[time, env]
            terminated += transition.terminated
            truncated += transition.ended and not transition.terminated
        drawable, jax_drawable = (replay.drawable_per_env() for replay in replays)
        np.testing.assert_array_equal(drawable, jax_drawable)
        if not drawable.any():
            continue
        slots, jax_slots = map(draw_slots, replays)
        np.testing.assert_array_equal(slots, jax_slots)
        batch, jax_batch = (gather(replay, slots) for replay in replays)
        for name in ("rewards", "discounts"):
            np.testing.assert_allclose(getattr(batch, name), getattr(jax_batch, name), rtol=1e-6, atol=1e-6)
        for name in ("observations", "actions", "next_observations", "terminations", "teacher_q_values"):
            np.testing.assert_array_equal(getattr(batch, name), getattr(jax_batch, name))
    assert terminated > 0
    assert truncated > 0


def test_jax_updates_its_buffer_in_place():
    replay = make_replay(JaxReplay, 5000, 2)
    observations = np.zeros((2, 4, 84, 84), np.uint8)
    step = StepResult(
        observations, np.zeros(2, np.float32), np.zeros(2, bool), np.ones(2, bool), observations, []
    )
    where = [values.unsafe_buffer_pointer() for values in jax.tree.leaves(replay.buffer)]
    for update in (
        lambda: replay.start(observations),
        lambda: replay.add(np.zeros(2, int), step, np.zeros((2, NUM_ACTIONS), np.float32)),
    ):
        old = replay.buffer
        update()
        assert all(values.is_deleted() for values in jax.tree.leaves(old))
        assert [values.unsafe_buffer_pointer() for values in jax.tree.leaves(replay.buffer)] == where
    # Nor is it copied to and fro on the way.
    arrays = (
        np.zeros(2, int),
        *step[1:4],
        observations[:, -1],
        observations[:, -1],
        np.zeros((2, NUM_ACTIONS)),
    )
    memory = JaxReplayBuffer._add.lower(replay.buffer, *arrays).compile().memory_analysis()
    assert memory.alias_size_in_bytes == replay.bytes_taken()
    assert memory.temp_size_in_bytes < 10 * 84 * 84


def test_jax_does_the_same_compiled_and_not():
    """Compiled: with several draws in one loop, as when training. Sums may differ in their last bits."""
    replay, eager = (make_replay(JaxReplay, 6, 3, n_step=3) for _ in range(2))
    for _ in fill(replay, 12, MANY_ENDS, 0):
        pass
    with jax.disable_jit():
        for _ in fill(eager, 12, MANY_ENDS, 0):
            pass
    for values, eager_values in zip(*map(jax.tree.leaves, (replay.buffer, eager.buffer)), strict=True):
        np.testing.assert_array_equal(values, eager_values)
        assert values.dtype == eager_values.dtype

    @jax.jit
    def draw_and_gather(buffer, keys):
        def one(_, key):
            slots = buffer.draw(key, 16)
            return None, (slots, buffer.gather(slots))

        return jax.lax.scan(one, None, keys)[1]

    keys = jax.random.split(jax.random.key(0), 5)
    every_slots, every_batch = draw_and_gather(replay.buffer, keys)
    for index, key in enumerate(keys):
        slots = replay.buffer.draw(key, 16)
        np.testing.assert_array_equal(slots, every_slots[index])
        for values, looped_values in zip(replay.buffer.gather(slots), every_batch, strict=True):
            np.testing.assert_allclose(values, looped_values[index], rtol=1e-6, atol=1e-6)
            assert values.dtype == looped_values.dtype


@pytest.mark.parametrize(
    ("capacity", "num_envs", "num_actions", "n_step"), [(2000, 1, 18, 1), (3000, 8, 4, 3)]
)
def test_num_bytes_is_what_the_buffer_takes(replay_type, capacity, num_envs, num_actions, n_step):
    replay = replay_type(capacity, num_envs, num_actions, n_step, GAMMA)
    num_bytes = replay_type.script.ReplayBuffer.num_bytes(capacity, num_envs, num_actions, n_step)
    bytes_per_env = 8 + 1  # at most, for the position and the stack depth of the current observation
    assert 0 <= replay.bytes_taken() - num_bytes <= bytes_per_env * num_envs


def test_a_million_transitions_take_less_than_7_3_gb(replay_type):
    num_bytes = replay_type.script.ReplayBuffer.num_bytes(1_000_000, num_envs=8, num_actions=18, n_step=1)
    assert num_bytes <= 7.3e9
