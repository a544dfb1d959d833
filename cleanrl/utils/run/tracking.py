"""Mirrors a run to Weights & Biases: curves, videos, the final evaluation, the model."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from cleanrl.utils.bounds import shown

INSTALL = "pip install -r requirements/requirements-track.txt"
INIT_TIMEOUT_S = 60.0


def check_tracking(project: str) -> None:
    """Ensures that a run can be tracked, without asking anything: a job has nobody who could answer.

    Raises:
        SystemExit: with a one-line error, if wandb is not installed, refuses the project's name, or is online
            and nobody is logged in.
    """
    try:
        import wandb
    except ImportError:
        raise SystemExit(
            f"error: --track needs Weights & Biases, which is not installed; {INSTALL}, or leave --track out"
        ) from None
    try:
        wandb.setup()
    except ValueError as error:  # of one of its variables
        fault = " ".join(str(error).split())
        raise SystemExit(
            f"error: --track: Weights & Biases cannot be used ({shown(fault)}); check the WANDB variables"
        ) from None
    try:
        wandb.Settings(project=project)
    except wandb.UsageError:
        raise SystemExit(
            f"error: --wandb-project-name {shown(project)} must be at most 128 characters, none of them"
            r" / \ # ? % or :"
        ) from None
    if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
        raise SystemExit(
            "error: --track: not logged in to Weights & Biases; run wandb login, set WANDB_API_KEY, or"
            " set WANDB_MODE=offline and send the run later with wandb sync"
        )


class Tracker:
    """A Weights & Biases run, or the resumed one of that name.

    Args:
        run_name: its name and id.
        project: its project.
        entity: its entity; None: the user's own.
        options: shown beside it.

    Raises:
        SystemExit: with a one-line error, if Weights & Biases cannot be reached or refuses the run.
    """

    def __init__(self, run_name: str, project: str, entity: str | None, options: dict[str, Any]):
        import wandb

        try:
            self.run = wandb.init(
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
                f"error: --track: Weights & Biases refused the run ({fault}); set WANDB_MODE=offline"
                " and send it later with wandb sync"
            ) from None
        # Each curve has steps of its own: games end at other steps than losses are written.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.run.log({tag: value, "step": step})

    def add_video(self, tag: str, path: Path, step: int) -> None:
        """Adds an mp4 file."""
        import wandb

        self.run.log({tag: wandb.Video(str(path), format="mp4"), "step": step})

    def finish(self, returns: Sequence[float], model: Path | None) -> None:
        """Adds the returns of the final evaluation's games as a table, and the model as an artifact."""
        import wandb

        table = wandb.Table(columns=["game", "return"], data=[list(row) for row in enumerate(returns)])
        self.run.log({"eval/games": table})
        if model:
            artifact = wandb.Artifact(self.run.name, type="model", metadata={"mean_return": fmean(returns)})
            artifact.add_file(str(model))
            self.run.log_artifact(artifact)
        self.run.finish()
