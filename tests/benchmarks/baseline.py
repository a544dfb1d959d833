"""The loop to beat: QDagger as a usual training loop, made of widely used parts.

One environment in the learner's process, with Stable-Baselines3's Atari wrappers on colour frames; its
`ReplayBuffer`, which keeps stacked observations and next observations; eager PyTorch in the default memory
format with its default threads; a forward pass of the teacher in each update. Environment and learner wait
for each other. Networks, losses and settings are those of the PyTorch script, so that the work is the same.
"""

import warnings

import ale_py
import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.atari_wrappers import AtariWrapper
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import Tensor, nn

from cleanrl.qdagger_dqn_atari_impalacnn import (
    LOSS_INTERVAL,
    Args,
    StudentNetwork,
    distill_loss,
    linear_schedule,
    load_teacher,
    online_epsilon,
    td_loss,
    td_targets,
)
from cleanrl.utils.evaluation import MAX_GAME_FRAMES

gym.register_envs(ale_py)


def make_env(env_id: str, max_game_frames: int = MAX_GAME_FRAMES) -> gym.Env:
    """Observations uint8 (4, 84, 84), oldest frame first; rewards −1, 0 or 1; a lost life ends an episode."""
    env = gym.make(env_id, max_num_frames_per_episode=max_game_frames, disable_env_checker=True)
    env = gym.wrappers.RecordEpisodeStatistics(env)
    # NoopReset, MaxAndSkip, EpisodicLife, FireReset, WarpFrame, ClipReward
    env = AtariWrapper(env)
    env = gym.wrappers.ReshapeObservation(env, (84, 84))
    return gym.wrappers.FrameStackObservation(env, 4)


def create_replay(buffer_size: int, env: gym.Env, device: torch.device) -> ReplayBuffer:
    return ReplayBuffer(buffer_size, env.observation_space, env.action_space, device)


class Baseline:
    """The phases of QDagger, one step after the other.

    Args:
        args: the PyTorch script's; `num_envs` is not heeded, there is one.
        device: where the networks lie; the replay buffer lies in host memory.
    """

    def __init__(self, args: Args, device: torch.device):
        self.args, self.device = args, device
        self.env = make_env(args.env_id)
        self.num_actions = int(self.env.action_space.n)
        self.teacher = load_teacher(args, self.num_actions, device)
        torch.manual_seed(args.seed)
        self.student, self.target_network = (
            StudentNetwork(self.num_actions, args.dense_width).to(device) for _ in range(2)
        )
        self.target_network.requires_grad_(False).load_state_dict(self.student.state_dict())
        self.optimizer = torch.optim.Adam(
            self.student.parameters(), args.learning_rate, eps=args.adam_epsilon
        )
        self.replay = create_replay(args.buffer_size, self.env, device)
        self.rng = np.random.default_rng(args.seed)
        self.gradient_steps = 0

    def fill(self, steps: int) -> None:
        """The teacher plays that many environment steps, ε falling from start_e to end_e."""
        observation, _ = self.env.reset(seed=self.args.seed)
        for step in range(steps):
            epsilon = linear_schedule(self.args.start_e, self.args.end_e, steps, step)
            action = self.act(self.teacher, observation, epsilon)
            observation = self.step(self.replay, observation, action)

    def offline(self, gradient_steps: int) -> None:
        """That many gradient steps on what the teacher did."""
        for step in range(1, gradient_steps + 1):
            self.update(self.replay.sample(self.args.batch_size), distill_coeff=1.0)
            if step % self.args.target_network_frequency == 0:
                self.update_target_network()

    def online(self, steps: int, replay: ReplayBuffer) -> None:
        """The student plays that many environment steps into an empty buffer, and learns from it."""
        self.update_target_network()
        observation, _ = self.env.reset(seed=self.args.seed)
        for step in range(1, steps + 1):
            action = self.act(self.student, observation, online_epsilon(self.args, step))
            observation = self.step(replay, observation, action)
            if step % self.args.train_frequency == 0:
                self.update(replay.sample(self.args.batch_size), distill_coeff=1.0)
            if step % self.args.target_network_frequency == 0:
                self.update_target_network()

    def evaluate(self, games: int, max_game_frames: int) -> list[float]:
        """The teacher's returns of that many games, one after another, each cut off after so many frames."""
        env = make_env(self.args.env_id, max_game_frames)
        observation, _ = env.reset(seed=self.args.seed)
        returns: list[float] = []
        while len(returns) < games:
            action = self.act(self.teacher, observation, self.args.end_e)
            observation, _, terminated, truncated, info = env.step(action)
            if "episode" in info:
                returns.append(float(info["episode"]["r"]))
            if terminated or truncated:
                observation, _ = env.reset()
        env.close()
        return returns

    def act(self, network: nn.Module, observation: np.ndarray, epsilon: float) -> int:
        """ε-greedy, computing Q-values only where they decide."""
        if self.rng.random() < epsilon:
            return int(self.rng.integers(self.num_actions))
        with torch.inference_mode():
            return int(network(torch.from_numpy(observation[None]).to(self.device)).argmax())

    def step(self, replay: ReplayBuffer, observation: np.ndarray, action: int) -> np.ndarray:
        """One environment step, kept in `replay`; returns the observation to act on next."""
        next_observation, reward, terminated, truncated, info = self.env.step(action)
        info["TimeLimit.truncated"] = truncated and not terminated  # as Stable-Baselines3 marks it
        done = terminated or truncated
        replay.add(observation, next_observation, np.array([action]), reward, done, [info])
        return self.env.reset()[0] if done else next_observation

    def update(self, batch: ReplayBufferSamples, distill_coeff: float) -> dict[str, Tensor]:
        """One gradient step; returns its losses."""
        with torch.no_grad():
            next_q_values = self.target_network(batch.next_observations)
            rewards, terminations = batch.rewards.flatten(), batch.dones.flatten()
            targets = td_targets(rewards, terminations, self.args.gamma, next_q_values)
            teacher_q_values = self.teacher(batch.observations)
        q_values = self.student(batch.observations)
        td = td_loss(q_values, batch.actions.flatten(), targets, self.args.td_loss)
        distill = distill_loss(q_values, teacher_q_values, self.args.temperature)
        loss = td + distill_coeff * distill
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        losses = {"loss": loss.detach(), "td_loss": td.detach(), "distill_loss": distill.detach()}
        self.gradient_steps += 1
        if self.gradient_steps % LOSS_INTERVAL == 0:
            for value in losses.values():
                value.item()  # to the logger
        return losses

    def update_target_network(self) -> None:
        self.target_network.load_state_dict(self.student.state_dict())


def replay_bytes(transitions: int, env: gym.Env) -> int:
    """Bytes of the arrays of Stable-Baselines3's buffer when it is full.

    They grow with the transitions alone, so those of a hundredth are counted: the whole fits in few machines.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that memory may not suffice
        replay = create_replay(transitions // 100, env, torch.device("cpu"))
    return 100 * sum(array.nbytes for array in vars(replay).values() if isinstance(array, np.ndarray))
