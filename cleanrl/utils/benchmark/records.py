"""What a benchmark knows of its runs, kept in a file for each between two starts.

A run's record, `runs/benchmark/{env_id}__{exp_name}__{seed}.json`, names the command it was started with and
the folder it writes to; beside it is the log of its output. The folder itself shows whether the run has
finished: until then a training script keeps its `checkpoints` there.
"""

import dataclasses
import json
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_type_hints

import filelock

from cleanrl.utils.benchmark.logs import last_line, short_progress
from cleanrl.utils.benchmark.plan import Plan
from cleanrl.utils.bounds import Bounds, has_kind, printable
from cleanrl.utils.run.folders import is_finished, manifests
from cleanrl.utils.storage import MOST_JSON_BYTES, write_durably

State = Literal["waiting", "running", "done", "failed", "stopped"]


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
    """A run while the benchmark works on it: its plan, its record and its progress.

    It is locked against other processes until its context ends.
    """

    plan: Plan
    folder: Path  # of the records
    record: Record = field(init=False)
    progress: str = ""
    node: str = ""
    started: float | None = None  # time.monotonic() at its start, if it is running

    def __post_init__(self) -> None:
        """Raises SystemExit with a one-line error if it cannot be locked or its record is damaged."""
        self._lock = filelock.FileLock(self.folder / f"{self.plan.name}.lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise SystemExit(
                f"error: another benchmark is running {self.plan.name}; wait until it has finished"
            ) from None
        except OSError as error:
            raise SystemExit(
                f"error: {self.folder} cannot be written to ({error.strerror}); start in another folder"
            ) from None
        for path in (self.record_path, self.log_path):
            if path.exists() and not path.is_file():  # a pipe would be waited for
                raise SystemExit(f"error: {path} is not a file; remove it")
        self.record = self._read() or Record(self.plan.identity)
        # It may have finished by itself after the benchmark was killed, or have been resumed by hand.
        is_done = self.run_folder is not None and is_finished(self.run_folder)
        self.record.state = "done" if is_done else "waiting"

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
            if self.record_path.stat().st_size > MOST_JSON_BYTES:
                raise ValueError("it is too large")
            record = Record(**json.loads(self.record_path.read_text("utf-8")))
            for name, kind in get_type_hints(Record).items():
                if not has_kind(getattr(record, name), kind):
                    raise ValueError(name)
            if not all(map(Bounds(0).admit, (record.starts, record.seconds))):
                raise ValueError("they are infinite, or other than any run's")
            if record.folder and not re.fullmatch(r"__\d{1,20}", record.folder.removeprefix(self.plan.name)):
                raise ValueError("it is the folder of another run")
            return record
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, RecursionError):
            raise SystemExit(
                f"error: {self.record_path} is damaged; delete it to start that run again"
            ) from None

    def _save(self) -> None:
        """If the record cannot be written it stays as it was, and the runs continue."""
        record = dataclasses.replace(self.record, seconds=self.seconds)
        try:
            write_durably(self.record_path, json.dumps(dataclasses.asdict(record), indent=1).encode())
        except OSError as error:
            print(f"warning: {self.record_path} cannot be written ({error.strerror})", file=sys.stderr)

    def check_command(self) -> None:
        """Raises SystemExit with a one-line error if the run was started with another command."""
        if self.record.folder is None:  # it led to no run, as with a mistyped option
            self.record = Record(self.plan.identity)
        elif self.record.command != self.plan.identity:
            before, now = printable(" ".join(self.record.command)), " ".join(self.plan.identity)
            raise SystemExit(
                f"error: {self.plan.name} was started as `{before}`, not as `{now}`; give this one its own"
                f" --exp-name, or delete {self.record_path} to start over"
            )

    def begin(self, node: str = "") -> None:
        self.record.state, self.record.message = "running", ""
        self.record.starts += 1
        self.record.seconds = self.seconds  # of an interrupted attempt as well
        self.started, self.node = time.monotonic(), node
        self._save()

    def show(self, folder: str | None) -> None:
        """Updates its folder's name, once known, and its progress, from its log."""
        self.progress = short_progress(last_line(self.log_path))
        if folder and folder != self.record.folder:
            self.record.folder = folder
            self._save()

    def end(self, state: State, message: str) -> None:
        self.record.seconds, self.started = self.seconds, None
        self.record.state, self.record.message = state, message
        self._save()


def resumable(run_folder: Path | None) -> bool:
    return run_folder is not None and bool(manifests(run_folder))
