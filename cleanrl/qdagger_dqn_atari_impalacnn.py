"""QDagger (Agarwal et al., 2022, "Reincarnating Reinforcement Learning") on Atari, in PyTorch.

A student, an Impala-CNN, learns from an existing teacher, usually a DQN, and then outperforms it: (1) the
teacher fills a replay buffer with its play, (2) the student learns from it offline, (3) the student plays and
learns online while the teacher's influence fades.

    python cleanrl/qdagger_dqn_atari_impalacnn.py --env-id BreakoutNoFrameskip-v4
"""

import copy
import os
import shlex
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

if not __package__:  # started as a file: makes `cleanrl` importable, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cleanrl.utils.bounds import Fraction, Name, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from cleanrl.utils.command_line import read_arguments
from cleanrl.utils.run.options import DenseWidth, TeacherOptions
from cleanrl.utils.shell import prepare_command

# ----------------------------------------------------------------------------------------------- options


@dataclass
class Args(TeacherOptions):  # --seed, --env-id, --num-envs, …: see cleanrl/utils/run/options.py
    exp_name: Name = Path(__file__).stem

    # student
    dense_width: DenseWidth = 256
    """units in the student's dense layer (the paper: 512)"""
    total_timesteps: PositiveInt = 10_000_000
    """environment steps (4 frames each) of the online phase"""
    learning_rate: PositiveFloat = 1e-4
    """learning rate of Adam"""
    final_learning_rate: PositiveFloat | None = None
    """learning rate at distillation coefficient 0, linear in between (the paper: 1e-5; default: constant)"""
    adam_epsilon: PositiveFloat = 1e-8
    """epsilon of Adam (the paper: 1.5e-4)"""
    average_decay: Fraction = 0.0
    """decay per gradient step of the weight-averaged student, which acts in its place; 0: no average"""
    td_loss: Literal["mse", "huber"] = "mse"
    """loss of the TD error, mse or huber (the paper: huber)"""
    buffer_size: PositiveInt = 1_000_000
    """capacity of the replay buffer in frames: one per transition and one per end of an episode"""
    n_step: PositiveInt = 1
    """rewards summed before the bootstrap (the paper: 3)"""
    gamma: Fraction = 0.99
    """discount factor"""
    tau: Fraction = 1.0
    """weight of the student in each target network update; 1: a copy"""
    target_network_frequency: PositiveInt = 1000
    """gradient steps (offline) or environment steps (online) between target network updates"""
    batch_size: PositiveInt = 32
    """transitions per gradient step"""
    start_e: Fraction = 1.0
    """epsilon at the start of the teacher's play, and of the student's schedule"""
    end_e: Fraction = 0.01
    """epsilon at the end of both, and in every evaluation"""
    exploration_fraction: Fraction = 0.10
    """fraction of total_timesteps over which epsilon falls; offline_steps count as its first steps"""
    exploration_steps: PositiveInt | None = None
    """online environment steps over which epsilon falls (the paper: 50000; default: that fraction)"""
    learning_starts: NonNegativeInt = 80_000
    """online environment steps before the first online gradient step"""
    train_frequency: PositiveInt = 4
    """online environment steps per gradient step"""

    # distillation
    offline_steps: NonNegativeInt = 500_000
    """gradient steps of the offline phase"""
    offline_eval_frequency: PositiveInt = 100_000
    """offline gradient steps between evaluations of the student; one more at the end of the phase"""
    online_eval_frequency: NonNegativeInt = 0
    """online environment steps between evaluations of the student; the best is saved too; 0: none"""
    eval_episodes: PositiveInt = 10
    """games in each evaluation of the student"""
    temperature: PositiveFloat = 1.0
    """temperature of the policies softmax(Q / temperature) in the distillation loss (the paper: 0.1)"""
    distill_weight: NonNegativeFloat = 1.0
    """weight of the distillation loss, multiplied by the distillation coefficient (the paper: 3.0)"""
    distill_steps: NonNegativeInt | None = None
    """t0, the online environment step at which distillation ends (the paper: 1.5M; default: never)"""
    return_normalization: Literal["none", "random"] = "none"
    """random: λ measures returns from the random player's score, as the paper's code does; none: from 0"""


TEACHERS = shlex.quote(os.path.relpath(Path(__file__).parent / "teachers"))
PRESETS = {  # what --preset stands for; options beside it win
    "quick": (
        f"--env-id PongNoFrameskip-v4 --teacher-model-path {TEACHERS}/PongNoFrameskip-v4.safetensors"
        " --teacher-steps 15000 --teacher-eval-episodes 5 --offline-steps 2000 --offline-eval-frequency 1000"
        " --total-timesteps 40000 --learning-starts 3000 --train-frequency 28 --start-e 0.3"
        " --exploration-steps 20000 --learning-rate 5e-4 --final-learning-rate 1e-4 --average-decay 0.995"
        " --n-step 3 --temperature 0.1 --return-normalization random"
    ),
    "paper": (  # Agarwal et al. (2022); what no option covers is listed in docs/qdagger.md
        "--repeat-action-probability 0.25 --dense-width 512 --td-loss huber --n-step 3 --adam-epsilon 1.5e-4"
        " --final-learning-rate 1e-5 --target-network-frequency 8000 --exploration-steps 50000"
        " --learning-starts 20000 --offline-steps 1000000 --temperature 0.1 --distill-weight 3.0"
        " --distill-steps 1500000 --total-timesteps 2500000 --return-normalization random"
    ),
}

if __name__ == "__main__":  # before the imports below, which take seconds
    prepare_command()
    ARGS = read_arguments(Args, PRESETS)

import cv2
import gymnasium as gym
import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional as F

from cleanrl.utils.evaluation import MAX_GAME_FRAMES, acting_values
from cleanrl.utils.games.atari import check_teacher_return, random_return
from cleanrl.utils.games.statistics import EpisodeStatistics
from cleanrl.utils.games.video import RecordGame
from cleanrl.utils.gpu_torch import OneLaunch, adam_options, choose_device, set_learning_rate
from cleanrl.utils.hub.download import download, find_file
from cleanrl.utils.replay.frames_torch import TorchFrames
from cleanrl.utils.replay.ring import Batch, ReplayBuffer
from cleanrl.utils.replay.saved_replay import load_replay
from cleanrl.utils.run.memory import plan_replays
from cleanrl.utils.run.training_run import TrainingRun
from cleanrl.utils.weights.agents import read_agent

RECENT_GAMES = 10  # whose mean return sets the distillation coefficient
LOSS_INTERVAL = 100  # gradient steps between two points of a loss curve
CHART_INTERVAL = 1000  # environment steps between two points of the other curves
FILL_SEED, ONLINE_SEED = 1, 2  # with --seed, the seeds of a phase's environments


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
    def __init__(self, in_channels: int, out_channels: int, pools_as_flax: bool):
        super().__init__()
        self.pools_as_flax = pools_as_flax
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.res_block0 = ResidualBlock(out_channels)
        self.res_block1 = ResidualBlock(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        padding = x.shape[-1] % 2 if self.pools_as_flax else 1  # flax pads even sizes on one side only
        x = F.max_pool2d(self.conv(x), 3, stride=2, padding=padding, ceil_mode=self.pools_as_flax)
        return self.res_block1(self.res_block0(x))


class StudentNetwork(nn.Module):
    """The Impala-CNN (Espeholt et al., 2018): uint8 (batch, 4, 84, 84) to Q-values (batch, num_actions)."""

    def __init__(self, num_actions: int, dense_width: int = 256, pools_as_flax: bool = False):
        super().__init__()
        self.network = nn.Sequential(
            ConvSequence(4, 16, pools_as_flax),
            ConvSequence(16, 32, pools_as_flax),
            ConvSequence(32, 32, pools_as_flax),
            nn.Flatten(),
            nn.ReLU(),
            nn.Linear(3872, dense_width),
            nn.ReLU(),
            nn.Linear(dense_width, num_actions),
        )

    def forward(self, observations: Tensor) -> Tensor:
        return self.network(observations / 255.0)


# ----------------------------------------------------------------------------------------------- teacher


class Teacher(nn.Module):
    """An agent's outputs as Q-values: uint8 (batch, 4, 84, 84) to Q-values (batch, num_actions)."""

    def __init__(self, network: nn.Module, atoms: ArrayLike, temperature: float, sampling_temperature: float):
        super().__init__()
        self.network = network
        self.register_buffer("atoms", torch.tensor(atoms))
        self.temperature, self.sampling_temperature = temperature, sampling_temperature

    def forward(self, observations: Tensor) -> Tensor:
        outputs = self.network(observations)
        if len(self.atoms):  # C51: each action's expected return (Bellemare et al., 2017)
            return outputs.unflatten(1, (-1, len(self.atoms))).softmax(dim=2) @ self.atoms
        if self.temperature:  # a policy π, which is softmax(temperature · log π / temperature)
            return self.temperature * F.log_softmax(outputs, dim=1)
        return outputs


def load_teacher(args: Args, num_actions: int, device: torch.device) -> Teacher:
    """Loads the teacher, an agent of any kind, from a local file or from the Hub.

    Raises:
        SystemExit: with a one-line error that names the file or the repository and what to do.
    """
    path = args.teacher_model_path
    if path is None:
        repo = args.teacher_policy_hf_repo or f"cleanrl/{args.env_id}-{args.teacher_model_exp_name}-seed1"
        file = args.teacher_hf_file or find_file(repo, args.teacher_revision, args.teacher_model_exp_name)
        path = download(repo, file, args.teacher_revision)
    agent = read_agent(path, num_actions)
    network = TeacherNetwork(num_actions * agent.outputs_per_action)
    if agent.kind == "Impala-CNN":
        network = StudentNetwork(num_actions, agent.dense_width, pools_as_flax=agent.is_flax)
    network.load_state_dict(agent.fit(network.state_dict(), torch.from_numpy))
    teacher = Teacher(network, agent.atoms, *agent.temperatures(args.temperature, args.teacher_acts))
    return teacher.to(device).requires_grad_(False).eval()


# ------------------------------------------------------------------------------------------------ losses


def td_targets(rewards: Tensor, terminations: Tensor, discounts: Tensor, next_q_values: Tensor) -> Tensor:
    """y = r + γ (1 − terminated) max_a' Q_target(s', a'), float32 (batch,).

    `discounts` are γ, or γⁿ after n steps; `next_q_values` are (batch, num_actions), all others (batch,).
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


def learning_rate(args: Args, distill_coeff: float) -> float:
    """From `learning_rate` at a distillation coefficient of 1 to `final_learning_rate` at 0."""
    final = args.learning_rate if args.final_learning_rate is None else args.final_learning_rate
    return final + (args.learning_rate - final) * distill_coeff


def linear_schedule(start: float, end: float, duration: float, step: ArrayLike) -> np.ndarray:
    """Linear from `start` at step 0 to `end` at step `duration`, then constant."""
    return start + (end - start) * np.minimum(np.divide(step, max(duration, 1)), 1.0)


def online_epsilon(args: Args, online_steps: ArrayLike) -> np.ndarray:
    """ε of environment steps of the online phase.

    It falls from the start of the offline phase, as published, or with `exploration_steps` of the online one.
    """
    if args.exploration_steps is not None:
        return linear_schedule(args.start_e, args.end_e, args.exploration_steps, online_steps)
    duration = args.exploration_fraction * args.total_timesteps
    return linear_schedule(args.start_e, args.end_e, duration, args.offline_steps + np.asarray(online_steps))


# ---------------------------------------------------------------------------------------------- learning

Losses = dict[str, Tensor]


@dataclass
class TrainState:
    """A run's whole state. A checkpoint saves every field: see `cleanrl.utils.run.state`."""

    student: StudentNetwork
    ema_student: StudentNetwork  # moving average of the student's weights; acts, is evaluated, is saved
    target_network: StudentNetwork
    optimizer: torch.optim.Optimizer
    rng: np.random.Generator  # of exploration and of drawing batches
    teacher_replay: ReplayBuffer  # what the teacher did
    student_replay: ReplayBuffer  # what the student does online
    phase: Literal["teacher", "offline", "online"] = "teacher"
    teacher_return: float | None = None  # G_T
    recent_returns: list[float] = field(default_factory=list)  # of the last RECENT_GAMES online games
    teacher_step: int = 0  # environment steps that the teacher has played
    offline_step: int = 0  # gradient steps, offline
    evaluated_step: int = 0  # the plotted step of the student's last evaluation
    online_step: int = 0  # environment steps, online
    learned_step: int = 0  # the last of these for which all learning is done
    gradient_steps: int = 0  # offline and online
    online_seconds: float = 0.0

    @property
    def device(self) -> torch.device:
        return next(self.student.parameters()).device


def create_train_state(args: Args, num_actions: int, device: torch.device) -> TrainState:
    torch.manual_seed(args.seed)
    # Convolutions are a third faster in this memory format.
    student = StudentNetwork(num_actions, args.dense_width).to(device, memory_format=torch.channels_last)
    ema_student, target_network = (copy.deepcopy(student).requires_grad_(False).eval() for _ in range(2))
    settings = {"lr": args.learning_rate, "eps": args.adam_epsilon, **adam_options(device)}
    optimizer = torch.optim.Adam(student.parameters(), **settings)
    replays = plan_replays(args, num_actions, TorchFrames, device)
    rng = np.random.default_rng(args.seed)
    return TrainState(student, ema_student, target_network, optimizer, rng, *replays)


@torch.no_grad()
def move(network: nn.Module, towards: nn.Module, weight: float) -> None:
    """Interpolates the network's parameters, all in a few kernels; a weight of 1 makes a copy."""
    torch._foreach_lerp_([*network.parameters()], [*towards.parameters()], weight)


@OneLaunch  # arrays arrive as tensors on the device; on a GPU, a CUDA graph launches all kernels at once
def update(
    args: Args, state: TrainState, frames: Tensor, batch: Batch, distill_coeff: np.ndarray | Tensor
) -> Losses:
    """One gradient step with λ = `distill_coeff`; its losses and the mean of Q(s, a) stay on the device."""
    with torch.no_grad():
        next_q_values = state.target_network(frames[batch.next_stacks])
        targets = td_targets(batch.rewards, batch.terminations, batch.discounts, next_q_values)
    q_values = state.student(frames[batch.stacks])
    td = td_loss(q_values, batch.actions, targets, args.td_loss)
    distill = distill_loss(q_values, batch.teacher_q_values, args.temperature)
    loss = td + distill_coeff * args.distill_weight * distill
    state.optimizer.zero_grad()
    loss.backward()
    state.optimizer.step()
    move(state.ema_student, state.student, 1 - args.average_decay)
    mean_q_value = q_values.gather(1, batch.actions[:, None]).mean()
    losses = {"loss": loss, "td_loss": td, "distill_loss": distill, "q_values": mean_q_value}
    return {name: value.detach() for name, value in losses.items()}


def learn(args: Args, state: TrainState, replay: ReplayBuffer, distill_coeffs: list[float]) -> Losses:
    """A gradient step per coefficient, each on a batch of its own; returns the last one's losses."""
    batches = replay.sample(args.batch_size, state.rng, num_batches=len(distill_coeffs))
    for index, distill_coeff in enumerate(distill_coeffs):
        frames, batch = replay.frames.place(batches.at(index), state.device)
        set_learning_rate(state.optimizer, learning_rate(args, min(distill_coeff, 1.0)))
        losses = update(args, state, frames, batch, np.array(distill_coeff, np.float32))
    state.gradient_steps += len(distill_coeffs)
    return {name: loss.clone() for name, loss in losses.items()}  # on a GPU the next step overwrites them


def steps_per_call(state: TrainState) -> int:
    """The most gradient steps in one call of `learn`, during which no checkpoint can be made."""
    return 1 if state.device.type == "cpu" else 10


def update_target_network(state: TrainState, tau: float) -> None:
    move(state.target_network, state.student, tau)


@OneLaunch
@torch.no_grad()
def forward(networks: nn.Module | tuple[nn.Module, ...], observations: np.ndarray | Tensor) -> Tensor:
    if isinstance(networks, nn.Module):
        return networks(observations)
    return torch.stack([network(observations) for network in networks])


def compute_q_values(networks: nn.Module | tuple[nn.Module, ...], observations: np.ndarray) -> np.ndarray:
    """Q-values float32 (n, num_actions), or (k, …) for k networks, of observations uint8 (n, 4, 84, 84)."""
    return forward(networks, observations).cpu().numpy()


# ------------------------------------------------------------------------------------------------ phases


def epsilon_greedy(rng: np.random.Generator, epsilon: ArrayLike, q_values: np.ndarray) -> np.ndarray:
    """ε-greedy actions int64 (n,) from Q-values (n, num_actions); ε is a scalar or one per environment."""
    random_actions = rng.integers(q_values.shape[1], size=len(q_values))
    return np.where(rng.random(len(q_values)) < epsilon, random_actions, q_values.argmax(axis=1))


def evaluate_teacher(args: Args, state: TrainState, teacher: Teacher, run: TrainingRun) -> None:
    """Measures G_T."""
    q_values = partial(compute_q_values, teacher)
    returns = run.play("teacher", q_values, args.teacher_eval_episodes, 0, teacher.sampling_temperature)
    state.teacher_return = float(np.mean(returns))
    run.say(f"teacher: mean return {state.teacher_return:.2f}")
    run.plot({"charts/teacher/avg_episodic_return": state.teacher_return}, 0)


def fill_teacher_replay(args: Args, state: TrainState, teacher: Teacher, run: TrainingRun) -> None:
    """Phase 1: the teacher plays with a falling ε; its replay keeps what it saw and did, and its Q-values."""
    with (
        run.open_envs(args.num_envs, seed=(args.seed, FILL_SEED)) as envs,
        run.progress("teacher", state.teacher_step, args.teacher_steps, "steps") as progress,
    ):
        state.teacher_replay.start(envs.observations)
        while state.teacher_step < args.teacher_steps:
            run.checkpoint()
            q_values = compute_q_values(teacher, envs.observations)
            steps = state.teacher_step + np.arange(args.num_envs)
            epsilon = linear_schedule(args.start_e, args.end_e, args.teacher_steps, steps)
            # With a sampling temperature, Gumbel noise is added: the argmax is then a sample of the policy.
            preferences = acting_values(state.rng, q_values, teacher.sampling_temperature)
            actions = epsilon_greedy(state.rng, epsilon, preferences)
            envs.step_async(actions)
            state.teacher_replay.add(actions, envs.step_wait(), q_values)
            state.teacher_step += args.num_envs
            progress.update(args.num_envs)


def evaluate_student(args: Args, state: TrainState, run: TrainingRun, name: str, step: int) -> float:
    """The student's mean return at the plotted step `step`, with ε = `end_e`."""
    q_values = partial(compute_q_values, state.ema_student)
    returns = run.play(f"{name}-{step}", q_values, args.eval_episodes, step)
    mean_return = float(np.mean(returns))
    run.plot({f"charts/{name}/avg_episodic_return": mean_return}, step)
    run.say(f"{name}, step {step:,}: mean return {mean_return:.2f}")
    state.evaluated_step = step
    return mean_return


def train_offline(args: Args, state: TrainState, run: TrainingRun) -> None:
    """Phase 2: the student learns from the teacher's replay, with λ = 1."""
    with run.progress("offline", state.offline_step, args.offline_steps, "gradient steps") as progress:
        while state.evaluated_step < args.offline_steps:
            run.checkpoint()
            next_evaluation = min(state.evaluated_step + args.offline_eval_frequency, args.offline_steps)
            if state.offline_step >= next_evaluation:
                run.save_model(state.ema_student, "-offline")
                evaluate_student(args, state, run, "offline", state.offline_step)
                continue
            steps_left = (n - state.offline_step % n for n in (LOSS_INTERVAL, args.target_network_frequency))
            num_steps = min(steps_per_call(state), next_evaluation - state.offline_step, *steps_left)
            losses = learn(args, state, state.teacher_replay, [1.0] * num_steps)
            state.offline_step += num_steps
            progress.update(num_steps)
            if state.offline_step % args.target_network_frequency == 0:
                update_target_network(state, args.tau)
            if state.offline_step % LOSS_INTERVAL == 0 or state.offline_step == args.offline_steps:
                tags = {"loss": "loss", "td_loss": "q_loss", "distill_loss": "distill_loss"}
                run.plot({f"charts/offline/{tags[name]}": losses[name] for name in tags}, state.offline_step)


def distill_coefficient(args: Args, state: TrainState, online_step: int) -> float:
    """λ_t = 1[t < t0] · max(1 − G / G_T, 0), G and G_T measured from 0 or from the random player's return.

    G is the mean return of the last 10 finished games; before that, λ = 1[t < t0]. If G < 0, λ exceeds 1.
    """
    if args.distill_steps is not None and online_step >= args.distill_steps:
        return 0.0
    if len(state.recent_returns) < RECENT_GAMES:
        return 1.0
    baseline = random_return(args.env_id, args.return_normalization)
    student_return = float(np.mean(state.recent_returns))
    return max(1.0 - (student_return - baseline) / (state.teacher_return - baseline), 0.0)


def train_online(args: Args, state: TrainState, teacher: Teacher, run: TrainingRun) -> None:
    """Phase 3: the student plays and learns, less from the teacher as it improves."""
    if state.online_step == 0:
        update_target_network(state, tau=1.0)
    with (
        run.open_envs(args.num_envs, seed=(args.seed, ONLINE_SEED)) as envs,
        run.progress("online", state.online_step, args.total_timesteps, "steps") as progress,
    ):
        state.student_replay.start(envs.observations)
        start_time = time.monotonic() - state.online_seconds
        while state.online_step < args.total_timesteps:
            run.checkpoint()
            plotted_step = args.offline_steps + state.online_step
            if 0 < args.online_eval_frequency <= plotted_step - state.evaluated_step:
                run.keep_if_best(evaluate_student(args, state, run, "online", plotted_step))
                start_time = time.monotonic() - state.online_seconds
                continue
            q_values, teacher_q_values = compute_q_values((state.ema_student, teacher), envs.observations)
            epsilon = online_epsilon(args, state.online_step + np.arange(args.num_envs))
            actions = epsilon_greedy(state.rng, epsilon, q_values)
            envs.step_async(actions)
            learn_online(args, state, run)  # while the games step
            result = envs.step_wait()
            state.student_replay.add(actions, result, teacher_q_values)
            for game in result.finished_games:
                run.plot_game(game, plotted_step + game.env_index + 1)
                state.recent_returns = [*state.recent_returns, game.episodic_return][-RECENT_GAMES:]
            state.online_step += args.num_envs
            state.online_seconds = time.monotonic() - start_time
            progress.update(args.num_envs)
            is_end = state.online_step >= args.total_timesteps
            if is_end or state.online_step % CHART_INTERVAL < args.num_envs:
                values = {
                    "charts/epsilon": epsilon[-1],
                    "charts/distill_coeff": distill_coefficient(args, state, state.online_step),
                    "charts/SPS": state.online_step / state.online_seconds,
                }
                run.plot(values, args.offline_steps + state.online_step)
    learn_online(args, state, run)


def learn_online(args: Args, state: TrainState, run: TrainingRun) -> None:
    """Performs, in order, the gradient steps and target updates that are due."""
    last_step = min(state.online_step, args.total_timesteps)
    most_due = steps_per_call(state)
    due: list[float] = []  # distillation coefficients of the gradient steps to be done in one call
    for step in range(state.learned_step + 1, last_step + 1):
        state.learned_step = step
        if step <= args.learning_starts:
            continue
        is_plotted = False
        if step % args.train_frequency == 0 and state.student_replay.can_sample:
            due.append(distill_coefficient(args, state, step))
            is_last = step + args.train_frequency > args.total_timesteps
            is_plotted = is_last or (state.gradient_steps + len(due)) % LOSS_INTERVAL == 0
        updates_target = step % args.target_network_frequency == 0
        if due and (len(due) == most_due or is_plotted or updates_target or step == last_step):
            losses = learn(args, state, state.student_replay, due)
            due = []
            if is_plotted:
                run.plot({f"losses/{name}": loss for name, loss in losses.items()}, args.offline_steps + step)
        if updates_target:
            update_target_network(state, args.tau)


# -------------------------------------------------------------------------------------------------- main


def main(args: Args) -> None:
    num_actions = int(make_env(args.env_id).action_space.n)
    device = choose_device(args)
    state = create_train_state(args, num_actions, device)
    teacher = load_teacher(args, num_actions, device)

    with TrainingRun(args, Path(__file__), state, make_env, model="ema_student", teacher=teacher) as run:
        if state.teacher_return is None:
            run.say(f"the teacher plays {args.teacher_eval_episodes} games")
            evaluate_teacher(args, state, teacher, run)
        check_teacher_return(args.env_id, args.return_normalization, state.teacher_return)
        if state.phase == "teacher":
            if args.teacher_replay_path and args.offline_steps:
                load_replay(args, state.teacher_replay, partial(compute_q_values, teacher), run.checkpoint)
            elif args.offline_steps:
                run.say("(1) the teacher fills its replay buffer")
                fill_teacher_replay(args, state, teacher, run)
            state.phase = "offline"

        if state.phase == "offline":
            if args.offline_steps:
                run.say("(2) the student learns offline from that buffer")
            train_offline(args, state, run)
            run.plot({"charts/teacher/avg_episodic_return": state.teacher_return}, args.offline_steps)
            state.teacher_replay.free()  # the student's takes over its frames
            state.phase = "online"

        run.say("(3) the student plays and learns online")
        train_online(args, state, teacher, run)
        run.save_model(state.ema_student)
        end = args.offline_steps + state.online_step
        run.finish(run.play("final", partial(compute_q_values, state.ema_student), args.eval_episodes, end))
        run.plot({"charts/teacher/avg_episodic_return": state.teacher_return}, end)


if __name__ == "__main__":
    main(ARGS)
