"""Mirrors the curves to Weights & Biases."""

from collections.abc import Callable
from typing import Any

INSTALL = "pip install -r requirements/requirements-track.txt"
INIT_TIMEOUT_S = 60.0


def check_tracking() -> None:
    """Ensures that a run can be tracked, without asking anything: a job has nobody who could answer.

    Raises:
        SystemExit: with a one-line error, if wandb is not installed, or is online and nobody is logged in.
    """
    try:
        import wandb
    except ImportError:
        raise SystemExit(
            f"error: --track needs Weights & Biases, which is not installed; {INSTALL}, or leave --track out"
        ) from None
    if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
        raise SystemExit(
            "error: --track: nobody is logged in to Weights & Biases; run wandb login, set WANDB_API_KEY, or"
            " set WANDB_MODE=offline and send the run later with wandb sync"
        )


def start_tracking(
    run_name: str, project: str, entity: str | None, options: dict[str, Any]
) -> Callable[[str, float, int], None]:
    """Starts a Weights & Biases run, or resumes the one of that name.

    Returns the function that logs a point: tag, value, step.

    Raises:
        SystemExit: with a one-line error, if Weights & Biases cannot be reached or refuses the run.
    """
    import wandb

    try:
        run = wandb.init(
            project=project,
            entity=entity,
            name=run_name,
            id=run_name,
            resume="allow",
            config=options,
            save_code=True,
            settings=wandb.Settings(init_timeout=INIT_TIMEOUT_S),
        )
    except wandb.Error as error:
        fault = " ".join(str(error).split())
        raise SystemExit(
            f"error: --track: Weights & Biases does not take the run ({fault}); set WANDB_MODE=offline and"
            " send it later with wandb sync"
        ) from None
    # Each curve has steps of its own: games end at other steps than losses are written.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")

    def log(tag: str, value: float, step: int) -> None:
        run.log({tag: value, "step": step})

    return log
