"""The processes of runs, and running them on this machine."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from cleanrl.utils.benchmark.logs import STARTED, last_words, shorten
from cleanrl.utils.benchmark.plan import Plan
from cleanrl.utils.benchmark.records import Job, State, resumable
from cleanrl.utils.games.parallel_envs import available_cores
from cleanrl.utils.run.folders import is_finished, runs_named
from cleanrl.utils.signals import STOP_SIGNALS, name_of

POLL_S = 0.5
THREAD_VARIABLES = ("OMP_NUM_THREADS", "PJRT_NPROC")  # of PyTorch, NumPy and OpenCV; of XLA


def run_environment(cores: int | None) -> dict[str, str]:
    """Variables for a run that may use that many cores (None: all); what the user has set stays."""
    defaults = {"PYTHONUNBUFFERED": "1"}
    if cores is not None:
        defaults |= dict.fromkeys(THREAD_VARIABLES, str(cores))
    return {name: os.environ.get(name, value) for name, value in defaults.items()}


def dies_with_parent(signal_number: int) -> Callable[[], None] | None:
    """For a new process: it gets that signal when the process that started it dies (Linux only)."""
    if sys.platform != "linux":
        return None
    prctl, set_death_signal = ctypes.CDLL(None).prctl, 1
    return lambda: prctl(set_death_signal, int(signal_number))


class RunProcess:
    """A run's process, in a session of its own, so that Ctrl-C reaches it only through the benchmark.

    Args:
        plan: the run.
        where: the folder it starts in, and in which it writes to `runs`.
        log: the file its output is appended to.
        resume: the folder in `runs` to resume; None: a new one.
        variables: additional environment variables.
        death_signal: the signal it gets if this process dies.

    Raises:
        OSError: the command cannot be started.
    """

    def __init__(
        self,
        plan: Plan,
        where: Path,
        log: Path,
        resume: str | None,
        variables: dict[str, str],
        death_signal: int,
    ):
        self.plan, self.runs, self.log = plan, where / "runs", log
        self.is_stopping = False
        self._kill_time = float("inf")
        self._resume, self._before = resume, set(self._folders())
        words = plan.words(f"runs/{resume}" if resume else None)
        with log.open("ab") as file:
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"{STARTED} {now}: {' '.join(words)}\n".encode())
            file.flush()
            self.process = subprocess.Popen(
                words, cwd=where, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
                env=os.environ | variables, preexec_fn=dies_with_parent(death_signal),
            )  # fmt: skip

    def _folders(self) -> list[str]:
        return [path.name for path in runs_named(self.plan.name, self.runs)]

    @property
    def folder(self) -> str | None:
        """The name of the folder in `runs` it writes to, once that exists."""
        return self._resume or max(set(self._folders()) - self._before, default=None)

    @property
    def run_folder(self) -> Path | None:
        return self.runs / self.folder if self.folder else None

    def poll(self, timeout_s: float = 0.0) -> int | None:
        """The exit status, if it ends within that time; kills it if its grace period is over."""
        if time.monotonic() > self._kill_time:
            self.kill()
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def outcome(self, status: int) -> tuple[State, str]:
        """What became of the run, and a message; a negative exit status is the signal that killed it."""
        if self.run_folder and is_finished(self.run_folder):  # perhaps all but its upload succeeded
            return "done", (last_words(self.log) or f"exit status {status}") if status else ""
        if status == 0:
            return (
                "failed",
                "left no finished folder in runs/ (exit status 0): is it a training script?",
            )
        if self.is_stopping and (status < 0 or status - 128 in STOP_SIGNALS):
            return "stopped", ""
        if status < 0:
            return "failed", f"killed by {name_of(-status)}: out of memory?"
        return "failed", last_words(self.log) or f"exit status {status}"

    def stop(self, grace_s: float) -> None:
        """Asks it to save a checkpoint and exit, once; after `grace_s`, `poll` kills it."""
        if not self.is_stopping:
            self.is_stopping = True
            self._kill_time = time.monotonic() + grace_s
            self.process.terminate()

    def kill(self) -> None:
        """Ends it and everything it started, immediately."""
        if self.process.poll() is None:
            if os.name == "posix":
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
        self.process.wait()


class LocalRunner:
    """Runs jobs in processes of this machine, at most `workers` at a time, which share its cores."""

    def __init__(self, jobs: list[Job], workers: int, grace_s: float):
        self.waiting, self.workers, self.grace_s = deque(jobs), workers, grace_s
        self.variables = run_environment(max(1, available_cores() // workers) if workers > 1 else None)
        self.running: dict[Job, RunProcess] = {}
        self.is_stopping = False

    @property
    def is_busy(self) -> bool:
        return bool(self.running or (self.waiting and not self.is_stopping))

    def step(self) -> None:
        """Starts what can be started, waits a little, and records what has ended."""
        while self.waiting and len(self.running) < self.workers and not self.is_stopping:
            self._start(self.waiting.popleft())
        time.sleep(POLL_S)
        for job, process in list(self.running.items()):
            status = process.poll()  # before looking for its folder, which it may have just made
            job.show(process.folder)
            shorten(job.log_path)
            if status is not None:
                job.end(*process.outcome(status))
                del self.running[job]

    def _start(self, job: Job) -> None:
        resume = job.record.folder if resumable(job.run_folder) else None
        job.begin()
        try:
            self.running[job] = RunProcess(
                job.plan, Path.cwd(), job.log_path, resume, self.variables, death_signal=signal.SIGTERM
            )
        except OSError as error:
            job.end("failed", f"{job.plan.command[0]} cannot be started: {error.strerror}")

    def stop(self) -> None:
        """Asks all runs to save a checkpoint and exit; waiting ones are not started any more."""
        self.is_stopping = True
        for process in self.running.values():
            process.stop(self.grace_s)

    def close(self) -> None:
        """Ends what is still running."""
        for process in self.running.values():
            process.kill()
