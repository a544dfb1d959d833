"""Options that training scripts share, and which options may change when a run is resumed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cleanrl.utils.bounds import (
    MOST_DENSE_WIDTH,
    Bounds,
    Fraction,
    Name,
    NonNegativeFloat,
    PositiveInt,
    Seed,
    shown,
)

DenseWidth = Annotated[int, Bounds(1, MOST_DENSE_WIDTH)]

MAY_CHANGE = {
    "resume",
    "teacher_replay_path",  # to another place, not to none
    "teacher_policy_hf_repo",  # the teacher itself must be the same
    "teacher_hf_file",
    "teacher_revision",
    "teacher_model_path",
    "checkpoint_interval",
    "total_timesteps",
    "save_model",
    "upload_model",
    "hf_entity",
    "save_replay",
    "capture_video",
    "track",
    "wandb_project_name",
    "wandb_entity",
    "cuda",
    "cuda_graphs",
    "buffer_device",
}


def check_unchanged(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Checks the options with which a run is resumed against those that it had.

    Raises:
        SystemExit: with a one-line error that names one that must not change.
    """
    for name, value in now.items():
        may_change = name in MAY_CHANGE
        if name == "teacher_replay_path" and not (value and before.get(name)):
            may_change = False
        is_new = name not in before  # the script has been edited
        if not (may_change or is_new) and value != before[name]:
            raise SystemExit(
                f"error: --{name.replace('_', '-')} is {value}, but {folder} has {shown(before[name])};"
                " leave the option out, or start again without --resume"
            )


@dataclass
class RunOptions:
    """What every training script has."""

    # run
    exp_name: Name
    """name of the experiment; part of the name of the run's folder"""
    seed: Seed = 1
    """seed of the experiment; on a CPU, the same seed gives identical results"""
    torch_deterministic: bool = True
    """use only deterministic algorithms of cuDNN (PyTorch) or XLA (JAX) on a GPU"""
    cuda: bool = True
    """train on the GPU if there is one"""
    buffer_device: Literal["auto", "cpu", "cuda"] = "auto"
    """device of the replay buffer's frames; auto: on the training device if they fit, else in host memory"""
    cuda_graphs: bool = True
    """launch the kernels of a gradient step together on a GPU, as a CUDA graph"""
    track: bool = False
    """mirror the TensorBoard curves to Weights & Biases (requirements/requirements-track.txt)"""
    wandb_project_name: str = "qdagger"
    """the Weights & Biases project"""
    wandb_entity: str | None = None
    """the Weights & Biases entity (team)"""
    capture_video: bool = False
    """record the first game of each evaluation as mp4 in the run's folder, and show it in TensorBoard"""
    save_model: bool = True
    """save the network: after evaluations, at the end, and when the run is stopped"""
    upload_model: bool = False
    """publish the model on the Hugging Face Hub at the end, as {hf_entity}/{env_id}-{exp_name}-seed{seed}"""
    hf_entity: str | None = None
    """the user or organization on the Hub (default: the token's user)"""
    checkpoint_interval: NonNegativeFloat = 600.0
    """seconds between checkpoints of the whole run; 0: only when it is stopped"""
    resume: str | None = None
    """resume the run in this folder with its options; auto: the newest unfinished one"""

    # environment
    env_id: str = "BreakoutNoFrameskip-v4"
    """the game, as {Game}NoFrameskip-v4"""
    repeat_action_probability: Fraction = 0.0
    """sticky actions: probability that the game repeats the previous action (Agarwal et al., 2022: 0.25)"""
    num_envs: Annotated[int, Bounds(1, 1024)] = 8  # whose states fit into a checkpoint
    """environments that step in parallel; counts of environment steps are totals over all of them"""


@dataclass
class TeacherOptions(RunOptions):
    """Sets of options by name; where QDagger's teacher comes from, and how it plays."""

    # run
    preset: Literal["quick", "paper"] | None = None
    """other defaults; quick: Pong, 10 to 30 minutes on two CPU cores; paper: the paper's settings"""

    # teacher
    teacher_model_exp_name: str = "dqn_atari"
    """the experiment that trained the teacher: part of its repository and file name on the Hub"""
    teacher_policy_hf_repo: str | None = None
    """the teacher's repository on the Hub (default: cleanrl/{env_id}-{teacher_model_exp_name}-seed1)"""
    teacher_hf_file: str | None = None
    """the teacher's file there (default: {teacher_model_exp_name}.cleanrl_model, or the only agent there)"""
    teacher_revision: str | None = None
    """branch, tag or commit of that repository (default: main)"""
    teacher_model_path: Path | None = None
    """load the teacher from this file (torch, flax, safetensors or Stable-Baselines3 zip) instead"""
    teacher_acts: Literal["auto", "argmax", "sample"] = "auto"
    """how the teacher acts: argmax of Q-values, or sample from its policy; auto: an actor-critic samples"""
    teacher_replay_path: Path | None = None
    """learn offline from this folder, saved with dqn_atari's --save-replay, instead of from new play"""
    teacher_eval_episodes: PositiveInt = 10
    """games over which the teacher's return is measured"""
    teacher_steps: PositiveInt = 500_000
    """environment steps the teacher plays into its buffer, while epsilon falls from start_e to end_e"""
