"""One run of a benchmark: its record beside the runs, its process, and how its state is told.

A run's record, `runs/benchmark/{env_id}__{exp_name}__{seed}.json`, holds the command it was begun with and
the folder that it writes to; beside it lies the log of what it printed. Whether it has come to its end is
told by the folder: until then a training script keeps its `checkpoints` there.
"""

import ctypes
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import filelock

from cleanrl.utils.run.checkpoint import manifests
from cleanrl.utils.storage import write_durably

POLL_S = 0.5
STARTED = "--- started"  # begins a line of a log
TAIL_BYTES = 16 * 1024  # of a log, in which its last line is looked for
PROGRESS_INTERVAL_S = 2  # of tqdm's lines, which all go into the log: 10 a second are 90 MB a day
PROGRESS = re.compile(
    r"(?P<phase>.*?): +(?P<percent>\d+%)\|.*\[[^<]*<(?P<left>[^,]+), *(?P<speed>[^,\]]+)(, (?P<more>.*))?\]$"
)
# PyTorch's, NumPy's and OpenCV's threads; those of XLA.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "PJRT_NPROC")

State = Literal["waiting", "running", "done", "failed", "stopped"]


@dataclass(frozen=True)
class Plan:
    """What one run is: a command for one game and one seed.

    command: the user's, in words, without the options that the benchmark sets.
    """

    env_id: str
    exp_name: str
    seed: int
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        """Also what its folder's name begins with."""
        return f"{self.env_id}__{self.exp_name}__{self.seed}"

    @property
    def identity(self) -> list[str]:
        """The part of the command that decides what comes out: all but the Python that runs it."""
        return list(self.command[script_index(self.command) or 0 :])

    def words(self, resume: str | None) -> list[str]:
        """The command line that begins the run, or goes on with the folder `resume`."""
        words = [sys.executable if word in ("python", "python3") else word for word in self.command[:1]]
        words += self.command[1:]
        words += ["--env-id", self.env_id, "--seed", str(self.seed)]
        if option_value(self.command, "exp_name") is None:
            words += ["--exp-name", self.exp_name]
        return words + (["--resume", resume] if resume else [])


def script_index(command: tuple[str, ...]) -> int | None:
    """Where in a command the script stands: a file, or a module after -m."""
    for index, word in enumerate(command):
        if word.endswith(".py") or (index > 0 and command[index - 1] == "-m"):
            return index
    return None


def option_value(command: tuple[str, ...], name: str) -> str | None:
    """The value of the option `name` in a command, "" if it stands there without one, None if it does not."""
    for index, word in enumerate(command):
        option, equals, value = word.partition("=")
        if option.startswith("--") and option[2:].replace("-", "_") == name:
            return value if equals else "".join(command[index + 1 : index + 2])
    return None


@dataclass
class Record:
    """What is kept of a run between two starts of the benchmark."""

    command: list[str]
    state: State = "waiting"
    folder: str | None = None  # its name in runs/
    starts: int = 0
    seconds: float = 0.0
    message: str = ""


@dataclass(eq=False)
class Job:
    """A run of the benchmark while it is at work on it: what it is, its record, and what it shows.

    It is held against other processes until the end of its context.
    """

    plan: Plan
    folder: Path  # of the records
    record: Record = field(init=False)
    progress: str = ""
    node: str = ""
    started: float | None = None  # time.monotonic() of its start, if it is running

    def __post_init__(self) -> None:
        """Raises SystemExit with one line if another process is at work on it, or its record is damaged."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(self.folder / f"{self.plan.name}.lock")
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise SystemExit(
                f"error: another benchmark is at work on {self.plan.name}; wait for its end"
            ) from None
        self.record = self._read() or Record(self.plan.identity)
        # One that was running when the benchmark was killed may have come to its end by itself.
        if self.record.state == "running" and self.run_folder and is_finished(self.run_folder):
            self.record.state = "done"
        elif self.record.state != "done" or not self.run_folder or not is_finished(self.run_folder):
            self.record.state = "waiting"

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    @property
    def record_path(self) -> Path:
        return self.folder / f"{self.plan.name}.json"

    @property
    def log_path(self) -> Path:
        return self.folder / f"{self.plan.name}.log"

    @property
    def run_folder(self) -> Path | None:
        return self.folder.parent / self.record.folder if self.record.folder else None

    @property
    def seconds(self) -> float:
        """How long it has run, over all its starts."""
        return self.record.seconds + (time.monotonic() - self.started if self.started else 0)

    def _read(self) -> Record | None:
        try:
            return Record(**json.loads(self.record_path.read_text("utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            raise SystemExit(
                f"error: {self.record_path} is damaged; remove it to begin that run anew"
            ) from None

    def _save(self) -> None:
        record = dataclasses.replace(self.record, seconds=self.seconds)
        write_durably(self.record_path, json.dumps(dataclasses.asdict(record), indent=1).encode())

    def check_command(self) -> None:
        """Raises SystemExit with one line if the run was begun with another command."""
        if self.record.command != self.plan.identity:
            before, now = " ".join(self.record.command), " ".join(self.plan.identity)
            raise SystemExit(
                f"error: {self.plan.name} was begun as `{before}`, not as `{now}`; give this one an"
                f" --exp-name of its own, or remove {self.record_path} to begin the run anew"
            )

    def begin(self, node: str = "") -> None:
        self.record.state, self.record.message = "running", ""
        self.record.starts += 1
        self.record.seconds = self.seconds  # of an attempt that was cut short
        self.started, self.node = time.monotonic(), node
        self._save()

    def show(self, folder: str | None) -> None:
        """Takes over what its folder is called, once that is known, and where its log says it is."""
        self.progress = short_progress(last_line(self.log_path))
        if folder and folder != self.record.folder:
            self.record.folder = folder
            self._save()

    def end(self, state: State, message: str) -> None:
        self.record.seconds, self.started = self.seconds, None
        self.record.state, self.record.message = state, message
        self._save()


def is_finished(run_folder: Path) -> bool:
    """Whether a run has come to its end, and so has no checkpoints any more."""
    return run_folder.is_dir() and not (run_folder / "checkpoints").exists()


def resumable(run_folder: Path | None) -> bool:
    return run_folder is not None and bool(manifests(run_folder))


# ---------------------------------------------------------------------------------------- what a log says


def last_line(log: Path) -> str:
    """The last that was printed; a progress bar overwrites its line with \\r."""
    lines = tail(log)
    return lines[-1] if lines else ""


def tail(log: Path) -> list[str]:
    """The last lines that were printed since the last start, without empty ones."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    text = text.rpartition(STARTED)[2].partition("\n")[2] if STARTED in text else text
    return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def short_progress(line: str) -> str:
    """A progress line of tqdm without its bar: phase, percentage, speed, time left; another line as it is."""
    match = PROGRESS.match(line)
    if not match:
        return line
    parts = [f"{match['phase']} {match['percent']}", match["speed"].strip(), f"{match['left']} left"]
    return ", ".join(parts + ([match["more"]] if match["more"] else []))


def last_words(log: Path) -> str:
    """Why a run failed, as it said itself: its last error, or last line."""
    lines = tail(log)
    if lines and lines[-1].startswith("╰"):  # tyro draws a box around an error: its first line
        top = max((index for index, line in enumerate(lines) if line.startswith("╭")), default=0)
        return lines[top + 1].strip("│ ")
    errors = [line for line in lines[-20:] if line.startswith("error:")]
    return (errors or lines or [""])[-1]


def outcome(status: int, run_folder: Path | None, is_stopping: bool, log: Path) -> tuple[State, str]:
    """What became of a run whose process has ended, and the words for it.

    Args:
        status: the exit status; negative: the signal that killed it.
        run_folder: which it wrote to, if it made one.
        is_stopping: whether it had been asked to end.
        log: what it printed.
    """
    if status == 0 and run_folder and is_finished(run_folder):
        return "done", ""
    if status == 0:
        return "failed", "ended with status 0 and left no finished folder in runs/: is it a training script?"
    if is_stopping and (status < 0 or status in (128 + signal.SIGINT, 128 + signal.SIGTERM)):
        return "stopped", ""
    if status < 0:
        return "failed", f"killed by {signal.Signals(-status).name}: out of memory?"
    return "failed", last_words(log) or f"exit status {status}"


# ----------------------------------------------------------------------------------------------- processes


def run_environment(cores: int | None) -> dict[str, str]:
    """Variables for a run that shall use so many cores (None: all); what the user has set stays."""
    defaults = {"PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": str(PROGRESS_INTERVAL_S)}
    if cores is not None:
        defaults |= dict.fromkeys(THREAD_VARIABLES, str(cores))
    return {name: os.environ.get(name, value) for name, value in defaults.items()}


def dies_with_parent(signal_number: int) -> Callable[[], None] | None:
    """For a new process: gets that signal when the process that started it dies (Linux only)."""
    if sys.platform != "linux":
        return None
    prctl, set_death_signal = ctypes.CDLL(None).prctl, 1
    return lambda: prctl(set_death_signal, int(signal_number))


class RunProcess:
    """A run's process, in a session of its own, so that Ctrl-C reaches it only through the benchmark.

    Args:
        plan: the run.
        where: the folder that it starts in, and that has or gets `runs`.
        log: what it prints is appended to this file.
        resume: the folder in `runs` to go on with; None: a new one.
        variables: environment variables beside those of this process.
        death_signal: what it gets if this process dies.

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
        return [path.name for path in self.runs.glob(f"{self.plan.name}__*")]

    @property
    def folder(self) -> str | None:
        """The name of the folder in `runs` that it writes to, once it is there."""
        return self._resume or max(set(self._folders()) - self._before, default=None)

    @property
    def run_folder(self) -> Path | None:
        return self.runs / self.folder if self.folder else None

    def poll(self, timeout_s: float = 0.0) -> int | None:
        """The exit status, if it ends within that time; kills it if it has been asked to end for too long."""
        if time.monotonic() > self._kill_time:
            self.kill()
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def outcome(self, status: int) -> tuple[State, str]:
        return outcome(status, self.run_folder, self.is_stopping, self.log)

    def stop(self, grace_s: float) -> None:
        """Asks it to make a checkpoint and end, once; from `grace_s` on, `poll` kills it."""
        if not self.is_stopping:
            self.is_stopping = True
            self._kill_time = time.monotonic() + grace_s
            self.process.terminate()

    def kill(self) -> None:
        """Ends it and all that it started, whatever they are doing."""
        if self.process.poll() is None:
            if os.name == "posix":
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
        self.process.wait()


class LocalRunner:
    """Runs jobs in processes of this machine, at most `workers` at a time."""

    def __init__(self, jobs: list[Job], workers: int, variables: dict[str, str], grace_s: float):
        self.waiting, self.workers = deque(jobs), workers
        self.variables, self.grace_s = variables, grace_s
        self.running: dict[Job, RunProcess] = {}
        self.is_stopping = False

    @property
    def is_busy(self) -> bool:
        return bool(self.running or (self.waiting and not self.is_stopping))

    def step(self) -> None:
        """Starts what can be started, waits a little, and takes note of what has ended."""
        while self.waiting and len(self.running) < self.workers and not self.is_stopping:
            self._start(self.waiting.popleft())
        time.sleep(POLL_S)
        for job, process in list(self.running.items()):
            status = process.poll()  # before its folder is looked for, which it may have just made
            job.show(process.folder)
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
        """Asks all runs to make a checkpoint and end; those that wait are not begun any more."""
        self.is_stopping = True
        for process in self.running.values():
            process.stop(self.grace_s)

    def close(self) -> None:
        """Ends what is still running."""
        for process in self.running.values():
            process.kill()
