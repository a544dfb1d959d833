"""DQN (Mnih et al., 2015, "Human-level control through deep reinforcement learning") on Atari, in JAX.

It learns a game from scratch: it plays ε-greedily, stores its experience in a replay buffer, and learns from
that. Its network can teach QDagger, as can its replay buffer (`--save-replay`).

    python cleanrl/dqn_atari_jax.py --env-id BreakoutNoFrameskip-v4
"""

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if not __package__:  # started as a file: makes `cleanrl` importable, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cleanrl.utils.bounds import Fraction, Name, NonNegativeInt, PositiveFloat, PositiveInt
from cleanrl.utils.command_line import read_arguments
from cleanrl.utils.run.options import RunOptions
from cleanrl.utils.shell import prepare_command

# ----------------------------------------------------------------------------------------------- options


@dataclass(unsafe_hash=True)  # JAX compiles for its values
class Args(RunOptions):  # --seed, --env-id, --num-envs, …: see cleanrl/utils/run/options.py
    exp_name: Name = Path(__file__).stem

    # learning
    total_timesteps: PositiveInt = 10_000_000
    """environment steps (4 frames each)"""
    learning_rate: PositiveFloat = 1e-4
    """learning rate of Adam"""
    buffer_size: PositiveInt = 1_000_000
    """capacity of the replay buffer in frames: one per transition and one per end of an episode"""
    gamma: Fraction = 0.99
    """discount factor"""
    tau: Fraction = 1.0
    """weight of the Q-network in each target network update; 1: a copy"""
    target_network_frequency: PositiveInt = 1000
    """environment steps between target network updates"""
    batch_size: PositiveInt = 32
    """transitions per gradient step"""
    start_e: Fraction = 1.0
    """epsilon at the start"""
    end_e: Fraction = 0.01
    """epsilon at the end and in every evaluation"""
    exploration_fraction: Fraction = 0.10
    """fraction of total_timesteps over which epsilon falls"""
    learning_starts: NonNegativeInt = 80_000
    """environment steps before the first gradient step"""
    train_frequency: PositiveInt = 4
    """environment steps per gradient step"""
    eval_episodes: PositiveInt = 10
    """games in each evaluation"""
    eval_frequency: NonNegativeInt = 0
    """environment steps between evaluations; the best network is saved too; 0: only one, at the end"""
    save_replay: Path | None = None
    """a new folder for the replay buffer, saved at the end, for QDagger's --teacher-replay-path"""


if __name__ == "__main__":  # before the imports below, which take seconds
    prepare_command()
    ARGS = read_arguments(Args)

import cv2
import flax.linen as nn
import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import Array, lax
from numpy.typing import ArrayLike

from cleanrl.utils.evaluation import MAX_GAME_FRAMES
from cleanrl.utils.games.statistics import EpisodeStatistics
from cleanrl.utils.games.video import RecordGame
from cleanrl.utils.gpu_jax import choose_device
from cleanrl.utils.replay.frames_jax import JaxFrames, padded
from cleanrl.utils.replay.ring import Batch, ReplayBuffer
from cleanrl.utils.replay.saved_replay import check_new_folder, save_replay
from cleanrl.utils.run.charts import DQN_CHARTS
from cleanrl.utils.run.memory import plan_replay
from cleanrl.utils.run.training_run import TrainingRun

LOSS_INTERVAL = 100  # gradient steps between two points of a loss curve
CHART_INTERVAL = 1000  # environment steps between two points of the other curves
TRAINING_SEED = 1  # with --seed, what the games start from


# ------------------------------------------------------------------------------------------- environment


class NoopReset(gym.Wrapper):
    """Starts each game with 1 to 30 no-ops (Mnih et al., 2015)."""

    def reset(self, **kwargs):
        observation, reset_info = self.env.reset(**kwargs)
        for _ in range(self.unwrapped.np_random.integers(1, 31)):
            observation, _, terminated, truncated, _ = self.env.step(0)
            if terminated or truncated:
                observation, _ = self.env.reset()
        return observation, reset_info


class MaxAndSkip(gym.Wrapper):
    """Repeats an action for 4 frames; shows the pixel-wise maximum of the last 2, as some sprites flicker.

    The maximum is taken of the colours, then turned to grey, uint8 (height, width).
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        height, width = self.unwrapped.ale.getScreenDims()
        self.observation_space = gym.spaces.Box(0, 255, (height, width), np.uint8)
        self.last_frames = np.zeros((2, height, width, 3), np.uint8)

    def reset(self, **kwargs):
        _, info = self.env.reset(**kwargs)
        return cv2.cvtColor(self.unwrapped.ale.getScreenRGB(), cv2.COLOR_RGB2GRAY), info

    def step(self, action):
        total_reward = 0.0
        for repeat in range(4):
            _, reward, terminated, truncated, info = self.env.step(action)
            total_reward += reward
            if repeat >= 2:
                self.unwrapped.ale.getScreenRGB(self.last_frames[repeat - 2])
            if terminated or truncated:
                break
        frame = cv2.cvtColor(np.maximum(*self.last_frames), cv2.COLOR_RGB2GRAY)
        return frame, total_reward, terminated, truncated, info


class EpisodicLife(gym.Wrapper):
    """A lost life ends the episode for the learner while the game continues."""

    lives = 0
    game_over = True

    def reset(self, **kwargs):
        if not self.game_over:
            observation, _, terminated, truncated, info = self.env.step(0)
            self.game_over = terminated or truncated
        if self.game_over:
            observation, info = self.env.reset(**kwargs)
            self.game_over = False
        self.lives = self.unwrapped.ale.lives()
        return observation, info

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.game_over = terminated or truncated
        lives = self.unwrapped.ale.lives()
        # Some games show 0 lives for a few frames before they are over.
        terminated = terminated or 0 < lives < self.lives
        self.lives = lives
        return observation, reward, terminated, truncated, info


class FireReset(gym.Wrapper):
    """Presses FIRE, then performs action 2, at the start of each episode: some games wait for it."""

    def reset(self, **kwargs):
        observation, reset_info = self.env.reset(**kwargs)
        for action in (1, 2):
            observation, _, terminated, truncated, _ = self.env.step(action)
            if terminated or truncated:
                observation, info = self.env.reset()
                reset_info.update(info)
        return observation, reset_info


def make_env(
    env_id: str,
    repeat_action_probability: float = 0.0,
    max_game_frames: int = MAX_GAME_FRAMES,
    video_folder: Path | None = None,
) -> gym.Env:
    """Makes an Atari game, preprocessed as in Mnih et al. (2015): observations uint8 (4, 84, 84)."""
    cv2.setNumThreads(1)  # the workers already take the cores
    env = gym.make(
        env_id,
        obs_type="ram",  # MaxAndSkip renders the frames that it shows
        repeat_action_probability=0.0,  # ALE's own sticky actions are not in the state that it can save
        max_num_frames_per_episode=max_game_frames,
        render_mode="rgb_array" if video_folder else None,
        disable_env_checker=True,
    )
    if video_folder:
        env = RecordGame(env, video_folder)
    if repeat_action_probability:
        env = gym.wrappers.StickyAction(env, repeat_action_probability)
    env = EpisodeStatistics(env)
    env = NoopReset(env)
    env = MaxAndSkip(env)
    env = EpisodicLife(env)
    if "FIRE" in env.unwrapped.get_action_meanings():
        env = FireReset(env)
    env = gym.wrappers.TransformReward(env, np.sign)
    env = gym.wrappers.ResizeObservation(env, (84, 84))  # by area interpolation
    return gym.wrappers.FrameStackObservation(env, 4)  # oldest first; after a reset the first frame fills it


# ---------------------------------------------------------------------------------------------- networks


class QNetwork(nn.Module):
    """The DQN network (Mnih et al., 2015): uint8 (batch, 4, 84, 84) to Q-values (batch, num_actions)."""

    num_actions: int

    @nn.compact
    def __call__(self, observations: Array) -> Array:
        x = jnp.transpose(observations, (0, 2, 3, 1)) / 255.0
        x = nn.relu(nn.Conv(32, (8, 8), strides=4, padding="VALID")(x))
        x = nn.relu(nn.Conv(64, (4, 4), strides=2, padding="VALID")(x))
        x = nn.relu(nn.Conv(64, (3, 3), strides=1, padding="VALID")(x))
        x = nn.relu(nn.Dense(512)(x.reshape(len(x), -1)))
        return nn.Dense(self.num_actions)(x)


@struct.dataclass
class QFunction:
    """A network with its parameters: uint8 (batch, 4, 84, 84) to Q-values (batch, num_actions)."""

    params: dict
    network: nn.Module = struct.field(pytree_node=False)

    def __call__(self, observations: Array) -> Array:
        return self.network.apply(self.params, observations)


# ------------------------------------------------------------------------------------------------ losses


def td_targets(rewards: Array, terminations: Array, discounts: Array, next_q_values: Array) -> Array:
    """y = r + γ (1 − terminated) max_a' Q_target(s', a'), float32 (batch,).

    `discounts` are γ, or γⁿ after n steps; `next_q_values` are (batch, num_actions), all others (batch,).
    """
    return rewards + discounts * (1 - terminations) * next_q_values.max(axis=1)


def linear_schedule(start: float, end: float, duration: float, step: ArrayLike) -> np.ndarray:
    """Linear from `start` at step 0 to `end` at step `duration`, then constant."""
    return start + (end - start) * np.minimum(np.divide(step, max(duration, 1)), 1.0)


# ---------------------------------------------------------------------------------------------- learning

Losses = dict[str, Array]


@struct.dataclass
class Learner:
    """The networks and the optimizer's state, all on the training device."""

    q_network: QFunction
    target_network: QFunction
    optimizer_state: optax.OptState


@dataclass
class TrainState:
    """A run's whole state. A checkpoint saves every field: see `cleanrl.utils.run.state`."""

    learner: Learner
    rng: np.random.Generator  # of exploration and of drawing batches
    replay: ReplayBuffer
    step: int = 0  # environment steps
    learned_step: int = 0  # the last of these for which all learning is done
    evaluated_step: int = 0  # that of the last evaluation
    gradient_steps: int = 0
    seconds: float = 0.0  # of training

    @property
    def q_network(self) -> QFunction:
        return self.learner.q_network

    @property
    def device(self) -> jax.Device:
        return jax.tree.leaves(self.learner)[0].device


def create_train_state(args: Args, num_actions: int, device: jax.Device) -> TrainState:
    network = QNetwork(num_actions)
    params = jax.jit(network.init)(jax.random.key(args.seed), jnp.zeros((1, 4, 84, 84), jnp.uint8))
    q_network = QFunction(params, network)
    target_network = jax.tree.map(jnp.copy, q_network)
    learner = Learner(q_network, target_network, optax.adam(args.learning_rate).init(q_network))
    replay = plan_replay(args, num_actions, JaxFrames, device)
    return TrainState(jax.device_put(learner, device), np.random.default_rng(args.seed), replay)


@partial(jax.jit, static_argnames="args", donate_argnames="learner")
def update(args: Args, learner: Learner, frames: Array, batches: Batch) -> tuple[Learner, Losses]:
    """A gradient step per batch (k, …); the last one's loss, mean((y − Q(s, a))²), is returned too."""

    def gradient_step(learner: Learner, batch: Batch) -> tuple[Learner, Losses]:
        next_q_values = learner.target_network(frames[batch.next_stacks])
        targets = td_targets(batch.rewards, batch.terminations, batch.discounts, next_q_values)

        def compute_loss(q_network: QFunction) -> tuple[Array, Losses]:
            q_values = q_network(frames[batch.stacks])[jnp.arange(len(batch.actions)), batch.actions]
            loss = jnp.square(targets - q_values).mean()
            return loss, {"td_loss": loss, "q_values": q_values.mean()}

        gradients, losses = jax.grad(compute_loss, has_aux=True)(learner.q_network)
        updates, optimizer_state = optax.adam(args.learning_rate).update(gradients, learner.optimizer_state)
        q_network = optax.apply_updates(learner.q_network, updates)
        return learner.replace(q_network=q_network, optimizer_state=optimizer_state), losses

    # On a CPU, convolutions in a loop are ten times slower; on a GPU, a loop of 1 or 2 steps costs more
    # launches than it saves.
    unroll = 1 if jax.default_backend() != "cpu" and len(batches.actions) > 2 else 0  # 0: no loop
    learner, losses = lax.scan(gradient_step, learner, batches, unroll=unroll)
    return learner, {name: values[-1] for name, values in losses.items()}


def learn(args: Args, state: TrainState, num_steps: int) -> Losses:
    """Gradient steps, each on a batch of its own; returns the last one's losses."""
    batches = state.replay.sample(args.batch_size, state.rng, num_batches=num_steps)
    state.learner, losses = update(args, state.learner, *state.replay.frames.place(batches, state.device))
    state.gradient_steps += num_steps
    return losses


def steps_per_call(state: TrainState) -> int:
    """The most gradient steps in one call of `learn`; on a CPU compile time grows with their number."""
    return 2 if state.device.platform == "cpu" else 10


@partial(jax.jit, static_argnames="tau", donate_argnames="learner")
def move_target_network(learner: Learner, tau: float) -> Learner:
    target_network = optax.incremental_update(learner.q_network, learner.target_network, tau)
    return learner.replace(target_network=target_network)


def update_target_network(state: TrainState, tau: float) -> None:
    state.learner = move_target_network(state.learner, tau)


@jax.jit
def forward(network: QFunction, observations: Array) -> Array:
    return network(observations)


def compute_q_values(network: QFunction, observations: np.ndarray) -> np.ndarray:
    """Q-values float32 (n, num_actions) of observations uint8 (n, 4, 84, 84)."""
    q_values = forward(network, jax.device_put(padded(observations)))  # to 2^k, as each size is compiled
    return jax.device_get(q_values)[: len(observations)]


# ---------------------------------------------------------------------------------------------- training


def epsilon_greedy(rng: np.random.Generator, epsilon: ArrayLike, q_values: np.ndarray) -> np.ndarray:
    """ε-greedy actions int64 (n,) from Q-values (n, num_actions); ε is a scalar or one per environment."""
    random_actions = rng.integers(q_values.shape[1], size=len(q_values))
    return np.where(rng.random(len(q_values)) < epsilon, random_actions, q_values.argmax(axis=1))


def train(args: Args, state: TrainState, run: TrainingRun) -> None:
    """Plays and learns in parallel."""
    with (
        run.open_envs(args.num_envs, seed=(args.seed, TRAINING_SEED)) as envs,
        run.progress("training", state.step, args.total_timesteps, "steps") as progress,
    ):
        state.replay.start(envs.observations)
        start_time = time.monotonic() - state.seconds
        exploration_steps = args.exploration_fraction * args.total_timesteps
        while state.step < args.total_timesteps:
            run.checkpoint()
            if 0 < args.eval_frequency <= state.step - state.evaluated_step:
                run.keep_if_best(evaluate(args, state, run))
                start_time = time.monotonic() - state.seconds
                continue
            steps = state.step + np.arange(args.num_envs)
            epsilon = linear_schedule(args.start_e, args.end_e, exploration_steps, steps)
            actions = epsilon_greedy(state.rng, epsilon, compute_q_values(state.q_network, envs.observations))
            envs.step_async(actions)
            learn_online(args, state, run)  # while the games step
            result = envs.step_wait()
            state.replay.add(actions, result)
            for game in result.finished_games:
                run.plot_game(game, state.step + game.env_index + 1)
            state.step += args.num_envs
            state.seconds = time.monotonic() - start_time
            progress.update(args.num_envs)
            if state.step >= args.total_timesteps or state.step % CHART_INTERVAL < args.num_envs:
                values = {"charts/epsilon": epsilon[-1], "charts/SPS": state.step / state.seconds}
                run.plot(values, state.step)
    learn_online(args, state, run)


def evaluate(args: Args, state: TrainState, run: TrainingRun) -> float:
    """The network's mean return with ε = `end_e`."""
    q_values = partial(compute_q_values, state.q_network)
    mean_return = float(np.mean(run.play(f"online-{state.step}", q_values, args.eval_episodes, state.step)))
    run.plot({"charts/online/avg_episodic_return": mean_return}, state.step)
    run.say(f"step {state.step:,}: mean return {mean_return:.2f}")
    state.evaluated_step = state.step
    return mean_return


def learn_online(args: Args, state: TrainState, run: TrainingRun) -> None:
    """Performs, in order, the gradient steps and target updates that are due."""
    last_step = min(state.step, args.total_timesteps)
    num_due, most_due = 0, steps_per_call(state)  # gradient steps to be done in one call
    for step in range(state.learned_step + 1, last_step + 1):
        state.learned_step = step
        if step <= args.learning_starts:
            continue
        is_plotted = False
        if step % args.train_frequency == 0:
            num_due += 1
            is_last = step + args.train_frequency > args.total_timesteps
            is_plotted = is_last or (state.gradient_steps + num_due) % LOSS_INTERVAL == 0
        updates_target = step % args.target_network_frequency == 0
        if num_due and (num_due == most_due or is_plotted or updates_target or step == last_step):
            losses = learn(args, state, num_due)
            num_due = 0
            if is_plotted:
                run.plot({f"losses/{name}": value for name, value in losses.items()}, step)
        if updates_target:
            update_target_network(state, args.tau)


# -------------------------------------------------------------------------------------------------- main


def main(args: Args) -> None:
    num_actions = int(make_env(args.env_id).action_space.n)
    device = choose_device(args)
    if args.save_replay:
        check_new_folder(args.save_replay, args.resume)
    state = create_train_state(args, num_actions, device)

    with TrainingRun(args, Path(__file__), state, make_env, model="q_network", charts=DQN_CHARTS) as run:
        train(args, state, run)
        run.save_model(state.q_network)
        q_values = partial(compute_q_values, state.q_network)
        run.finish(run.play("final", q_values, args.eval_episodes, state.step))
        if args.save_replay:
            save_replay(args.save_replay, state.replay, args.env_id, num_actions, run.folder.name)


if __name__ == "__main__":
    main(ARGS)
