"""DQN (Mnih et al., 2015, "Human-level control through deep reinforcement learning") on Atari, in JAX.

It learns a game from nothing: it plays ε-greedily, keeps what it saw in a replay buffer, and learns from
that. What it saves is a teacher for QDagger: the network (`--save-model`), its last play (`--save-replay`).

    python cleanrl/dqn_atari_jax.py --env-id BreakoutNoFrameskip-v4 --save-model
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
from cleanrl.utils.games.atari import count_actions
from cleanrl.utils.games.parallel_envs import ParallelEnvs, StepResult, available_cores
from cleanrl.utils.games.video import RecordGame
from cleanrl.utils.replay.memory import place_replay_buffer
from cleanrl.utils.replay.rows import check_new_folder, padded, save_replay
from cleanrl.utils.run.checkpoint import Checkpoint
from cleanrl.utils.run.events import EventWriter
from cleanrl.utils.run.training_run import check_services, training_run
from cleanrl.utils.signals import exit_on_ctrl_c
from cleanrl.utils.storage import write_durably

RECENT_GAMES = 10  # whose mean return the progress bar shows
LOSS_INTERVAL = 100  # gradient steps between two points of a loss curve: reading a loss waits for the device
CHART_INTERVAL = 1000  # environment steps between two points of the other curves
EVALUATION_SEED, TRAINING_SEED = 0, 1  # with --seed, what the games start from
LAYOUT = {  # of the curves that are read together, on TensorBoard's page "Custom Scalars"
    "returns": {"finished games": ["charts/episodic_return"]},
    "losses": {"TD loss": ["losses/td_loss"], "mean of Q(s, a)": ["losses/q_values"]},
    "ε": {"ε": ["charts/epsilon"]},
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
    """record the first game of the evaluation as mp4 under the run's folder, and show it in TensorBoard"""
    save_model: bool = True
    """save the network at the end, and when stopped"""
    upload_model: bool = False
    """publish the model on the Hugging Face Hub at the end, as {hf_entity}/{env_id}-{exp_name}-seed{seed}"""
    hf_entity: str | None = None
    """the user or organization on the Hub (default: the user whose token it is)"""
    save_replay: Path | None = None
    """a new folder for the replay buffer, saved at the end, as QDagger's --teacher-replay-path reads it"""
    checkpoint_interval: float = 600.0
    """seconds between two checkpoints of the run, all of it; 0: only when stopped"""
    resume: str | None = None
    """folder of a run to go on with, its options included; auto: the newest that is unfinished, if any"""

    env_id: str = "BreakoutNoFrameskip-v4"
    """the game, as {Game}NoFrameskip-v4"""
    repeat_action_probability: float = 0.0
    """sticky actions: the probability that the game repeats the last action instead"""
    num_envs: int = 8
    """copies of the game that step in parallel; all counts below are of steps over all copies"""

    total_timesteps: int = 10_000_000
    """environment steps (of 4 frames)"""
    learning_rate: float = 1e-4
    """learning rate of Adam"""
    buffer_size: int = 1_000_000
    """frames the replay buffer holds: one per transition and one per end of an episode"""
    buffer_device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the replay buffer lies; auto: on the training device if it fits there, else in host memory"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 1.0
    """share of the network in each update of the target network"""
    target_network_frequency: int = 1000
    """environment steps per update of the target network"""
    batch_size: int = 32
    """transitions per gradient step"""
    start_e: float = 1.0
    """epsilon at the start"""
    end_e: float = 0.01
    """epsilon at the end, and in the evaluation"""
    exploration_fraction: float = 0.10
    """share of total_timesteps in which epsilon falls"""
    learning_starts: int = 80_000
    """environment steps before the first gradient step"""
    train_frequency: int = 4
    """environment steps per gradient step"""
    eval_episodes: int = 10
    """games in the evaluation at the end"""


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


# ------------------------------------------------------------------------------------------------ replay


class Batch(NamedTuple):
    """`observations` are uint8 (batch, 4, 84, 84), `actions` int32 (batch,), all others float32.

    `terminations` are 1 where the episode ended by itself with that step.
    """

    observations: Array
    actions: Array
    rewards: Array
    next_observations: Array
    terminations: Array


SLOT_ARRAYS = (  # of a replay buffer: an entry per slot
    "frames",
    "stack_depths",
    "actions",
    "rewards",
    "terminations",
    "episode_ends",
    "is_transition",
)


@struct.dataclass
class ReplayBuffer:
    """Keeps each frame once, in a ring of slots per environment.

    A slot holds an observation's newest frame, how many earlier frames its stack reaches back (at most 3),
    and what followed: action, reward, whether the episode ended. The observation that ends an episode has a
    slot too, but no action.

    Contract: `draw` gives every transition in the buffer the same probability. No stack reaches across the
    start of an episode or into overwritten slots; spare slots see to it that this costs no transitions. A
    truncated episode is bootstrapped from its true last observation.

    The arrays lie on one device. `start` and `add` update them in place: the buffer that they are called on
    is used up, the one that they return takes its place.
    """

    frames: Array
    stack_depths: Array
    actions: Array
    rewards: Array
    terminations: Array
    episode_ends: Array
    is_transition: Array
    heads: Array  # positions of the current observations, ever growing
    depths: Array  # their stack depths

    @classmethod
    def create(cls, capacity: int, num_envs: int, device: jax.Device) -> "ReplayBuffer":
        """An empty buffer.

        Args:
            capacity: slots over all environments; the oldest are overwritten.
            num_envs: environments that are added together.
            device: where the arrays lie.
        """
        total = num_envs * cls.slots_per_env(capacity, num_envs)
        zeros = partial(jnp.zeros, device=device)
        return cls(
            frames=zeros((total, 84, 84), jnp.uint8),
            stack_depths=zeros(total, jnp.uint8),
            actions=zeros(total, jnp.uint8),
            rewards=zeros(total),
            terminations=zeros(total, bool),
            episode_ends=zeros(total, bool),
            is_transition=zeros(total, bool),
            heads=zeros(num_envs, jnp.int32),
            depths=zeros(num_envs, jnp.uint8),
        )

    @staticmethod
    def slots_per_env(capacity: int, num_envs: int) -> int:
        # At least 2, of which one is a transition. Spare: 3 for the oldest stack, 1 for the current frame.
        return max(2, math.ceil(capacity / num_envs)) + 4

    @classmethod
    def num_bytes(cls, capacity: int, num_envs: int) -> int:
        """Bytes of a buffer."""
        return num_envs * cls.slots_per_env(capacity, num_envs) * (84 * 84 + 4 + 5)

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

    def add(self, actions: np.ndarray, step: StepResult) -> "ReplayBuffer":
        """Adds one step of every environment.

        Args:
            actions: integers (num_envs,), taken from the current observations.
            step: what the environments answered.
        """
        return self._add(
            actions,
            step.rewards,
            step.terminations,
            step.truncations,
            step.observations[:, -1],
            step.final_observations[:, -1],
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
    ) -> "ReplayBuffer":
        slots = self._head_slots()
        ended = terminations | truncations
        replay = self.replace(
            actions=self.actions.at[slots].set(actions.astype(jnp.uint8)),
            rewards=self.rewards.at[slots].set(rewards),
            terminations=self.terminations.at[slots].set(terminations),
            episode_ends=self.episode_ends.at[slots].set(ended),
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
        """Puts back what `read` gave; the heads and their depths are set by themselves."""
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
        """The number of positions per environment, the newest at heads - 1, that `draw` chooses from."""
        overwritten = jnp.maximum(self.heads + 1 - self.num_slots, 0)
        oldest = jnp.where(overwritten > 0, overwritten + 3, 0)
        return self.heads - oldest

    def draw(self, key: Array, batch_size: int) -> Array:
        """Draws the slots of transitions, int32 (batch_size,), uniformly and with replacement.

        There are some once the environments have made a step; before, this would not end.
        """
        ends = jnp.cumsum(self._drawable_per_env())

        def redraw(key_and_slots: tuple[Array, Array]) -> tuple[Array, Array]:
            key, slots = key_and_slots
            key, draw_key = jax.random.split(key)
            drawn = jax.random.randint(draw_key, (batch_size,), 0, ends[-1])
            envs = jnp.searchsorted(ends, drawn, side="right")
            positions = self.heads[envs] - (ends[envs] - drawn)
            drawn_slots = envs * self.num_slots + positions % self.num_slots
            return key, jnp.where(self.is_transition[slots], slots, drawn_slots)

        def is_missing_some(key_and_slots: tuple[Array, Array]) -> Array:
            return ~self.is_transition[key_and_slots[1]].all()

        # Again, where the observation that ended an episode was drawn. A head is no transition yet.
        nothing = jnp.full(batch_size, self._head_slots()[0])
        return lax.while_loop(is_missing_some, redraw, (key, nothing))[1]

    def gather(self, slots: Array) -> Batch:
        """The transitions at `slots`, integers (batch,)."""
        return Batch(
            observations=self._stacks(slots),
            actions=self.actions[slots].astype(jnp.int32),
            rewards=self.rewards[slots],
            next_observations=self._stacks(self._ahead(slots, 1)),
            terminations=self.terminations[slots].astype(jnp.float32),
        )

    def _ahead(self, slots: Array, steps: int | Array) -> Array:
        """The slots that many steps later in the same rings; earlier, where negative."""
        ring_starts = slots // self.num_slots * self.num_slots
        return ring_starts + (slots - ring_starts + steps) % self.num_slots

    def _stacks(self, slots: Array) -> Array:
        # A stack that starts with its episode repeats the first frame.
        back = jnp.minimum(jnp.arange(3, -1, -1), self.stack_depths[slots].astype(jnp.int32)[:, None])
        return self.frames[self._ahead(slots[:, None], -back)]


# ------------------------------------------------------------------------------------------------ losses


def td_targets(rewards: Array, terminations: Array, next_q_values: Array, gamma: float) -> Array:
    """y = r + γ (1 − terminated) max_a' Q_target(s', a'), float32 (batch,).

    `next_q_values` are (batch, num_actions), the others (batch,).
    """
    return rewards + gamma * (1 - terminations) * next_q_values.max(axis=1)


def linear_schedule(start: float, end: float, duration: float, step: ArrayLike) -> np.ndarray:
    """Goes linearly from `start` at step 0 to `end` at step `duration` and stays there."""
    return start + (end - start) * np.minimum(np.divide(step, max(duration, 1)), 1.0)


# ---------------------------------------------------------------------------------------------- training


@struct.dataclass
class Learner:
    """What a gradient step changes, all on the training device."""

    q_network: QFunction
    target_network: QFunction
    optimizer_state: optax.OptState


@dataclass
class TrainState:
    """All that a run is: what a checkpoint saves."""

    learner: Learner
    sampling_key: Array  # of drawing from the replay buffer
    exploration_key: Array
    replay: ReplayBuffer
    step: int = 0  # environment steps done
    learned_step: int = 0  # of these, how many the learner has answered
    gradient_steps: int = 0
    seconds: float = 0.0  # of training
    recent_returns: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_GAMES))
    unread: list[tuple] = field(default_factory=list)  # arguments of `write_losses`, still on the device
    env_states: list[dict] | None = None  # where the games stand, while no environments are open

    @property
    def device(self) -> jax.Device:
        return jax.tree.leaves(self.learner)[0].device


KEYS = ("sampling_key", "exploration_key")
COUNTERS = ("step", "learned_step", "gradient_steps", "seconds")


def create_train_state(args: Args, num_actions: int, replay: ReplayBuffer, device: jax.Device) -> TrainState:
    init_key, sampling_key, exploration_key = jax.random.split(jax.random.key(args.seed), 3)
    network = QNetwork(num_actions)
    q_network = QFunction(network.init(init_key, jnp.zeros((1, 4, 84, 84), jnp.uint8)), network)
    target_network = jax.tree.map(jnp.copy, q_network)
    learner = Learner(q_network, target_network, optax.adam(args.learning_rate).init(q_network))
    return TrainState(*jax.device_put((learner, sampling_key, exploration_key), device), replay)


def capture(state: TrainState, envs: ParallelEnvs | None) -> dict[str, Any]:
    """The state for a checkpoint, but for the rows of the replay buffer."""
    return {
        "learner": serialization.to_state_dict(state.learner),
        **{name: jax.random.key_data(getattr(state, name)) for name in KEYS},
        **{name: getattr(state, name) for name in COUNTERS},
        "replay": (state.replay.heads, state.replay.depths),
        "recent_returns": list(state.recent_returns),
        "unread": state.unread,
        "env_states": envs.get_states() if envs else state.env_states,
    }


def restore(state: TrainState, checkpoint: Checkpoint) -> None:
    """Brings a new state to where `capture` saw it."""
    saved = checkpoint.read_state()
    learner = serialization.from_state_dict(state.learner, saved["learner"])
    keys = [jax.random.wrap_key_data(jnp.asarray(saved[name])) for name in KEYS]
    state.learner, state.sampling_key, state.exploration_key = jax.device_put((learner, *keys), state.device)
    for name in (*COUNTERS, "unread", "env_states"):
        setattr(state, name, saved[name])
    state.recent_returns.extend(saved["recent_returns"])
    heads, depths = jax.device_put(saved["replay"], state.replay.device)
    for slots, rows in checkpoint.rows(state.replay.num_slots):
        state.replay = state.replay.write(slots, {name: rows[name] for name in SLOT_ARRAYS})
    state.replay = state.replay.replace(heads=heads, depths=depths)


class Settings(NamedTuple):
    """The options that are compiled into a gradient step."""

    batch_size: int
    learning_rate: float
    gamma: float

    @classmethod
    def of(cls, args: Args) -> "Settings":
        return cls(*(getattr(args, name) for name in cls._fields))


def update(
    learner: Learner, batch: Batch, target_share: ArrayLike, settings: Settings
) -> tuple[Learner, dict[str, Array]]:
    """One gradient step; returns its loss, mean((y − Q(s, a))²), and the mean of Q(s, a) as well.

    Before it, the target network moves to the other by `target_share`.
    """
    target_network = optax.incremental_update(learner.q_network, learner.target_network, target_share)
    next_q_values = target_network(batch.next_observations)
    targets = td_targets(batch.rewards, batch.terminations, next_q_values, settings.gamma)

    def compute_loss(q_network: QFunction) -> tuple[Array, dict[str, Array]]:
        q_values = q_network(batch.observations)[jnp.arange(len(batch.actions)), batch.actions]
        loss = jnp.square(targets - q_values).mean()
        return loss, {"td_loss": loss, "q_values": q_values.mean()}

    gradients, results = jax.grad(compute_loss, has_aux=True)(learner.q_network)
    steps, optimizer_state = optax.adam(settings.learning_rate).update(gradients, learner.optimizer_state)
    return Learner(optax.apply_updates(learner.q_network, steps), target_network, optimizer_state), results


def sample_batch(replay: ReplayBuffer, key: Array, batch_size: int) -> tuple[Batch, Array]:
    """A batch, and the key for the next one."""
    key, draw_key = jax.random.split(key)
    return replay.gather(replay.draw(draw_key, batch_size)), key


@partial(jax.jit, static_argnames="settings", donate_argnames="learner")
def sample_and_update(
    learner: Learner, key: Array, replay: ReplayBuffer, target_shares: Array, settings: Settings
) -> tuple[Learner, Array, dict[str, Array]]:
    """As many gradient steps as there are shares (k), each on a batch of its own; the results are (k,)."""

    def gradient_step(
        learner_and_key: tuple[Learner, Array], target_share: Array
    ) -> tuple[tuple[Learner, Array], dict[str, Array]]:
        learner, key = learner_and_key
        batch, key = sample_batch(replay, key, settings.batch_size)
        learner, results = update(learner, batch, target_share, settings)
        return (learner, key), results

    # For the CPU, XLA compiles a convolution inside a loop into code that takes ten times as long; and a scan
    # of a single step is such a loop, if it is not unrolled further than it is long.
    unroll = len(target_shares) + 1 if jax.default_backend() == "cpu" else 1
    (learner, key), results = lax.scan(gradient_step, (learner, key), target_shares, unroll=unroll)
    return learner, key, results


# For a replay buffer that lies in host memory while a GPU trains.
update_alone = jax.jit(update, static_argnames="settings", donate_argnames="learner")
sample_alone = jax.jit(sample_batch, static_argnames="batch_size")


def start_gradient_steps(args: Args, state: TrainState, target_shares: Sequence[float]) -> dict[str, Array]:
    """Starts as many gradient steps as there are shares (k); their results (k,) are on the device.

    For the target network's shares see `target_share`.
    """
    settings, target_shares = Settings.of(args), np.float32(target_shares)
    state.sampling_key = jax.device_put(state.sampling_key, state.replay.device)
    if state.replay.device == state.device:
        state.learner, state.sampling_key, results = sample_and_update(
            state.learner, state.sampling_key, state.replay, target_shares, settings
        )
        return results
    every_result = []
    for share in target_shares:
        batch, state.sampling_key = sample_alone(state.replay, state.sampling_key, args.batch_size)
        batch = jax.device_put(batch, state.device)
        state.learner, results = update_alone(state.learner, batch, share, settings)
        every_result.append(results)
    return {name: [results[name] for results in every_result] for name in every_result[0]}


def updates_per_call(device: jax.Device) -> int:
    """The most gradient steps started in one call. For a CPU, XLA compiles each of them by itself."""
    return 2 if device.platform == "cpu" else 10


def target_share(args: Args, step: int) -> float:
    """How far the target network moves to the other before the gradient step at environment step `step`.

    That is all its updates since the gradient step before, whose own step counts and this one does not:
    where both fall on the same step, the network moves first.
    """
    frequency = args.target_network_frequency
    updates = (step - 1) // frequency - (step - args.train_frequency - 1) // frequency
    return 1 - (1 - args.tau) ** updates


def read_losses(results: dict[str, Array], index: int, where: str) -> dict[str, float]:
    """One of the results of `start_gradient_steps` as numbers; waits for the device.

    Raises:
        SystemExit: with one line, if the loss is not finite any more.
    """
    values = {name: float(value[index]) for name, value in jax.device_get(results).items()}
    if not math.isfinite(values["td_loss"]):
        raise SystemExit(f"error: the loss is {values['td_loss']} at {where}; try a lower --learning-rate")
    return values


def explore(key: Array, epsilon: ArrayLike, q_values: Array) -> Array:
    """ε-greedy actions int32 (n,) from Q-values (n, num_actions); ε is one for all or one for each."""
    choice_key, action_key = jax.random.split(key)
    random_actions = jax.random.randint(action_key, (len(q_values),), 0, q_values.shape[1])
    explores = jax.random.uniform(choice_key, (len(q_values),)) < epsilon
    return jnp.where(explores, random_actions, q_values.argmax(axis=1))


@jax.jit
def act(q_function: QFunction, observations: Array, epsilon: ArrayLike, key: Array) -> tuple[Array, Array]:
    """Actions (n,) for observations (n, 4, 84, 84), and the next key."""
    key, explore_key = jax.random.split(key)
    return explore(explore_key, epsilon, q_function(observations)), key


@jax.jit
def forward(q_function: QFunction, observations: Array) -> Array:
    return q_function(observations)


def compute_q_values(q_function: QFunction, observations: np.ndarray) -> np.ndarray:
    """Q-values float32 (n, num_actions) of observations uint8 (n, 4, 84, 84)."""
    # Every new n would be compiled; powers of two are few.
    padded = np.zeros((1 << (len(observations) - 1).bit_length(), 4, 84, 84), np.uint8)
    padded[: len(observations)] = observations
    return np.asarray(forward(q_function, padded))[: len(observations)]


def train(
    args: Args,
    state: TrainState,
    envs: ParallelEnvs,
    writer: EventWriter,
    checkpoint: Callable[[ParallelEnvs], None],
) -> None:
    """Plays and learns, each while the other is at work.

    `checkpoint` is called where nothing is half-done.
    """

    def write_losses(step: int, results: dict[str, Array], index: int) -> None:
        for name, value in read_losses(results, index, f"environment step {step}").items():
            writer.add_scalar(f"losses/{name}", value, step)

    if state.env_states:
        observations, state.env_states = envs.set_states(state.env_states), None
    else:
        observations = envs.reset(seed=(args.seed, TRAINING_SEED))
        state.replay = state.replay.start(observations)
    start_time = time.monotonic() - state.seconds
    exploration_steps = args.exploration_fraction * args.total_timesteps
    with tqdm(total=args.total_timesteps, initial=state.step, desc="training", unit=" steps") as progress:
        while state.step < args.total_timesteps:
            checkpoint(envs)
            steps = state.step + np.arange(args.num_envs)
            epsilon = linear_schedule(args.start_e, args.end_e, exploration_steps, steps)
            actions, state.exploration_key = act(
                state.learner.q_network, observations, epsilon, state.exploration_key
            )
            actions = np.asarray(actions)  # nothing else in this loop waits for the device
            envs.step_async(actions)
            write_all(state.unread, write_losses)  # computed before the actions were
            learn(args, state)  # while the environments step
            step = envs.step_wait()
            state.replay = state.replay.add(actions, step)
            observations = step.observations
            for game in step.finished_games:
                step_of_env = state.step + game.env_index + 1
                writer.add_scalar("charts/episodic_return", game.episodic_return, step_of_env)
                writer.add_scalar("charts/episodic_length", game.episodic_length, step_of_env)
                state.recent_returns.append(game.episodic_return)
                progress.set_postfix({"mean return": f"{np.mean(state.recent_returns):.1f}"}, refresh=False)
            state.step += args.num_envs
            state.seconds = time.monotonic() - start_time
            progress.update(args.num_envs)
            is_last = state.step >= args.total_timesteps
            if state.step % CHART_INTERVAL < args.num_envs or is_last:
                writer.add_scalar("charts/epsilon", epsilon[-1], state.step)
                writer.add_scalar("charts/SPS", state.step / state.seconds, state.step)
    learn(args, state)
    write_all(state.unread, write_losses)


def write_all(unread: list[tuple], write_losses: Callable[..., None]) -> None:
    """Writes the losses that were not read yet; waits for the device."""
    while unread:
        write_losses(*unread.pop(0))


def learn(args: Args, state: TrainState) -> None:
    """Starts the gradient steps and target updates that the environment steps so far call for, in order.

    Those whose losses are to be written go to `state.unread`: the step, all results, and their index there.
    """
    steps = [
        step
        for step in range(state.learned_step + 1, min(state.step, args.total_timesteps) + 1)
        if step > args.learning_starts and step % args.train_frequency == 0
    ]
    state.learned_step = min(state.step, args.total_timesteps)
    for first in range(0, len(steps), updates_per_call(state.device)):
        steps_of_call = steps[first : first + updates_per_call(state.device)]
        shares = [target_share(args, step) for step in steps_of_call]
        results = start_gradient_steps(args, state, shares)
        for index, step in enumerate(steps_of_call):
            state.gradient_steps += 1
            is_last = step + args.train_frequency > args.total_timesteps
            if state.gradient_steps % LOSS_INTERVAL == 0 or is_last:
                state.unread.append((step, results, index))


# -------------------------------------------------------------------------------------------------- main


def save_network(q_network: QFunction, path: Path) -> None:
    """Writes the parameters, all of them or nothing."""
    write_durably(path, serialization.to_bytes(q_network.params))


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


def main(args: Args) -> None:
    check_arguments(args)
    num_actions = count_actions(args.env_id)
    check_services(args)
    device = choose_device(args)
    if args.save_replay:
        check_new_folder(args.save_replay)

    # A tenth more slots than steps, for the observations that end an episode.
    capacity = min(args.buffer_size, math.ceil(1.1 * args.total_timesteps))
    buffer_place = place_replay_buffer(
        args.buffer_device,
        capacity,
        num_bytes=ReplayBuffer.num_bytes(capacity, args.num_envs),
        num_workers=min(args.num_envs, available_cores()),
        free_gpu=free_memory(device) if device.platform != "cpu" else None,
    )
    buffer_device = device if buffer_place == "cuda" else jax.devices("cpu")[0]
    replay = ReplayBuffer.create(capacity, args.num_envs, buffer_device)
    state = create_train_state(args, num_actions, replay, device)
    make_game = partial(make_env, args.env_id, args.repeat_action_probability)

    def save(path: Path) -> None:
        save_network(state.learner.q_network, path)

    def has_learned() -> bool:
        return state.gradient_steps > 0

    with training_run(args, Path(__file__), LAYOUT, save, has_learned) as run:
        print(f"run: {run.folder}, on {device.platform}")
        if run.resumed:
            restore(state, run.resumed)
            print(f"going on from environment step {state.step:,}")

        def checkpoint(envs: ParallelEnvs | None = None) -> None:
            run.checkpoint(partial(capture, state, envs), "replay", state.replay)

        with ParallelEnvs([make_game] * args.num_envs) as envs:
            train(args, state, envs, run.writer, checkpoint)
            state.env_states = envs.get_states()
        run.save_model()
        with run.video("final", state.step) as video_folder:
            returns = evaluate(
                make_game,
                partial(compute_q_values, state.learner.q_network),
                args.eval_episodes,
                seed=(args.seed, EVALUATION_SEED),
                epsilon=args.end_e,
                video_folder=video_folder,
                before_step=checkpoint,
            )
        run.report(returns)
        if args.save_replay:
            save_replay(args.save_replay, state.replay, args.env_id, num_actions)


if __name__ == "__main__":
    exit_on_ctrl_c()
    main(parse_arguments(Args))
