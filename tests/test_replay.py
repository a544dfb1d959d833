"""The replay buffer's ring against Stable-Baselines3's buffer and against loops over a stream.

It is the same for every kind of frames: most tests have PyTorch's. The frames by themselves: test_frames.py.
"""

import weakref

import gymnasium as gym
import numpy as np
import pytest
from replays import (
    FRAMES,
    GAMMA,
    NUM_ACTIONS,
    FramesType,
    ImpatientGenerator,
    Stream,
    assert_transitions,
    draw_everything,
    equal,
    fill,
    filled,
    gather,
    keys_of,
    make_replay,
)
from stable_baselines3.common.buffers import ReplayBuffer as StableBaselines3Buffer

from cleanrl.utils.games.parallel_envs import StepResult
from cleanrl.utils.replay.frames_torch import TorchFrames
from cleanrl.utils.replay.ring import ReplayBuffer

# The probability that a step terminates, and the one that it truncates.
NO_END, FEW_ENDS, SOME_ENDS, MANY_ENDS = 0.0, 0.03, 0.1, 0.3

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=FRAMES)
def frames_type(request) -> FramesType:
    return FRAMES[request.param]


# -------------------------------------------------------------------------------------- against the others


def stable_baselines3_buffer(capacity: int, stream: Stream) -> StableBaselines3Buffer:
    """With the stream, as Stable-Baselines3's own training loop would add it."""
    buffer = StableBaselines3Buffer(
        capacity,
        gym.spaces.Box(0, 255, (4, 84, 84), np.uint8),
        gym.spaces.Discrete(NUM_ACTIONS),
        device="cpu",
        n_envs=len(stream.logs),
        handle_timeout_termination=True,
    )
    for observations, (actions, step, _) in zip(stream.observations, stream.steps, strict=False):
        ended = step.terminations | step.truncations
        next_observations = np.where(ended[:, None, None, None], step.final_observations, step.observations)
        infos = [{"TimeLimit.truncated": timeout} for timeout in step.truncations & ~step.terminations]
        buffer.add(observations, next_observations, actions, step.rewards, ended, infos)
    return buffer


@pytest.mark.parametrize(("num_envs", "capacity_per_env"), [(1, 30), (3, 12)])
@pytest.mark.parametrize("end_probability", [NO_END, FEW_ENDS, MANY_ENDS])
def test_every_transition_that_can_be_drawn_equals_stable_baselines3s(
    frames_type, num_envs, capacity_per_env, end_probability
):
    num_steps = 130
    stream = Stream(num_envs, num_steps, end_probability)
    other = stable_baselines3_buffer(num_steps * num_envs, stream)
    replay = make_replay(frames_type, capacity_per_env * num_envs, num_envs)
    ends = 0
    for step in fill(replay, stream):
        if (step + 1) % 9 and step < num_steps - 1:
            continue
        batch = draw_everything(replay)
        keys = keys_of(batch)
        # Of an environment's rows, those that ended an episode are no steps.
        at = tuple(np.array([(steps_before(stream, *key), key[0]) for key in keys]).T)
        dones = other.dones[at] * (1 - other.timeouts[at])
        np.testing.assert_array_equal(batch.observations, other.observations[at])
        np.testing.assert_array_equal(batch.actions, other.actions[at][:, 0])
        np.testing.assert_array_equal(batch.rewards, other.rewards[at])
        np.testing.assert_array_equal(batch.next_observations, other.next_observations[at])
        np.testing.assert_array_equal(batch.terminations, dones)
        np.testing.assert_array_equal(batch.discounts, np.full(len(keys), np.float32(GAMMA)))
        np.testing.assert_array_equal(batch.teacher_q_values, [stream.at(key).q_values for key in keys])
        ends += sum(stream.at(key).ended for key in keys)
    assert set(keys) == stream.newest(capacity_per_env, n_step=1)
    assert (ends > 0) == (end_probability > 0)


def steps_before(stream: Stream, env: int, position: int) -> int:
    return sum(row is not None for row in stream.logs[env][:position])


def test_without_ends_it_keeps_the_same_transitions_as_stable_baselines3_of_the_same_size():
    stream = Stream(3, 50, NO_END)
    other = stable_baselines3_buffer(36, stream)
    batch = draw_everything(filled(make_replay(TorchFrames, 36, num_envs=3), stream))
    np.testing.assert_array_equal(np.sort(batch.rewards), np.sort(other.rewards.ravel()))


def assert_drawable(
    replay: ReplayBuffer, stream: Stream, step: int, capacity_per_env: int, n_step: int
) -> None:
    """All that its n rewards are known of, as far as it fits; nothing before n rows are full."""
    known = np.maximum(np.array(stream.lengths[step]) - n_step + 1, 0)
    assert (replay.drawable_per_env() >= np.minimum(known, capacity_per_env)).all()
    assert (replay.drawable_per_env() <= known).all()
    assert replay.can_sample == known.all()


@pytest.mark.parametrize("n_step", [1, 2, 3, 5])
@pytest.mark.parametrize("end_probability", [NO_END, SOME_ENDS, MANY_ENDS])
@pytest.mark.parametrize(("num_envs", "capacity_per_env"), [(1, 2), (3, 9), (2, 7)])
def test_n_step_transitions_equal_a_loop_over_the_stream(num_envs, capacity_per_env, end_probability, n_step):
    """Small buffers, looked at after each step: every way to wrap around, to end, to wait."""
    replay = make_replay(TorchFrames, capacity_per_env * num_envs, num_envs, n_step)
    stream = Stream(num_envs, 40, end_probability, seed=n_step)
    for step in fill(replay, stream):
        assert_drawable(replay, stream, step, capacity_per_env, n_step)
        if not replay.can_sample:
            continue
        batch = draw_everything(replay)
        keys = keys_of(batch)
        newest = stream.newest(capacity_per_env, n_step, step)
        assert set(keys) >= newest
        if step > 2 * capacity_per_env + 5:
            assert set(keys) == newest
        assert_transitions(batch, stream, keys, n_step)


# ------------------------------------------------------------------------------------------------ by hand


def end_after(step_kinds: str, n_step: int):
    """A stream of one environment: "." goes on, "T" terminates, "U" truncates; all rewards 1.

    Each frame is its number.
    """
    replay = make_replay(TorchFrames, 100, 1, n_step, num_q_values=0)
    frames = iter(range(100))
    observation = np.full((1, 4, 84, 84), next(frames), dtype=np.uint8)
    replay.start(observation)
    for kind in step_kinds:
        new_frame = np.full((1, 1, 84, 84), next(frames), dtype=np.uint8)
        final = np.concatenate([observation[:, 1:], new_frame], axis=1)
        observation = final if kind == "." else np.full_like(final, next(frames))
        ends = np.array([kind == "T"]), np.array([kind == "U"])
        replay.add(np.zeros(1, int), StepResult(observation, np.ones(1, np.float32), *ends, final, []))
    slots = np.unique(replay.draw(1000, np.random.default_rng(0)))
    return gather(replay, slots)


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
def test_a_sum_of_n_rewards_ends_with_its_episode(case):
    steps, n, summed, newest_frame, terminated = HAND_WRITTEN[case]
    batch = end_after(steps, n)
    assert batch.observations[0, -1, 0, 0] == 0
    assert batch.rewards[0] == pytest.approx(sum(GAMMA**k for k in range(summed)))
    assert batch.discounts[0] == pytest.approx(GAMMA**summed)
    assert batch.next_observations[0, -1, 0, 0] == newest_frame
    assert batch.terminations[0] == terminated


def test_the_newest_transitions_wait_for_their_n_rewards():
    assert end_after("......", 3).observations[:, -1, 0, 0].tolist() == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------ drawing


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("capacity", [1, 3, 5])
@pytest.mark.parametrize("end_probability", [MANY_ENDS, 1.0, "1.0 from step 12 on"])
def test_tiny_buffers_always_have_something_to_draw_once_n_steps_are_in(
    capacity, num_envs, n_step, end_probability
):
    """Even where every second row is that of an observation that ended an episode."""
    if isinstance(end_probability, str):
        end_probability = (np.arange(25) >= 12)[:, None]
    replay = make_replay(TorchFrames, capacity, num_envs, n_step)
    stream = Stream(num_envs, 25, end_probability)
    assert not replay.can_sample
    for step in fill(replay, stream):
        capacity_per_env = max(2, capacity // num_envs)
        assert_drawable(replay, stream, step, capacity_per_env, n_step)
        if step >= n_step - 1:
            assert replay.can_sample
            slots = replay.draw(200, ImpatientGenerator())
            assert len(slots) == 200
            batch = draw_everything(replay)
            keys = keys_of(batch)
            assert set(keys) >= stream.newest(capacity_per_env, n_step, step)
            assert_transitions(batch, stream, keys, n_step)


@pytest.mark.parametrize(
    ("capacity", "num_envs", "n_step", "end_probability"),
    [
        (30, 1, 1, NO_END),
        (30, 1, 1, MANY_ENDS),
        (36, 3, 3, MANY_ENDS),
        (40, 2, 1, 0.6),
        (5, 1, 1, 0.6),
        (1000, 3, 5, FEW_ENDS),
        (60, 3, 1, [0.0, 0.2, 0.6]),  # rings that hold different numbers of transitions
    ],
)
def test_draws_are_uniform(capacity, num_envs, n_step, end_probability):
    stream = Stream(num_envs, 120, end_probability, seed=1)
    replay = filled(make_replay(TorchFrames, capacity, num_envs, n_step), stream)
    slots, counts = np.unique(replay.draw(100_000, np.random.default_rng(2)), return_counts=True)
    assert len(slots) == len(draw_everything(replay).actions)
    expected = counts.sum() / len(counts)
    degrees_of_freedom = len(counts) - 1
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < degrees_of_freedom + 5 * np.sqrt(2 * degrees_of_freedom) + 5


def test_draws_depend_on_nothing_but_the_seed_and_where_the_transitions_lie():
    drawn = []
    for seed in (0, 1):
        replay = filled(make_replay(TorchFrames, 40, num_envs=2), Stream(2, 60, NO_END, seed))
        drawn += [replay.draw(32, np.random.default_rng(5)) for _ in range(2)]
    for slots in drawn:
        np.testing.assert_array_equal(slots, drawn[0])
    assert set(replay.draw(32, np.random.default_rng(6))) != set(drawn[0])


def test_a_generator_gives_the_same_batches_at_once_and_one_by_one_in_both_kinds_of_frames():
    stream, samples = Stream(2, 60, MANY_ENDS), []
    for frames_type in FRAMES.values():
        replay = filled(make_replay(frames_type, 40, num_envs=2, n_step=3), stream)
        rngs = [np.random.default_rng(5) for _ in range(2)]
        batches = replay.sample(16, rngs[0], num_batches=4)
        for index in range(4):
            assert equal(replay.sample(16, rngs[1]).at(0), batches.at(index))
        assert rngs[0].random() == rngs[1].random()
        samples.append(batches)
    assert equal(*samples)


@pytest.mark.parametrize("num_q_values", [0, NUM_ACTIONS])
def test_a_batch_has_the_documented_shapes_and_types(frames_type, num_q_values):
    replay = make_replay(frames_type, 40, num_envs=2, num_q_values=num_q_values)
    batch = filled(replay, Stream(2, 60, FEW_ENDS)).sample(32, np.random.default_rng(0), num_batches=3)
    described = {
        name: (values.shape, values.dtype) for name, values in batch._asdict().items() if values is not None
    }
    expected = {
        "stacks": ((3, 32, 4), np.int64),
        "actions": ((3, 32), np.int64),
        "rewards": ((3, 32), np.float32),
        "next_stacks": ((3, 32, 4), np.int64),
        "terminations": ((3, 32), np.float32),
        "discounts": ((3, 32), np.float32),
        "teacher_q_values": ((3, 32, NUM_ACTIONS), np.float32),
    }
    if not num_q_values:
        assert batch.teacher_q_values is None
        del expected["teacher_q_values"]
    assert described == expected


def test_observations_that_cannot_be_rebuilt_from_the_newest_frames_are_refused(frames_type):
    replay = make_replay(frames_type, 20, 2)
    observations = np.full((2, 4, 84, 84), 5, np.uint8)
    observations[1, 0, 3, 3] = 6  # another channel than a frame, or a stack that began with zeros
    with pytest.raises(SystemExit, match=r"^error: after a reset, an observation must be one frame"):
        replay.start(observations)


def test_a_buffer_that_holds_observations_does_not_start_again():
    """A run that was resumed goes on with what it had."""
    replay = filled(make_replay(TorchFrames, 40, num_envs=2), Stream(2, 60, SOME_ENDS))
    before = draw_everything(replay)
    replay.start(np.zeros((2, 4, 84, 84), np.uint8))
    assert equal(draw_everything(replay), before)


# ------------------------------------------------------------------------------------------------- memory


def bytes_taken(replay: ReplayBuffer) -> int:
    return replay.frames.frames.nbytes + sum(column.nbytes for column in replay.columns.values())


@pytest.mark.parametrize(
    ("capacity", "num_envs", "num_q_values", "n_step"), [(2000, 1, 18, 1), (3000, 8, 4, 3), (2000, 8, 0, 1)]
)
def test_it_says_how_many_bytes_it_will_take(frames_type, capacity, num_envs, num_q_values, n_step):
    replay = make_replay(frames_type, capacity, num_envs, n_step, num_q_values)
    num_bytes = replay.num_bytes
    replay.allocate()
    assert bytes_taken(replay) == num_bytes == replay.num_bytes
    num_slots = len(replay.frames.frames)
    assert num_slots <= capacity + num_envs * (4 + n_step)  # spare ones, and one for a part of a slot
    assert num_bytes <= num_slots * (84 * 84 + 9 + 4 * num_q_values)


def test_a_million_transitions_take_less_than_7_2_gb(frames_type):
    assert make_replay(frames_type, 1_000_000, num_envs=8, num_q_values=18).num_bytes <= 7.2e9


def test_it_takes_memory_from_its_start_until_it_is_freed(frames_type):
    made = []

    def make_frames(num_slots: int):
        made.append(num_slots)
        return frames_type(num_slots, frames_type.host())

    stream, replay = Stream(2, 10, SOME_ENDS), ReplayBuffer(100, 2, make_frames, NUM_ACTIONS, gamma=GAMMA)
    assert not made
    replay.start(stream.observations[0])
    arrays = [weakref.ref(array) for array in (replay.frames.frames, *replay.columns.values())]
    assert all(array() is not None for array in arrays)
    replay.free()
    assert all(array() is None for array in arrays)
    assert not replay.can_sample
    batch = draw_everything(filled(replay, stream))  # as if it were new
    keys = keys_of(batch)
    assert set(keys) == stream.newest(100, n_step=1)
    assert_transitions(batch, stream, keys)
    assert len(made) == 2


def test_a_buffer_without_transitions_ends_the_drawing():
    """A file can say so, though no run writes one."""
    replay = filled(make_replay(TorchFrames, 40, 2), Stream(2, 60, 0.1))
    replay.columns["is_transition"][:] = False
    empty = make_replay(TorchFrames, 40, 2)
    empty.allocate()
    for buffer in (replay, empty):
        with pytest.raises(SystemExit, match=r"^error: the replay buffer holds no transitions"):
            buffer.draw(8, np.random.default_rng(0))
