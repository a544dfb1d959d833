"""Runs training scripts on many games and seeds, on this machine or on a Ray cluster.

    python -m cleanrl.utils.benchmark --env-ids PongNoFrameskip-v4 BreakoutNoFrameskip-v4 --num-seeds 3 \\
        --command "python cleanrl/qdagger_dqn_atari_impalacnn.py" --workers 2

Started again, it does only what is missing. See docs/many-runs.md.
"""

import contextlib
import math
import os
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import tyro

from cleanrl.utils.benchmark.runs import Job, LocalRunner, Plan, option_value, run_environment, script_index
from cleanrl.utils.command_line import MOST, refuse
from cleanrl.utils.games.atari import count_actions
from cleanrl.utils.games.parallel_envs import available_cores
from cleanrl.utils.signals import StopSignals, exit_on_ctrl_c

RECORDS = Path("runs") / "benchmark"
OURS = ("env_id", "seed", "resume")  # options of a run that the benchmark sets
REDRAW_S = 0.5
SHOWN_FIRST = ("running", "failed", "stopped", "waiting", "done")
CLEAR_BELOW = "\x1b[J"


@dataclass
class Args:
    env_ids: tuple[str, ...]
    """the games, as {Game}NoFrameskip-v4"""
    command: tuple[str, ...]
    """the training script with its options, in quotes; several: each with an --exp-name of its own"""
    num_seeds: int = 3
    """how many seeds each game is run with"""
    start_seed: int = 1
    """the first of them"""
    workers: int | None = None
    """runs at a time on this machine (default: 1)"""
    ray_address: str | None = None
    """run on a Ray cluster: auto or HOST:PORT of one that this machine belongs to; local: start one here"""
    cpus_per_run: int = 1
    """on Ray: CPUs that a run asks for, and threads it computes with"""
    gpus_per_run: float = 0.0
    """on Ray: the share of a GPU, or the GPUs, that a run asks for"""
    retries: int = 3
    """on Ray: how often a run goes on elsewhere when its worker or machine dies"""
    grace_period: float = 120.0
    """seconds that a run may take for its last checkpoint when it is stopped, before it is killed"""
    report_interval: float = 60.0
    """seconds between two reports where there is no terminal"""


# ---------------------------------------------------------------------------------------------- planning


def check(args: Args) -> None:
    """Raises SystemExit with one line that names the option, its value and what it must be."""
    if not args.env_ids:
        raise SystemExit("error: --env-ids names no game; name at least one, as PongNoFrameskip-v4")
    if not args.command:
        raise SystemExit('error: --command names none; as --command "python cleanrl/dqn_atari.py"')
    for env_id, count in Counter(args.env_ids).items():
        count_actions(env_id)
        if count > 1:
            refuse("env_ids", env_id, f"stands there {count} times; once is enough")
    for name, least in {"num_seeds": 1, "start_seed": 0, "cpus_per_run": 1, "retries": 0}.items():
        if getattr(args, name) < least:
            refuse(name, getattr(args, name), f"must be at least {least}")
    if args.start_seed + args.num_seeds - 1 > MOST["seed"]:
        refuse("start_seed", args.start_seed, f"leads beyond the largest seed, {MOST['seed']}")
    for name in ("gpus_per_run", "grace_period"):
        if not 0 <= getattr(args, name) < math.inf:
            refuse(name, getattr(args, name), "must be a number of at least 0")
    if not 0 < args.report_interval < math.inf:
        refuse("report_interval", args.report_interval, "must be a positive number")
    if args.gpus_per_run > 1 and args.gpus_per_run % 1:
        refuse("gpus_per_run", args.gpus_per_run, "must be a share of one GPU, or whole GPUs")
    if args.workers is not None:
        if args.ray_address:
            refuse("workers", args.workers, "is for this machine alone; on Ray, --cpus-per-run decides")
        if args.workers < 1:
            refuse("workers", args.workers, "must be at least 1")
    elif args.gpus_per_run and not args.ray_address:
        refuse("gpus_per_run", args.gpus_per_run, "needs --ray-address; without Ray all GPUs are seen by all")


def split_command(command: str) -> tuple[tuple[str, ...], str]:
    """A command in words, and the name of its experiment: its --exp-name, else the script's name.

    Raises:
        SystemExit: with one line, if it cannot be run, or sets what the benchmark sets.
    """
    try:
        words = tuple(shlex.split(command))
    except ValueError as error:
        raise SystemExit(f"error: --command {command}: {error}") from None
    if not words:
        raise SystemExit('error: --command is empty; as --command "python cleanrl/dqn_atari.py"')
    for name in OURS:
        if option_value(words, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise SystemExit(f"error: --command {command}: the benchmark sets {option}; leave it out")
    if words[0] not in ("python", "python3") and not shutil.which(words[0]):
        raise SystemExit(f"error: --command {command}: there is no program {words[0]}")
    script, exp_name = script_index(words), option_value(words, "exp_name")
    if script is not None and words[script].endswith(".py") and not Path(words[script]).is_file():
        raise SystemExit(f"error: --command {command}: there is no {words[script]} in {Path.cwd()}")
    if exp_name is None and script is not None:
        exp_name = Path(words[script]).stem if words[script].endswith(".py") else words[script].split(".")[-1]
    if not exp_name or "/" in exp_name:
        raise SystemExit(f"error: --command {command}: name the experiment, with --exp-name NAME")
    return words, exp_name


def plan_runs(args: Args) -> list[Plan]:
    """Every command, game and seed, the seeds last: so each game has a result early."""
    commands = [split_command(command) for command in args.command]
    for exp_name, count in Counter(exp_name for _, exp_name in commands).items():
        if count > 1:
            raise SystemExit(
                f"error: --command has the experiment {exp_name} {count} times; give each an --exp-name"
            )
    return [
        Plan(env_id, exp_name, seed, words)
        for seed in range(args.start_seed, args.start_seed + args.num_seeds)
        for env_id in args.env_ids
        for words, exp_name in commands
    ]


# ----------------------------------------------------------------------------------------------- showing


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def state_of(job: Job) -> str:
    """What its row says: its state and, if it has needed several, its starts."""
    starts = job.record.starts
    return job.record.state + (f" (start {starts})" if job.record.state == "running" and starts > 1 else "")


def rows(jobs: list[Job], details: list[str]) -> list[str]:
    """A line for each: game, experiment, seed, state, time and what stands in `details`."""
    cells = [
        (job.plan.env_id, job.plan.exp_name, str(job.plan.seed), state_of(job), clock(job.seconds), detail)
        for job, detail in zip(jobs, details, strict=True)
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


def show_progress(job: Job) -> str:
    if job.record.state == "running":
        progress = job.progress or "starts"
        return f"{job.node}: {progress}" if job.node else progress
    return job.record.message


def table(jobs: list[Job]) -> list[str]:
    """What became of every run, and where it lies."""
    details = []
    for job in jobs:
        message = job.record.message
        where = f"see {job.log_path}" if job.record.state == "failed" else str(job.run_folder or "")
        details.append(f"{message} ({where})" if message else where)
    return [*rows(jobs, details), summary(jobs)]


class View:
    """Shows how all runs are getting on: on a terminal in one place, elsewhere in lines now and then.

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
        lines = rows(shown, [show_progress(job) for job in shown])
        for line in lines + ([summary(self.jobs)] if is_due else []):
            print(line, file=self.stream, flush=True)

    def _draw(self) -> None:
        columns, height = shutil.get_terminal_size()
        first = sorted(self.jobs, key=lambda job: SHOWN_FIRST.index(job.record.state))
        shown = first[: max(1, height - 3)]
        shown = [job for job in self.jobs if job in shown]
        lines = rows(shown, [show_progress(job) for job in shown])
        if len(shown) < len(self.jobs):
            lines.append(f"… and {len(self.jobs) - len(shown)} more")
        lines.append(summary(self.jobs))
        self.clear()
        self.stream.write("".join(line[: columns - 1] + "\n" for line in lines))
        self.stream.flush()
        self._lines_drawn = len(lines)

    def clear(self) -> None:
        """Takes away what was drawn."""
        if self._lines_drawn:
            self.stream.write(f"\x1b[{self._lines_drawn}F{CLEAR_BELOW}")
            self._lines_drawn = 0


# -------------------------------------------------------------------------------------------------- main


@contextlib.contextmanager
def make_runner(args: Args, jobs: list[Job]) -> Iterator:
    """What runs the jobs, on this machine or on Ray; ends what is still running.

    Raises:
        SystemExit: with one line, if Ray is not installed, or the cluster cannot be used.
    """
    if not args.ray_address:
        workers = args.workers or 1
        cores = max(1, available_cores() // workers) if workers > 1 else None
        runner = LocalRunner(jobs, workers, run_environment(cores), args.grace_period)
        try:
            yield runner
        finally:
            runner.close()
        return

    if args.ray_address == "local":
        # Before Ray is imported. Where Ray cannot have a second machine it listens on 127.0.0.1 alone.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        from cleanrl.utils.benchmark import ray_cluster
    except ImportError:
        raise SystemExit(
            f"error: --ray-address {args.ray_address} needs Ray: pip install -r"
            " requirements/requirements-cloud.txt, or leave it out"
        ) from None
    try:
        ray_cluster.connect(args.ray_address, args.cpus_per_run, args.gpus_per_run)
    except ray_cluster.ClusterError as error:
        raise SystemExit(f"error: {error}") from None
    runner = ray_cluster.RayRunner(
        jobs,
        args.cpus_per_run,
        args.gpus_per_run,
        args.retries,
        run_environment(args.cpus_per_run),
        args.grace_period,
    )
    try:
        # What Ray has to say of machines that died would tear the view.
        with (RECORDS / "ray.log").open("a") as log, contextlib.redirect_stderr(log):
            yield runner
    finally:
        runner.close()


def main(args: Args) -> int:
    """Runs what is missing and prints what became of all; gives the exit status."""
    check(args)
    with contextlib.ExitStack() as locks:
        jobs = [locks.enter_context(Job(plan, RECORDS)) for plan in plan_runs(args)]
        for job in jobs:
            job.check_command()
        return work_off(args, jobs)


def work_off(args: Args, jobs: list[Job]) -> int:
    """Runs the jobs that are not done and prints what became of all; gives the exit status."""
    missing = [job for job in jobs if job.record.state != "done"]
    print(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them done already; logs in {RECORDS}", flush=True)
    status = 0
    if missing:
        view = View(sys.stderr, jobs, args.report_interval)
        with make_runner(args, missing) as runner, StopSignals() as signals:
            while runner.is_busy:
                if signals.received and not runner.is_stopping:
                    runner.stop()
                runner.step()
                view.update()
            view.clear()
            status = 128 + signals.received if signals.received else 0
    print("\n".join(table(jobs)))
    if all(job.record.state == "done" for job in jobs):
        return 0
    print("start the same again for what is missing")
    return status or 1


if __name__ == "__main__":
    exit_on_ctrl_c()
    sys.exit(main(tyro.cli(Args, description=__doc__)))
