"""QDagger (Agarwal et al., 2022, "Reincarnating Reinforcement Learning") on Atari, in PyTorch.

A teacher, an ordinary DQN, already exists. A student, an Impala-CNN, takes over what the teacher knows and
then goes past it: (1) the teacher fills a replay buffer with its play, (2) the student learns from it
offline, (3) the student plays and learns online while the teacher's influence fades.

    python cleanrl/qdagger_dqn_atari_impalacnn.py --env-id BreakoutNoFrameskip-v4
"""

import io
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

# PyTorch's threads spin while they wait; by default so long that they take the cores from the workers.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import cv2
import gymnasium as gym
import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional as F
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
from cleanrl.utils.replay.rows import SavedReplay, open_replay
from cleanrl.utils.run.checkpoint import Checkpoint
from cleanrl.utils.run.events import EventWriter
from cleanrl.utils.run.training_run import check_services, training_run
from cleanrl.utils.signals import exit_on_ctrl_c
from cleanrl.utils.storage import write_durably
from cleanrl.utils.weights.files import fit_weights, read_weights

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
    """let cuDNN use only deterministic algorithms"""
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
    teacher_model_exp_name: str = "dqn_atari"
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

    def __init__(self, num_actions: int):
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(4, 32, 8, stride=4),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(3136, 512),
            nn.ReLU(),
            nn.Linear(512, num_actions),
        )

    def forward(self, observations: Tensor) -> Tensor:
        return self.network(observations / 255.0)


class ResidualBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv0 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv1(F.relu(self.conv0(F.relu(x))))


class ConvSequence(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.res_block0 = ResidualBlock(out_channels)
        self.res_block1 = ResidualBlock(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv(x), kernel_size=3, stride=2, padding=1)
        return self.res_block1(self.res_block0(x))


class StudentNetwork(nn.Module):
    """The Impala-CNN (Espeholt et al., 2018): uint8 (batch, 4, 84, 84) to Q-values (batch, num_actions)."""

    def __init__(self, num_actions: int, dense_width: int = 256):
        super().__init__()
        self.network = nn.Sequential(
            ConvSequence(4, 16),
            ConvSequence(16, 32),
            ConvSequence(32, 32),
            nn.Flatten(),
            nn.ReLU(),
            nn.Linear(3872, dense_width),
            nn.ReLU(),
            nn.Linear(dense_width, num_actions),
        )

    def forward(self, observations: Tensor) -> Tensor:
        return self.network(observations / 255.0)


# ------------------------------------------------------------------------------------------------ replay


class Batch(NamedTuple):
    """`observations` are uint8 (batch, 4, 84, 84), `actions` int64 (batch,), all others float32.

    `rewards` are discounted sums of up to n steps, `discounts` γ to the power of the steps summed,
    `next_observations` those after them, `terminations` 1 where the episode ended there by itself.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminations: Tensor
    discounts: Tensor
    teacher_q_values: Tensor


class ReplayBuffer:
    """Keeps each frame once, in a ring of slots per environment.

    A slot holds an observation's newest frame, how many earlier frames its stack reaches back (at most 3),
    the teacher's Q-values of the observation, which never change, and what followed: action, reward, whether
    the episode ended. The observation that ends an episode has a slot too, but no action.

    Contract: `draw` gives every transition in the buffer the same probability, save for each environment's
    newest n - 1 slots, which wait until their n rewards are known. No stack reaches across the start of an
    episode or into overwritten slots; spare slots see to it that this costs no transitions. A sum of n
    rewards ends with its episode. A truncated episode is bootstrapped from its true last observation.

    Args:
        capacity: slots over all environments; the oldest are overwritten.
        num_envs: environments that are added together.
        num_actions: Q-values per observation.
        n_step: n, rewards summed before the bootstrap.
        gamma: γ, the discount factor.
        device: where the tensors lie.
    """

    TENSORS = (
        "frames",
        "stack_depths",
        "actions",
        "rewards",
        "terminations",
        "episode_ends",
        "teacher_q_values",
    )

    def __init__(
        self, capacity: int, num_envs: int, num_actions: int, n_step: int, gamma: float, device: torch.device
    ):
        self.num_envs, self.n_step, self.gamma, self.device = num_envs, n_step, gamma, device
        self.num_slots = self.slots_per_env(capacity, num_envs, n_step)
        total = num_envs * self.num_slots
        self.frames = torch.empty((total, 84, 84), dtype=torch.uint8, device=device)
        self.stack_depths = torch.zeros(total, dtype=torch.uint8, device=device)
        self.actions = torch.zeros(total, dtype=torch.uint8, device=device)
        self.rewards = torch.zeros(total, device=device)
        self.terminations = torch.zeros(total, dtype=torch.bool, device=device)
        self.episode_ends = torch.zeros(total, dtype=torch.bool, device=device)
        self.teacher_q_values = torch.zeros((total, num_actions), device=device)
        # What drawing needs stays on the host, so that it never waits for the device.
        self.is_transition = np.zeros(total, dtype=bool)
        self.heads = np.zeros(num_envs, dtype=np.int64)  # positions of the current observations, ever growing
        self.depths = np.zeros(num_envs, dtype=np.uint8)  # their stack depths

    @staticmethod
    def slots_per_env(capacity: int, num_envs: int, n_step: int) -> int:
        # At least 2, of which one is a transition. Spare: 3 for the oldest stack, n before the current one.
        return max(2, math.ceil(capacity / num_envs)) + 3 + n_step

    @classmethod
    def num_bytes(cls, capacity: int, num_envs: int, num_actions: int, n_step: int) -> int:
        """Bytes of a full buffer."""
        bytes_per_slot = 84 * 84 + 4 * num_actions + 4 + 5
        return num_envs * cls.slots_per_env(capacity, num_envs, n_step) * bytes_per_slot

    def start(self, observations: np.ndarray) -> None:
        """Takes the first observations, uint8 (num_envs, 4, 84, 84), each the start of an episode."""
        self._write_observations(np.arange(self.num_envs), observations)

    def add(self, actions: np.ndarray, step: StepResult, teacher_q_values: np.ndarray) -> None:
        """Adds one step of every environment.

        Args:
            actions: integers (num_envs,), taken from the current observations.
            step: what the environments answered.
            teacher_q_values: float32 (num_envs, num_actions), of the observations that were acted on.
        """
        every_env = np.arange(self.num_envs)
        slots = self._head_slots(every_env)
        self.is_transition[slots] = True
        slots = torch.from_numpy(slots).to(self.device)
        ended = step.terminations | step.truncations
        self.actions[slots] = torch.from_numpy(actions.astype(np.uint8)).to(self.device)
        self.rewards[slots] = torch.from_numpy(step.rewards).to(self.device)
        self.terminations[slots] = torch.from_numpy(step.terminations).to(self.device)
        self.episode_ends[slots] = torch.from_numpy(ended).to(self.device)
        self.teacher_q_values[slots] = torch.from_numpy(teacher_q_values).to(self.device)

        self.heads += 1
        self.depths = np.minimum(self.depths + 1, 3).astype(np.uint8)
        if ended.any():
            self._write_observations(np.flatnonzero(ended), step.final_observations[ended])
            self.heads[ended] += 1
            self.depths[ended] = 0
        self._write_observations(every_env, step.observations)

    def _head_slots(self, envs: np.ndarray) -> np.ndarray:
        return envs * self.num_slots + self.heads[envs] % self.num_slots

    def _write_observations(self, envs: np.ndarray, observations: np.ndarray) -> None:
        slots = self._head_slots(envs)
        self.is_transition[slots] = False
        slots = torch.from_numpy(slots).to(self.device)
        self.frames[slots] = torch.from_numpy(observations[:, -1]).to(self.device)
        self.stack_depths[slots] = torch.from_numpy(self.depths[envs]).to(self.device)

    def read(self, slots: np.ndarray) -> dict[str, np.ndarray]:
        """What the slots, integers (n,), hold: arrays (n, …) by name."""
        on_device = torch.from_numpy(slots).to(self.device)
        rows = {name: getattr(self, name)[on_device].cpu().numpy() for name in self.TENSORS}
        return {**rows, "is_transition": self.is_transition[slots]}

    def write(self, slots: np.ndarray, rows: dict[str, np.ndarray]) -> None:
        """Puts back what `read` gave, all of it or some; the heads and their depths are set by themselves."""
        on_device = torch.from_numpy(slots).to(self.device)
        for name in rows.keys() & set(self.TENSORS):
            getattr(self, name)[on_device] = torch.from_numpy(rows[name]).to(self.device)
        self.is_transition[slots] = rows["is_transition"]

    def _drawable_per_env(self) -> np.ndarray:
        """The number of positions per environment, the newest at heads - n, that `draw` chooses from."""
        overwritten = np.maximum(self.heads + 1 - self.num_slots, 0)
        oldest = np.where(overwritten > 0, overwritten + 3, 0)
        return np.maximum(self.heads - self.n_step + 1 - oldest, 0)

    def draw(self, batch_size: int, rng: np.random.Generator) -> np.ndarray:
        """Draws the slots of transitions, int64 (batch_size,), uniformly and with replacement.

        There are some once every environment has made n steps; before, this would not end.
        """
        ends = np.cumsum(self._drawable_per_env())
        slots = np.empty(batch_size, dtype=np.int64)
        missing = np.arange(batch_size)
        while len(missing):  # again, where the observation that ended an episode was drawn
            drawn = rng.integers(ends[-1], size=len(missing))
            envs = np.searchsorted(ends, drawn, side="right")
            positions = self.heads[envs] - self.n_step - (ends[envs] - 1 - drawn)
            slots[missing] = envs * self.num_slots + positions % self.num_slots
            missing = missing[~self.is_transition[slots[missing]]]
        return slots

    def gather(self, slots: Tensor) -> Batch:
        """The transitions at `slots`, int64 (batch,), all on the buffer's device."""
        rewards = torch.zeros(len(slots), device=self.device)
        terminations = torch.zeros(len(slots), device=self.device)
        going_on = torch.ones(len(slots), device=self.device)
        steps = torch.zeros_like(slots)
        for k in range(self.n_step):
            slots_k = self._ahead(slots, k)
            rewards += self.gamma**k * going_on * self.rewards[slots_k]
            terminations += going_on * self.terminations[slots_k]
            steps += going_on.long()
            going_on *= ~self.episode_ends[slots_k]
        return Batch(
            observations=self._stacks(slots),
            actions=self.actions[slots].long(),
            rewards=rewards,
            next_observations=self._stacks(self._ahead(slots, steps)),
            terminations=terminations,
            discounts=self.gamma**steps,
            teacher_q_values=self.teacher_q_values[slots],
        )

    def _ahead(self, slots: Tensor, steps: int | Tensor) -> Tensor:
        """The slots that many steps later in the same rings; earlier, where negative."""
        ring_starts = slots // self.num_slots * self.num_slots
        return ring_starts + (slots - ring_starts + steps) % self.num_slots

    def _stacks(self, slots: Tensor) -> Tensor:
        # A stack that starts with its episode repeats the first frame.
        back = torch.arange(3, -1, -1, device=self.device)
        back = torch.minimum(back, self.stack_depths[slots].long()[:, None])
        return self.frames[self._ahead(slots[:, None], -back)]


# ----------------------------------------------------------------------------------------------- teacher


def load_teacher(args: Args, num_actions: int, device: torch.device) -> TeacherNetwork:
    """Loads the teacher from a local file or from the Hub.

    Raises:
        SystemExit: with one line that names the file or the repository and what to do.
    """
    path = args.teacher_model_path
    if path is None:
        repo_id = args.teacher_policy_hf_repo or f"cleanrl/{args.env_id}-{args.teacher_model_exp_name}-seed1"
        filename = teacher_filename(repo_id, args.teacher_model_exp_name)
        path = download(repo_id, filename, args.teacher_revision)
    teacher = TeacherNetwork(num_actions)
    weights = fit_weights(read_weights(path), teacher.state_dict(), str(path))
    teacher.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    return teacher.to(device).requires_grad_(False)


# ------------------------------------------------------------------------------------------------ losses


def td_targets(rewards: Tensor, terminations: Tensor, discounts: Tensor, next_q_values: Tensor) -> Tensor:
    """y = r + γ (1 − terminated) max_a' Q_target(s', a'), float32 (batch,).

    `next_q_values` are (batch, num_actions), all others (batch,).
    """
    return rewards + discounts * (1 - terminations) * next_q_values.max(dim=1).values


def td_loss(q_values: Tensor, actions: Tensor, targets: Tensor, kind: str = "mse") -> Tensor:
    """mean((y − Q(s, a))²) of Q-values (batch, num_actions), actions int64 (batch,), targets y (batch,).

    With kind "huber", half the square of errors up to 1, and |error| − 1/2 of larger ones.
    """
    q_of_actions = q_values.gather(1, actions[:, None]).squeeze(1)
    if kind == "huber":
        return F.huber_loss(q_of_actions, targets)
    return (targets - q_of_actions).square().mean()


def distill_loss(q_values: Tensor, teacher_q_values: Tensor, temperature: float) -> Tensor:
    """mean over the batch of Σ_a π_T (log π_T − log π), where π = softmax(Q / temperature).

    The distillation term of QDagger (Agarwal et al., 2022). Both Q-values are (batch, num_actions).
    """
    log_policy = F.log_softmax(q_values / temperature, dim=1)
    teacher_log_policy = F.log_softmax(teacher_q_values / temperature, dim=1)
    return (teacher_log_policy.exp() * (teacher_log_policy - log_policy)).sum(dim=1).mean()


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


@dataclass
class TrainState:
    """All that a run is: what a checkpoint saves."""

    student: StudentNetwork
    target_network: StudentNetwork
    optimizer: torch.optim.Optimizer
    rng: np.random.Generator  # of exploration and of drawing from the replay buffer
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
    env_states: list[dict] | None = None  # where the games stand, while no environments are open

    @property
    def device(self) -> torch.device:
        return next(self.student.parameters()).device


NETWORKS = ("student", "target_network", "optimizer")
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


def create_train_state(args: Args, num_actions: int, device: torch.device) -> TrainState:
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    # Convolutions are a third faster in this memory format.
    student, target_network = (
        StudentNetwork(num_actions, args.dense_width).to(device, memory_format=torch.channels_last)
        for _ in range(2)
    )
    target_network.requires_grad_(False).load_state_dict(student.state_dict())
    optimizer = torch.optim.Adam(student.parameters(), lr=args.learning_rate, eps=args.adam_epsilon)
    return TrainState(student, target_network, optimizer, np.random.default_rng(args.seed))


def capture(state: TrainState, envs: ParallelEnvs | None) -> dict[str, Any]:
    """The state for a checkpoint, but for the rows of the replay buffer."""
    return {
        **{name: getattr(state, name).state_dict() for name in NETWORKS},
        **{name: getattr(state, name) for name in COUNTERS},
        "rng": state.rng.bit_generator.state,
        "replay": (state.replay.heads, state.replay.depths) if state.replay else None,
        "recent_returns": list(state.recent_returns),
        "env_states": envs.get_states() if envs else state.env_states,
    }


def restore(state: TrainState, checkpoint: Checkpoint, make_replay: Callable[[str], ReplayBuffer]) -> None:
    """Brings a new state to where `capture` saw it; `make_replay` makes the buffer of a phase."""
    saved = checkpoint.read_state()
    for name in NETWORKS:
        getattr(state, name).load_state_dict(to_tensors(saved[name]))
    for name in (*COUNTERS, "env_states"):
        setattr(state, name, saved[name])
    state.rng.bit_generator.state = saved["rng"]
    state.recent_returns.extend(saved["recent_returns"])
    if saved["replay"]:
        state.replay = make_replay(state.phase)
        state.replay.heads, state.replay.depths = saved["replay"]
        for slots, rows in checkpoint.rows(state.replay.num_slots):
            state.replay.write(slots, rows)


def to_tensors(tree: Any) -> Any:
    """Nested dicts and lists with each array as a tensor."""
    if isinstance(tree, dict):
        return {key: to_tensors(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [to_tensors(value) for value in tree]
    return torch.tensor(tree) if isinstance(tree, np.ndarray) else tree


def update(args: Args, state: TrainState, batch: Batch, distill_coeff: float) -> dict[str, Tensor]:
    """One gradient step; returns its losses and the mean of Q(s, a), still on the device."""
    with torch.no_grad():
        next_q_values = state.target_network(batch.next_observations)
        targets = td_targets(batch.rewards, batch.terminations, batch.discounts, next_q_values)
    q_values = state.student(batch.observations)
    td = td_loss(q_values, batch.actions, targets, args.td_loss)
    distill = distill_loss(q_values, batch.teacher_q_values, args.temperature)
    loss = td + distill_coeff * args.distill_weight * distill
    state.optimizer.param_groups[0]["lr"] = learning_rate(args, distill_coeff)
    state.optimizer.zero_grad()
    loss.backward()
    state.optimizer.step()
    mean_q_value = q_values.gather(1, batch.actions[:, None]).mean()
    results = {"loss": loss, "td_loss": td, "distill_loss": distill, "q_values": mean_q_value}
    return {name: value.detach() for name, value in results.items()}


@torch.no_grad()
def update_target_network(state: TrainState, tau: float) -> None:
    for target, parameter in zip(state.target_network.parameters(), state.student.parameters(), strict=True):
        target.lerp_(parameter, tau)


def sample_batch(args: Args, state: TrainState) -> Batch:
    slots = torch.from_numpy(state.replay.draw(args.batch_size, state.rng)).to(state.replay.device)
    return Batch(*(tensor.to(state.device) for tensor in state.replay.gather(slots)))


def read_losses(losses: dict[str, Tensor], where: str) -> dict[str, float]:
    """The results of `update` as numbers; waits for the device.

    Raises:
        SystemExit: with one line, if the loss is not finite any more.
    """
    values = {name: value.item() for name, value in losses.items()}
    if not math.isfinite(values["loss"]):
        raise SystemExit(f"error: the loss is {values['loss']} at {where}; try a lower --learning-rate")
    return values


def explore(rng: np.random.Generator, epsilon: ArrayLike, q_values: np.ndarray) -> np.ndarray:
    """ε-greedy actions int64 (n,) from Q-values (n, num_actions); ε is one for all or one for each."""
    random_actions = rng.integers(q_values.shape[1], size=len(q_values))
    return np.where(rng.random(len(q_values)) < epsilon, random_actions, q_values.argmax(axis=1))


@torch.no_grad()
def compute_q_values(network: nn.Module, device: torch.device, observations: np.ndarray) -> np.ndarray:
    """Q-values float32 (n, num_actions) of observations uint8 (n, 4, 84, 84)."""
    return network(torch.from_numpy(observations).to(device)).cpu().numpy()


def start_games(state: TrainState, envs: ParallelEnvs, seed: Sequence[int]) -> np.ndarray:
    """The first observations of new games; or, after a checkpoint, those at which it was made."""
    if state.env_states:
        observations, state.env_states = envs.set_states(state.env_states), None
        return observations
    observations = envs.reset(seed)
    state.replay.start(observations)
    return observations


def fill_teacher_buffer(
    args: Args,
    state: TrainState,
    teacher: TeacherNetwork,
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
            teacher_q_values = compute_q_values(teacher, state.device, observations)
            steps = state.teacher_step + np.arange(args.num_envs)
            epsilon = linear_schedule(args.start_e, args.end_e, args.teacher_steps, steps)
            actions = explore(state.rng, epsilon, teacher_q_values)
            envs.step_async(actions)
            step = envs.step_wait()
            state.replay.add(actions, step, teacher_q_values)
            observations = step.observations
            state.teacher_step += args.num_envs
            progress.update(args.num_envs)


@torch.no_grad()
def load_teacher_buffer(state: TrainState, teacher: TeacherNetwork, saved: SavedReplay) -> None:
    """Phase 1 without play: the buffer takes what the teacher saw and did when it was trained itself."""
    replay = state.replay
    with tqdm(total=saved.num_rows, desc="teacher's replay", unit=" frames") as progress:
        for slots, rows in saved.rows(replay.num_slots):
            replay.write(slots, rows)
            # The frames of these stacks are there: a part comes after those before it in time.
            for chunk in torch.from_numpy(slots).to(replay.device).split(1024):
                observations = replay._stacks(chunk).to(state.device)
                replay.teacher_q_values[chunk] = teacher(observations).to(replay.device)
            progress.update(len(slots))
    replay.heads = saved.heads


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
    with tqdm(
        total=args.offline_steps, initial=state.offline_step, desc="offline", unit=" updates"
    ) as progress:
        while state.evaluated_step < args.offline_steps:
            checkpoint()
            if state.offline_step > state.evaluated_step and evaluates_at(args, state.offline_step):
                progress.set_postfix_str("playing games")
                mean_return = save_and_evaluate()
                progress.set_postfix_str("")
                writer.add_scalar("charts/offline/avg_episodic_return", mean_return, state.offline_step)
                progress.write(f"gradient step {state.offline_step:,}: mean return {mean_return:.2f}")
                state.evaluated_step = state.offline_step
                continue
            losses = update(args, state, sample_batch(args, state), 1.0)
            state.offline_step += 1
            progress.update()
            if state.offline_step % args.target_network_frequency == 0:
                update_target_network(state, args.tau)
            # Before an evaluation too: a student that is no longer finite must not be saved over a good one.
            if state.offline_step % LOSS_INTERVAL == 0 or evaluates_at(args, state.offline_step):
                values = read_losses(losses, f"gradient step {state.offline_step} of the offline phase")
                writer.add_scalar("charts/offline/loss", values["loss"], state.offline_step)
                writer.add_scalar("charts/offline/q_loss", values["td_loss"], state.offline_step)
                writer.add_scalar("charts/offline/distill_loss", values["distill_loss"], state.offline_step)


def evaluates_at(args: Args, offline_step: int) -> bool:
    return offline_step % args.offline_eval_frequency == 0 or offline_step == args.offline_steps


def train_online(
    args: Args,
    state: TrainState,
    teacher: TeacherNetwork,
    coefficient: Callable[[int, Sequence[float]], float],
    envs: ParallelEnvs,
    writer: EventWriter,
    checkpoint: Callable[[ParallelEnvs], None],
) -> None:
    """Phase 3: the student plays and learns, the less from the teacher the better it plays.

    `coefficient` gives λ_t from the online environment step and the recent returns.
    """
    if not state.env_states:
        update_target_network(state, tau=1.0)
    observations = start_games(state, envs, seed=(args.seed, ONLINE_SEED))
    start_time = time.monotonic() - state.online_seconds
    with tqdm(
        total=args.total_timesteps, initial=state.online_step, desc="online", unit=" steps"
    ) as progress:
        while state.online_step < args.total_timesteps:
            checkpoint(envs)
            epsilon = online_epsilon(args, state.online_step + np.arange(args.num_envs))
            actions = explore(state.rng, epsilon, compute_q_values(state.student, state.device, observations))
            envs.step_async(actions)
            # The rest of the loop needs nothing from the environments until they are waited for.
            teacher_q_values = compute_q_values(teacher, state.device, observations)
            learn_online(args, state, coefficient, writer)
            step = envs.step_wait()
            state.replay.add(actions, step, teacher_q_values)
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
    learn_online(args, state, coefficient, writer)


def learn_online(
    args: Args,
    state: TrainState,
    coefficient: Callable[[int, Sequence[float]], float],
    writer: EventWriter,
) -> None:
    """Does the gradient steps and target updates that the environment steps so far call for, in order."""
    can_draw = state.online_step >= args.n_step * args.num_envs  # n rewards of every environment are known
    while state.learned_step < min(state.online_step, args.total_timesteps):
        state.learned_step += 1
        if state.learned_step <= args.learning_starts:
            continue
        if state.learned_step % args.train_frequency == 0 and can_draw:
            distill_coeff = coefficient(state.learned_step, state.recent_returns)
            losses = update(args, state, sample_batch(args, state), distill_coeff)
            state.online_gradient_steps += 1
            is_last = state.learned_step + args.train_frequency > args.total_timesteps
            if state.online_gradient_steps % LOSS_INTERVAL == 0 or is_last:
                values = read_losses(losses, f"online environment step {state.learned_step}")
                for name, value in values.items():
                    writer.add_scalar(f"losses/{name}", value, args.offline_steps + state.learned_step)
        if state.learned_step % args.target_network_frequency == 0:
            update_target_network(state, args.tau)


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


def save_student(student: StudentNetwork, path: Path) -> None:
    """Writes the state dict, all of it or nothing."""
    state_dict = {name: tensor.cpu().contiguous() for name, tensor in student.state_dict().items()}
    content = io.BytesIO()
    torch.save(state_dict, content)
    write_durably(path, content.getvalue())


def plan_replay(
    args: Args, num_actions: int, saved_replay: SavedReplay | None, device: torch.device
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
        free_gpu=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None,
    )

    def make_replay(phase: str) -> ReplayBuffer:
        return ReplayBuffer(*buffers[phase], num_actions, args.n_step, args.gamma, torch.device(buffer_place))

    return make_replay


def main(args: Args) -> None:
    check_arguments(args)
    num_actions = count_actions(args.env_id)
    baseline_return = random_return(args.env_id, args.return_normalization)
    check_services(args)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
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
        save_student(state.student, path)

    def has_learned() -> bool:
        return state.offline_step > 0 or state.online_step > 0

    with training_run(args, Path(__file__), LAYOUT, save_network, has_learned) as run:
        print(f"run: {run.folder}, on {device}")
        if run.resumed:
            restore(state, run.resumed, make_replay)

        def checkpoint(envs: ParallelEnvs | None = None) -> None:
            player = "student" if state.phase == "online" else "teacher"
            run.checkpoint(partial(capture, state, envs), player, state.replay)

        def play(network: nn.Module, games: int, name: str, step: int) -> list[float]:
            """The returns of whole games, the same games each time; their video is plotted at `step`."""
            with run.video(name, step) as video_folder:
                return evaluate(
                    make_game,
                    partial(compute_q_values, network, device),
                    games,
                    seed=(args.seed, EVALUATION_SEED),
                    epsilon=args.end_e,
                    video_folder=video_folder,
                    before_step=checkpoint,
                )

        def save_and_evaluate() -> float:
            run.save_model("-offline")
            step = state.offline_step
            return float(np.mean(play(state.student, args.eval_episodes, f"offline-{step}", step)))

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
        run.report(play(state.student, args.eval_episodes, "final", last_step))
        write_teacher_return(last_step)


if __name__ == "__main__":
    exit_on_ctrl_c()
    main(parse_arguments(Args))
