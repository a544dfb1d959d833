"""Copies of run folders between machines without a shared file system.

The driver's machine has the authoritative copy (`Home`). A machine that resumes a run fetches the folder from
there; while it works it sends what has changed (`FolderSender`), in pieces of at most PIECE_BYTES. Files are
sent before the manifest that names them, and what the newest manifest names is not removed, so the newest
checkpoint at home is complete at all times.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cleanrl.utils.benchmark.logs import shorten
from cleanrl.utils.benchmark.records import State, resumable
from cleanrl.utils.run.checkpoint import Checkpoint
from cleanrl.utils.run.folders import event_files, is_finished, manifests
from cleanrl.utils.storage import DamagedError

PIECE_BYTES = 8 * 2**20


class SupersededError(Exception):
    """Another attempt at the run has started since; this one must end."""


class Beginning(NamedTuple):
    """What an attempt at a run starts from.

    attempt: its number, which it names in everything it sends
    folder: the folder to resume, by its name in `runs`; None: a new one
    files: that folder's, relative to `runs`
    over: None, or why there is nothing to do: the run is done, or all runs are being stopped
    """

    attempt: int
    folder: str | None = None
    files: tuple[str, ...] = ()
    over: State | None = None


@dataclass
class Attempt:
    """What the home knows about a run's newest attempt."""

    number: int
    node: str
    folder: str | None


class Home:
    """The authoritative copies and the logs; the driver and the working machines call it.

    Args:
        runs: the driver's folder `runs`.
        logs: by run name, the file that its output is appended to.
        folders: by run name, the folder in `runs` it has written to so far, if any.
    """

    def __init__(self, runs: Path, logs: dict[str, Path], folders: dict[str, str | None]):
        self.runs, self.logs, self.folders = runs, logs, folders
        self.attempts: dict[str, Attempt] = {}
        self.is_stopping = False

    def begin(self, name: str, node: str) -> Beginning:
        """A machine starts a run, for the first time or after another machine has died."""
        before = self.attempts.get(name)
        folder = self.folders[name]
        run_folder = self.runs / folder if folder else None
        number = before.number + 1 if before else 1
        if before and run_folder and is_finished(run_folder):
            return Beginning(number, over="done")
        if self.is_stopping:
            return Beginning(number, over="stopped")
        if not resumable(run_folder):
            self.attempts[name] = Attempt(number, node, None)
            return Beginning(number)
        self.attempts[name] = Attempt(number, node, folder)
        for path in run_folder.rglob("*.partial"):
            path.unlink()
        files = sorted(path.relative_to(self.runs).as_posix() for path in _files(run_folder))
        return Beginning(number, folder, tuple(files))

    def _check(self, name: str, attempt: int) -> Attempt:
        newest = self.attempts[name]
        if newest.number != attempt:
            raise SupersededError(f"{name} is now running on {newest.node}")
        return newest

    def read(self, name: str, attempt: int, file: str, offset: int) -> bytes:
        """The piece of a file that starts at `offset`; empty at its end."""
        self._check(name, attempt)
        with (self.runs / file).open("rb") as content:
            content.seek(offset)
            return content.read(PIECE_BYTES)

    def report(self, name: str, attempt: int, folder: str | None, log: bytes) -> bool:
        """Takes the name of the run's folder and its new output; returns whether the run is to stop."""
        newest = self._check(name, attempt)
        with self.logs[name].open("ab") as file:
            file.write(log)
        shorten(self.logs[name])
        if folder and folder != newest.folder:
            # From the start, the copy looks like an unfinished run.
            (self.runs / folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            newest.folder = self.folders[name] = folder
        return self.is_stopping

    def write(self, name: str, attempt: int, file: str, offset: int, data: bytes, is_last: bool) -> None:
        """Takes a piece of a file, which exists once its last piece has arrived."""
        self._check(name, attempt)
        path = self.runs / file
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with partial.open("ab" if offset else "wb") as content:
            content.write(data)
            content.flush()
            os.fsync(content.fileno())
        if is_last:
            partial.replace(path)

    def append(self, name: str, attempt: int, file: str, offset: int, data: bytes) -> None:
        """Takes a piece that follows a file's first `offset` bytes."""
        self._check(name, attempt)
        with (self.runs / file).open("r+b") as content:
            content.truncate(offset)
            content.seek(offset)
            content.write(data)

    def remove(self, name: str, attempt: int, file: str) -> None:
        self._check(name, attempt)
        (self.runs / file).unlink(missing_ok=True)

    def finish(self, name: str, attempt: int, checksums: dict[str, str]) -> list[str]:
        """Marks the run as finished; or, if some of its files are not as they should be, returns them."""
        newest = self._check(name, attempt)
        wrong = [file for file, sha256 in checksums.items() if _sha256(self.runs / file) != sha256]
        if not wrong:
            run_folder = self.runs / newest.folder
            finished = run_folder / "finished"  # moved at once: a half-removed folder has no checkpoints
            (run_folder / "checkpoints").rename(finished)
            shutil.rmtree(finished)
        return wrong

    def stop(self) -> None:
        """From now on, every report is answered with the request to stop."""
        self.is_stopping = True

    def newest_attempts(self) -> dict[str, Attempt]:
        return self.attempts


def _files(run_folder: Path) -> list[Path]:
    """The files that belong to a run, finished or not."""
    # Not by rglob, which fails where a folder goes away meanwhile.
    paths = (Path(folder, name) for folder, _, names in os.walk(run_folder) for name in names)
    return [path for path in paths if path.is_file() and path.suffix != ".partial" and path.name != "lock"]


def _sha256(path: Path) -> str | None:
    if not path.exists():
        return None
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


class FolderSender:
    """Keeps the home's copy of a run's folder up to date.

    Args:
        runs: this machine's folder `runs`.
        call: calls a method of the home by its name, with the arguments after the attempt's number.
    """

    def __init__(self, runs: Path, call: Callable[..., Any]):
        self.runs, self.call = runs, call
        self._sent: dict[str, tuple[int, int]] = {}  # by file: size and modification time when sent

    def fetch(self, files: tuple[str, ...]) -> None:
        """Copies the home's files here."""
        for file in files:
            path = self.runs / file
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as content:
                while data := self.call("read", file, content.tell()):
                    content.write(data)
            self._sent[file] = _state(path)

    def send(self, run_folder: Path) -> None:
        """Sends what has changed since the last call; what changes meanwhile waits for the next one."""
        checkpoints = []
        for path in reversed(manifests(run_folder)):
            try:
                checkpoints.append((path, Checkpoint(path)))
            except DamagedError:  # removed just now, or useless anyway
                continue
        # After reading the manifests, so that the event files are at least as long as these say.
        others = [path for path in _files(run_folder) if path.parent.name not in ("checkpoints", "finished")]
        for path in others:
            self._send_file(path)
        for path, checkpoint in checkpoints:
            if all(self._send_file(path.parent / entry.name) for entry in checkpoint.files()):
                self._send_file(path)
        if (run_folder / "checkpoints").is_dir():  # else the run is about to finish, see `finish`
            self._remove_what_is_gone(run_folder)

    def finish(self, run_folder: Path) -> None:
        """Ensures that the home has the finished folder, bit for bit."""
        checksums = {self._name(path): _sha256(path) for path in _files(run_folder)}
        while wrong := self.call("finish", checksums):
            for file in wrong:
                self._send_whole(self.runs / file)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.runs).as_posix()

    def _send_file(self, path: Path) -> bool:
        """Sends a file if the home's differs; returns False if the file is gone."""
        try:
            state, before = _state(path), self._sent.get(self._name(path))
            if before and path in event_files(path.parent) and state[0] > before[0]:
                self._append(path, before[0], state[0])
            elif state != before:
                self._send_whole(path)
        except FileNotFoundError:
            return False
        return True

    def _send_whole(self, path: Path) -> None:
        file, offset = self._name(path), 0
        with path.open("rb") as content:  # if the file is replaced meanwhile, this stays the old one
            status = os.fstat(content.fileno())
            while True:
                data = content.read(PIECE_BYTES)
                is_last = len(data) < PIECE_BYTES
                self.call("write", file, offset, data, is_last)
                offset += len(data)
                if is_last:
                    break
        self._sent[file] = (status.st_size, status.st_mtime_ns)

    def _append(self, path: Path, start: int, end: int) -> None:
        """For event files, which only grow while a run is working."""
        state = _state(path)
        with path.open("rb") as content:
            content.seek(start)
            for offset in range(start, end, PIECE_BYTES):
                data = content.read(min(PIECE_BYTES, end - offset))
                self.call("append", self._name(path), offset, data)
        self._sent[self._name(path)] = (end, state[1])

    def _remove_what_is_gone(self, run_folder: Path) -> None:
        held = [Path(file).name for file in self._sent if Path(file).match("checkpoints/checkpoint-*.json")]
        needed: set[str] = set()
        if held:
            newest = run_folder / "checkpoints" / max(held)
            try:
                needed = {newest.name, *(entry.name for entry in Checkpoint(newest).files())}
            except DamagedError:  # removed since it was sent; the next call sends a newer one
                return
        gone = [
            file for file in self._sent if not (self.runs / file).exists() and Path(file).name not in needed
        ]
        for file in sorted(gone, key=lambda file: not file.endswith(".json")):  # manifests first
            self.call("remove", file)
            del self._sent[file]


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
