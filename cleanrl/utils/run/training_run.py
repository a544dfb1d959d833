"""What surrounds a training script's algorithm: the run's folder, checkpoints, curves, games and models."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from tqdm import tqdm

from cleanrl.utils.bounds import shown
from cleanrl.utils.devices import memory_shortage
from cleanrl.utils.evaluation import evaluate
from cleanrl.utils.games.parallel_envs import FinishedGame, ParallelEnvs, WorkerError
from cleanrl.utils.hub.card import copy_sources, repo_name, write_card
from cleanrl.utils.hub.publish import upload
from cleanrl.utils.progress import ProgressBar
from cleanrl.utils.run.charts import (
    CHARTS,
    DISTILL_COEFF,
    EPISODIC_RETURN,
    EVALUATION_RETURN,
    FINAL_RETURN,
    RESULTS,
    TAGS,
)
from cleanrl.utils.run.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    complete_checkpoints,
    cut_events,
    newest_checkpoint,
    warn_of,
)
from cleanrl.utils.run.events import EventWriter
from cleanrl.utils.run.folders import lock_run, manifests, new_folder, release_finished
from cleanrl.utils.run.options import check_unchanged
from cleanrl.utils.run.state import capture, check_fields, fingerprint, read_numbers, replays_of
from cleanrl.utils.run.summary import summary
from cleanrl.utils.run.tracking import Tracker
from cleanrl.utils.signals import Stopped, StopSignals
from cleanrl.utils.storage import DamagedError
from cleanrl.utils.weights.files import save_weights

EVALUATION_SEED = 0  # with --seed, what the games of every evaluation start from


class TrainingRun:
    """A run, new or resumed, locked against other processes; a context around all of its training.

    As a context it records stop signals for `checkpoint`. A run that is stopped, loses an environment, or
    runs out of disk or memory exits with one line and a status; in the first two cases its network is saved.
    A finished run's checkpoints are deleted, and it is uploaded if requested.

    Args:
        args: the script's.
        script: the script's file.
        state: a new state; if the run is resumed, its checkpoint is restored into it. It has
            `gradient_steps`.
        make_env: makes a game from its id, the probability of sticky actions and the options of `evaluate`.
        model: the name of the state's field with the network that a stopped run keeps.
        charts: as `charts.CHARTS`.
        teacher: a network that must be the same when the run is resumed, wherever it is from.

    Raises:
        SystemExit: with a one-line error, if the run cannot be resumed with these arguments, or its folder
            cannot be written to.
        TypeError: a field of the state cannot be saved.
    """

    def __init__(
        self,
        args: Any,
        script: Path,
        state: Any,
        make_env: Callable[..., gym.Env],
        model: str,
        charts: Mapping[str, Mapping[str, Sequence[str]]] = CHARTS,
        teacher: Any = None,
    ):
        check_fields(state)
        self.args, self.script, self.state, self.model = args, script, state, model
        self.options = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
        self.folder = Path(args.resume) if args.resume else new_folder(args)
        if args.resume and not manifests(self.folder):
            newest_checkpoint(self.folder)  # says why there is none
        self._teacher = None if teacher is None else fingerprint(teacher)
        self._lock = lock_run(self.folder)
        self._saved_games: tuple[list[int], list[dict]] | None = None  # of the last phase: seed, states
        self._mean_returns: dict[str, float] = {}  # of the newest evaluations by name, and "best"
        resumed = self._resume() if args.resume else None
        self._checkpoints = CheckpointWriter(self.folder, resumed)
        self._next_checkpoint = 0.0  # the first one is due at once
        self._make_game = partial(make_env, args.env_id, args.repeat_action_probability)
        self._envs: ParallelEnvs | None = None  # while they are open
        self._bar: ProgressBar | None = None  # the last one
        self._unread: list[tuple[int, dict[str, Any]]] = []  # of `plot`: a step and its values
        where = self.folder.name, args.wandb_project_name, args.wandb_entity
        self._tracker = Tracker(*where, self.options) if args.track else None
        self.writer = EventWriter(self.folder, self._tracker)
        if not resumed:
            self.writer.add_options(vars(args), RESULTS)
            self.writer.add_layout(charts)
        self._final_returns: Sequence[float] | None = None
        if args.upload_model:
            copy_sources(self.folder, script)
        print(f"run: {self.folder}" + (", resumed" if resumed else ""))

    def _resume(self) -> Checkpoint:
        """Restores the newest checkpoint whose content makes sense."""
        for checkpoint in complete_checkpoints(self.folder):
            if checkpoint.script != self.script.stem:
                fault = f"is a run of {shown(checkpoint.script)}.py, not of {self.script.name}"
                raise SystemExit(f"error: --resume {self.folder} {fault}")
            check_unchanged(self.folder, checkpoint.options, self.options)
            try:
                saved = checkpoint.restore(self.state, self.args.num_envs, self._teacher)
                self._saved_games, self._mean_returns = saved
                break
            except DamagedError as fault:
                warn_of(checkpoint.folder / checkpoint.name, fault)
        cut_events(self.folder, checkpoint)
        return checkpoint

    # ------------------------------------------------------------------------------------ how it ends

    def __enter__(self) -> "TrainingRun":
        self._signals = StopSignals().__enter__()
        return self

    def __exit__(self, kind: type | None, exception: BaseException | None, traceback: Any) -> None:
        try:
            if exception is None:
                self._write_results()
                if self.args.upload_model:
                    upload(self.folder)
            elif isinstance(exception, Stopped | WorkerError) and self.state.gradient_steps > 0:
                self.save_model(getattr(self.state, self.model))
        except OSError as error:  # a full disk
            exception = error
        finally:
            self._signals.__exit__()
            self.writer.flush()
            how_to_resume = "there is no checkpoint"
            if manifests(self.folder):
                how_to_resume = f"resume it with --resume {self.folder}"
            self._lock.release()
        if isinstance(exception, Stopped):
            print(f"{exception}; {how_to_resume}", file=sys.stderr)
            raise SystemExit(exception.status) from None
        if isinstance(exception, WorkerError | OSError):
            raise SystemExit(f"error: {exception}; {how_to_resume}") from None
        if exception and (shortage := memory_shortage(exception)):
            raise SystemExit(f"error: {shortage}; {how_to_resume}") from None

    def _write_results(self) -> None:
        self._write_values()
        if self.args.upload_model:
            repo_id = f"{self.args.hf_entity}/{repo_name(self.args)}"
            write_card(self.folder, repo_id, self.args, self.script, self._final_returns)
        self.writer.flush()
        if self._tracker:
            model = self.folder / f"{self.args.exp_name}.cleanrl_model"
            self._tracker.finish(self._final_returns, model if self.args.save_model else None)
        self._checkpoints.remove_all()
        release_finished(self.folder, self._lock)

    # ------------------------------------------------------------------------------------ checkpoints

    def checkpoint(self) -> None:
        """Makes a checkpoint if one is due, and ends a stopped run; to be called where nothing is half-done.

        Raises:
            Stopped: the run was asked to stop.
        """
        stop = self._signals.received
        is_time = self.args.checkpoint_interval > 0 and time.monotonic() >= self._next_checkpoint
        if is_time or stop is not None:
            self._write_values()
            if self.writer.flush():  # the resumed run writes no point from before the checkpoint again
                games = self._saved_games
                if self._envs:
                    games = self._games_seed, self._envs.get_states()
                state = {"state": capture(self.state), "teacher": self._teacher}
                state |= {"games": games, "mean_returns": self._mean_returns}
                self._checkpoints.save(self.script.stem, self.options, state, replays_of(self.state))
            self._next_checkpoint = time.monotonic() + self.args.checkpoint_interval
        if stop is not None:
            raise Stopped(stop)

    # ------------------------------------------------------------------------------------------ games

    @contextmanager
    def open_envs(self, num_envs: int, seed: Sequence[int]) -> Iterator[ParallelEnvs]:
        """Environments with new games from `seed` or, if the run was resumed, with its games as they were."""
        with ParallelEnvs([self._make_game] * num_envs) as envs:
            if self._saved_games and list(self._saved_games[0]) == list(seed):
                envs.set_states(self._saved_games[1])
            else:
                envs.reset(seed)
            self._envs, self._games_seed = envs, list(seed)
            try:
                yield envs
                self._saved_games = list(seed), envs.get_states()
            finally:
                self._envs = None

    def play(
        self,
        name: str,
        compute_q_values: Callable[[np.ndarray], np.ndarray],
        num_games: int,
        step: int,
        sampling_temperature: float = 0.0,
    ) -> list[float]:
        """The unclipped returns of whole games, played with ε = `end_e`: the same games each time.

        Above a temperature of 0 actions are sampled from softmax(Q / temperature). With --capture-video the
        first game is recorded in the folder `name`; TensorBoard shows it at `step`.
        """
        player = name.partition("-")[0]
        video_folder = self.folder / "videos" / name if self.args.capture_video else None
        with ProgressBar(f"{player} evaluation", 0, num_games, "games", passing=True) as progress:
            returns = evaluate(
                self._make_game,
                compute_q_values,
                num_games,
                seed=(self.args.seed, EVALUATION_SEED),
                epsilon=self.args.end_e,
                video_folder=video_folder,
                before_step=self.checkpoint,
                after_step=progress.reach,
                sampling_temperature=sampling_temperature,
            )
        self._mean_returns[player] = float(np.mean(returns))
        for path in video_folder.glob("*.mp4") if video_folder else ():
            try:
                self.writer.add_video(f"videos/{player}", path, step)
            except OSError:
                self.say(f"warning: {path} is damaged, and not shown in TensorBoard")
        return returns

    # ----------------------------------------------------------------------------------------- curves

    def progress(self, name: str, done: int, total: int, unit: str) -> ProgressBar:
        """A bar for `total` of a `unit`, of which some are `done`; it also shows the newest return and λ."""
        self._bar = ProgressBar(name, done, total, unit)
        return self._bar

    def say(self, text: str) -> None:
        """Prints a line, above the progress bar if there is one."""
        tqdm.write(text)

    def plot(self, values: dict[str, Any], step: int) -> None:
        """Adds a point at `step` to each curve, by its tag.

        Values may still be on a device. They are read when the next ones come or a checkpoint is made;
        by then the device has computed them. A loss that is not finite then ends the run.

        Raises:
            SystemExit: with a one-line error, for a loss that is not finite.
        """
        self._write_values()
        order = [*TAGS, *sorted(values.keys() - TAGS.keys())]  # JAX sorts a dict's keys
        self._unread.append((step, {tag: values[tag] for tag in order if tag in values}))

    def plot_game(self, game: FinishedGame, step: int) -> None:
        """Adds a finished game to the curves."""
        self.writer.add_scalar(EPISODIC_RETURN, game.episodic_return, step)
        self.writer.add_scalar("charts/episodic_length", game.episodic_length, step)
        if self._bar:
            self._bar.show("return", game.episodic_return)

    def _write_values(self) -> None:
        unread, self._unread = self._unread, []
        numbers = iter(read_numbers([value for _, values in unread for value in values.values()]))
        for step, values in unread:
            for tag, number in zip(values, numbers, strict=False):
                if tag.endswith("loss") and not math.isfinite(number):
                    raise SystemExit(f"error: {tag} is {number} at step {step}; try a lower --learning-rate")
                self.writer.add_scalar(tag, number, step)
                if tag == DISTILL_COEFF and self._bar:
                    self._bar.show("λ", number)

    # ---------------------------------------------------------------------------------------- results

    def save_model(self, network: Any, suffix: str = "") -> None:
        """Saves a network as {exp_name}{suffix}.cleanrl_model, unless models are not to be saved.

        Raises:
            SystemExit: with a one-line error, if it is not finite; a file from before stays.
        """
        if self.args.save_model:
            self._write_values()  # says at which step it went wrong
            save_weights(self.folder / f"{self.args.exp_name}{suffix}.cleanrl_model", network)

    def keep_if_best(self, mean_return: float) -> None:
        """Saves the network as {exp_name}-best.cleanrl_model, if no online evaluation returned as much."""
        if mean_return > self._mean_returns.get("best", -math.inf):
            self._mean_returns["best"] = mean_return
            self.save_model(getattr(self.state, self.model), "-best")

    def finish(self, returns: Sequence[float]) -> None:
        """Takes the returns of the final evaluation's games."""
        self._final_returns, self._mean_returns["final"] = returns, float(np.mean(returns))
        if "best" in self._mean_returns:
            self.keep_if_best(self._mean_returns["final"])
        for game, episodic_return in enumerate(returns):
            self.plot({EVALUATION_RETURN: episodic_return}, game)
        self.plot({FINAL_RETURN: self._mean_returns["final"]}, self.state.gradient_steps)
        self.say(summary(self.args, self.folder, len(returns), self._mean_returns))
