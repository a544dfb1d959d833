"""Mirrors TensorBoard to Weights & Biases."""

from typing import Any


def start_tracking(run_name: str, project: str, entity: str | None, options: dict[str, Any]) -> None:
    """Starts a Weights & Biases run that follows every TensorBoard writer opened after it.

    Raises:
        SystemExit: with one line, if wandb is not installed.
    """
    try:
        import wandb
    except ImportError:
        raise SystemExit(
            "error: --track needs Weights & Biases; pip install wandb, or leave --track out"
        ) from None
    wandb.init(
        project=project, entity=entity, name=run_name, config=options, sync_tensorboard=True, save_code=True
    )
