"""Shows the runs of a benchmark: while they run, and what became of them."""

import shutil
import time
from collections import Counter
from typing import TextIO

from cleanrl.utils.benchmark.records import Job
from cleanrl.utils.bounds import printable

REDRAW_S = 0.5
SHOWN_FIRST = ("running", "failed", "stopped", "waiting", "done")
CLEAR_BELOW = "\x1b[J"


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def state_of(job: Job) -> str:
    """Its state and, from the second start on, the number of starts."""
    starts = job.record.starts
    return job.record.state + (f" (start {starts})" if job.record.state == "running" and starts > 1 else "")


def rows(jobs: list[Job], details: list[str]) -> list[str]:
    """A line for each: game, experiment, seed, state, time and its entry of `details`."""
    cells = [
        (job.plan.env_id, job.plan.exp_name, str(job.plan.seed), state_of(job), clock(job.seconds), detail)
        for job, detail in zip(jobs, map(printable, details), strict=True)  # a run may have printed anything
    ]
    widths = [max((len(row[column]) for row in cells), default=0) for column in range(5)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]]).rstrip()
        for row in cells
    ]


def summary(jobs: list[Job]) -> str:
    counts = Counter(job.record.state for job in jobs)
    return f"{len(jobs)} runs: " + ", ".join(
        f"{counts[state]} {state}"
        for state in ("done", "failed", "stopped", "running", "waiting")
        if counts[state]
    )


def progress_of(job: Job) -> str:
    if job.record.state == "running":
        progress = job.progress or "starting"
        return f"{job.node}: {progress}" if job.node else progress
    return job.record.message


def table(jobs: list[Job]) -> list[str]:
    """What became of every run, and where it is."""
    details = []
    for job in jobs:
        message = job.record.message
        where = f"see {job.log_path}" if job.record.state == "failed" else str(job.run_folder or "")
        details.append(f"{message} ({where})" if message else where)
    return [*rows(jobs, details), summary(jobs)]


class View:
    """Shows the progress of all runs: on a terminal in place, elsewhere in a line now and then.

    Args:
        stream: where to.
        jobs: the runs.
        interval_s: seconds between two reports where there is no terminal.
    """

    def __init__(self, stream: TextIO, jobs: list[Job], interval_s: float):
        self.stream, self.jobs = stream, jobs
        self.is_terminal = stream.isatty()
        self.interval_s = REDRAW_S if self.is_terminal else interval_s
        self._states = {job: state_of(job) for job in jobs}
        self._lines_drawn = 0
        self._next_time = time.monotonic() + (0 if self.is_terminal else interval_s)

    def update(self) -> None:
        changed = [job for job in self.jobs if state_of(job) != self._states[job]]
        self._states |= {job: state_of(job) for job in changed}
        is_due = time.monotonic() >= self._next_time
        if is_due:
            self._next_time = time.monotonic() + self.interval_s
        if self.is_terminal:
            if is_due or changed:
                self._draw()
            return
        shown = [job for job in self.jobs if job in changed or (is_due and job.record.state == "running")]
        lines = rows(shown, [progress_of(job) for job in shown])
        for line in lines + ([summary(self.jobs)] if is_due else []):
            print(line, file=self.stream, flush=True)

    def _draw(self) -> None:
        columns, height = shutil.get_terminal_size()
        first = sorted(self.jobs, key=lambda job: SHOWN_FIRST.index(job.record.state))
        shown = first[: max(1, height - 3)]
        shown = [job for job in self.jobs if job in shown]
        lines = rows(shown, [progress_of(job) for job in shown])
        if len(shown) < len(self.jobs):
            lines.append(f"… and {len(self.jobs) - len(shown)} more")
        lines.append(summary(self.jobs))
        self.clear()
        self.stream.write("".join(line[: columns - 1] + "\n" for line in lines))
        self.stream.flush()
        self._lines_drawn = len(lines)

    def clear(self) -> None:
        """Erases what was drawn."""
        if self._lines_drawn:
            self.stream.write(f"\x1b[{self._lines_drawn}F{CLEAR_BELOW}")
            self._lines_drawn = 0
