"""The trials of a study: each is a run of the training script, which can be stopped and resumed."""

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from cleanrl.utils.benchmark.plan import Plan
from cleanrl.utils.benchmark.processes import LocalRunner, run_environment
from cleanrl.utils.benchmark.records import Job
from cleanrl.utils.bounds import printable, shown
from cleanrl.utils.games.parallel_envs import available_cores
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
        raise SystemExit(
            f"error: the study {path} cannot be used ({reason}); move it away, or name another --study"
        ) from None


def open_study(path: Path, name: str, seed: int, warm_up_trials: int) -> optuna.Study:
    """A new one, or that in the file; raises SystemExit with a one-line error if it cannot be used."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with using(path, Exception):  # what a damaged one raises has many types
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise OSError("not a file")
        study = optuna.create_study(
            storage=f"sqlite:///{path}",
            sampler=optuna.samplers.TPESampler(seed=seed),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=warm_up_trials),
            study_name=name,
            direction="maximize",
            load_if_exists=True,
        )
        study.get_trials(deepcopy=False)  # reads all of it
        dict(study.user_attrs)
        return study


@dataclass
class Attempt:
    """A trial while its run is worked on."""

    trial: optuna.trial.Trial
    job: Job
    num_reported: int = 0  # evaluations
    is_pruned: bool = False
    next_reading: float = 0.0  # time.monotonic() from which on to read the event files again

    def follow(self, runner: LocalRunner) -> bool:
        """Reports new evaluations offline; stops the run if others did better; returns whether it ended."""
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
        state = self.job.record.state
        if state == "done" and final_returns:
            self.trial.study.tell(self.trial, fmean(final_returns))
        elif self.is_pruned:
            self.trial.study.tell(self.trial, state=TrialState.PRUNED)
        elif state != "stopped":  # a stopped one is resumed at the next start
            self.trial.study.tell(self.trial, state=TrialState.FAIL)
        self.job.__exit__()
        return True

    def _returns(self) -> tuple[list[tuple[int, float]], list[float]]:
        """Step and mean return of each evaluation offline, and the returns of the final evaluation."""
        folder = self.job.run_folder
        try:
            _, curves = read_curves(event_files(folder) if folder else [], faults=[])
        except UnusableError:  # it is just being written
            return [], []
        offline = (column.tolist() for column in curves[OFFLINE_RETURN])
        return list(zip(*offline, strict=True)), curves[EVALUATION_RETURN].values.tolist()

    @property
    def outcome(self) -> str:
        if self.is_pruned:
            return "pruned"
        return printable(f"{self.job.record.state} {self.job.record.message}".strip())

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

    def _job(self, number: int, params: dict[str, object]) -> Job:
        """The run of a trial; raises SystemExit if another process is working on it."""
        options = [word for name, value in params.items() for word in (f"--{name}", str(value))]
        exp_name = f"{self.study.study_name}-{number}"
        return Job(Plan(self.env_id, exp_name, self.seed, (*self.command, *options)), RECORDS)

    def interrupted(self) -> Iterator[Attempt]:
        """Trials that have begun and that nobody is working on: those in which a search was stopped."""
        for frozen in self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            try:
                job = self._job(frozen.number, frozen.params)
            except SystemExit:
                continue
            trial = optuna.trial.Trial(self.study, frozen._trial_id)  # Optuna has no public way
            yield Attempt(trial, job, len(frozen.intermediate_values))

    def next(self) -> Attempt:
        """A trial of the values that are most promising after those so far."""
        trial = self.study.ask(self.space)
        return Attempt(trial, self._job(trial.number, trial.params))

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
    cores = max(1, available_cores() // workers) if workers > 1 else None
    runner = LocalRunner([], workers, run_environment(cores), grace_s)
    active = list(search.interrupted())
    runner.waiting.extend(attempt.job for attempt in active)
    failure = ""
    try:
        with StopSignals() as signals:
            while True:
                if (signals.received or failure) and not runner.is_stopping:
                    runner.stop()
                while not runner.is_stopping and len(active) < workers and search.num_trials() < num_trials:
                    active.append(search.next())
                    runner.waiting.append(active[-1].job)
                if not runner.is_busy:
                    break
                runner.step()
                for attempt in [attempt for attempt in active if attempt.follow(runner)]:
                    active.remove(attempt)
                    print(f"{attempt}: {attempt.outcome}", flush=True)
                    if attempt.job.record.state == "failed":
                        failure = f"error: {attempt} failed; its log is {attempt.job.log_path}"
    finally:
        runner.close()
    if failure:
        print(failure, file=sys.stderr)
    return 128 + signals.received if signals.received else int(bool(failure))
