"""A game whose state is restored continues exactly as it would have."""

from collections import Counter, deque
from functools import partial

import gymnasium as gym
import numpy as np
import pytest

from cleanrl.dqn_atari import make_env
from cleanrl.utils.games.env_state import get_state, set_state
from cleanrl.utils.games.parallel_envs import IDLE, ParallelEnvs
from cleanrl.utils.storage import pack, unpack

PONG, BREAKOUT, BEAM_RIDER = (f"{game}NoFrameskip-v4" for game in ("Pong", "Breakout", "BeamRider"))
STEPS = 150  # a game of 500 frames ends in them


def play(env: gym.Env, actions: np.ndarray) -> list[tuple]:
    """All that the steps give; where an episode ends, also what the reset gives."""
    record = []
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        record.append((observation.tobytes(), float(reward), terminated, truncated, info))
        if terminated or truncated:
            observation, info = env.reset()
            record.append((observation.tobytes(), info))
    return record


def count_ends(record: list[tuple]) -> tuple[int, int]:
    """Ended episodes, and how many of them were a whole game."""
    resets = [entry for entry in record if len(entry) == 2]
    return len(resets), sum("episode" in info for _, info in resets)


@pytest.mark.parametrize(("env_id", "sticky"), [(PONG, 0.0), (BREAKOUT, 0.25), (BEAM_RIDER, 0.0)])
def test_a_restored_game_continues_as_it_would_have(env_id, sticky):
    make = partial(make_env, env_id, sticky, max_game_frames=500)
    rng = np.random.default_rng(0)
    env = make()
    env.reset(seed=3)
    actions = rng.integers(env.action_space.n, size=4 * STEPS)
    for before in (0, 1, 60, 137):
        play(env, actions[:before])
        state = unpack(pack(get_state(env)))
        expected = play(env, actions[-STEPS:])
        other = make()
        other.reset()
        set_state(other, state)
        assert play(other, actions[-STEPS:]) == expected
        assert count_ends(expected)[1] >= 1, "no game was over"
    if env_id == BREAKOUT:
        episodes, games = count_ends(expected)
        assert episodes > games, "no life was lost"


def test_reading_the_state_changes_nothing():
    states = []
    for reads in (False, True):
        env = make_env(BREAKOUT, 0.25, max_game_frames=500)
        env.reset(seed=5)
        record = []
        for action in np.random.default_rng(1).integers(env.action_space.n, size=STEPS):
            record += play(env, [action])
            if reads:
                get_state(env)
        states.append(record)
    assert states[0] == states[1]


def test_a_state_can_be_restored_in_the_middle_of_another_game():
    make = partial(make_env, BREAKOUT, 0.25, max_game_frames=500)
    actions = np.random.default_rng(2).integers(4, size=3 * STEPS)
    env, other = make(), make()
    env.reset(seed=1)
    play(env, actions[:70])
    state = get_state(env)
    expected = play(env, actions[:STEPS])
    other.reset(seed=2)
    play(other, actions[-STEPS:])
    set_state(other, state)
    assert play(other, actions[:STEPS]) == expected


class Counting(gym.Wrapper):
    """Changes rewards by the counts of actions and by random numbers of its own."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.rng, self.counts, self.newest = np.random.default_rng(0), Counter(), deque(maxlen=2)

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.counts[int(action)] += 1
        self.newest.append(self.counts[int(action)])
        reward += self.rng.random() + self.counts["never"] + sum(self.newest)
        return observation, reward, terminated, truncated, info


def test_the_state_of_a_wrapper_of_ones_own_is_saved():
    env, other = (Counting(make_env(PONG)) for _ in range(2))
    for one in (env, other):
        one.reset(seed=1)
    play(env, [2, 3, 2])
    state = unpack(pack(get_state(env)))
    expected = play(env, [2, 3, 4])
    set_state(other, state)
    assert play(other, [2, 3, 4]) == expected


def steps_of(envs: ParallelEnvs, actions: np.ndarray) -> list[tuple]:
    record = []
    for step_actions in actions:
        envs.step_async(step_actions)
        step = envs.step_wait()
        ended = step.terminations | step.truncations
        arrays = (*step[:4], step.final_observations[ended])
        record.append((*(array.tobytes() for array in arrays), step.finished_games))
    return record


@pytest.mark.slow
def test_restored_environments_continue_as_they_would_have_with_any_number_of_workers():
    fns = [partial(make_env, BREAKOUT, 0.25, max_game_frames=500)] * 3
    rng = np.random.default_rng(0)
    before, after = rng.integers(4, size=(40, 3)), rng.integers(4, size=(STEPS, 3))
    with ParallelEnvs(fns, num_workers=2) as envs:
        envs.reset(seed=7)
        last = steps_of(envs, before)[-1]
        states = unpack(pack(envs.get_states()))
        expected = steps_of(envs, after)
    assert any(games for *_, games in expected)
    with ParallelEnvs(fns, num_workers=1) as envs:
        envs.set_states(states)
        assert envs.observations.tobytes() == last[0]
        assert steps_of(envs, after) == expected
        envs.set_states(states)
        assert steps_of(envs, after) == expected


def test_an_idle_environment_keeps_its_observation():
    fns = [partial(make_env, PONG)] * 2
    with ParallelEnvs(fns, num_workers=1) as envs:
        envs.reset(seed=7)
        steps_of(envs, np.array([[2, 3], [2, IDLE], [2, IDLE]]))
        states = envs.get_states()
        observations = np.stack([state["observation"] for state in states])
        envs.set_states(states)
        assert envs.observations.tobytes() == observations.tobytes()
        envs.step_async(np.array([IDLE, IDLE]))
        assert envs.step_wait().observations.tobytes() == observations.tobytes()
