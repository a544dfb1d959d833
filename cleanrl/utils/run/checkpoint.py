"""A run's checkpoints, in its folder's `checkpoints`: the last two, each with all of the run's state.

A checkpoint is a manifest, `checkpoint-N.json`, and the files that it names with their checksums: one with
the state (`state-N.zst`), and those with the replay buffers' rows (`rows-M.zst`). Files are never rewritten;
a checkpoint adds the rows that are new, and files that neither of the last two needs are removed. The
manifest is written last, so that a checkpoint exists as a whole or not at all.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cleanrl.utils.bounds import has_kind, shown
from cleanrl.utils.replay.ring import ReplayBuffer
from cleanrl.utils.replay.rows import check_range, fitting_rows, held_positions, rows_between
from cleanrl.utils.run.folders import checkpoint_files, event_files, is_folder, manifests
from cleanrl.utils.run.state import is_number_of_a_run, replays_of, restore
from cleanrl.utils.storage import (
    DamagedError,
    FileEntry,
    check_file,
    read_manifest,
    read_tree,
    write_manifest,
    write_tree,
)

VERSION = 3
NUM_KEPT = 2


class OtherVersionError(DamagedError):
    """Another version of this software wrote it."""


@dataclass
class RowsFile:
    """Rows of a replay buffer; `last` are the newest positions in it, of every ring (-1: none)."""

    name: str
    sha256: str
    last: list[int]


@dataclass
class SavedRows:
    """A replay buffer of that capacity in a checkpoint: of every ring the positions `oldest` to `heads`."""

    capacity: int
    oldest: list[int]
    heads: list[int]
    files: list[RowsFile]


class Checkpoint:
    """A complete one: every one of its files exists as it was written.

    script: the script's name
    options: the run's
    event_files: its event files' names and their sizes
    replays: its replay buffers, by the names of the state's fields
    """

    def __init__(self, manifest_path: Path):
        """Raises DamagedError if it is not complete, OtherVersionError if another version wrote it."""
        self.folder, self.name = manifest_path.parent, manifest_path.name
        content = read_manifest(manifest_path)
        if content.get("version") != VERSION:
            raise OtherVersionError(f"{self.name} has version {shown(content.get('version'))}, not {VERSION}")
        try:
            self.script: str = content["script"]
            self.options: dict[str, Any] = content["options"]
            self.event_files: dict[str, int] = content["event_files"]
            self.state = FileEntry(*content["state"])
            self.replays = {
                name: SavedRows(**saved | {"files": [RowsFile(**file) for file in saved["files"]]})
                for name, saved in content["replays"].items()
            }
            names = [*self.event_files, *(entry.name for entry in self.files())]
            is_plain = all(re.fullmatch(r"[\w-][\w.-]*", name) for name in names)  # not a path
            sizes = [*self.event_files.values(), *(saved.capacity for saved in self.replays.values())]
            sizes_are_sizes = all(isinstance(size, int) and size >= 0 for size in sizes)
            rings = [(file.last, saved.heads) for saved in self.replays.values() for file in saved.files]
            fit = all(has_kind(last, list[int]) and len(last) == len(heads) for last, heads in rings)
            if not (is_plain and sizes_are_sizes and fit and isinstance(self.options, dict)):
                raise TypeError
        except (KeyError, TypeError, AttributeError):
            raise DamagedError(f"{self.name} does not describe a checkpoint") from None

    def files(self) -> list[FileEntry]:
        rows = [file for saved in self.replays.values() for file in saved.files]
        return [self.state, *(FileEntry(file.name, file.sha256) for file in rows)]

    def check(self) -> None:
        """Raises DamagedError if a file of it is missing or altered."""
        for entry in self.files():
            check_file(self.folder, entry)

    def read_state(self) -> Any:
        return read_tree(self.folder, self.state)

    def restore(self, state: Any, num_envs: int, teacher: str | None) -> tuple[Any, dict[str, float]]:
        """Restores a run's state into a new one; returns its games' states and its mean returns.

        The run has `num_envs` games; `teacher` is the fingerprint of the teacher that it is resumed with.

        Raises:
            SystemExit: with a one-line error, if it had another teacher.
            DamagedError: it is of another kind of state, or makes no sense; the state is then half restored.
        """
        try:
            saved = self.read_state()
            games, mean_returns = saved["games"], saved.get("mean_returns", {})
            if games is not None:
                seed, states = games
                is_of_run = isinstance(seed, list) and len(states) == num_envs
                if not is_of_run or any(own.keys() != {"env", "observation"} for own in states):
                    raise TypeError
            if not is_number_of_a_run(list(mean_returns.values()), list[float]):
                raise TypeError
            content = saved["state"]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise DamagedError("its state is not what it should be") from None
        if str(saved.get("teacher", teacher)) != str(teacher):
            raise SystemExit(
                f"error: --resume {self.folder.parent}: its teacher had other weights; name that teacher"
                " with --teacher-model-path or --teacher-revision"
            )
        for replay in replays_of(state).values():  # of a checkpoint that was tried before
            replay.free()
        restore(state, content)
        for name in self.replays:
            if not isinstance(getattr(state, name, None), ReplayBuffer):
                raise DamagedError(f"it has a replay buffer {name}")
            self.restore_replay(name, getattr(state, name))
        return games, mean_returns

    def restore_replay(self, name: str, replay: ReplayBuffer) -> None:
        """Raises DamagedError if the checkpoint's rows cannot be that buffer's."""
        saved = self.replays[name]
        oldest, heads = check_range(saved.oldest, saved.heads, replay.num_envs)
        files = [FileEntry(file.name, file.sha256) for file in saved.files]
        replay.allocate()
        for slots, rows in fitting_rows(self.folder, files, oldest, heads, replay, replay.num_q_values > 0):
            replay.write(slots, rows)
        replay.heads = heads


def newest_checkpoint(run_folder: Path) -> Checkpoint:
    """The first of `complete_checkpoints`."""
    return next(complete_checkpoints(run_folder))


def complete_checkpoints(run_folder: Path) -> Iterator[Checkpoint]:
    """The complete checkpoints, the newest first; warns of those that are damaged.

    Raises:
        SystemExit: with a one-line error, if there is none, or no further one.
    """
    if not is_folder(run_folder):
        raise SystemExit(f"error: --resume {shown(run_folder)} is not a folder; name a run's folder, runs/…")
    candidates = manifests(run_folder)
    if not candidates:
        raise SystemExit(f"error: --resume {run_folder} has no checkpoint: it has finished, or never started")
    for path in candidates:
        try:
            checkpoint = Checkpoint(path)
            checkpoint.check()
            yield checkpoint
        except OtherVersionError as fault:
            raise SystemExit(
                f"error: --resume {run_folder}: {fault}; finish the run with the version that started it, or"
                " start again without --resume"
            ) from None
        except DamagedError as fault:
            warn_of(path, fault)
    raise SystemExit(
        f"error: no checkpoint of {run_folder} can be used; restore its files, finish the run with the"
        " version that started it, or start without --resume"
    )


def warn_of(manifest_path: Path, fault: DamagedError) -> None:
    run_folder = manifest_path.parents[1]
    print(f"warning: {manifest_path.stem} of {run_folder} cannot be used: {fault}", file=sys.stderr)


def saved_options(run_folder: Path) -> dict[str, Any]:
    """The options that a run was started with.

    Raises:
        SystemExit: with a one-line error, if it has no complete checkpoint.
    """
    for path in manifests(run_folder):
        with suppress(DamagedError):
            return Checkpoint(path).options
    return newest_checkpoint(run_folder).options


def replay_sizes(run_folder: Path) -> dict[str, tuple[int, int]]:
    """Capacity and environments of the replay buffers in a run's checkpoints, but of no empty teacher's."""
    sizes: dict[str, tuple[int, int]] = {}
    for path in manifests(run_folder):
        with suppress(DamagedError):
            for name, saved in Checkpoint(path).replays.items():
                _, heads = check_range(saved.oldest, saved.heads)
                if heads.any() or name != "teacher_replay":
                    sizes.setdefault(name, (saved.capacity, len(heads)))
    return sizes


class CheckpointWriter:
    """Writes the checkpoints of the run in a folder, which nobody else may do meanwhile.

    Args:
        run_folder: the run's.
        resumed: the checkpoint from which it was resumed, if it was.
    """

    def __init__(self, run_folder: Path, resumed: Checkpoint | None):
        self.run_folder, self.folder = run_folder, run_folder / "checkpoints"
        self._replays = resumed.replays if resumed else {}  # of the last checkpoint
        self._number = self._rows_number = 0
        if resumed:
            files = checkpoint_files(run_folder)
            for path in manifests(run_folder):
                if files[path] > files[self.folder / resumed.name]:  # damaged
                    path.unlink()
            self._number = self._rows_number = max(files.values()) + 1

    def save(
        self, script: str, options: dict[str, Any], state: Any, replays: dict[str, ReplayBuffer]
    ) -> None:
        """Writes a checkpoint; if it cannot be written, says so, and the ones before it stay.

        Args:
            script: the script's name.
            options: the run's.
            state: what `storage.pack` takes.
            replays: the replay buffers that take memory, by the names of their fields.
        """
        self._number += 1
        try:
            saved_replays = {name: self._save_rows(name, replay) for name, replay in replays.items()}
            content = {
                "version": VERSION,
                "script": script,
                "options": options,
                "event_files": {path.name: path.stat().st_size for path in event_files(self.run_folder)},
                "state": write_tree(self.folder / f"state-{self._number:06d}.zst", state),
                "replays": {name: asdict(saved) for name, saved in saved_replays.items()},
            }
            write_manifest(self.folder / f"checkpoint-{self._number:06d}.json", content)
            self._replays = saved_replays
        except OSError as error:
            print(
                f"\nwarning: no checkpoint could be written ({error.strerror}); the run continues, and the"
                " previous checkpoint stays",
                file=sys.stderr,
            )
        with suppress(OSError):
            self._remove_what_is_not_needed()

    def remove_all(self) -> None:
        """Removes the checkpoints of a run that has finished; `release_finished` removes their folder."""
        for path in reversed(manifests(self.run_folder)):  # a kill in between leaves the newest, or none
            path.unlink()
        for path in checkpoint_files(self.run_folder):
            path.unlink()

    def _save_rows(self, name: str, replay: ReplayBuffer) -> SavedRows:
        oldest, heads = held_positions(replay)
        first, files = oldest, []
        if before := self._replays.get(name):
            oldest = np.maximum(oldest, before.oldest)  # a buffer that has become larger had no more rows
            first = np.maximum(oldest, before.heads)  # the newest row had no action yet: it comes again
            files = [file for file in before.files if (np.array(file.last) >= oldest).any()]
            if (heads == before.heads).all():
                first = heads + 1
        for rows in rows_between(replay, first, heads):
            last = np.full(len(heads), -1)
            np.maximum.at(last, rows["envs"], rows["positions"])
            entry = write_tree(self.folder / f"rows-{self._rows_number:06d}.zst", rows)
            self._rows_number += 1
            files.append(RowsFile(*entry, last.tolist()))
        return SavedRows(replay.capacity, oldest.tolist(), heads.tolist(), files)

    def _remove_what_is_not_needed(self) -> None:
        needed, kept = set(), 0
        for path in manifests(self.run_folder):
            try:
                checkpoint = Checkpoint(path)
            except DamagedError:
                continue
            if kept == NUM_KEPT:
                break
            needed |= {path.name, *(entry.name for entry in checkpoint.files())}
            kept += 1
        for path in checkpoint_files(self.run_folder):
            if path.name not in needed:
                path.unlink()


def cut_events(run_folder: Path, checkpoint: Checkpoint) -> None:
    """Removes from the event files what was written after the checkpoint: the run will write it again."""
    files = {path.name: path for path in event_files(run_folder)}
    for name in files.keys() - checkpoint.event_files.keys():
        files[name].unlink()
    for name, size in checkpoint.event_files.items():
        if name not in files or files[name].stat().st_size < size:
            print(f"warning: {run_folder / name} lacks some of the run's curves", file=sys.stderr)
        else:
            os.truncate(files[name], size)
