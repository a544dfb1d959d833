"""The trials of a study: each is a run of the training script, which can be stopped and resumed."""

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from statistics import fmean

import filelock
import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import StorageInternalError
from optuna.study import StudyDirection
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from cleanrl.utils.benchmark.plan import Plan
from cleanrl.utils.benchmark.processes import LocalRunner
from cleanrl.utils.benchmark.records import Job, Record
from cleanrl.utils.bounds import printable, shown
from cleanrl.utils.report.events import UnusableError, read_curves
from cleanrl.utils.run.charts import EVALUATION_RETURN, OFFLINE_RETURN
from cleanrl.utils.run.folders import event_files
from cleanrl.utils.signals import StopSignals

RECORDS = Path("runs") / "tune"
READING_INTERVAL = 50  # times what it takes to read a run's event files, which grow to megabytes


@contextmanager
def using(path: Path, *faults: type[Exception]) -> Iterator[None]:
    """Raises SystemExit with a one-line error instead of what a database raises, or of `faults`."""
    try:
        yield
    except (SQLAlchemyError, StorageInternalError, *faults) as error:
        reason = shown(str(error.__cause__ or error).partition("\n")[0])
        is_full = any(words in reason for words in ("disk is full", "No space left", "quota"))
        advice = "free some space" if is_full else "move it away, or name another --study"
        raise SystemExit(f"error: the study {path} cannot be used ({reason}); {advice}") from None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Raises SystemExit with a one-line error if another process uses the study in that file."""
    with using(path, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise SystemExit(
                f"error: another process uses the study {path}; for several runs at a time set its --workers"
            ) from None
    try:
        yield
    finally:
        lock.release()


def open_study(path: Path, name: str, seed: int, warm_up_trials: int) -> optuna.Study:
    """A new one, or that in the file; raises SystemExit with a one-line error if it cannot be used."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with using(path, Exception):  # what a damaged one raises has many types
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise OSError("not a file")
        study = optuna.create_study(
            storage=f"sqlite:///{path}",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=warm_up_trials),
            study_name=name,
            direction="maximize",
            load_if_exists=True,
        )
        trials = study.get_trials(deepcopy=False)  # reads all of it
        complete = (trial for trial in trials if trial.state == TrialState.COMPLETE)
        if study.direction != StudyDirection.MAXIMIZE or not all(isfinite(trial.value) for trial in complete):
            raise ValueError("it does not come from a search")
        # Not again the values of the last start.
        study.sampler = optuna.samplers.TPESampler(seed=(seed + len(trials)) % 2**32)
        dict(study.user_attrs)
        return study


@dataclass
class Attempt:
    """A trial while its run is worked on."""

    trial: optuna.trial.Trial
    job: Job
    num_reported: int = 0  # evaluations
    is_pruned: bool = False
    outcome: str = ""  # once it has ended
    next_reading: float = 0.0  # time.monotonic() from which on to read the event files again

    def follow(self, runner: LocalRunner) -> bool:
        """Reports new offline evaluations; stops the run if others did better; returns whether it ended."""
        is_active = self.job in runner.running or self.job in runner.waiting
        start_time = time.monotonic()
        if is_active and start_time < self.next_reading:
            return False
        evaluations, final_returns = self._returns()
        self.next_reading = start_time + READING_INTERVAL * (time.monotonic() - start_time)
        for step, mean_return in evaluations[self.num_reported :]:
            self.trial.report(mean_return, step)
            self.num_reported += 1
            if not self.is_pruned and self.job in runner.running and self.trial.should_prune():
                self.is_pruned = True
                runner.running[self.job].stop(runner.grace_s)
        if is_active:
            return False
        record, tell = self.job.record, partial(self.trial.study.tell, self.trial)
        if record.state == "done" and final_returns:
            tell(fmean(final_returns))
            self.outcome = f"done {record.message}".strip()
        elif self.is_pruned:
            tell(state=TrialState.PRUNED)
            self.outcome = "pruned"
        elif record.state == "stopped":  # it is resumed at the next start
            self.outcome = "stopped"
        else:
            tell(state=TrialState.FAIL)
            self.outcome = f"failed {record.message or 'it made no final evaluation'}"
        self.job.__exit__()
        return True

    def _returns(self) -> tuple[list[tuple[int, float]], list[float]]:
        """Step and mean return of each offline evaluation, and the returns of the final evaluation."""
        folder = self.job.run_folder
        try:
            _, curves = read_curves(event_files(folder) if folder else [], faults=[])
        except UnusableError:  # it is just being written
            return [], []
        offline = (column.tolist() for column in curves[OFFLINE_RETURN])
        return list(zip(*offline, strict=True)), curves[EVALUATION_RETURN].values.tolist()

    def __str__(self) -> str:
        options = self.job.plan.command[-2 * len(self.trial.params) :]
        return printable(f"trial {self.trial.number} ({shlex.join(options)})")


@dataclass
class Search:
    """What all trials of a study have in common."""

    study: optuna.Study
    command: tuple[str, ...]
    env_id: str
    seed: int
    space: dict[str, BaseDistribution]

    def _attempt(self, trial: optuna.trial.Trial, num_reported: int = 0) -> Attempt:
        """A trial with its run; raises SystemExit if another process is working on that."""
        options = [word for name, value in trial.params.items() for word in (f"--{name}", str(value))]
        exp_name = f"{self.study.study_name}-{trial.number}"
        plan = Plan(self.env_id, exp_name, self.seed, (*self.command, *options))
        job = Job(plan, RECORDS)
        if job.record.command != plan.identity:  # of an earlier study of that name
            job.record = Record(plan.identity)
        return Attempt(trial, job, num_reported)

    def interrupted(self) -> Iterator[Attempt]:
        """The trials in which the last search was stopped."""
        for frozen in self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            trial = optuna.trial.Trial(self.study, frozen._trial_id)  # Optuna has no public way
            if frozen.params.keys() == self.space.keys():
                yield self._attempt(trial, len(frozen.intermediate_values))
            else:  # it was stopped before all values were chosen
                self.study.tell(trial, state=TrialState.FAIL)

    def next(self) -> Attempt:
        """A trial of the most promising values, given the trials so far."""
        return self._attempt(self.study.ask(self.space))

    def num_trials(self) -> int:
        """Those that have an outcome, or are worked on."""
        counted = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        return len(self.study.get_trials(deepcopy=False, states=counted))


def run_trials(search: Search, num_trials: int, workers: int, grace_s: float) -> int:
    """Runs trials until there are so many; a failure ends the search.

    Args:
        search: the study and what its trials are.
        num_trials: in all, those of earlier starts included.
        workers: runs at a time.
        grace_s: how long a stopped run may take.

    Returns:
        The exit status.
    """
    runner = LocalRunner([], workers, grace_s)
    active: list[Attempt] = []
    failure = ""

    def add(attempt: Attempt) -> None:
        active.append(attempt)
        if attempt.job.record.state != "done":
            runner.waiting.append(attempt.job)

    try:
        with StopSignals() as signals:
            for attempt in search.interrupted():
                add(attempt)
            while True:
                for attempt in [attempt for attempt in active if attempt.follow(runner)]:
                    active.remove(attempt)
                    print(f"{attempt}: {printable(attempt.outcome)}", flush=True)
                    if attempt.outcome.startswith("failed"):
                        failure = f"error: {attempt} failed; its log is {attempt.job.log_path}"
                if signals.received or failure:
                    runner.stop()
                while not runner.is_stopping and len(active) < workers and search.num_trials() < num_trials:
                    add(search.next())
                if not (runner.running if runner.is_stopping else active):
                    break
                runner.step()
    finally:  # also where the study cannot be used any more
        runner.stop()
        while runner.running:
            runner.step()
    if failure:
        print(failure, file=sys.stderr)
    return 128 + signals.received if signals.received else int(bool(failure))
