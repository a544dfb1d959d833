"""Plays whole games with a policy and returns what they scored. Knows no framework and no algorithm."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np

from cleanrl.utils.games.parallel_envs import IDLE, ParallelEnvs

MAX_GAME_FRAMES = 108_000  # half an hour at 60 frames a second, the field's usual bound
MAX_PARALLEL_GAMES = 16


def acting_values(rng: np.random.Generator, q_values: np.ndarray, sampling_temperature: float) -> np.ndarray:
    """Values (n, actions) whose argmax is the player's action: at temperature 0, the Q-values themselves.

    Above 0, their argmax is a sample from softmax(Q / temperature), by the Gumbel-max trick.

    Raises:
        SystemExit: with a one-line error, if they are not finite, as those of finite weights may be.
    """
    if not np.isfinite(q_values).all():
        raise SystemExit(
            "error: the acting network outputs values that are not finite; use another teacher or, if it"
            " is the student, a lower --learning-rate"
        )
    if not sampling_temperature:
        return q_values
    return q_values / sampling_temperature + rng.gumbel(size=q_values.shape)


def evaluate(
    make_env: Callable[..., gym.Env],
    q_values: Callable[[np.ndarray], np.ndarray],
    episodes: int,
    seed: int | Sequence[int],
    epsilon: float,
    max_game_frames: int = MAX_GAME_FRAMES,
    video_folder: Path | None = None,
    before_step: Callable[[], None] = lambda: None,
    after_step: Callable[[int, int], None] = lambda num_steps, num_games: None,
    sampling_temperature: float = 0.0,
) -> list[float]:
    """Plays `episodes` whole games side by side and returns their unclipped returns.

    Which games count is decided before they start (environment k of n plays games k, k + n, …), so that short
    games are not favoured. The same seed gives the same games.

    Args:
        make_env: makes an environment; takes the keywords `max_game_frames` and `video_folder`, and reports a
            finished game as `ParallelEnvs` describes. Must be picklable.
        q_values: from observations (n, *observation_shape) to Q-values (n, actions); n falls as games end.
        seed: of the environments and of the exploration.
        epsilon: the probability of a random action.
        max_game_frames: a game ends after this many emulator frames and counts with its return so far.
        video_folder: where the first game is recorded as an mp4 file; None: nowhere.
        before_step: called before each step; what it raises ends the games.
        after_step: called after each step with the environment steps and the finished games so far.
        sampling_temperature: see `acting_values`.

    Raises:
        WorkerError: an environment worker failed.
    """
    num_envs = min(episodes, MAX_PARALLEL_GAMES)
    games_left = np.array([len(range(env, episodes, num_envs)) for env in range(num_envs)])
    returns: list[list[float]] = [[] for _ in range(num_envs)]
    num_steps = 0
    rng = np.random.default_rng(seed)
    make_env = partial(make_env, max_game_frames=max_game_frames)
    env_fns = [partial(make_env, video_folder=video_folder if env == 0 else None) for env in range(num_envs)]
    with ParallelEnvs(env_fns, probe_fn=make_env) as envs:  # the probe must not take the video's place
        observations = envs.reset(seed)
        while games_left.any():
            before_step()
            playing = games_left > 0
            actions = rng.integers(envs.action_space.n, size=num_envs)
            greedy = playing & (rng.random(num_envs) >= epsilon)
            if greedy.any():
                # For all that play, since on a GPU every other number of them needs a graph of its own.
                players_values = q_values(observations[playing])[greedy[playing]]
                values = acting_values(rng, players_values, sampling_temperature)
                actions[greedy] = values.argmax(axis=1)
            envs.step_async(np.where(playing, actions, IDLE))
            step = envs.step_wait()
            observations = step.observations
            for game in step.finished_games:
                returns[game.env_index].append(game.episodic_return)
                games_left[game.env_index] -= 1
            num_steps += int(playing.sum())
            after_step(num_steps, episodes - int(games_left.sum()))
    return [returns[game % num_envs][game // num_envs] for game in range(episodes)]
