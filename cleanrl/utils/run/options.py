"""The options that every training script has, and which options may change when a run is resumed."""

from dataclasses import dataclass

from cleanrl.utils.bounds import Name, NonNegativeFloat, Seed

MAY_CHANGE = {
    "resume",
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


@dataclass
class RunOptions:
    # run
    exp_name: Name
    """name of the experiment; part of the name of the run's folder"""
    seed: Seed = 1
    """seed of the experiment; on a CPU the same seed gives the same bits"""
    torch_deterministic: bool = True
    """use only deterministic algorithms on a GPU"""
    cuda: bool = True
    """train on the GPU if there is one"""
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
    """save the network at each evaluation, at the end, and when the run is stopped"""
    upload_model: bool = False
    """publish the model on the Hugging Face Hub at the end, as {hf_entity}/{env_id}-{exp_name}-seed{seed}"""
    hf_entity: str | None = None
    """the user or organization on the Hub (default: the user whose token it is)"""
    checkpoint_interval: NonNegativeFloat = 600.0
    """seconds between two checkpoints of the whole run; 0: only when it is stopped"""
    resume: str | None = None
    """resume the run in this folder with its options; auto: the newest unfinished one"""
