"""Training without games, files and time: what the phases do when, and what they plot, stays the same."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
from both_scripts import (
    NUM_ACTIONS,
    PONG_TEACHER,
    Weights,
    create_state,
    is_qdagger,
    linear_teacher,
    set_weights,
    use_network,
    weights,
)

from cleanrl.utils.games.parallel_envs import FinishedGame, StepResult
from cleanrl.utils.run import training_run

TINY = {  # a whole run of a few seconds
    "env_id": "PongNoFrameskip-v4",
    "teacher_model_path": PONG_TEACHER,
    "return_normalization": "random",  # a game of Pong that is cut short can end below 0
    "teacher_eval_episodes": 2,
    "teacher_steps": 64,
    "offline_steps": 6,
    "offline_eval_frequency": 4,
    "total_timesteps": 64,
    "learning_starts": 16,
    "train_frequency": 4,
    "target_network_frequency": 3,
    "buffer_size": 60,
    "batch_size": 8,
    "eval_episodes": 2,
}
REHEARSAL = {
    "teacher_steps": 48,
    "offline_steps": 30,
    "offline_eval_frequency": 7,
    "total_timesteps": 240,
    "learning_starts": 50,
    "train_frequency": 4,
    "target_network_frequency": 40,
    "exploration_fraction": 0.5,
    "buffer_size": 1000,
    "batch_size": 8,
    "learning_rate": 1e-3,
    "gamma": 0.5,
}


class NoGame:
    """Stands in for ParallelEnvs: black frames, the same reward in each step, and no episode ends.

    Every environment reports a finished game each `game_length` steps. Its return is `game_return` plus the
    environment's index.
    """

    action_space = gym.spaces.Discrete(NUM_ACTIONS)

    def __init__(
        self, num_envs: int, reward: float = 0.0, game_length: int = 10**9, game_return: float = 0.0
    ):
        self.num_envs, self.reward = num_envs, reward
        self.game_length, self.game_return = game_length, game_return
        self.actions: list[list[int]] = []

    def reset(self, seed: Sequence[int]) -> None:
        self.steps = 0
        self.observations = np.zeros((self.num_envs, 4, 84, 84), np.uint8)

    def step_async(self, actions: np.ndarray) -> None:
        assert actions.shape == (self.num_envs,)
        self.steps += 1
        self.actions.append(actions.tolist())

    def step_wait(self) -> StepResult:
        games = []
        if self.steps % self.game_length == 0:
            length = 4 * self.game_length
            games = [FinishedGame(i, self.game_return + i, length) for i in range(self.num_envs)]
        no, rewards = np.zeros(self.num_envs, bool), np.full(self.num_envs, self.reward, np.float32)
        return StepResult(self.observations, rewards, no, no, self.observations, games)

    def get_states(self) -> list:
        return []

    def set_states(self, states: list) -> None:
        self.reset(())

    def __enter__(self) -> "NoGame":
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class RandomGame(NoGame):
    """Random frames and rewards, the same for every script; episodes end in both ways."""

    def reset(self, seed: Sequence[int]) -> None:
        super().reset(seed)
        self.rng = np.random.default_rng(0)
        self.observations = self._first_observations()

    def _frames(self) -> np.ndarray:
        return self.rng.integers(256, size=(self.num_envs, 1, 84, 84), dtype=np.uint8)

    def _first_observations(self) -> np.ndarray:
        return np.repeat(self._frames(), 4, axis=1)

    def step_wait(self) -> StepResult:
        final_observations = np.concatenate([self.observations[:, 1:], self._frames()], axis=1)
        terminations, truncations = self.rng.random((2, self.num_envs)) < 0.1
        ended = (terminations | truncations)[:, None, None, None]
        self.observations = np.where(ended, self._first_observations(), final_observations)
        rewards = self.rng.choice([-1, 0, 1], self.num_envs).astype(np.float32)
        return super().step_wait()._replace(
            observations=self.observations, rewards=rewards, terminations=terminations,
            truncations=truncations, final_observations=final_observations,
        )  # fmt: skip


def shorten_games(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has every TrainingRun cut off the games of an evaluation after a few frames."""
    monkeypatch.setattr(training_run, "evaluate", partial(training_run.evaluate, max_game_frames=300))


def replace_games(monkeypatch: pytest.MonkeyPatch, game_return: float = 1.0) -> None:
    """Has every TrainingRun play games that take no time; in an evaluation each has the same return."""

    def evaluate(make_env: Callable, q_values: Callable, episodes: int, **settings: Any) -> list[float]:
        settings["before_step"]()
        return [game_return] * episodes

    monkeypatch.setattr(training_run, "evaluate", evaluate)
    monkeypatch.setattr(training_run, "ParallelEnvs", lambda env_fns: RandomGame(len(env_fns), game_length=5))


class NoRun:
    """Stands in for TrainingRun: it keeps what would be plotted and saved.

    points: (step, value) by tag
    played: the names of the evaluations
    num_games: of each of them
    saved: for each saved model its file's suffix and the weights
    candidates: the mean returns of the networks of which the best is to be kept
    seeds: of the environments of each phase
    games: those of the last phase
    checkpoints: how often one could have been made
    """

    def __init__(self, make_games: Callable[[int], NoGame]):
        self.make_games = make_games
        self.points: dict[str, list[tuple[int, float]]] = {}
        self.played: list[str] = []
        self.num_games: list[int] = []
        self.played_temperatures: list[float] = []  # of each call of `play`
        self.played_q_values: list[float] = []  # of each call of `play`, for black frames
        self.saved: list[tuple[str, Weights]] = []
        self.candidates: list[float] = []
        self.seeds: list[Sequence[int]] = []
        self.checkpoints = 0

    @contextmanager
    def open_envs(self, num_envs: int, seed: Sequence[int]) -> Iterator[NoGame]:
        self.seeds.append(seed)
        self.games = self.make_games(num_envs)
        self.games.reset(seed)
        yield self.games

    def progress(self, name: str, done: int, total: int, unit: str) -> AbstractContextManager:
        return nullcontext(mock.MagicMock())

    def checkpoint(self) -> None:
        self.checkpoints += 1

    def say(self, text: str) -> None:
        pass

    def plot(self, values: dict[str, Any], step: int) -> None:
        for tag, value in values.items():
            self.points.setdefault(tag, []).append((step, float(value)))

    def plot_game(self, game: FinishedGame, step: int) -> None:
        self.plot({"charts/episodic_return": game.episodic_return}, step)
        self.plot({"charts/episodic_length": game.episodic_length}, step)

    def play(
        self,
        name: str,
        compute_q_values: Callable,
        num_games: int,
        step: int,
        sampling_temperature: float = 0.0,
    ) -> list[float]:
        self.played.append(name)
        self.num_games.append(num_games)
        self.played_temperatures.append(sampling_temperature)
        self.played_q_values.append(compute_q_values(np.zeros((1, 4, 84, 84), np.uint8)).max().item())
        return [0.5]

    def keep_if_best(self, mean_return: float) -> None:
        self.candidates.append(mean_return)

    def save_model(self, network: Any, suffix: str = "") -> None:
        self.saved.append((suffix, weights(network)))


@dataclass
class Rehearsed:
    """What happened in a rehearsal."""

    run: NoRun
    state: Any
    teacher_epsilon: list[float]
    """ε of every step of the teacher's, over all environments"""
    epsilon: list[float]
    """the same of the student's"""
    teacher_actions: list[list[int]]
    actions: list[list[int]]

    @property
    def points(self) -> dict[str, list[tuple[int, float]]]:
        return self.run.points

    def values(self, tag: str) -> np.ndarray:
        return np.array([value for _, value in self.points[tag]])

    def coefficients(self) -> np.ndarray:
        """The distillation coefficient of every gradient step online whose losses were plotted."""
        weighted = self.values("losses/loss") - self.values("losses/td_loss")
        return weighted / self.values("losses/distill_loss")


def options_of(script: ModuleType, options: dict[str, Any]) -> dict[str, Any]:
    """Those that the script has: a DQN has no teacher."""
    return {field.name: options[field.name] for field in fields(script.Args) if field.name in options}


def tiny_args(script: ModuleType, **options: Any) -> Any:
    return script.Args(**options_of(script, TINY) | options)


def rehearsal_args(script: ModuleType, num_envs: int, **options: Any) -> Any:
    return script.Args(num_envs=num_envs, **options_of(script, REHEARSAL) | options)


def rehearse(
    script: ModuleType,
    num_envs: int,
    make_games: Callable[[int], NoGame] = NoGame,
    teacher: Any = None,
    start: Weights | None = None,
    loss_interval: int = 1,
    steps_per_call: int | None = None,
    **options: Any,
) -> Rehearsed:
    """Trains a network that is one number, or the linear one `start`, with games that take no time.

    Args:
        script: one of the four.
        num_envs: environments in every phase.
        make_games: makes that many.
        teacher: by default it prefers the last action, everywhere. G_T is 20.
        start: the network's weights.
        loss_interval: gradient steps between two points of a loss curve.
        steps_per_call: gradient steps that are done in one call, if not as many as usual on a CPU.
        options: the script's, beside those of `REHEARSAL`.
    """
    args = rehearsal_args(script, num_envs, **options)
    epsilons: list[float] = []
    epsilon_greedy = script.epsilon_greedy

    def recording_epsilon_greedy(rng: np.random.Generator, epsilon: Any, q_values: np.ndarray) -> np.ndarray:
        epsilons.extend(np.broadcast_to(epsilon, len(q_values)))
        return epsilon_greedy(rng, epsilon, q_values)

    with pytest.MonkeyPatch.context() as monkeypatch:
        use_network(monkeypatch, script, "linear" if start else "number")
        monkeypatch.setattr(script, "epsilon_greedy", recording_epsilon_greedy)
        monkeypatch.setattr(script, "LOSS_INTERVAL", loss_interval)
        if steps_per_call:
            monkeypatch.setattr(script, "steps_per_call", lambda state: steps_per_call)
        state, run = create_state(script, args), NoRun(make_games)
        if start:
            set_weights(state, start)
            for role in ("target", "ema_student")[: 1 + is_qdagger(script)]:
                set_weights(state, start, role)
        teacher_epsilon, teacher_actions = [], []
        if is_qdagger(script):
            if teacher is None:
                preferences = np.arange(NUM_ACTIONS, dtype=np.float32)
                teacher = linear_teacher(script, np.zeros((196, NUM_ACTIONS), np.float32), preferences)
            script.fill_teacher_replay(args, state, teacher, run)
            teacher_epsilon, teacher_actions = epsilons.copy(), run.games.actions
            epsilons.clear()
            script.train_offline(args, state, run)
            state.teacher_return = 20.0
            script.train_online(args, state, teacher, run)
        else:
            script.train(args, state, run)
    return Rehearsed(run, state, teacher_epsilon, epsilons, teacher_actions, run.games.actions)


def td_losses_by_the_rules(args: Any, reward: float) -> tuple[list[float], list[tuple[int, float]]]:
    """The TD loss of each gradient step offline, and online with its step, of a network that is one number.

    Every step of the game gives the same reward, and no episode ends. In float64, one step at a time. A DQN
    has no offline phase.
    """
    number = target = 1.0
    mean = square = 0.0
    n_step, offline_steps = getattr(args, "n_step", 1), getattr(args, "offline_steps", 0)
    gradient_steps = 0

    def adam_step() -> float:
        nonlocal number, mean, square, gradient_steps
        rewards = sum(args.gamma**k * reward for k in range(n_step))
        error = number - (rewards + args.gamma**n_step * target)
        gradient_steps += 1
        mean, square = 0.9 * mean + 0.1 * 2 * error, 0.999 * square + 0.001 * (2 * error) ** 2
        root = np.sqrt(square / (1 - 0.999**gradient_steps))
        number -= args.learning_rate * mean / (1 - 0.9**gradient_steps) / (root + 1e-8)
        return error**2

    offline, online = [], []
    for step in range(1, offline_steps + 1):
        offline.append(adam_step())
        if step % args.target_network_frequency == 0:
            target += args.tau * (number - target)
    target = number
    for step in range(args.learning_starts + 1, args.total_timesteps + 1):
        if step % args.train_frequency == 0:
            online.append((offline_steps + step, adam_step()))
        if step % args.target_network_frequency == 0:
            target += args.tau * (number - target)
    return offline, online
