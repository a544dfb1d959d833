"""Runs training scripts on many games and seeds, on this machine or on a Ray cluster.

    python -m cleanrl.utils.benchmark --env-ids PongNoFrameskip-v4 BreakoutNoFrameskip-v4 --num-seeds 3 \\
        --command "python cleanrl/qdagger_dqn_atari_impalacnn.py" --workers 2

Started again, it does only what is missing. See docs/many-runs.md.
"""

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cleanrl.utils.benchmark.plan import plan_runs
from cleanrl.utils.benchmark.processes import LocalRunner, run_environment
from cleanrl.utils.benchmark.records import Job
from cleanrl.utils.benchmark.view import View, table
from cleanrl.utils.bounds import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Seed
from cleanrl.utils.command_line import check_bounds, parse, refuse
from cleanrl.utils.games.atari import GAME_LISTS, check_game
from cleanrl.utils.shell import prepare_command
from cleanrl.utils.signals import StopSignals

RECORDS = Path("runs") / "benchmark"
MOST_RUNS = 10_000
OTHER_FILES = 100  # open at a time, besides a lock for each run
(SEED_BOUNDS,) = Seed.__metadata__


@dataclass
class Args:
    # benchmark
    env_ids: tuple[str, ...]
    """the games, as {Game}NoFrameskip-v4, or a list of them: atari57 or atari5"""
    command: tuple[str, ...]
    """the training script with its options, in quotes; if several, each with its own --exp-name"""
    num_seeds: PositiveInt = 3
    """seeds per game"""
    start_seed: Seed = 1
    """the first seed"""
    workers: PositiveInt | None = None
    """runs at a time on this machine (default: 1)"""
    grace_period: NonNegativeFloat = 120.0
    """seconds a stopped run has for its last checkpoint before it is killed"""
    report_interval: PositiveFloat = 60.0
    """seconds between reports when there is no terminal"""

    # Ray
    ray_address: str | None = None
    """run on a Ray cluster: auto or HOST:PORT of one that this machine belongs to; local: start one here"""
    cpus_per_run: PositiveInt = 1
    """on Ray: CPUs that a run requests, and threads it computes with"""
    gpus_per_run: NonNegativeFloat = 0.0
    """on Ray: GPUs, or the fraction of one, that a run requests"""
    retries: NonNegativeInt = 3
    """on Ray: how many times a run restarts elsewhere after its worker or machine dies"""


def check(args: Args) -> None:
    """Raises SystemExit with a one-line error that names the option, its value and what it must be."""
    if not args.env_ids:
        raise SystemExit("error: --env-ids names no game; name at least one, such as PongNoFrameskip-v4")
    if not args.command:
        raise SystemExit(
            'error: --command names no script; use, say, --command "python cleanrl/dqn_atari.py"'
        )
    args.env_ids = tuple(game for name in args.env_ids for game in GAME_LISTS.get(name, [name]))
    for env_id, count in Counter(args.env_ids).items():
        check_game(env_id)
        if count > 1:
            refuse("env_ids", env_id, f"is named {count} times; once is enough")
    check_bounds(args)
    if not SEED_BOUNDS.admit(args.start_seed + args.num_seeds - 1):
        refuse("start_seed", args.start_seed, f"leads beyond the largest seed, {SEED_BOUNDS.most}")
    check_number(args, len(args.env_ids) * len(args.command) * args.num_seeds)
    if args.gpus_per_run > 1 and args.gpus_per_run % 1:
        refuse("gpus_per_run", args.gpus_per_run, "must be a fraction of one GPU, or a whole number")
    if args.workers is not None and args.ray_address:
        refuse("workers", args.workers, "applies to this machine only; on Ray, use --cpus-per-run")
    if args.gpus_per_run and not args.ray_address:
        refuse("gpus_per_run", args.gpus_per_run, "needs --ray-address; without Ray all runs share all GPUs")


def check_number(args: Args, num_runs: int) -> None:
    """Raises SystemExit with a one-line error if there are too many runs."""
    if num_runs > MOST_RUNS:
        refuse("num_seeds", args.num_seeds, f"makes {num_runs} runs; a benchmark has at most {MOST_RUNS}")
    num_files = num_runs + OTHER_FILES
    if os.name == "posix":  # elsewhere there is no such limit
        import resource

        if 0 <= resource.getrlimit(resource.RLIMIT_NOFILE)[0] < num_files:
            raise SystemExit(
                f"error: {num_runs} runs need more open files than this shell allows;"
                f" enter: ulimit -n {num_files}"
            )


@contextlib.contextmanager
def make_runner(args: Args, jobs: list[Job]) -> Iterator[Any]:
    """What runs the jobs, on this machine or on Ray; ends what is still running.

    Raises:
        SystemExit: with a one-line error if Ray is not installed or the cluster cannot be used.
    """
    if not args.ray_address:
        runner = LocalRunner(jobs, args.workers or 1, args.grace_period)
        try:
            yield runner
        finally:
            runner.close()
        return

    if args.ray_address == "local":
        # Before Ray is imported. If Ray cannot have a second machine, it listens on 127.0.0.1 only.
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
        # Ray's messages about dead machines would garble the view.
        with (RECORDS / "ray.log").open("a") as log, contextlib.redirect_stderr(log):
            yield runner
    finally:
        runner.close()


def main(args: Args) -> int:
    """Runs what is missing and prints what became of all runs; returns the exit status."""
    check(args)
    seeds = range(args.start_seed, args.start_seed + args.num_seeds)
    with contextlib.ExitStack() as locks:
        plans = plan_runs(args.command, args.env_ids, seeds)
        jobs = [locks.enter_context(Job(plan, RECORDS)) for plan in plans]
        for job in jobs:
            job.check_command()
        return run_jobs(args, jobs)


def run_jobs(args: Args, jobs: list[Job]) -> int:
    """Runs the jobs that are not done and prints what became of all; returns the exit status."""
    missing = [job for job in jobs if job.record.state != "done"]
    print(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them already done; logs in {RECORDS}", flush=True)
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
    print("to do what is missing, start the same command again")
    return status or 1


if __name__ == "__main__":
    prepare_command()
    sys.exit(main(parse(Args)))
