"""DQN (Mnih et al., 2015, "Human-level control through deep reinforcement learning") on Atari, in PyTorch.

It learns a game from nothing: it plays ε-greedily, keeps what it saw in a replay buffer, and learns from
that. What it saves is a teacher for QDagger: the network (`--save-model`), its last play (`--save-replay`).

    python cleanrl/dqn_atari.py --env-id BreakoutNoFrameskip-v4 --save-model
"""

import io
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable
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
from tqdm import tqdm

if not __package__:  # started as a file: the helpers below lie beside it, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cleanrl.utils.command_line import check_arguments, parse_arguments
from cleanrl.utils.evaluation import MAX_GAME_FRAMES, evaluate
from cleanrl.utils.games.atari import count_actions
from cleanrl.utils.games.parallel_envs import ParallelEnvs, StepResult, available_cores
from cleanrl.utils.games.video import RecordGame
from cleanrl.utils.replay.memory import place_replay_buffer
from cleanrl.utils.replay.rows import check_new_folder, save_replay
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


# ------------------------------------------------------------------------------------------------ replay


class Batch(NamedTuple):
    """`observations` are uint8 (batch, 4, 84, 84), `actions` int64 (batch,), all others float32.

    `terminations` are 1 where the episode ended by itself with that step.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminations: Tensor


class ReplayBuffer:
    """Keeps each frame once, in a ring of slots per environment.

    A slot holds an observation's newest frame, how many earlier frames its stack reaches back (at most 3),
    and what followed: action, reward, whether the episode ended. The observation that ends an episode has a
    slot too, but no action.

    Contract: `draw` gives every transition in the buffer the same probability. No stack reaches across the
    start of an episode or into overwritten slots; spare slots see to it that this costs no transitions. A
    truncated episode is bootstrapped from its true last observation.

    Args:
        capacity: slots over all environments; the oldest are overwritten.
        num_envs: environments that are added together.
        device: where the tensors lie.
    """

    TENSORS = ("frames", "stack_depths", "actions", "rewards", "terminations", "episode_ends")

    def __init__(self, capacity: int, num_envs: int, device: torch.device):
        self.num_envs, self.device = num_envs, device
        self.num_slots = self.slots_per_env(capacity, num_envs)
        total = num_envs * self.num_slots
        self.frames = torch.empty((total, 84, 84), dtype=torch.uint8, device=device)
        self.stack_depths = torch.zeros(total, dtype=torch.uint8, device=device)
        self.actions = torch.zeros(total, dtype=torch.uint8, device=device)
        self.rewards = torch.zeros(total, device=device)
        self.terminations = torch.zeros(total, dtype=torch.bool, device=device)
        self.episode_ends = torch.zeros(total, dtype=torch.bool, device=device)
        # What drawing needs stays on the host, so that it never waits for the device.
        self.is_transition = np.zeros(total, dtype=bool)
        self.heads = np.zeros(num_envs, dtype=np.int64)  # positions of the current observations, ever growing
        self.depths = np.zeros(num_envs, dtype=np.uint8)  # their stack depths

    @staticmethod
    def slots_per_env(capacity: int, num_envs: int) -> int:
        # At least 2, of which one is a transition. Spare: 3 for the oldest stack, 1 for the current frame.
        return max(2, math.ceil(capacity / num_envs)) + 4

    @classmethod
    def num_bytes(cls, capacity: int, num_envs: int) -> int:
        """Bytes of a full buffer."""
        return num_envs * cls.slots_per_env(capacity, num_envs) * (84 * 84 + 4 + 5)

    def start(self, observations: np.ndarray) -> None:
        """Takes the first observations, uint8 (num_envs, 4, 84, 84), each the start of an episode."""
        self._write_observations(np.arange(self.num_envs), observations)

    def add(self, actions: np.ndarray, step: StepResult) -> None:
        """Adds one step of every environment.

        Args:
            actions: integers (num_envs,), taken from the current observations.
            step: what the environments answered.
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
        """Puts back what `read` gave; the heads and their depths are set by themselves."""
        on_device = torch.from_numpy(slots).to(self.device)
        for name in self.TENSORS:
            getattr(self, name)[on_device] = torch.from_numpy(rows[name]).to(self.device)
        self.is_transition[slots] = rows["is_transition"]

    def _drawable_per_env(self) -> np.ndarray:
        """The number of positions per environment, the newest at heads - 1, that `draw` chooses from."""
        overwritten = np.maximum(self.heads + 1 - self.num_slots, 0)
        oldest = np.where(overwritten > 0, overwritten + 3, 0)
        return self.heads - oldest

    def draw(self, batch_size: int, rng: np.random.Generator) -> np.ndarray:
        """Draws the slots of transitions, int64 (batch_size,), uniformly and with replacement.

        There are some once the environments have made a step; before, this would not end.
        """
        ends = np.cumsum(self._drawable_per_env())
        slots = np.empty(batch_size, dtype=np.int64)
        missing = np.arange(batch_size)
        while len(missing):  # again, where the observation that ended an episode was drawn
            drawn = rng.integers(ends[-1], size=len(missing))
            envs = np.searchsorted(ends, drawn, side="right")
            positions = self.heads[envs] - (ends[envs] - drawn)
            slots[missing] = envs * self.num_slots + positions % self.num_slots
            missing = missing[~self.is_transition[slots[missing]]]
        return slots

    def gather(self, slots: Tensor) -> Batch:
        """The transitions at `slots`, int64 (batch,), all on the buffer's device."""
        return Batch(
            observations=self._stacks(slots),
            actions=self.actions[slots].long(),
            rewards=self.rewards[slots],
            next_observations=self._stacks(self._ahead(slots, 1)),
            terminations=self.terminations[slots].float(),
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


# ------------------------------------------------------------------------------------------------ losses


def td_targets(rewards: Tensor, terminations: Tensor, next_q_values: Tensor, gamma: float) -> Tensor:
    """y = r + γ (1 − terminated) max_a' Q_target(s', a'), float32 (batch,).

    `next_q_values` are (batch, num_actions), the others (batch,).
    """
    return rewards + gamma * (1 - terminations) * next_q_values.max(dim=1).values


def linear_schedule(start: float, end: float, duration: float, step: ArrayLike) -> np.ndarray:
    """Goes linearly from `start` at step 0 to `end` at step `duration` and stays there."""
    return start + (end - start) * np.minimum(np.divide(step, max(duration, 1)), 1.0)


# ---------------------------------------------------------------------------------------------- training


@dataclass
class TrainState:
    """All that a run is: what a checkpoint saves."""

    q_network: QNetwork
    target_network: QNetwork
    optimizer: torch.optim.Optimizer
    rng: np.random.Generator  # of exploration and of drawing from the replay buffer
    replay: ReplayBuffer
    step: int = 0  # environment steps done
    learned_step: int = 0  # of these, how many the learner has answered
    gradient_steps: int = 0
    seconds: float = 0.0  # of training
    recent_returns: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_GAMES))
    env_states: list[dict] | None = None  # where the games stand, while no environments are open

    @property
    def device(self) -> torch.device:
        return next(self.q_network.parameters()).device


NETWORKS = ("q_network", "target_network", "optimizer")
COUNTERS = ("step", "learned_step", "gradient_steps", "seconds")


def create_train_state(
    args: Args, num_actions: int, replay: ReplayBuffer, device: torch.device
) -> TrainState:
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    # Convolutions are a third faster in this memory format.
    q_network, target_network = (
        QNetwork(num_actions).to(device, memory_format=torch.channels_last) for _ in range(2)
    )
    target_network.requires_grad_(False).load_state_dict(q_network.state_dict())
    optimizer = torch.optim.Adam(q_network.parameters(), lr=args.learning_rate)
    return TrainState(q_network, target_network, optimizer, np.random.default_rng(args.seed), replay)


def capture(state: TrainState, envs: ParallelEnvs | None) -> dict[str, Any]:
    """The state for a checkpoint, but for the rows of the replay buffer."""
    return {
        **{name: getattr(state, name).state_dict() for name in NETWORKS},
        **{name: getattr(state, name) for name in COUNTERS},
        "rng": state.rng.bit_generator.state,
        "replay": (state.replay.heads, state.replay.depths),
        "recent_returns": list(state.recent_returns),
        "env_states": envs.get_states() if envs else state.env_states,
    }


def restore(state: TrainState, checkpoint: Checkpoint) -> None:
    """Brings a new state to where `capture` saw it."""
    saved = checkpoint.read_state()
    for name in NETWORKS:
        getattr(state, name).load_state_dict(to_tensors(saved[name]))
    for name in (*COUNTERS, "env_states"):
        setattr(state, name, saved[name])
    state.rng.bit_generator.state = saved["rng"]
    state.recent_returns.extend(saved["recent_returns"])
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


def update(args: Args, state: TrainState, batch: Batch) -> dict[str, Tensor]:
    """One gradient step; returns its loss, mean((y − Q(s, a))²), and the mean of Q(s, a), on the device."""
    with torch.no_grad():
        next_q_values = state.target_network(batch.next_observations)
        targets = td_targets(batch.rewards, batch.terminations, next_q_values, args.gamma)
    q_values = state.q_network(batch.observations).gather(1, batch.actions[:, None]).squeeze(1)
    loss = (targets - q_values).square().mean()
    state.optimizer.zero_grad()
    loss.backward()
    state.optimizer.step()
    return {"td_loss": loss.detach(), "q_values": q_values.detach().mean()}


@torch.no_grad()
def update_target_network(state: TrainState, tau: float) -> None:
    networks = state.target_network.parameters(), state.q_network.parameters()
    for target, parameter in zip(*networks, strict=True):
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
    if not math.isfinite(values["td_loss"]):
        raise SystemExit(f"error: the loss is {values['td_loss']} at {where}; try a lower --learning-rate")
    return values


def explore(rng: np.random.Generator, epsilon: ArrayLike, q_values: np.ndarray) -> np.ndarray:
    """ε-greedy actions int64 (n,) from Q-values (n, num_actions); ε is one for all or one for each."""
    random_actions = rng.integers(q_values.shape[1], size=len(q_values))
    return np.where(rng.random(len(q_values)) < epsilon, random_actions, q_values.argmax(axis=1))


@torch.no_grad()
def compute_q_values(network: nn.Module, device: torch.device, observations: np.ndarray) -> np.ndarray:
    """Q-values float32 (n, num_actions) of observations uint8 (n, 4, 84, 84)."""
    return network(torch.from_numpy(observations).to(device)).cpu().numpy()


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
    if state.env_states:
        observations, state.env_states = envs.set_states(state.env_states), None
    else:
        observations = envs.reset(seed=(args.seed, TRAINING_SEED))
        state.replay.start(observations)
    start_time = time.monotonic() - state.seconds
    exploration_steps = args.exploration_fraction * args.total_timesteps
    with tqdm(total=args.total_timesteps, initial=state.step, desc="training", unit=" steps") as progress:
        while state.step < args.total_timesteps:
            checkpoint(envs)
            steps = state.step + np.arange(args.num_envs)
            epsilon = linear_schedule(args.start_e, args.end_e, exploration_steps, steps)
            q_values = compute_q_values(state.q_network, state.device, observations)
            actions = explore(state.rng, epsilon, q_values)
            envs.step_async(actions)
            learn(args, state, writer)  # while the environments step
            step = envs.step_wait()
            state.replay.add(actions, step)
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
    learn(args, state, writer)


def learn(args: Args, state: TrainState, writer: EventWriter) -> None:
    """Does the gradient steps and target updates that the environment steps so far call for, in order."""
    while state.learned_step < min(state.step, args.total_timesteps):
        state.learned_step += 1
        if state.learned_step <= args.learning_starts:
            continue
        if state.learned_step % args.train_frequency == 0:
            losses = update(args, state, sample_batch(args, state))
            state.gradient_steps += 1
            is_last = state.learned_step + args.train_frequency > args.total_timesteps
            if state.gradient_steps % LOSS_INTERVAL == 0 or is_last:
                values = read_losses(losses, f"environment step {state.learned_step}")
                for name, value in values.items():
                    writer.add_scalar(f"losses/{name}", value, state.learned_step)
        if state.learned_step % args.target_network_frequency == 0:
            update_target_network(state, args.tau)


# -------------------------------------------------------------------------------------------------- main


def save_network(network: QNetwork, path: Path) -> None:
    """Writes the state dict, all of it or nothing."""
    state_dict = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    content = io.BytesIO()
    torch.save(state_dict, content)
    write_durably(path, content.getvalue())


def main(args: Args) -> None:
    check_arguments(args)
    num_actions = count_actions(args.env_id)
    check_services(args)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.save_replay:
        check_new_folder(args.save_replay)

    # A tenth more slots than steps, for the observations that end an episode.
    capacity = min(args.buffer_size, math.ceil(1.1 * args.total_timesteps))
    buffer_place = place_replay_buffer(
        args.buffer_device,
        capacity,
        num_bytes=ReplayBuffer.num_bytes(capacity, args.num_envs),
        num_workers=min(args.num_envs, available_cores()),
        free_gpu=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None,
    )
    replay = ReplayBuffer(capacity, args.num_envs, torch.device(buffer_place))
    state = create_train_state(args, num_actions, replay, device)
    make_game = partial(make_env, args.env_id, args.repeat_action_probability)

    def save(path: Path) -> None:
        save_network(state.q_network, path)

    def has_learned() -> bool:
        return state.gradient_steps > 0

    with training_run(args, Path(__file__), LAYOUT, save, has_learned) as run:
        print(f"run: {run.folder}, on {device}")
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
                partial(compute_q_values, state.q_network, device),
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
