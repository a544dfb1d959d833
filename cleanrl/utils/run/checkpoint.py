"""A run's checkpoints, in the folder `checkpoints` of the run's: all of its state, twice, at the least cost.

A checkpoint is a manifest, `checkpoint-N.json`, and the files that it names with their checksums: one with
the state (`state-N.zst`), and those with the replay buffer's rows (`rows-M.zst`). Files are never rewritten;
a checkpoint adds the rows that are new, and what neither of the last two needs is removed. The manifest comes
last, so that a checkpoint is there as a whole or not at all.
"""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from cleanrl.utils.games.parallel_envs import WorkerError
from cleanrl.utils.replay.rows import Replay, fitting_rows, held_positions, rows_between
from cleanrl.utils.signals import Stopped, StopSignals
from cleanrl.utils.storage import (
    DamagedError,
    FileEntry,
    check_file,
    read_manifest,
    read_tree,
    write_manifest,
    write_tree,
)

VERSION = 1
NUM_KEPT = 2
MAY_CHANGE = {  # from a run to its continuation, without making it another one
    "resume",
    "checkpoint_interval",
    "total_timesteps",
    "save_model",
    "upload_model",
    "hf_entity",
    "save_replay",
    "capture_video",
    "track",
    "wandb_project_name",
    "wandb_entity",
    "cuda",
    "buffer_device",
}


@dataclass
class RowsFile:
    """Rows of a replay buffer; `last` are the newest positions in it, of every ring (-1: none)."""

    name: str
    sha256: str
    last: list[int]


@dataclass
class SavedBuffer:
    """The replay buffer of a checkpoint: of every ring the positions `oldest` to `heads`."""

    name: str
    oldest: list[int]
    heads: list[int]
    files: list[RowsFile]


class Checkpoint:
    """One that is whole: every file of it is there as it was written."""

    def __init__(self, manifest_path: Path):
        """Raises DamagedError if it is not whole."""
        self.folder, self.name = manifest_path.parent, manifest_path.name
        content = read_manifest(manifest_path)
        if content.get("version") != VERSION:
            raise DamagedError(f"{manifest_path.name} has version {content.get('version')}, not {VERSION}")
        try:
            self.script: str = content["script"]
            self.options: dict[str, Any] = content["options"]
            self.event_files: dict[str, int] = content["event_files"]
            self.state = FileEntry(*content["state"])
            self.buffer: SavedBuffer | None = None
            if content["buffer"]:
                files = [RowsFile(**file) for file in content["buffer"].pop("files")]
                self.buffer = SavedBuffer(**content["buffer"], files=files)
        except (KeyError, TypeError):
            raise DamagedError(f"{manifest_path.name} is not that of a checkpoint") from None

    def files(self) -> list[FileEntry]:
        rows = self.buffer.files if self.buffer else []
        return [self.state, *(FileEntry(file.name, file.sha256) for file in rows)]

    def check(self) -> None:
        """Raises DamagedError if a file of it is missing or altered."""
        for entry in self.files():
            check_file(self.folder, entry)

    def read_state(self) -> Any:
        return read_tree(self.folder, self.state)

    def rows(self, num_slots: int) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """The replay buffer's rows with their slots in a buffer of `num_slots` per ring, oldest first."""
        parts = (read_tree(self.folder, FileEntry(file.name, file.sha256)) for file in self.buffer.files)
        return fitting_rows(parts, np.array(self.buffer.oldest), np.array(self.buffer.heads), num_slots)


def manifests(run_folder: Path) -> list[Path]:
    """Those of a run's checkpoints, the newest first."""
    return sorted((run_folder / "checkpoints").glob("checkpoint-*.json"), reverse=True)


def newest_checkpoint(run_folder: Path) -> Checkpoint:
    """The newest checkpoint that is whole; says so if it is not the newest of all.

    Raises:
        SystemExit: with one line, if there is none.
    """
    if not run_folder.is_dir():
        raise SystemExit(f"error: --resume {run_folder} is not a folder; name a run's, runs/…")
    candidates = manifests(run_folder)
    if not candidates:
        raise SystemExit(f"error: --resume {run_folder} has no checkpoint: it is finished, or had not begun")
    for path in candidates:
        try:
            checkpoint = Checkpoint(path)
            checkpoint.check()
            return checkpoint
        except DamagedError as fault:
            print(f"warning: {path.stem} of {run_folder} cannot be used: {fault}", file=sys.stderr)
    raise SystemExit(
        f"error: no checkpoint of {run_folder} is whole; restore its files, or start again without --resume"
    )


def saved_options(run_folder: Path) -> dict[str, Any]:
    """The options that a run was started with.

    Raises:
        SystemExit: with one line, if it has no checkpoint that is whole.
    """
    for path in manifests(run_folder):
        with suppress(DamagedError):
            return Checkpoint(path).options
    return newest_checkpoint(run_folder).options


def newest_unfinished_run(env_id: str, exp_name: str, seed: int) -> Path | None:
    """The run of that experiment and seed, started last, that has checkpoints."""
    runs = [path.parent for path in Path("runs").glob(f"{env_id}__{exp_name}__{seed}__*/checkpoints")]
    return max(
        (run for run in runs if manifests(run)), key=lambda run: run.name.rpartition("__")[2], default=None
    )


def new_folder(args: Any) -> Path:
    """runs/{env_id}__{exp_name}__{seed}__{unix time}, of a second in which no other run of it was started."""
    start_time = int(time.time())
    while (path := Path("runs") / f"{args.env_id}__{args.exp_name}__{args.seed}__{start_time}").exists():
        start_time += 1
    return path


def options_of(args: Any) -> dict[str, Any]:
    """A command line as JSON can hold it."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


class Run:
    """A run's folder, new or gone on with, held against other processes, and its checkpoints.

    As a context it notes SIGINT and SIGTERM for `raise_if_stopped`, and ends a run that is stopped, whose
    environments fail, or whose disk is full, with one line and an exit status.

    Args:
        args: the script's; `resume` names the folder of the run to go on with, if any.
        script: the script's name.

    Raises:
        SystemExit: with one line, if the run cannot be gone on with as these arguments want it, or its folder
            cannot be written to.
    """

    def __init__(self, args: Any, script: str):
        self.script, self.options = script, options_of(args)
        self.interval_s = args.checkpoint_interval
        self.folder = Path(args.resume) if args.resume else new_folder(args)
        self.resumed: Checkpoint | None = None
        self.next_time = 0.0  # the first checkpoint is due at once
        self._stop: int | None = None  # the signal that ends the run
        self.number = self.rows_number = 0
        self.buffer: SavedBuffer | None = None
        if args.resume and not manifests(self.folder):
            newest_checkpoint(self.folder)  # says why there is none
        self._lock = self._hold()
        if args.resume:
            self.resumed = newest_checkpoint(self.folder)
            self._check_resumed()
            self.buffer = self.resumed.buffer
            for path in manifests(self.folder):
                if path.name > self.resumed.name:  # cannot be used
                    path.unlink()
            names = [path.name.partition(".")[0] for path in self._checkpoints.glob("*-*.*")]
            self.number = self.rows_number = max(int(name.rpartition("-")[2]) for name in names) + 1
            cut_events(self.folder, self.resumed)

    def __enter__(self) -> "Run":
        self._signals = StopSignals().__enter__()
        return self

    def __exit__(self, kind: type | None, exception: BaseException | None, traceback: Any) -> None:
        self._signals.__exit__()
        self._lock.release()
        go_on = f"go on with --resume {self.folder}" if manifests(self.folder) else "there is no checkpoint"
        if isinstance(exception, Stopped):
            print(f"{exception}; {go_on}", file=sys.stderr)
            raise SystemExit(exception.status) from None
        if isinstance(exception, WorkerError | OSError):
            raise SystemExit(f"error: {exception}; {go_on}") from None

    def raise_if_stopped(self) -> None:
        """Raises Stopped if a signal had come, when `is_due` was last called, that asks the run to end."""
        if self._stop is not None:
            raise Stopped(self._stop)

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def _hold(self) -> filelock.FileLock:
        try:
            self._checkpoints.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self._checkpoints / "lock")
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise SystemExit(
                f"error: another process is at work on {self.folder}; wait for its end"
            ) from None
        except OSError as error:
            raise SystemExit(
                f"error: {self.folder} cannot be written to ({error.strerror}); start in another folder"
            ) from None
        return lock

    def _check_resumed(self) -> None:
        if self.resumed.script != self.script:
            raise SystemExit(
                f"error: --resume {self.folder} is a run of {self.resumed.script}.py, not of {self.script}.py"
            )
        for name, value in self.options.items():
            before = self.resumed.options.get(name)
            if name not in MAY_CHANGE and value != before:
                raise SystemExit(
                    f"error: --{name.replace('_', '-')} is {value}, but {self.folder} began with {before};"
                    " leave the option out, or start again without --resume"
                )

    def is_due(self) -> bool:
        """Whether it is time for a checkpoint: the interval is over, or the run is asked to end."""
        self._stop = self._signals.received
        is_time = self.interval_s > 0 and time.monotonic() >= self.next_time
        return is_time or self._stop is not None

    def save(self, state: Any, buffer_name: str, replay: Replay | None) -> None:
        """Writes a checkpoint; if it cannot be written, says so, and the ones before it stay.

        Args:
            state: what `storage.pack` takes.
            buffer_name: of the replay buffer; under another name all of it is new.
            replay: the replay buffer, if there is one.
        """
        self.number += 1
        try:
            buffer = self._save_rows(buffer_name, replay) if replay is not None else None
            content = {
                "version": VERSION,
                "script": self.script,
                "options": self.options,
                "event_files": {path.name: path.stat().st_size for path in event_files(self.folder)},
                "state": write_tree(self._checkpoints / f"state-{self.number:06d}.zst", state),
                "buffer": buffer and asdict(buffer),
            }
            write_manifest(self._checkpoints / f"checkpoint-{self.number:06d}.json", content)
            self.buffer = buffer
        except OSError as error:
            print(
                f"\nwarning: no checkpoint could be written ({error.strerror}); the run goes on, and the"
                " checkpoint before stays",
                file=sys.stderr,
            )
        with suppress(OSError):
            self._remove_what_is_not_needed()
        self.next_time = time.monotonic() + self.interval_s

    def finish(self) -> None:
        """Removes the checkpoints of a run that has come to its end."""
        finished = self.folder / "finished"  # moved at once: what is half removed is no checkpoint
        self._checkpoints.rename(finished)
        shutil.rmtree(finished)

    def _save_rows(self, name: str, replay: Replay) -> SavedBuffer:
        oldest, heads = held_positions(replay)
        first, files = oldest, []
        if self.buffer and self.buffer.name == name:
            # What follows an observation is known only when it is not the newest any more: that row again.
            first = np.maximum(oldest, self.buffer.heads)
            files = [file for file in self.buffer.files if (np.array(file.last) >= oldest).any()]
            if (heads == self.buffer.heads).all():
                return SavedBuffer(name, oldest.tolist(), heads.tolist(), files)
        for rows in rows_between(replay, first, heads):
            last = np.full(len(heads), -1)
            np.maximum.at(last, rows["envs"], rows["positions"])
            entry = write_tree(self._checkpoints / f"rows-{self.rows_number:06d}.zst", rows)
            self.rows_number += 1
            files.append(RowsFile(*entry, last.tolist()))
        return SavedBuffer(name, oldest.tolist(), heads.tolist(), files)

    def _remove_what_is_not_needed(self) -> None:
        needed, kept = {"lock"}, 0
        for path in manifests(self.folder):
            try:
                checkpoint = Checkpoint(path)
            except DamagedError:
                continue
            if kept == NUM_KEPT:
                break
            needed |= {path.name, *(entry.name for entry in checkpoint.files())}
            kept += 1
        for path in self._checkpoints.iterdir():
            if path.name not in needed:
                path.unlink()


def event_files(run_folder: Path) -> list[Path]:
    return sorted(run_folder.glob("events.out.tfevents.*"))


def cut_events(run_folder: Path, checkpoint: Checkpoint) -> None:
    """Takes what came after the checkpoint out of the event files: the run will write it again."""
    for path in event_files(run_folder):
        if path.name not in checkpoint.event_files:
            path.unlink()
    for name, size in checkpoint.event_files.items():
        path = run_folder / name
        if not path.exists() or path.stat().st_size < size:
            print(f"warning: {path} lacks some of the run's curves", file=sys.stderr)
        else:
            os.truncate(path, size)
