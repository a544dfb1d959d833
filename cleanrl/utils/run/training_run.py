"""What a training script does around its algorithm: curves, videos, models, and how a run ends."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cleanrl.utils.games.animation import animate
from cleanrl.utils.games.parallel_envs import WorkerError
from cleanrl.utils.hub.publish import check_upload, copy_sources, repo_name, upload, write_card
from cleanrl.utils.replay.rows import Replay
from cleanrl.utils.run.checkpoint import Run
from cleanrl.utils.run.events import EventWriter
from cleanrl.utils.run.tracking import check_tracking, start_tracking
from cleanrl.utils.signals import Stopped


def check_services(args: Any) -> None:
    """Sees to it that Weights & Biases and the Hub will take what the script's options ask for.

    Without `hf_entity` it becomes the user whose token it is.

    Raises:
        SystemExit: with one line, if they will not.
    """
    if args.track:
        check_tracking()
    if args.upload_model:
        args.hf_entity, _, _ = check_upload(repo_name(args), args.hf_entity).partition("/")


class TrainingRun(Run):
    """A run with its checkpoints, as `Run` describes, its curves, its videos and its models.

    Args:
        args: the script's.
        script: the script's file.
        layout: how TensorBoard groups the curves, as `EventWriter.add_layout` takes it.
        save_network: writes the network to be kept to a file.
    """

    def __init__(
        self,
        args: Any,
        script: Path,
        layout: Mapping[str, Mapping[str, Sequence[str]]],
        save_network: Callable[[Path], None],
    ):
        super().__init__(args, script.stem)
        self.args, self.save_network = args, save_network
        mirror = None
        if args.track:
            mirror = start_tracking(self.folder.name, args.wandb_project_name, args.wandb_entity, vars(args))
        self.writer = EventWriter(self.folder, mirror)
        if not self.resumed:
            self.writer.add_options(vars(args))
            self.writer.add_layout(layout)

    def checkpoint(self, capture: Callable[[], Any], buffer_name: str, replay: Replay | None) -> None:
        """Makes a checkpoint of what `capture` gives, if one is due, and ends a run that must end.

        Raises:
            Stopped: the run is asked to end.
        """
        if self.is_due():
            self.writer.flush()
            self.save(capture(), buffer_name, replay)
        self.raise_if_stopped()

    @contextmanager
    def video(self, name: str, step: int) -> Iterator[Path | None]:
        """Gives the folder, called `name`, for the mp4 of the games to be played, if one is to be recorded.

        TensorBoard shows it at `step`, under what precedes the first hyphen of `name`.
        """
        if not self.args.capture_video:
            yield None
            return
        folder = self.folder / "videos" / name
        yield folder
        for path in folder.glob("*.mp4"):
            try:
                self.writer.add_animation(f"videos/{name.partition('-')[0]}", *animate(path), step)
            except OSError:
                print(f"\nwarning: {path} is damaged, and not shown in TensorBoard", file=sys.stderr)

    def save_model(self, suffix: str = "") -> None:
        """Saves the network in the run's folder, unless models are not to be saved."""
        if self.args.save_model:
            self.save_network(self.folder / f"{self.args.exp_name}{suffix}.cleanrl_model")

    def report(self, returns: Sequence[float]) -> None:
        """Takes down the returns of the final evaluation's games."""
        self.final_returns = returns
        for game, episodic_return in enumerate(returns):
            self.writer.add_scalar("eval/episodic_return", episodic_return, game)
        print(f"final evaluation: mean return {np.mean(returns):.2f} over {len(returns)} games")


@contextmanager
def training_run(
    args: Any,
    script: Path,
    layout: Mapping[str, Mapping[str, Sequence[str]]],
    save_network: Callable[[Path], None],
    has_learned: Callable[[], bool],
) -> Iterator[TrainingRun]:
    """Starts a run, or goes on with one, and sees to its end, whatever that is.

    A run that is stopped, or whose environments fail, keeps its network if that `has_learned`. One that comes
    to its end removes its checkpoints and is uploaded, if it is to be. For the others see `TrainingRun`.

    Raises:
        SystemExit: with one line, or after one, if it cannot be started or does not come to its end.
    """
    with TrainingRun(args, script, layout, save_network) as run:
        try:
            if args.upload_model:
                copy_sources(run.folder, script)
            yield run
            if args.upload_model:
                write_card(run.folder, f"{args.hf_entity}/{repo_name(args)}", args, script, run.final_returns)
        except (Stopped, WorkerError):
            if has_learned():
                run.save_model()
            raise
        finally:
            run.writer.close()
        run.finish()
    if args.upload_model:
        upload(run.folder)
