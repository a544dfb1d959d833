"""Folders of runs: their names, which are unfinished, and the files in them."""

import time
from pathlib import Path
from typing import Any


def new_folder(args: Any) -> Path:
    """runs/{env_id}__{exp_name}__{seed}__{unix time}, of a second in which no such run was started."""
    start_time = int(time.time())
    while (path := Path("runs") / f"{args.env_id}__{args.exp_name}__{args.seed}__{start_time}").exists():
        start_time += 1
    return path


def manifests(run_folder: Path) -> list[Path]:
    """Those of a run's checkpoints, the newest first."""
    return sorted((run_folder / "checkpoints").glob("checkpoint-*.json"), reverse=True)


def newest_unfinished_run(env_id: str, exp_name: str, seed: int) -> Path | None:
    """Of the runs of that experiment and seed that have checkpoints, the one started last."""
    runs = [path.parent for path in Path("runs").glob(f"{env_id}__{exp_name}__{seed}__*/checkpoints")]
    return max(
        (run for run in runs if manifests(run)), key=lambda run: run.name.rpartition("__")[2], default=None
    )


def event_files(run_folder: Path) -> list[Path]:
    return sorted(run_folder.glob("events.out.tfevents.*"))
