"""QDagger (Agarwal et al., 2022, "Reincarnating Reinforcement Learning") on Atari, in JAX.

A teacher, an ordinary DQN, already exists. A student, an Impala-CNN, takes over what the teacher knows and
then goes past it: (1) the teacher fills a replay buffer with its play, (2) the student learns from it
offline, (3) the student plays and learns online while the teacher's influence fades.

    python cleanrl/qdagger_dqn_atari_jax_impalacnn.py --env-id BreakoutNoFrameskip-v4
"""

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import flax.linen as nn
import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization, struct
from jax import Array, lax
from numpy.typing import ArrayLike
from tqdm import tqdm

if not __package__:  # started as a file: the helpers below lie beside it, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cleanrl.utils.command_line import check_arguments, parse_arguments
from cleanrl.utils.evaluation import MAX_GAME_FRAMES, evaluate
from cleanrl.utils.games.atari import count_actions, random_return
from cleanrl.utils.games.parallel_envs import ParallelEnvs, StepResult, available_cores
from cleanrl.utils.games.video import RecordGame
from cleanrl.utils.hub.download import download, teacher_filename
from cleanrl.utils.replay.memory import place_replay_buffer
from cleanrl.utils.replay.rows import SavedReplay, open_replay, padded
from cleanrl.utils.run.checkpoint import Checkpoint
from cleanrl.utils.run.events import EventWriter
from cleanrl.utils.run.training_run import check_services, training_run
from cleanrl.utils.signals import exit_on_ctrl_c
from cleanrl.utils.storage import write_durably
from cleanrl.utils.weights.files import fit_weights, flatten, read_weights, unflatten

RECENT_GAMES = 10  # whose mean return sets the distillation coefficient
LOSS_INTERVAL = 100  # gradient steps between two points of a loss curve: reading a loss waits for the device
CHART_INTERVAL = 1000  # environment steps between two points of the other curves
EVALUATION_SEED, FILL_SEED, ONLINE_SEED = 0, 1, 2  # with --seed, what the games of each phase start from
LAYOUT = {  # of the curves that are read together, on TensorBoard's page "Custom Scalars"
    "returns": {
        "teacher, offline and online": [
            "charts/teacher/avg_episodic_return",
            "charts/offline/avg_episodic_return",
            "charts/episodic_return",
        ]
    },
    "losses, offline and online": {
        "TD loss": ["charts/offline/q_loss", "losses/td_loss"],
        "distillation loss": ["charts/offline/distill_loss", "losses/distill_loss"],
        "sum": ["charts/offline/loss", "losses/loss"],
        "mean of Q(s, a)": ["losses/q_values"],
    },
    "λ and ε": {"distillation coefficient λ": ["charts/distill_coeff"], "ε": ["charts/epsilon"]},
    "speed": {"environment steps per second": ["charts/SPS"]},
}


# --------------------------------------------------------------------------------------------- arguments


@dataclass
class Args:
    exp_name: str = Path(__file__).stem
    """name of the experiment; with the game and the seed it names the run's folder"""
    seed: int = 1
    """seed of the experiment; on a CPU the same seed gives the same bits"""
    torch_deterministic: bool = True
    """let XLA use only deterministic operations on a GPU"""
    cuda: bool = True
    """train on the GPU if there is one"""
    track: bool = False
    """mirror the TensorBoard curves to Weights & Biases (requirements/requirements-track.txt)"""
    wandb_project_name: str = "qdagger"
    """the Weights & Biases project"""
    wandb_entity: str | None = None
    """the Weights & Biases entity (team)"""
    capture_video: bool = False
    """record the first game of each evaluation as mp4 under the run's folder, and show it in TensorBoard"""
    save_model: bool = True
    """save the student in the offline phase, at the end, and when stopped"""
    upload_model: bool = False
    """publish the model on the Hugging Face Hub at the end, as {hf_entity}/{env_id}-{exp_name}-seed{seed}"""
    hf_entity: str | None = None
    """the user or organization on the Hub (default: the user whose token it is)"""
    checkpoint_interval: float = 600.0
    """seconds between two checkpoints of the run, all of it; 0: only when stopped"""
    resume: str | None = None
    """folder of a run to go on with, its options included; auto: the newest that is unfinished, if any"""

    env_id: str = "BreakoutNoFrameskip-v4"
    """the game, as {Game}NoFrameskip-v4"""
    repeat_action_probability: float = 0.0
    """sticky actions: the probability that the game repeats the last action instead (the paper: 0.25)"""
    num_envs: int = 8
    """copies of the game that step in parallel; all counts below are of steps over all copies"""

    dense_width: int = 256
    """units of the student's dense layer (the paper: 512)"""
    total_timesteps: int = 10_000_000
    """environment steps (of 4 frames) of the online phase"""
    learning_rate: float = 1e-4
    """learning rate of Adam"""
    final_learning_rate: float | None = None
    """learning rate at a distillation coefficient of 0; in between, mixed (the paper: 1e-5; default: same)"""
    adam_epsilon: float = 1e-8
    """term in the denominator of Adam (the paper: 1.5e-4)"""
    td_loss: Literal["mse", "huber"] = "mse"
    """how the TD error is penalised (the paper: huber)"""
    buffer_size: int = 1_000_000
    """frames the replay buffer holds: one per transition and one per end of an episode"""
    buffer_device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the replay buffer lies; auto: on the training device if it fits there, else in host memory"""
    n_step: int = 1
    """steps of reward before the bootstrap (the paper: 3)"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 1.0
    """share of the student in each update of the target network"""
    target_network_frequency: int = 1000
    """update the target network every so many gradient steps (offline) or environment steps (online)"""
    batch_size: int = 32
    """transitions per gradient step"""
    start_e: float = 1.0
    """epsilon at the start"""
    end_e: float = 0.01
    """epsilon at the end, and in every evaluation"""
    exploration_fraction: float = 0.10
    """share of total_timesteps in which epsilon falls; it starts falling with the offline phase"""
    exploration_steps: int | None = None
    """online environment steps in which epsilon falls, instead of that share (the paper: 50,000)"""
    learning_starts: int = 80_000
    """online environment steps before the first online gradient step"""
    train_frequency: int = 4
    """online environment steps per gradient step"""

    teacher_policy_hf_repo: str | None = None
    """the teacher's repository on the Hub (default: cleanrl/{env_id}-{teacher_model_exp_name}-seed1)"""
    teacher_model_exp_name: str = "dqn_atari_jax"
    """the teacher's file in that repository is {teacher_model_exp_name}.cleanrl_model (sb3/name: name.zip)"""
    teacher_revision: str | None = None
    """branch, tag or commit of that repository"""
    teacher_model_path: Path | None = None
    """a teacher in a local file (torch, flax, safetensors or Stable-Baselines3's zip), not from the Hub"""
    teacher_eval_episodes: int = 10
    """games that measure the teacher's return"""
    teacher_steps: int = 500_000
    """environment steps that the teacher plays to fill its buffer, epsilon falling from start_e to end_e"""
    teacher_replay_path: Path | None = None
    """learn offline from this replay, a folder that dqn_atari's --save-replay wrote, instead of that play"""
    offline_steps: int = 500_000
    """gradient steps of the offline phase"""
    offline_eval_frequency: int = 100_000
    """evaluate the student every so many gradient steps of the offline phase, and at its end"""
    eval_episodes: int = 10
    """games in each evaluation of the student"""
    temperature: float = 1.0
    """temperature of the policies softmax(Q / temperature) in the distillation loss (the paper: 0.1)"""
    distill_weight: float = 1.0
    """weight of the distillation loss, a factor beside the distillation coefficient (the paper: 3.0)"""
    distill_steps: int | None = None
    """t0, the online environment step that ends the teacher's influence (the paper: 1.5M; default: never)"""
    return_normalization: Literal["none", "random"] = "none"
    """random: the distillation coefficient measures returns from the random player's (as the paper does)"""


# ------------------------------------------------------------------------------------------- environment


class EpisodeStatistics(gym.Wrapper):
    """Return and length, in frames, of the whole game, unclipped.

    They stand in the info of the reset that follows the game's end, where `ParallelEnvs` looks for them: a
    game can also end inside the reset of an outer wrapper, where nobody sees the step.
    """

    finished: dict | None = None

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        if self.finished:
            info["episode"] = self.finished
        self.finished, self.episodic_return, self.episodic_length = None, 0.0, 0
        return observation, info

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.episodic_return += reward
        self.episodic_length += 1
        if terminated or truncated:
            self.finished = {"r": self.episodic_return, "l": self.episodic_length}
        return observation, reward, terminated, truncated, info


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

    Frames are the emulator's own grey ones, uint8 (height, width), and only those that are shown are drawn.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        height, width = self.unwrapped.ale.getScreenDims()
        self.observation_space = gym.spaces.Box(0, 255, (height, width), np.uint8)
        self.last_frames = np.zeros((2, height, width), dtype=np.uint8)

    def reset(self, **kwargs):
        _, info = self.env.reset(**kwargs)
        return self.unwrapped.ale.getScreenGrayscale(), info

    def step(self, action):
        total_reward = 0.0
        for frame in range(4):
            _, reward, terminated, truncated, info = self.env.step(action)
            total_reward += reward
            if frame >= 2:
                self.unwrapped.ale.getScreenGrayscale(self.last_frames[frame - 2])
            if terminated or truncated:
                break
        return self.last_frames.max(axis=0), total_reward, terminated, truncated, info


class EpisodicLife(gym.Wrapper):
    """A lost life ends the episode for the learner while the game goes on."""

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
        # 0 lives without a game over is no end yet: some games show it for a few frames before they are over.
        terminated = terminated or 0 < lives < self.lives
        self.lives = lives
        return observation, reward, terminated, truncated, info


class FireReset(gym.Wrapper):
    """Presses FIRE, then the action after it, at the start of each episode: some games wait for it."""

    def reset(self, **kwargs):
        observation, reset_info = self.env.reset(**kwargs)
        for action in (1, 2):
            observation, _, terminated, truncated, _ = self.env.step(action)
            if terminated or truncated:
                observation, info = self.env.reset()
                reset_info.update(info)
        return observation, reset_info


class SignReward(gym.RewardWrapper):
    def reward(self, reward):
        return np.sign(reward)


class Resize(gym.ObservationWrapper):
    """84×84 by area interpolation."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (84, 84), np.uint8)

    def observation(self, observation):
        return cv2.resize(observation, (84, 84), interpolation=cv2.INTER_AREA)


class FrameStack(gym.Wrapper):
    """The last 4 frames, oldest first; after a reset the first frame fills the stack."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
        self.frames = deque(maxlen=4)

    def reset(self, **kwargs):
        frame, info = self.env.reset(**kwargs)
        self.frames.extend([frame] * 4)
        return np.stack(self.frames), info

    def step(self, action):
        frame, reward, terminated, truncated, info = self.env.step(action)
        self.frames.append(frame)
        return np.stack(self.frames), reward, terminated, truncated, info


def make_env(
    env_id: str,
    repeat_action_probability: float = 0.0,
    max_game_frames: int = MAX_GAME_FRAMES,
    video_folder: Path | None = None,
) -> gym.Env:
    """Makes an Atari game, preprocessed as in Mnih et al. (2015): observations uint8 (4, 84, 84)."""
    cv2.setNumThreads(1)  # the workers are the parallelism
    env = gym.make(
        env_id,
        obs_type="ram",  # the screen is drawn where it is shown: half the frames
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
    env = SignReward(env)
    env = Resize(env)
    return FrameStack(env)


# ---------------------------------------------------------------------------------------------- networks


class TeacherNetwork(nn.Module):
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


def max_pool(x: Array) -> Array:
    """3×3 maximum with stride 2 and SAME padding of finite x (batch, height, width, channels).

    The same as `nn.max_pool`, in its gradient too, which XLA would compute several times slower on a CPU.
    """
    for axis in (2, 1):
        padding = [(0, 0)] * 4
        padding[axis] = (x.shape[axis] % 2, 1)
        length = (x.shape[axis] + 1) // 2
        padded = jnp.pad(x, padding, constant_values=-jnp.inf)
        first, second, third = (
            lax.slice_in_dim(padded, start, start + 2 * length - 1, stride=2, axis=axis) for start in range(3)
        )
        # Of equal numbers the first gets the gradient; jnp.maximum would divide it.
        x = jnp.where(first >= second, first, second)
        x = jnp.where(x >= third, x, third)
    return x


class ResidualBlock(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        y = nn.Conv(channels, (3, 3))(nn.relu(x))
        y = nn.Conv(channels, (3, 3))(nn.relu(y))
        return x + y


class ConvSequence(nn.Module):
    channels: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = max_pool(nn.Conv(self.channels, (3, 3))(x))
        x = ResidualBlock()(x)
        return ResidualBlock()(x)


class StudentNetwork(nn.Module):
    """The Impala-CNN (Espeholt et al., 2018): uint8 (batch, 4, 84, 84) to Q-values (batch, num_actions)."""

    num_actions: int
    dense_width: int = 256

    @nn.compact
    def __call__(self, observations: Array) -> Array:
        x = jnp.transpose(observations, (0, 2, 3, 1)) / 255.0
        for channels in (16, 32, 32):
            x = ConvSequence(channels)(x)
        x = nn.relu(x.reshape(len(x), -1))
        x = nn.relu(nn.Dense(self.dense_width)(x))
        return nn.Dense(self.num_actions)(x)


@struct.dataclass
class QFunction:
    """A network with its parameters: uint8 (batch, 4, 84, 84) to Q-values (batch, num_actions)."""

    params: dict
    network: nn.Module = struct.field(pytree_node=False)

    def __call__(self, observations: Array) -> Array:
        return self.network.apply(self.params, observations)


# ------------------------------------------------------------------------------------------------ replay


class Batch(NamedTuple):
    """`observations` are uint8 (batch, 4, 84, 84), `actions` int32 (batch,), all others float32.

    `rewards` are discounted sums of up to n steps, `discounts` γ to the power of the steps summed,
    `next_observations` those after them, `terminations` 1 where the episode ended there by itself.
    """

    observations: Array
    actions: Array
    rewards: Array
    next_observations: Array
    terminations: Array
    discounts: Array
    teacher_q_values: Array


SLOT_ARRAYS = (  # of a replay buffer: an entry per slot
    "frames",
    "stack_depths",
    "actions",
    "rewards",
    "terminations",
    "episode_ends",
    "teacher_q_values",
    "is_transition",
)


@struct.dataclass
class ReplayBuffer:
    """Keeps each frame once, in a ring of slots per environment.

    A slot holds an observation's newest frame, how many earlier frames its stack reaches back (at most 3),
    the teacher's Q-values of the observation, which never change, and what followed: action, reward, whether
    the episode ended. The observation that ends an episode has a slot too, but no action.

    Contract: `draw` gives every transition in the buffer the same probability, save for each environment's
    newest n - 1 slots, which wait until their n rewards are known. No stack reaches across the start of an
    episode or into overwritten slots; spare slots see to it that this costs no transitions. A sum of n
    rewards ends with its episode. A truncated episode is bootstrapped from its true last observation.

    The arrays lie on one device. `start` and `add` update them in place: the buffer that they are called on
    is used up, the one that they return takes its place.
    """

    frames: Array
    stack_depths: Array
    actions: Array
    rewards: Array
    terminations: Array
    episode_ends: Array
    teacher_q_values: Array
    is_transition: Array
    heads: Array  # positions of the current observations, ever growing
    depths: Array  # their stack depths
    n_step: int = struct.field(pytree_node=False)
    gamma: float = struct.field(pytree_node=False)

    @classmethod
    def create(
        cls, capacity: int, num_envs: int, num_actions: int, n_step: int, gamma: float, device: jax.Device
    ) -> "ReplayBuffer":
        """An empty buffer.

        Args:
            capacity: slots over all environments; the oldest are overwritten.
            num_envs: environments that are added together.
            num_actions: Q-values per observation.
            n_step: n, rewards summed before the bootstrap.
            gamma: γ, the discount factor.
            device: where the arrays lie.
        """
        total = num_envs * cls.slots_per_env(capacity, num_envs, n_step)
        zeros = partial(jnp.zeros, device=device)
        return cls(
            frames=zeros((total, 84, 84), jnp.uint8),
            stack_depths=zeros(total, jnp.uint8),
            actions=zeros(total, jnp.uint8),
            rewards=zeros(total),
            terminations=zeros(total, bool),
            episode_ends=zeros(total, bool),
            teacher_q_values=zeros((total, num_actions)),
            is_transition=zeros(total, bool),
            heads=zeros(num_envs, jnp.int32),
            depths=zeros(num_envs, jnp.uint8),
            n_step=n_step,
            gamma=gamma,
        )

    @staticmethod
    def slots_per_env(capacity: int, num_envs: int, n_step: int) -> int:
        # At least 2, of which one is a transition. Spare: 3 for the oldest stack, n before the current one.
        return max(2, math.ceil(capacity / num_envs)) + 3 + n_step

    @classmethod
    def num_bytes(cls, capacity: int, num_envs: int, num_actions: int, n_step: int) -> int:
        """Bytes of a buffer."""
        bytes_per_slot = 84 * 84 + 4 * num_actions + 4 + 5
        return num_envs * cls.slots_per_env(capacity, num_envs, n_step) * bytes_per_slot

    @property
    def device(self) -> jax.Device:
        return self.frames.device

    @property
    def num_slots(self) -> int:
        """Slots per environment."""
        return len(self.frames) // len(self.heads)

    def start(self, observations: np.ndarray) -> "ReplayBuffer":
        """Takes the first observations, uint8 (num_envs, 4, 84, 84), each the start of an episode."""
        return self._start(observations[:, -1])

    def add(self, actions: np.ndarray, step: StepResult, teacher_q_values: Array) -> "ReplayBuffer":
        """Adds one step of every environment.

        Args:
            actions: integers (num_envs,), taken from the current observations.
            step: what the environments answered.
            teacher_q_values: float32 (num_envs, num_actions), of the observations that were acted on.
        """
        return self._add(
            actions,
            step.rewards,
            step.terminations,
            step.truncations,
            step.observations[:, -1],
            step.final_observations[:, -1],
            jax.device_put(teacher_q_values, self.device),
        )

    @partial(jax.jit, donate_argnums=0)
    def _start(self, frames: Array) -> "ReplayBuffer":
        return self._write_frames(frames, where=True)

    @partial(jax.jit, donate_argnums=0)
    def _add(
        self,
        actions: Array,
        rewards: Array,
        terminations: Array,
        truncations: Array,
        frames: Array,
        final_frames: Array,
        teacher_q_values: Array,
    ) -> "ReplayBuffer":
        slots = self._head_slots()
        ended = terminations | truncations
        replay = self.replace(
            actions=self.actions.at[slots].set(actions.astype(jnp.uint8)),
            rewards=self.rewards.at[slots].set(rewards),
            terminations=self.terminations.at[slots].set(terminations),
            episode_ends=self.episode_ends.at[slots].set(ended),
            teacher_q_values=self.teacher_q_values.at[slots].set(teacher_q_values),
            is_transition=self.is_transition.at[slots].set(True),
            heads=self.heads + 1,
            depths=jnp.minimum(self.depths + 1, 3),
        )
        replay = replay._write_frames(final_frames, where=ended)
        replay = replay.replace(heads=replay.heads + ended, depths=jnp.where(ended, 0, replay.depths))
        return replay._write_frames(frames, where=True)

    def _head_slots(self) -> Array:
        return jnp.arange(len(self.heads)) * self.num_slots + self.heads % self.num_slots

    def _write_frames(self, frames: Array, where: Array | bool) -> "ReplayBuffer":
        slots = jnp.where(where, self._head_slots(), len(self.frames))  # past the end, a write is dropped
        return self.replace(
            frames=self.frames.at[slots].set(frames, mode="drop"),
            stack_depths=self.stack_depths.at[slots].set(self.depths, mode="drop"),
            is_transition=self.is_transition.at[slots].set(False, mode="drop"),
        )

    def read(self, slots: np.ndarray) -> dict[str, np.ndarray]:
        """What the slots, integers (n,), hold: arrays (n, …) by name."""
        rows = self._read(padded(slots))
        return {name: np.asarray(rows[name])[: len(slots)] for name in SLOT_ARRAYS}

    def write(self, slots: np.ndarray, rows: dict[str, np.ndarray]) -> "ReplayBuffer":
        """Puts back what `read` gave, all of it or some; the heads and their depths are set by themselves."""
        slots = padded(slots, fill=len(self.frames))  # past the end, a write is dropped
        return self._write(slots, {name: padded(values) for name, values in rows.items()})

    @jax.jit
    def _read(self, slots: Array) -> dict[str, Array]:
        return {name: getattr(self, name)[slots] for name in SLOT_ARRAYS}

    @partial(jax.jit, donate_argnums=0)
    def _write(self, slots: Array, rows: dict[str, Array]) -> "ReplayBuffer":
        written = {name: getattr(self, name).at[slots].set(rows[name], mode="drop") for name in rows}
        return self.replace(**written)

    def _drawable_per_env(self) -> Array:
        """The number of positions per environment, the newest at heads - n, that `draw` chooses from."""
        overwritten = jnp.maximum(self.heads + 1 - self.num_slots, 0)
        oldest = jnp.where(overwritten > 0, overwritten + 3, 0)
        return jnp.maximum(self.heads - self.n_step + 1 - oldest, 0)

    def draw(self, key: Array, batch_size: int) -> Array:
        """Draws the slots of transitions, int32 (batch_size,), uniformly and with replacement.

        There are some once every environment has made n steps; before, this would not end.
        """
        ends = jnp.cumsum(self._drawable_per_env())

        def redraw(key_and_slots: tuple[Array, Array]) -> tuple[Array, Array]:
            key, slots = key_and_slots
            key, draw_key = jax.random.split(key)
            drawn = jax.random.randint(draw_key, (batch_size,), 0, ends[-1])
            envs = jnp.searchsorted(ends, drawn, side="right")
            positions = self.heads[envs] - self.n_step - (ends[envs] - 1 - drawn)
            drawn_slots = envs * self.num_slots + positions % self.num_slots
            return key, jnp.where(self.is_transition[slots], slots, drawn_slots)

        def is_missing_some(key_and_slots: tuple[Array, Array]) -> Array:
            return ~self.is_transition[key_and_slots[1]].all()

        # Again, where the observation that ended an episode was drawn. A head is no transition yet.
        nothing = jnp.full(batch_size, self._head_slots()[0])
        return lax.while_loop(is_missing_some, redraw, (key, nothing))[1]

    def gather(self, slots: Array) -> Batch:
        """The transitions at `slots`, integers (batch,)."""
        rewards = jnp.zeros(len(slots))
        terminations = jnp.zeros(len(slots))
        going_on = jnp.ones(len(slots))
        steps = jnp.zeros_like(slots)
        for k in range(self.n_step):
            slots_k = self._ahead(slots, k)
            rewards += self.gamma**k * going_on * self.rewards[slots_k]
            terminations += going_on * self.terminations[slots_k]
            steps += going_on.astype(steps.dtype)
            going_on *= ~self.episode_ends[slots_k]
        return Batch(
            observations=self._stacks(slots),
            actions=self.actions[slots].astype(jnp.int32),
            rewards=rewards,
            next_observations=self._stacks(self._ahead(slots, steps)),
            terminations=terminations,
            discounts=self.gamma ** steps.astype(jnp.float32),
            teacher_q_values=self.teacher_q_values[slots],
        )

    def _ahead(self, slots: Array, steps: int | Array) -> Array:
        """The slots that many steps later in the same rings; earlier, where negative."""
        ring_starts = slots // self.num_slots * self.num_slots
        return ring_starts + (slots - ring_starts + steps) % self.num_slots

    def _stacks(self, slots: Array) -> Array:
        # A stack that starts with its episode repeats the first frame.
        back = jnp.minimum(jnp.arange(3, -1, -1), self.stack_depths[slots].astype(jnp.int32)[:, None])
        return self.frames[self._ahead(slots[:, None], -back)]


# ----------------------------------------------------------------------------------------------- teacher


def load_teacher(args: Args, num_actions: int, device: jax.Device) -> QFunction:
    """Loads the teacher from a local file or from the Hub.

    Raises:
        SystemExit: with one line that names the file or the repository and what to do.
    """
    path = args.teacher_model_path
    if path is None:
        repo_id = args.teacher_policy_hf_repo or f"cleanrl/{args.env_id}-{args.teacher_model_exp_name}-seed1"
        filename = teacher_filename(repo_id, args.teacher_model_exp_name)
        path = download(repo_id, filename, args.teacher_revision)
    network = TeacherNetwork(num_actions)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 4, 84, 84), jnp.uint8))
    weights = fit_weights(read_weights(path), like=flatten(shapes), source=str(path))
    return QFunction(jax.device_put(unflatten(weights), device), network)


# ------------------------------------------------------------------------------------------------ losses


def td_targets(rewards: Array, terminations: Array, discounts: Array, next_q_values: Array) -> Array:
    """y = r + γ (1 − terminated) max_a' Q_target(s', a'), float32 (batch,).

    `next_q_values` are (batch, num_actions), all others (batch,).
    """
    return rewards + discounts * (1 - terminations) * next_q_values.max(axis=1)


def td_loss(q_values: Array, actions: Array, targets: Array, kind: str = "mse") -> Array:
    """mean((y − Q(s, a))²) of Q-values (batch, num_actions), actions int32 (batch,), targets y (batch,).

    With kind "huber", half the square of errors up to 1, and |error| − 1/2 of larger ones.
    """
    q_of_actions = q_values[jnp.arange(len(actions)), actions]
    if kind == "huber":
        return optax.huber_loss(q_of_actions, targets).mean()
    return jnp.square(targets - q_of_actions).mean()


def distill_loss(q_values: Array, teacher_q_values: Array, temperature: float) -> Array:
    """mean over the batch of Σ_a π_T (log π_T − log π), where π = softmax(Q / temperature).

    The distillation term of QDagger (Agarwal et al., 2022). Both Q-values are (batch, num_actions).
    """
    log_policy = nn.log_softmax(q_values / temperature, axis=1)
    teacher_log_policy = nn.log_softmax(teacher_q_values / temperature, axis=1)
    return (jnp.exp(teacher_log_policy) * (teacher_log_policy - log_policy)).sum(axis=1).mean()


def distill_coefficient(
    online_step: int,
    recent_returns: Sequence[float],
    teacher_return: float,
    baseline_return: float = 0.0,
    distill_steps: int | None = None,
) -> float:
    """λ_t = 1[t < t0] · max(1 − G / G_T, 0), with G and G_T measured from `baseline_return`.

    G is the mean of `recent_returns`, those of the last 10 finished games; until there are 10, λ = 1[t < t0].
    """
    if distill_steps is not None and online_step >= distill_steps:
        return 0.0
    if len(recent_returns) < RECENT_GAMES:
        return 1.0
    student_return = float(np.mean(recent_returns))
    return max(1.0 - (student_return - baseline_return) / (teacher_return - baseline_return), 0.0)


def learning_rate(args: Args, distill_coeff: float) -> float:
    """From `learning_rate` at a distillation coefficient of 1 to `final_learning_rate` at 0."""
    final = args.learning_rate if args.final_learning_rate is None else args.final_learning_rate
    return final + (args.learning_rate - final) * distill_coeff


def linear_schedule(start: float, end: float, duration: float, step: ArrayLike) -> np.ndarray:
    """Goes linearly from `start` at step 0 to `end` at step `duration` and stays there."""
    return start + (end - start) * np.minimum(np.divide(step, max(duration, 1)), 1.0)


def online_epsilon(args: Args, online_steps: ArrayLike) -> np.ndarray:
    """ε of environment steps of the online phase.

    As published it has been falling since the offline phase started; with `exploration_steps` it starts now.
    """
    if args.exploration_steps is not None:
        return linear_schedule(args.start_e, args.end_e, args.exploration_steps, online_steps)
    duration = args.exploration_fraction * args.total_timesteps
    return linear_schedule(args.start_e, args.end_e, duration, args.offline_steps + np.asarray(online_steps))


# ------------------------------------------------------------------------------------------------ phases


@struct.dataclass
class Learner:
    """What a gradient step changes, all on the training device."""

    student: QFunction
    target_network: QFunction
    optimizer_state: optax.OptState


@dataclass
class TrainState:
    """All that a run is: what a checkpoint saves."""

    learner: Learner
    sampling_key: Array  # of drawing from the replay buffer
    exploration_key: Array
    replay: ReplayBuffer | None = None  # what the teacher did; in the online phase what the student did
    phase: Literal["teacher", "offline", "online"] = "teacher"
    teacher_return: float | None = None
    teacher_step: int = 0  # environment steps that the teacher has played
    offline_step: int = 0  # gradient steps done offline
    evaluated_step: int = 0  # the one at which the student was evaluated last
    online_step: int = 0  # environment steps done online
    learned_step: int = 0  # of these, how many the learner has answered
    online_gradient_steps: int = 0
    online_seconds: float = 0.0
    recent_returns: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_GAMES))
    unread: list[tuple] = field(default_factory=list)  # arguments of `write_losses`, still on the device
    env_states: list[dict] | None = None  # where the games stand, while no environments are open

    @property
    def device(self) -> jax.Device:
        return jax.tree.leaves(self.learner)[0].device


KEYS = ("sampling_key", "exploration_key")
COUNTERS = (
    "phase",
    "teacher_return",
    "teacher_step",
    "offline_step",
    "evaluated_step",
    "online_step",
    "learned_step",
    "online_gradient_steps",
    "online_seconds",
)


def create_train_state(args: Args, num_actions: int, device: jax.Device) -> TrainState:
    init_key, sampling_key, exploration_key = jax.random.split(jax.random.key(args.seed), 3)
    network = StudentNetwork(num_actions, args.dense_width)
    params = network.init(init_key, jnp.zeros((1, 4, 84, 84), jnp.uint8))
    student = QFunction(params, network)
    target_network = jax.tree.map(jnp.copy, student)
    learner = Learner(student, target_network, optax.adam(args.learning_rate).init(student))
    return TrainState(*jax.device_put((learner, sampling_key, exploration_key), device))


def capture(state: TrainState, envs: ParallelEnvs | None) -> dict[str, Any]:
    """The state for a checkpoint, but for the rows of the replay buffer."""
    return {
        "learner": serialization.to_state_dict(state.learner),
        **{name: jax.random.key_data(getattr(state, name)) for name in KEYS},
        **{name: getattr(state, name) for name in COUNTERS},
        "replay": (state.replay.heads, state.replay.depths) if state.replay else None,
        "recent_returns": list(state.recent_returns),
        "unread": state.unread,
        "env_states": envs.get_states() if envs else state.env_states,
    }


def restore(state: TrainState, checkpoint: Checkpoint, make_replay: Callable[[str], ReplayBuffer]) -> None:
    """Brings a new state to where `capture` saw it; `make_replay` makes the buffer of a phase."""
    saved = checkpoint.read_state()
    learner = serialization.from_state_dict(state.learner, saved["learner"])
    keys = [jax.random.wrap_key_data(jnp.asarray(saved[name])) for name in KEYS]
    state.learner, state.sampling_key, state.exploration_key = jax.device_put((learner, *keys), state.device)
    for name in (*COUNTERS, "unread", "env_states"):
        setattr(state, name, saved[name])
    state.recent_returns.extend(saved["recent_returns"])
    if saved["replay"]:
        replay = make_replay(state.phase)
        heads, depths = jax.device_put(saved["replay"], replay.device)
        for slots, rows in checkpoint.rows(replay.num_slots):
            replay = replay.write(slots, {name: rows[name] for name in SLOT_ARRAYS})
        state.replay = replay.replace(heads=heads, depths=depths)


class Settings(NamedTuple):
    """The options that are compiled into a gradient step."""

    batch_size: int
    td_loss: str
    temperature: float
    distill_weight: float
    adam_epsilon: float

    @classmethod
    def of(cls, args: Args) -> "Settings":
        return cls(*(getattr(args, name) for name in cls._fields))


class Schedule(NamedTuple):
    """What changes from one gradient step to the next: numbers, or arrays (k,) of k steps."""

    distill_coeff: ArrayLike
    learning_rate: ArrayLike
    target_share: ArrayLike  # how far the target network moves to the student before the step


def update(
    learner: Learner, batch: Batch, schedule: Schedule, settings: Settings
) -> tuple[Learner, dict[str, Array]]:
    """One gradient step; returns its losses and the mean of Q(s, a) as well."""
    target_network = optax.incremental_update(learner.student, learner.target_network, schedule.target_share)
    next_q_values = target_network(batch.next_observations)
    targets = td_targets(batch.rewards, batch.terminations, batch.discounts, next_q_values)

    def compute_loss(student: QFunction) -> tuple[Array, dict[str, Array]]:
        q_values = student(batch.observations)
        td = td_loss(q_values, batch.actions, targets, settings.td_loss)
        distill = distill_loss(q_values, batch.teacher_q_values, settings.temperature)
        loss = td + schedule.distill_coeff * settings.distill_weight * distill
        mean_q_value = q_values[jnp.arange(len(batch.actions)), batch.actions].mean()
        return loss, {"loss": loss, "td_loss": td, "distill_loss": distill, "q_values": mean_q_value}

    gradients, results = jax.grad(compute_loss, has_aux=True)(learner.student)
    optimizer = optax.adam(schedule.learning_rate, eps=settings.adam_epsilon)
    steps, optimizer_state = optimizer.update(gradients, learner.optimizer_state)
    return Learner(optax.apply_updates(learner.student, steps), target_network, optimizer_state), results


def sample_batch(replay: ReplayBuffer, key: Array, batch_size: int) -> tuple[Batch, Array]:
    """A batch, and the key for the next one."""
    key, draw_key = jax.random.split(key)
    return replay.gather(replay.draw(draw_key, batch_size)), key


@partial(jax.jit, static_argnames="settings", donate_argnames="learner")
def sample_and_update(
    learner: Learner, key: Array, replay: ReplayBuffer, schedule: Schedule, settings: Settings
) -> tuple[Learner, Array, dict[str, Array]]:
    """As many gradient steps as the schedule has (k), each on a batch of its own; the results are (k,)."""

    def gradient_step(
        learner_and_key: tuple[Learner, Array], schedule: Schedule
    ) -> tuple[tuple[Learner, Array], dict[str, Array]]:
        learner, key = learner_and_key
        batch, key = sample_batch(replay, key, settings.batch_size)
        learner, results = update(learner, batch, schedule, settings)
        return (learner, key), results

    # For the CPU, XLA compiles a convolution inside a loop into code that takes ten times as long; and a scan
    # of a single step is such a loop, if it is not unrolled further than it is long.
    unroll = len(schedule.target_share) + 1 if jax.default_backend() == "cpu" else 1
    (learner, key), results = lax.scan(gradient_step, (learner, key), schedule, unroll=unroll)
    return learner, key, results


# For a replay buffer that lies in host memory while a GPU trains.
update_alone = jax.jit(update, static_argnames="settings", donate_argnames="learner")
sample_alone = jax.jit(sample_batch, static_argnames="batch_size")


def learn(
    args: Args, state: TrainState, distill_coeffs: Sequence[float], target_shares: Sequence[float]
) -> dict[str, Array]:
    """Starts as many gradient steps as there are coefficients (k); their results (k,) are on the device.

    For the target network's shares see `target_share`.
    """
    settings = Settings.of(args)
    learning_rates = [learning_rate(args, distill_coeff) for distill_coeff in distill_coeffs]
    schedule = Schedule(np.float32(distill_coeffs), np.float32(learning_rates), np.float32(target_shares))
    state.sampling_key = jax.device_put(state.sampling_key, state.replay.device)
    if state.replay.device == state.device:
        state.learner, state.sampling_key, results = sample_and_update(
            state.learner, state.sampling_key, state.replay, schedule, settings
        )
        return results
    every_result = []
    for step in range(len(distill_coeffs)):
        batch, state.sampling_key = sample_alone(state.replay, state.sampling_key, args.batch_size)
        batch = jax.device_put(batch, state.device)
        schedule_of_step = Schedule(*(values[step] for values in schedule))
        state.learner, results = update_alone(state.learner, batch, schedule_of_step, settings)
        every_result.append(results)
    return {name: [results[name] for results in every_result] for name in every_result[0]}


def updates_per_call(device: jax.Device) -> int:
    """The most gradient steps in one call of `learn`. For a CPU, XLA compiles each of them by itself."""
    return 2 if device.platform == "cpu" else 10


def target_share(args: Args, step: int, interval: int) -> float:
    """How far the target network moves to the student before the gradient step at `step`.

    That is all its updates since the gradient step `interval` steps ago, whose own step counts and this one
    does not: where both fall on the same step, the student moves first.
    """
    frequency = args.target_network_frequency
    updates = (step - 1) // frequency - (step - interval - 1) // frequency
    return 1 - (1 - args.tau) ** updates


def read_losses(results: dict[str, Array], index: int, where: str) -> dict[str, float]:
    """One of the results of `learn` as numbers; waits for the device.

    Raises:
        SystemExit: with one line, if the loss is not finite any more.
    """
    values = {name: float(value[index]) for name, value in jax.device_get(results).items()}
    if not math.isfinite(values["loss"]):
        raise SystemExit(f"error: the loss is {values['loss']} at {where}; try a lower --learning-rate")
    return values


def explore(key: Array, epsilon: ArrayLike, q_values: Array) -> Array:
    """ε-greedy actions int32 (n,) from Q-values (n, num_actions); ε is one for all or one for each."""
    choice_key, action_key = jax.random.split(key)
    random_actions = jax.random.randint(action_key, (len(q_values),), 0, q_values.shape[1])
    explores = jax.random.uniform(choice_key, (len(q_values),)) < epsilon
    return jnp.where(explores, random_actions, q_values.argmax(axis=1))


@jax.jit
def act(
    q_function: QFunction, observations: Array, epsilon: ArrayLike, key: Array
) -> tuple[Array, Array, Array]:
    """Actions (n,) for observations (n, 4, 84, 84), the Q-values (n, num_actions), and the next key."""
    key, explore_key = jax.random.split(key)
    q_values = q_function(observations)
    return explore(explore_key, epsilon, q_values), q_values, key


@jax.jit
def forward(q_function: QFunction, observations: Array) -> Array:
    return q_function(observations)


def compute_q_values(q_function: QFunction, observations: np.ndarray) -> np.ndarray:
    """Q-values float32 (n, num_actions) of observations uint8 (n, 4, 84, 84)."""
    # Every new n would be compiled; powers of two are few.
    padded = np.zeros((1 << (len(observations) - 1).bit_length(), 4, 84, 84), np.uint8)
    padded[: len(observations)] = observations
    return np.asarray(forward(q_function, padded))[: len(observations)]


def start_games(state: TrainState, envs: ParallelEnvs, seed: Sequence[int]) -> np.ndarray:
    """The first observations of new games; or, after a checkpoint, those at which it was made."""
    if state.env_states:
        observations, state.env_states = envs.set_states(state.env_states), None
        return observations
    observations = envs.reset(seed)
    state.replay = state.replay.start(observations)
    return observations


def fill_teacher_buffer(
    args: Args,
    state: TrainState,
    teacher: QFunction,
    envs: ParallelEnvs,
    checkpoint: Callable[[ParallelEnvs], None],
) -> None:
    """Phase 1: the teacher plays, ε falling all the while; the buffer keeps what it saw, did and thought.

    `checkpoint` is called where nothing is half-done, here and in the phases below.
    """
    observations = start_games(state, envs, seed=(args.seed, FILL_SEED))
    with tqdm(
        total=args.teacher_steps, initial=state.teacher_step, desc="teacher", unit=" steps"
    ) as progress:
        while state.teacher_step < args.teacher_steps:
            checkpoint(envs)
            steps = state.teacher_step + np.arange(args.num_envs)
            epsilon = linear_schedule(args.start_e, args.end_e, args.teacher_steps, steps)
            actions, teacher_q_values, state.exploration_key = act(
                teacher, observations, epsilon, state.exploration_key
            )
            actions = np.asarray(actions)
            envs.step_async(actions)
            step = envs.step_wait()
            state.replay = state.replay.add(actions, step, teacher_q_values)
            observations = step.observations
            state.teacher_step += args.num_envs
            progress.update(args.num_envs)


def load_teacher_buffer(state: TrainState, teacher: QFunction, saved: SavedReplay) -> None:
    """Phase 1 without play: the buffer takes what the teacher saw and did when it was trained itself."""

    @jax.jit
    def teacher_q_values(replay: ReplayBuffer, slots: Array) -> Array:
        return teacher(jax.device_put(replay._stacks(slots), state.device))

    replay = state.replay
    with tqdm(total=saved.num_rows, desc="teacher's replay", unit=" frames") as progress:
        for slots, rows in saved.rows(replay.num_slots):
            replay = replay.write(slots, {name: rows[name] for name in rows.keys() & set(SLOT_ARRAYS)})
            # The frames of these stacks are there: a part comes after those before it in time.
            for first in range(0, len(slots), 1024):
                chunk = slots[first : first + 1024]
                q_values = np.asarray(teacher_q_values(replay, padded(chunk)))[: len(chunk)]
                replay = replay.write(chunk, {"teacher_q_values": q_values})
            progress.update(len(slots))
    state.replay = replay.replace(heads=jax.device_put(saved.heads.astype(np.int32), replay.device))


def train_offline(
    args: Args,
    state: TrainState,
    writer: EventWriter,
    save_and_evaluate: Callable[[], float],
    checkpoint: Callable[[], None],
) -> None:
    """Phase 2: the student learns from what the teacher did, with a distillation coefficient of 1.

    `save_and_evaluate` saves the student and returns its mean return.
    """

    def write_losses(step: int, results: dict[str, Array]) -> None:
        values = read_losses(results, -1, f"gradient step {step} of the offline phase")
        if step % LOSS_INTERVAL == 0 or evaluates_at(args, step):
            writer.add_scalar("charts/offline/loss", values["loss"], step)
            writer.add_scalar("charts/offline/q_loss", values["td_loss"], step)
            writer.add_scalar("charts/offline/distill_loss", values["distill_loss"], step)

    with tqdm(
        total=args.offline_steps, initial=state.offline_step, desc="offline", unit=" updates"
    ) as progress:
        while state.evaluated_step < args.offline_steps:
            checkpoint()
            if state.offline_step > state.evaluated_step and evaluates_at(args, state.offline_step):
                # A student that is no longer finite must not be saved over a good one.
                write_all(state.unread, write_losses)
                progress.set_postfix_str("playing games")
                mean_return = save_and_evaluate()
                progress.set_postfix_str("")
                writer.add_scalar("charts/offline/avg_episodic_return", mean_return, state.offline_step)
                progress.write(f"gradient step {state.offline_step:,}: mean return {mean_return:.2f}")
                state.evaluated_step = state.offline_step
                continue
            ends = [n * (state.offline_step // n + 1) for n in (LOSS_INTERVAL, args.offline_eval_frequency)]
            last_step = min(state.offline_step + updates_per_call(state.device), args.offline_steps, *ends)
            shares = [target_share(args, step, 1) for step in range(state.offline_step + 1, last_step + 1)]
            results = learn(args, state, [1.0] * len(shares), shares)
            state.offline_step = last_step
            progress.update(len(shares))
            write_all(state.unread, write_losses)  # of the call before, while the device is at work
            state.unread.append((last_step, results))


def evaluates_at(args: Args, offline_step: int) -> bool:
    return offline_step % args.offline_eval_frequency == 0 or offline_step == args.offline_steps


def write_all(unread: list[tuple], write_losses: Callable[..., None]) -> None:
    """Writes the losses that were not read yet; waits for the device."""
    while unread:
        write_losses(*unread.pop(0))


def train_online(
    args: Args,
    state: TrainState,
    teacher: QFunction,
    coefficient: Callable[[int, Sequence[float]], float],
    envs: ParallelEnvs,
    writer: EventWriter,
    checkpoint: Callable[[ParallelEnvs], None],
) -> None:
    """Phase 3: the student plays and learns, the less from the teacher the better it plays.

    `coefficient` gives λ_t from the online environment step and the recent returns.
    """

    def write_losses(step: int, results: dict[str, Array], index: int) -> None:
        for name, value in read_losses(results, index, f"online environment step {step}").items():
            writer.add_scalar(f"losses/{name}", value, args.offline_steps + step)

    if not state.env_states:
        student = jax.tree.map(jnp.copy, state.learner.student)
        state.learner = state.learner.replace(target_network=student)
    observations = start_games(state, envs, seed=(args.seed, ONLINE_SEED))
    start_time = time.monotonic() - state.online_seconds
    with tqdm(
        total=args.total_timesteps, initial=state.online_step, desc="online", unit=" steps"
    ) as progress:
        while state.online_step < args.total_timesteps:
            checkpoint(envs)
            epsilon = online_epsilon(args, state.online_step + np.arange(args.num_envs))
            observations = jax.device_put(observations, state.device)
            actions, _, state.exploration_key = act(
                state.learner.student, observations, epsilon, state.exploration_key
            )
            actions = np.asarray(actions)  # nothing else in this loop waits for the device
            envs.step_async(actions)
            # The rest of the loop needs nothing from the environments until they are waited for.
            write_all(state.unread, write_losses)  # computed before the actions were
            teacher_q_values = forward(teacher, observations)
            learn_online(args, state, coefficient)
            step = envs.step_wait()
            state.replay = state.replay.add(actions, step, teacher_q_values)
            observations = step.observations
            for game in step.finished_games:
                plotted_step = args.offline_steps + state.online_step + game.env_index + 1
                writer.add_scalar("charts/episodic_return", game.episodic_return, plotted_step)
                writer.add_scalar("charts/episodic_length", game.episodic_length, plotted_step)
                state.recent_returns.append(game.episodic_return)
                progress.set_postfix({"mean return": f"{np.mean(state.recent_returns):.1f}"}, refresh=False)
            state.online_step += args.num_envs
            state.online_seconds = time.monotonic() - start_time
            progress.update(args.num_envs)
            is_last = state.online_step >= args.total_timesteps
            if state.online_step % CHART_INTERVAL < args.num_envs or is_last:
                plotted_step = args.offline_steps + state.online_step
                distill_coeff = coefficient(state.online_step, state.recent_returns)
                steps_per_second = state.online_step / state.online_seconds
                writer.add_scalar("charts/epsilon", epsilon[-1], plotted_step)
                writer.add_scalar("charts/distill_coeff", distill_coeff, plotted_step)
                writer.add_scalar("charts/SPS", steps_per_second, plotted_step)
    learn_online(args, state, coefficient)
    write_all(state.unread, write_losses)


def learn_online(args: Args, state: TrainState, coefficient: Callable[[int, Sequence[float]], float]) -> None:
    """Starts the gradient steps and target updates that the environment steps so far call for, in order.

    Those whose losses are to be written go to `state.unread`: the step, all results, and their index there.
    """
    steps = [
        step
        for step in range(state.learned_step + 1, min(state.online_step, args.total_timesteps) + 1)
        if step > args.learning_starts and step % args.train_frequency == 0
    ]
    state.learned_step = min(state.online_step, args.total_timesteps)
    can_draw = state.online_step >= args.n_step * args.num_envs  # n rewards of every environment are known
    if not can_draw:
        return
    for first in range(0, len(steps), updates_per_call(state.device)):
        steps_of_call = steps[first : first + updates_per_call(state.device)]
        distill_coeffs = [coefficient(step, state.recent_returns) for step in steps_of_call]
        shares = [target_share(args, step, args.train_frequency) for step in steps_of_call]
        results = learn(args, state, distill_coeffs, shares)
        for index, step in enumerate(steps_of_call):
            state.online_gradient_steps += 1
            is_last = step + args.train_frequency > args.total_timesteps
            if state.online_gradient_steps % LOSS_INTERVAL == 0 or is_last:
                state.unread.append((step, results, index))


# -------------------------------------------------------------------------------------------------- main


def check_teacher_return(teacher_return: float, baseline_return: float) -> None:
    """Refuses a teacher whose return gives the distillation coefficient no meaning.

    Raises:
        SystemExit: with one line that says what to do.
    """
    if teacher_return > baseline_return:
        return
    if baseline_return == 0:
        fault = "λ = 1 − G / G_T means nothing unless G_T > 0; use --return-normalization random"
    else:
        fault = f"the random player's is {baseline_return}; use a better teacher"
    raise SystemExit(f"error: the teacher's mean return is {teacher_return:.2f}: {fault}")


def save_student(student: QFunction, path: Path) -> None:
    """Writes the parameters, all of them or nothing."""
    write_durably(path, serialization.to_bytes(student.params))


def choose_device(args: Args) -> jax.Device:
    """The GPU if there is one and it is wanted, else the CPU. Must come before JAX computes anything."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves room for another run
    flags = os.environ.get("XLA_FLAGS", "")
    if args.torch_deterministic and "--xla_gpu_deterministic_ops" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true"
    if not args.cuda:
        jax.config.update("jax_platforms", "cpu")
    return jax.devices()[0]


def free_memory(gpu: jax.Device) -> int:
    """Bytes of the GPU that JAX can still take."""
    statistics = gpu.memory_stats()
    return statistics["bytes_limit"] - statistics["bytes_in_use"]


def plan_replay(
    args: Args, num_actions: int, saved_replay: SavedReplay | None, device: jax.Device
) -> Callable[[str], ReplayBuffer]:
    """Says what memory the replay buffers take, sees to it that it is there, and decides where they lie.

    Returns the function that makes the buffer of a phase.

    Raises:
        SystemExit: with one line, if they do not fit.
    """
    # A tenth more slots than steps, for the observations that end an episode.
    teacher_frames = saved_replay.capacity if saved_replay else math.ceil(1.1 * args.teacher_steps)
    online_frames = math.ceil(1.1 * args.total_timesteps)
    buffers = {  # of each phase: its capacity and how many environments fill it
        "teacher": (min(args.buffer_size, teacher_frames), (saved_replay or args).num_envs),
        "online": (min(args.buffer_size, online_frames), args.num_envs),
    }
    buffers["offline"] = buffers["teacher"]
    largest_buffer = max(buffers.values())
    buffer_place = place_replay_buffer(
        args.buffer_device,
        largest_buffer[0],
        num_bytes=ReplayBuffer.num_bytes(*largest_buffer, num_actions, args.n_step),
        num_workers=min(args.num_envs, available_cores()),
        free_gpu=free_memory(device) if device.platform != "cpu" else None,
    )

    def make_replay(phase: str) -> ReplayBuffer:
        buffer_device = device if buffer_place == "cuda" else jax.devices("cpu")[0]
        return ReplayBuffer.create(*buffers[phase], num_actions, args.n_step, args.gamma, buffer_device)

    return make_replay


def main(args: Args) -> None:
    check_arguments(args)
    num_actions = count_actions(args.env_id)
    baseline_return = random_return(args.env_id, args.return_normalization)
    check_services(args)
    device = choose_device(args)
    saved_replay = None
    if args.teacher_replay_path:
        saved_replay = open_replay(
            args.teacher_replay_path, args.env_id, num_actions, args.batch_size, args.n_step
        )
    make_replay = plan_replay(args, num_actions, saved_replay, device)
    teacher = load_teacher(args, num_actions, device)
    state = create_train_state(args, num_actions, device)
    make_game = partial(make_env, args.env_id, args.repeat_action_probability)

    def make_envs() -> ParallelEnvs:
        return ParallelEnvs([make_game] * args.num_envs)

    def save_network(path: Path) -> None:
        save_student(state.learner.student, path)

    def has_learned() -> bool:
        return state.offline_step > 0 or state.online_step > 0

    with training_run(args, Path(__file__), LAYOUT, save_network, has_learned) as run:
        print(f"run: {run.folder}, on {device.platform}")
        if run.resumed:
            restore(state, run.resumed, make_replay)

        def checkpoint(envs: ParallelEnvs | None = None) -> None:
            player = "student" if state.phase == "online" else "teacher"
            run.checkpoint(partial(capture, state, envs), player, state.replay)

        def play(q_function: QFunction, games: int, name: str, step: int) -> list[float]:
            """The returns of whole games, the same games each time; their video is plotted at `step`."""
            with run.video(name, step) as video_folder:
                return evaluate(
                    make_game,
                    partial(compute_q_values, q_function),
                    games,
                    seed=(args.seed, EVALUATION_SEED),
                    epsilon=args.end_e,
                    video_folder=video_folder,
                    before_step=checkpoint,
                )

        def save_and_evaluate() -> float:
            run.save_model("-offline")
            step = state.offline_step
            return float(np.mean(play(state.learner.student, args.eval_episodes, f"offline-{step}", step)))

        def write_teacher_return(step: int) -> None:
            run.writer.add_scalar("charts/teacher/avg_episodic_return", state.teacher_return, step)

        if state.teacher_return is None:
            print(f"(1) the teacher plays {args.teacher_eval_episodes} games, then its buffer is filled")
            state.teacher_return = float(np.mean(play(teacher, args.teacher_eval_episodes, "teacher", 0)))
            print(f"teacher: mean return {state.teacher_return:.2f}")
            write_teacher_return(0)
            check_teacher_return(state.teacher_return, baseline_return)
        if state.phase == "teacher":
            state.replay = state.replay or make_replay("teacher")
            if saved_replay:
                load_teacher_buffer(state, teacher, saved_replay)
            else:
                with make_envs() as envs:
                    fill_teacher_buffer(args, state, teacher, envs, checkpoint)
            state.phase = "offline"

        if state.phase == "offline":
            print("(2) the student learns offline from that buffer")
            train_offline(args, state, run.writer, save_and_evaluate, checkpoint)
            write_teacher_return(args.offline_steps)
            state.replay = None  # before the online buffer needs the memory
            state.replay = make_replay("online")
            state.phase = "online"

        print("(3) the student plays and learns online")
        coefficient = partial(
            distill_coefficient,
            teacher_return=state.teacher_return,
            baseline_return=baseline_return,
            distill_steps=args.distill_steps,
        )
        with make_envs() as envs:
            train_online(args, state, teacher, coefficient, envs, run.writer, checkpoint)
            state.env_states = envs.get_states()
        run.save_model()
        last_step = args.offline_steps + state.online_step
        run.report(play(state.learner.student, args.eval_episodes, "final", last_step))
        write_teacher_return(last_step)


if __name__ == "__main__":
    exit_on_ctrl_c()
    main(parse_arguments(Args))
