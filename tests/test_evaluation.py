"""Evaluation on games whose returns are known beforehand, and on Pong."""

from functools import partial

import gymnasium as gym
import numpy as np
import pytest

from cleanrl.qdagger_dqn_atari_impalacnn import make_env
from cleanrl.utils.evaluation import MAX_GAME_FRAMES, acting_values, evaluate


class CountingGame(gym.Env):
    """Two lives of random length; a step is worth its action: 1 by the policy below, 0 or 1 at random."""

    observation_space = gym.spaces.Box(0, 255, (1,), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, max_game_frames: int, video_folder=None):
        self.max_game_frames, self.video_folder = max_game_frames, video_folder
        self.statistics, self.game_over = None, True

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        info = {}
        if self.game_over:
            if self.statistics:
                info["episode"] = self.statistics
            self.lives, self.game_return, self.game_length, self.game_over = 2, 0, 0, False
        self.left = int(self.np_random.integers(1, 20))
        return np.zeros(1, np.uint8), info

    def step(self, action):
        self.left -= 1
        self.game_return += int(action)
        self.game_length += 1
        truncated = self.game_length >= self.max_game_frames
        self.lives -= self.left == 0
        self.game_over = self.lives == 0 or truncated
        if self.game_over:
            self.statistics = {"r": float(self.game_return), "l": self.game_length}
            if self.video_folder:
                self.video_folder.mkdir(parents=True, exist_ok=True)
                (self.video_folder / f"{id(self)}.mp4").touch()
        return np.zeros(1, np.uint8), 0.0, self.left == 0, truncated, {}


def prefer_one(observations: np.ndarray) -> np.ndarray:
    return np.tile([0.0, 1.0], (len(observations), 1))


def lengths_of_games(seed: int, env_index: int, num_envs: int, games: int) -> list[int]:
    """Plays one environment's games by hand; with `prefer_one` a game's return is its length."""
    game = CountingGame(max_game_frames=10**6)
    seeds = np.random.SeedSequence(seed).generate_state(num_envs)
    game.reset(seed=int(seeds[env_index]))
    lengths = []
    while len(lengths) < games:
        *_, terminated, truncated, _ = game.step(1)
        if terminated or truncated:
            _, info = game.reset()
            if "episode" in info:
                lengths.append(info["episode"]["l"])
    return lengths


def test_whole_games_of_every_environment_count_and_short_ones_are_not_favoured():
    returns = evaluate(CountingGame, prefer_one, episodes=40, seed=5, epsilon=0.0)
    expected = [lengths_of_games(5, game % 16, 16, 3)[game // 16] for game in range(40)]
    assert returns == expected
    assert max(expected) > 19  # longer than any single life: both were counted


def test_the_number_of_observations_only_falls_whatever_is_played_at_random():
    """For on a GPU each number needs a graph of its own."""
    numbers = []

    def counting(observations: np.ndarray) -> np.ndarray:
        numbers.append(len(observations))
        return prefer_one(observations)

    evaluate(CountingGame, counting, episodes=20, seed=5, epsilon=0.3)
    assert numbers[0] == 16
    assert len(set(numbers)) > 3
    assert numbers == sorted(numbers, reverse=True)


def test_the_same_seed_gives_the_same_games_and_another_seed_others():
    play = partial(evaluate, CountingGame, prefer_one, episodes=20, epsilon=0.5)
    assert play(seed=1) == play(seed=1)
    assert play(seed=1) != play(seed=2)


def test_epsilon_is_the_share_of_random_actions():
    greedy = evaluate(CountingGame, prefer_one, episodes=200, seed=3, epsilon=0.0)
    mixed = evaluate(CountingGame, prefer_one, episodes=200, seed=3, epsilon=0.5)
    # The same environments take the same number of steps; half of the random half scores nothing.
    assert sum(mixed) / sum(greedy) == pytest.approx(0.75, abs=0.03)


def test_a_game_is_bounded():
    assert max(evaluate(CountingGame, prefer_one, episodes=20, seed=0, epsilon=0.0, max_game_frames=7)) == 7
    assert MAX_GAME_FRAMES == 30 * 60 * 60  # half an hour of 60 frames a second


def test_one_environment_records_where_asked(tmp_path):
    evaluate(CountingGame, prefer_one, 20, seed=0, epsilon=0.0, video_folder=tmp_path / "videos")
    assert len(list((tmp_path / "videos").iterdir())) == 1


def test_a_bounded_game_of_pong_is_recorded_without_a_warning(tmp_path, capfd):
    def noop(observations):
        assert observations.shape[1:] == (4, 84, 84)
        return np.tile([1.0] + [0.0] * 5, (len(observations), 1))

    make_pong = partial(make_env, "PongNoFrameskip-v4")
    folder = tmp_path / "videos"
    (episodic_return,) = evaluate(make_pong, noop, 1, 0, 0.0, max_game_frames=600, video_folder=folder)
    assert -21 < episodic_return < 0
    assert capfd.readouterr().err == ""
    videos = list(folder.glob("*.mp4"))
    assert len(videos) == 1
    assert videos[0].stat().st_size > 10_000


def test_it_says_how_far_it_has_come():
    said = []
    returns = evaluate(
        CountingGame, prefer_one, 20, seed=0, epsilon=0.0, after_step=lambda *so_far: said.append(so_far)
    )
    steps, games = np.transpose(said)
    assert steps[-1] == sum(returns)  # each step is worth 1
    assert games[-1] == 20
    assert (np.diff(games) >= 0).all()
    assert ((np.diff(steps) >= 1) & (np.diff(steps) <= 16)).all()


def test_above_a_temperature_of_0_actions_are_samples_of_the_policy():
    """ln 3 apart at temperature 1, the second action is three times as likely."""
    q_values = np.array([[0.0, np.log(3)], [5.0, 5.0], [0.0, -200.0]], np.float32)
    rng = np.random.default_rng(0)
    for temperature in (1.0, 0.25):
        actions = [
            acting_values(rng, temperature * q_values, temperature).argmax(axis=1) for _ in range(4000)
        ]
        np.testing.assert_allclose(np.mean(actions, axis=0), [0.75, 0.5, 0.0], atol=0.03)
    assert acting_values(None, q_values, 0.0) is q_values


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_values_that_are_not_finite_are_no_play(value, temperature):
    """A teacher's, whose weights are finite, would make the student's losses NaN."""
    with pytest.raises(SystemExit, match="outputs values that are not finite; use another teacher"):
        acting_values(np.random.default_rng(0), np.array([[0.0, value]]), temperature)


def test_a_sampling_player_plays_its_policy():
    """Each step is worth 1 with probability 3/4; without sampling it always is."""

    def play(sampling_temperature: float) -> list[float]:
        return evaluate(
            CountingGame,
            lambda observations: np.tile([0.0, np.log(3)], (len(observations), 1)),
            episodes=64,
            seed=0,
            epsilon=0.0,
            sampling_temperature=sampling_temperature,
        )

    lengths, returns = play(0.0), play(1.0)
    assert play(1.0) == returns
    assert np.sum(returns) / np.sum(lengths) == pytest.approx(0.75, abs=0.05)
