"""The wrappers, frame by frame, against those of Stable-Baselines3 and gymnasium; and the ids of games."""

from collections import deque

import cv2
import gymnasium as gym
import numpy as np
import pytest
from ale_py.env import AtariEnv
from stable_baselines3.common import atari_wrappers as stable_baselines3

from cleanrl.qdagger_dqn_atari_impalacnn import EpisodicLife, MaxAndSkip, NoopReset, make_env
from cleanrl.utils.games.atari import RANDOM_SCORES, check_game

SEED = 3
ALL_IDS = sorted(
    name
    for name, spec in gym.registry.items()
    if name.endswith("NoFrameskip-v4") and spec.entry_point == "ale_py.env:AtariEnv"
)


def make_with_stable_baselines3(env_id: str) -> gym.Env:
    """Up to the clipped reward; observations are still colour frames of full size."""
    env = gym.make(env_id)
    env = stable_baselines3.NoopResetEnv(env)
    env = stable_baselines3.MaxAndSkipEnv(env)
    env = stable_baselines3.EpisodicLifeEnv(env)
    if "FIRE" in env.unwrapped.get_action_meanings():
        env = stable_baselines3.FireResetEnv(env)
    return stable_baselines3.ClipRewardEnv(env)


def grey(frame: np.ndarray) -> np.ndarray:
    """As Stable-Baselines3's WarpFrame makes it."""
    return cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)


def resized(frame: np.ndarray) -> np.ndarray:
    return cv2.resize(frame, (84, 84), interpolation=cv2.INTER_AREA)


# game: (has FIRE at the start, whole games to play, lives that are lost in them while the game goes on)
GAMES = {
    "Pong": (True, 1, 0),
    "Breakout": (True, 3, 12),
    "BeamRider": (True, 1, 2),
    "SpaceInvaders": (True, 1, 2),
    "MsPacman": (False, 1, 2),
    "Seaquest": (True, 1, 3),
    "Qbert": (True, 2, 6),
    "BankHeist": (True, 1, 3),  # shows 0 lives for a while before the game is over
    "Freeway": (False, 1, 0),
}
LONG_GAMES = ("BeamRider", "Freeway")


@pytest.mark.parametrize(
    "game", [pytest.param(game, marks=pytest.mark.slow if game in LONG_GAMES else ()) for game in GAMES]
)
def test_whole_games_equal_those_through_stable_baselines3s_wrappers(game):
    has_fire, games, lives_to_lose = GAMES[game]
    ours, theirs = make_env(f"{game}NoFrameskip-v4"), make_with_stable_baselines3(f"{game}NoFrameskip-v4")
    assert (theirs.unwrapped.get_action_meanings()[1] == "FIRE") == has_fire
    rng = np.random.default_rng(SEED)
    observation, _ = ours.reset(seed=SEED)
    frame, _ = theirs.reset(seed=SEED)
    stack = deque([resized(grey(frame))] * 4, maxlen=4)
    lost_lives = games_over = 0
    while games_over < games:
        np.testing.assert_array_equal(observation, stack)
        action = rng.integers(ours.action_space.n)
        observation, *outcome, _ = ours.step(action)
        frame, *expected, _ = theirs.step(action)
        stack.append(resized(grey(frame)))
        assert outcome == expected  # reward, terminated, truncated
        if any(expected):
            np.testing.assert_array_equal(observation, stack)
        if expected[1] or expected[2]:
            if theirs.unwrapped.ale.game_over():
                games_over += 1
            else:
                lost_lives += 1
            observation, _ = ours.reset()
            frame, _ = theirs.reset()
            stack.extend([resized(grey(frame))] * 4)
    np.testing.assert_array_equal(observation, stack)
    assert lost_lives == lives_to_lose


@pytest.mark.parametrize("game", ["Pong", "Breakout", "SpaceInvaders", "Qbert"])
def test_a_whole_game_equals_that_through_gymnasiums_atari_preprocessing(game):
    ours = MaxAndSkip(NoopReset(gym.make(f"{game}NoFrameskip-v4", obs_type="ram")))
    theirs = gym.wrappers.AtariPreprocessing(gym.make(f"{game}NoFrameskip-v4"), grayscale_obs=False)
    rng = np.random.default_rng(SEED)
    frame, _ = ours.reset(seed=SEED)
    theirs.reset(seed=SEED)
    ended = False
    while not ended:  # at the end itself gymnasium shows the frame before
        np.testing.assert_array_equal(frame, grey(theirs.obs_buffer[0]))  # where it takes the maximum
        action = rng.integers(ours.action_space.n)
        frame, *outcome, _ = ours.step(action)
        _, *expected, _ = theirs.step(action)
        assert outcome == expected
        ended = expected[1] or expected[2]
    assert ours.unwrapped.ale.game_over()


@pytest.mark.parametrize("game", ["Breakout", "SpaceInvaders", "MsPacman"])
def test_lost_lives_equal_those_of_gymnasiums_atari_preprocessing(game):
    """Gymnasium stops in the middle of a step when a life is lost; its other frames are played by hand.

    Nobody is reset before the game is over: gymnasium would start a new game.
    """
    ours = EpisodicLife(MaxAndSkip(NoopReset(gym.make(f"{game}NoFrameskip-v4", obs_type="ram"))))
    raw = gym.make(f"{game}NoFrameskip-v4")
    theirs = gym.wrappers.AtariPreprocessing(raw, grayscale_obs=False, terminal_on_life_loss=True)
    rng = np.random.default_rng(SEED)
    ours.reset(seed=SEED)
    theirs.reset(seed=SEED)
    lives = raw.unwrapped.ale.lives()
    ends = 0
    while not raw.unwrapped.ale.game_over():
        action = rng.integers(ours.action_space.n)
        frame, reward, terminated, truncated, _ = ours.step(action)
        _, expected_reward, expected_terminated, expected_truncated, _ = theirs.step(action)
        while raw.unwrapped.ale.getFrameNumber() < ours.unwrapped.ale.getFrameNumber():
            expected_reward += raw.step(action)[1]
        assert (reward, terminated, truncated) == (expected_reward, expected_terminated, expected_truncated)
        if terminated:
            ends += 1
        else:
            np.testing.assert_array_equal(frame, grey(theirs.obs_buffer[0]))
    assert ends == lives > 1


@pytest.mark.slow
def test_every_games_pixels_are_those_that_published_agents_saw():
    """The grey of the colours' maximum, before resizing, over 150 steps of every game.

    ALE's own grey, or the maximum of two grey frames, is another one in many games.
    """
    differs_from_ales_grey = set()
    for env_id in ALL_IDS:
        ours = MaxAndSkip(NoopReset(gym.make(env_id, obs_type="ram")))
        theirs = stable_baselines3.MaxAndSkipEnv(stable_baselines3.NoopResetEnv(gym.make(env_id)))
        rng = np.random.default_rng(SEED)
        (frame, _), (colours, _) = ours.reset(seed=SEED), theirs.reset(seed=SEED)
        for _ in range(150):
            assert np.array_equal(frame, grey(colours)), env_id
            if not np.array_equal(frame, ours.unwrapped.ale.getScreenGrayscale()):
                differs_from_ales_grey.add(env_id)
            action = rng.integers(ours.action_space.n)
            frame, *outcome, _ = ours.step(action)
            colours, *expected, _ = theirs.step(action)
            assert outcome == expected
            if outcome[1]:
                (frame, _), (colours, _) = ours.reset(), theirs.reset()
        ours.close()
        theirs.close()
    assert len(differs_from_ales_grey) > 30  # or this would show nothing


def test_after_each_reset_the_first_frame_fills_the_stack_and_then_moves_by_one():
    env = make_env("BreakoutNoFrameskip-v4")
    rng = np.random.default_rng(SEED)
    resets_after = {"lost life": 0, "game over": 0}
    observation, _ = env.reset(seed=SEED)
    while resets_after["game over"] < 2:
        np.testing.assert_array_equal(observation, [observation[-1]] * 4)
        ended = False
        while not ended:
            previous = observation
            observation, _, terminated, truncated, _ = env.step(rng.integers(4))
            np.testing.assert_array_equal(observation[:-1], previous[1:])
            ended = terminated or truncated
        last_of_episode = observation
        resets_after["game over" if env.unwrapped.ale.game_over() else "lost life"] += 1
        observation, _ = env.reset()
        assert not np.array_equal(observation[0], last_of_episode[-1])
    assert resets_after["lost life"] == 8
    assert (observation.shape, observation.dtype) == ((4, 84, 84), np.uint8)
    assert env.observation_space.contains(observation)


@pytest.mark.parametrize("game", ["MsPacman", "SpaceInvaders", "Seaquest"])
def test_return_and_length_are_of_the_whole_unclipped_game(game, monkeypatch):
    make, counted = gym.make, []

    def make_counted(*args, **kwargs) -> gym.Env:
        counted.append(gym.wrappers.RecordEpisodeStatistics(make(*args, **kwargs)))
        return counted[0]

    monkeypatch.setattr(gym, "make", make_counted)
    env = make_env(f"{game}NoFrameskip-v4")
    rng = np.random.default_rng(SEED)
    env.reset(seed=SEED)
    clipped_return, lost_lives, info = 0.0, 0, {}
    while "episode" not in info:
        _, reward, terminated, truncated, _ = env.step(rng.integers(env.action_space.n))
        assert reward in (-1, 0, 1)
        clipped_return += reward
        if terminated or truncated:
            lost_lives += not env.unwrapped.ale.game_over()
            _, info = env.reset()
    assert info["episode"]["r"] == counted[0].return_queue[0] > clipped_return
    assert info["episode"]["l"] == counted[0].length_queue[0]
    assert len(counted[0].return_queue) == 1
    assert lost_lives >= 2


def first_observations(repeat_action_probability: float, seed: int) -> np.ndarray:
    env = make_env("BreakoutNoFrameskip-v4", repeat_action_probability)
    rng = np.random.default_rng(0)
    env.reset(seed=seed)
    return np.stack([env.step(rng.integers(4))[0] for _ in range(20)])


def test_sticky_actions_change_the_game_and_depend_on_the_seed_alone():
    sticky = first_observations(0.25, seed=SEED)
    np.testing.assert_array_equal(sticky, first_observations(0.25, seed=SEED))
    assert not np.array_equal(sticky, first_observations(0.0, seed=SEED))


@pytest.mark.parametrize("probability", [0.0, 0.25])
def test_each_frame_repeats_the_last_action_with_that_probability(monkeypatch, probability):
    env = make_env("PongNoFrameskip-v4", probability)
    env.reset(seed=SEED)
    assert env.unwrapped.ale.getFloat("repeat_action_probability") == 0  # or it would be sticky twice
    frames, step = [], AtariEnv.step

    def recording_step(self, action):
        frames.append(action)
        return step(self, action)

    monkeypatch.setattr(AtariEnv, "step", recording_step)
    for index in range(1500):
        if env.step(2 + index % 2)[2]:  # another action than before
            break
    played = np.array(frames[: 4 * index]).reshape(index, 4)
    chosen = np.repeat(2 + np.arange(index) % 2, 4).reshape(index, 4)
    is_old = (played != chosen)[1:]
    # Old in frame k if it was repeated k times in a row.
    expected = probability ** np.arange(1, 5)
    np.testing.assert_allclose(is_old.mean(axis=0), expected, atol=0.04)
    assert len(is_old) > 500


def test_a_game_is_cut_off_after_max_game_frames():
    env = make_env("PongNoFrameskip-v4", max_game_frames=401)
    env.reset(seed=SEED)
    for length in (401, 401):  # the second game, too
        terminated = truncated = False
        while not (terminated or truncated):
            _, _, terminated, truncated, _ = env.step(0)
        assert (terminated, truncated) == (False, True)
        _, info = env.reset()
        assert info["episode"]["l"] == length


@pytest.mark.slow
def test_every_game_can_be_made_and_played():
    assert len(ALL_IDS) > 60
    for env_id in ALL_IDS:
        env = make_env(env_id)
        observation, _ = env.reset()  # a seed would load the game a second time
        for action in range(3):
            assert env.observation_space.contains(observation), env_id
            observation, *_ = env.step(action)
        env.close()


def test_every_game_has_a_random_players_score():
    games = {env_id.removesuffix("NoFrameskip-v4") for env_id in ALL_IDS}
    assert set(RANDOM_SCORES) == games | {"Surround"}  # which the papers have and ALE has under another id


@pytest.mark.parametrize(
    ("env_id", "actions"),
    [("PongNoFrameskip-v4", 6), ("BreakoutNoFrameskip-v4", 4), ("SeaquestNoFrameskip-v4", 18)],
)
def test_a_game_has_its_own_actions_only(env_id, actions):
    check_game(env_id)
    assert make_env(env_id).action_space == gym.spaces.Discrete(actions)


@pytest.mark.parametrize(
    ("env_id", "says"),
    [
        ("CartPole-v1", "not an Atari game"),
        ("PongNoFrameskip-v5", "PongNoFrameskip-v4"),
        ("PnogNoFrameskip-v4", "PongNoFrameskip-v4"),
        ("ALE/Pong-v5", "PongNoFrameskip-v4"),
        ("Pong-v4", "PongNoFrameskip-v4"),
        ("Pong", "PongNoFrameskip-v4"),
        ("breakout", "BreakoutNoFrameskip-v4"),
        ("Xyzzy-v0", "{Game}NoFrameskip-v4"),
        ("ContinuousPongNoFrameskip-v4", "Discrete"),
    ],
)
def test_an_id_that_cannot_be_used_gets_one_line(env_id, says):
    continuous = {"game": "pong", "continuous": True, "frameskip": 1}
    gym.register("ContinuousPongNoFrameskip-v4", entry_point="ale_py.env:AtariEnv", kwargs=continuous)
    try:
        with pytest.raises(SystemExit) as stop:
            check_game(env_id)
    finally:
        del gym.registry["ContinuousPongNoFrameskip-v4"]
    message = stop.value.code
    assert "\n" not in message
    assert env_id in message
    assert says in message


def test_the_first_game_is_recorded(tmp_path):
    env = make_env("BreakoutNoFrameskip-v4", max_game_frames=80, video_folder=tmp_path / "videos")
    env.reset(seed=SEED)
    games = 0
    while games < 2:
        _, _, terminated, truncated, _ = env.step(0)
        if terminated or truncated:
            games += "episode" in env.reset()[1]
    env.close()
    (video,) = tmp_path.glob("videos/*.mp4")
    capture = cv2.VideoCapture(str(video))
    assert 70 <= capture.get(cv2.CAP_PROP_FRAME_COUNT) <= 82
    capture.release()
