"""Mirrors the curves to Weights & Biases."""

from collections.abc import Callable
from typing import Any


def start_tracking(
    run_name: str, project: str, entity: str | None, options: dict[str, Any]
) -> Callable[[str, float, int], None]:
    """Starts a Weights & Biases run, or goes on with the one of that name.

    Returns the function that logs a point: tag, value, step.

    Raises:
        SystemExit: with one line, if wandb is not installed.
    """
    try:
        import wandb
    except ImportError:
        raise SystemExit(
            "error: --track needs Weights & Biases; pip install wandb, or leave --track out"
        ) from None
    run = wandb.init(
        project=project,
        entity=entity,
        name=run_name,
        id=run_name,
        resume="allow",
        config=options,
        save_code=True,
    )
    # Each curve has steps of its own: games end at other steps than losses are written.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")

    def log(tag: str, value: float, step: int) -> None:
        run.log({tag: value, "step": step})

    return log
