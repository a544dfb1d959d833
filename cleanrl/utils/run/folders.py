"""Folders of runs: their names and locks, which are unfinished, and the files in them."""

import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import filelock


def new_folder(args: Any) -> Path:
    """runs/{env_id}__{exp_name}__{seed}__{unix time}, of a second in which no such run was started."""
    start_time = int(time.time())
    while (path := Path("runs") / f"{args.env_id}__{args.exp_name}__{args.seed}__{start_time}").exists():
        start_time += 1
    return path


def lock_run(run_folder: Path) -> filelock.FileLock:
    """Locks a run against other processes; its folder is made if it does not exist.

    Raises:
        SystemExit: with a one-line error, if another process has it, or it cannot be written to.
    """
    try:
        (run_folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(run_folder / "checkpoints" / "lock")
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise SystemExit(
            f"error: another process is running {run_folder}; wait until it has ended or, if it was killed on"
            f" another machine, delete {lock.lock_file}"
        ) from None
    except OSError as error:
        raise SystemExit(
            f"error: {run_folder} cannot be written to ({error.strerror}); start in another folder"
        ) from None
    return lock


def release_finished(run_folder: Path, lock: filelock.FileLock) -> None:
    """Ends the lock of a run without checkpoints any more, and with it their folder: the run has finished."""
    lock.release()  # first: on NFS a file that is removed while it is open stays, and so does its folder
    with suppress(OSError):  # if there are files that are not ours, they and the folder stay
        Path(lock.lock_file).unlink(missing_ok=True)
        (run_folder / "checkpoints").rmdir()


def is_folder(path: Path) -> bool:
    """Whether there is such a folder; a name that no file can have is none."""
    try:
        return path.is_dir()
    except OSError:
        return False


def is_finished(run_folder: Path) -> bool:
    """Whether a run has finished: it then has neither checkpoints nor a lock, only what others put there."""
    checkpoints = run_folder / "checkpoints"
    left = [path.name for path in checkpoints.glob("*")]  # nothing: the run was killed as it began
    ours_are_gone = bool(left) and "lock" not in left and not checkpoint_files(run_folder)
    return run_folder.is_dir() and (ours_are_gone or not checkpoints.exists())


def checkpoint_files(run_folder: Path) -> dict[Path, int]:
    """The files of checkpoints, complete or not, and their numbers; other files there are not ours."""
    found = {}
    for path in (run_folder / "checkpoints").glob("*-*") if is_folder(run_folder) else ():
        name = re.fullmatch(r"(checkpoint-(\d+)\.json|(state|rows)-(\d+)\.zst)(\.partial)?", path.name)
        if name and path.is_file() and not path.is_symlink():
            found[path] = int(name[2] or name[4])
    return found


def manifests(run_folder: Path) -> list[Path]:
    """Those of a run's checkpoints, the newest first."""
    files = checkpoint_files(run_folder)
    return sorted((path for path in files if path.suffix == ".json"), key=files.get, reverse=True)


def runs_named(name: str, where: Path = Path("runs")) -> list[Path]:
    """The runs {name}__{unix time}, in the order in which they were started; `name` is no pattern."""
    found = []
    for path in where.iterdir() if where.is_dir() else ():
        start, _, start_time = path.name.rpartition("__")
        if start == name and start_time.isdecimal():
            found.append((int(start_time), path))
    return [path for _, path in sorted(found)]


def newest_unfinished_run(env_id: str, exp_name: str, seed: int) -> Path | None:
    """Of the runs of that experiment and seed that have checkpoints, the one started last."""
    return next(filter(manifests, reversed(runs_named(f"{env_id}__{exp_name}__{seed}"))), None)


def unfinished_runs() -> list[Path]:
    """All that have checkpoints."""
    return sorted(path.parent for path in Path("runs").glob("*/checkpoints") if manifests(path.parent))


def event_files(run_folder: Path) -> list[Path]:
    found = run_folder.glob("events.out.tfevents.*")
    return sorted(path for path in found if path.is_file() and not path.is_symlink())


def saved_model(run_folder: Path) -> Path | None:
    """The model from a run's end, not those of its evaluations; None if there is none."""
    models = {path.stem: path for path in run_folder.glob("*.cleanrl_model")}
    of_evaluations = {f"{name}{suffix}" for name in models for suffix in ("-offline", "-best")}
    found = models.keys() - of_evaluations
    return models[found.pop()] if len(found) == 1 else None
