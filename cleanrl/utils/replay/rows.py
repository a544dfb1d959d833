"""A replay buffer's rows on disk: `--save-replay` writes them, `--teacher-replay-path` reads them.

A row is what one slot of the buffer holds. A saved replay is a folder of compressed files of rows and a
manifest, which is written last: without it the folder is not whole.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cleanrl.utils.storage import (
    DamagedError,
    FileEntry,
    read_manifest,
    read_tree,
    write_manifest,
    write_tree,
)

ROWS_PER_FILE = 16_384  # 116 MB of frames before compression
MANIFEST = "manifest.json"
FILE_NAME = re.compile(r"rows-\d+\.zst")
FORMAT, VERSION = "qdagger replay", 1
ROW_SHAPES = {  # of a saved replay: type and shape of each row
    "envs": (np.int64, ()),
    "positions": (np.int64, ()),
    "frames": (np.uint8, (84, 84)),
    "stack_depths": (np.uint8, ()),
    "actions": (np.uint8, ()),
    "rewards": (np.float32, ()),
    "terminations": (np.bool_, ()),
    "episode_ends": (np.bool_, ()),
    "is_transition": (np.bool_, ()),
}


class Replay(Protocol):
    """A replay buffer: a ring of slots per environment; position p of a ring lies in slot p % num_slots."""

    num_slots: int  # per environment
    heads: Any  # integers (num_envs,): positions of the current observations, ever growing

    def read(self, slots: np.ndarray) -> dict[str, np.ndarray]: ...


def held_positions(replay: Replay) -> tuple[np.ndarray, np.ndarray]:
    """The oldest and the newest position of every ring; the newest is that of the current observation."""
    heads = np.asarray(replay.heads, dtype=np.int64)
    return np.maximum(heads + 1 - replay.num_slots, 0), heads


def padded(values: np.ndarray, fill: int = 0) -> np.ndarray:
    """Lengthens an array (n, …) to a power of two: what is compiled for every length meets only a few."""
    num_missing = (1 << (len(values) - 1).bit_length()) - len(values)
    return np.pad(values, [(0, num_missing)] + [(0, 0)] * (values.ndim - 1), constant_values=fill)


def rows_between(
    replay: Replay, first: np.ndarray, last: np.ndarray, rows_per_file: int = ROWS_PER_FILE
) -> Iterator[dict[str, np.ndarray]]:
    """What the slots of every ring's positions `first` to `last` hold, both (num_envs,) and inclusive.

    A part of the rows at a time, each ring's in order, all rings side by side; with each row its `envs`
    index and its `positions`.
    """
    lengths = last - first + 1
    num_parts = -(-int(lengths.sum()) // rows_per_file)
    for part in range(num_parts):
        starts, ends = first + lengths * part // num_parts, first + lengths * (part + 1) // num_parts
        envs = np.repeat(np.arange(len(first)), ends - starts)
        positions = np.concatenate([np.arange(*ring) for ring in zip(starts, ends, strict=True)])
        rows = replay.read(envs * replay.num_slots + positions % replay.num_slots)
        yield {"envs": envs, "positions": positions, **rows}


def fitting_rows(
    parts: Iterable[dict[str, np.ndarray]], oldest: np.ndarray, heads: np.ndarray, num_slots: int
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Of rows that hold the positions `oldest` to `heads`, those that a buffer of `num_slots` keeps.

    With them the slots, integers (rows,), where they belong in it. A transition whose stack of frames would
    begin before the oldest row is none any more.
    """
    for rows in parts:
        envs, positions = rows["envs"], rows["positions"]
        kept = positions > heads[envs] - num_slots
        is_whole = positions - rows["stack_depths"] >= oldest[envs]
        rows = {**rows, "is_transition": rows["is_transition"] & is_whole}
        slots = envs * num_slots + positions % num_slots
        yield slots[kept], {name: values[kept] for name, values in rows.items()}


# ------------------------------------------------------------------------------------------ saved replays


@dataclass
class SavedReplay:
    """A folder that `save_replay` wrote."""

    folder: Path
    num_actions: int
    oldest: np.ndarray  # int64 (num_envs,): the first position of every ring,
    heads: np.ndarray  # and the last, which is that of an observation without an action
    files: list[FileEntry]

    @property
    def num_envs(self) -> int:
        return len(self.heads)

    @property
    def capacity(self) -> int:
        """The frames that a replay buffer must hold to take all rows."""
        return self.num_envs * int((self.heads - self.oldest + 1).max())

    @property
    def num_rows(self) -> int:
        return int((self.heads - self.oldest + 1).sum())

    def rows(self, num_slots: int) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """The rows that a buffer of `num_slots` per ring keeps, a part at a time, with their slots.

        Raises:
            SystemExit: with one line, if a file is missing or damaged.
        """
        return fitting_rows(self._parts(), self.oldest, self.heads, num_slots)

    def _parts(self) -> Iterator[dict[str, np.ndarray]]:
        num_rows = 0
        for entry in self.files:
            rows = self._read(entry)
            num_rows += len(rows["envs"])
            yield rows
        if num_rows != self.num_rows:
            raise SystemExit(
                f"error: {self.folder}: its files hold {num_rows} frames, not {self.num_rows} as its manifest"
                " says; save or copy the replay again"
            )

    def _read(self, entry: FileEntry) -> dict[str, np.ndarray]:
        try:
            rows = read_tree(self.folder, entry)
            self._check(entry, rows)
        except DamagedError as fault:
            raise SystemExit(f"error: {self.folder}: {fault}; save or copy the replay again") from None
        return rows

    def _check(self, entry: FileEntry, rows: Any) -> None:
        foreign = DamagedError(f"{entry.name} does not hold the rows of a replay buffer of this game")
        if not isinstance(rows, dict) or rows.keys() != ROW_SHAPES.keys():
            raise foreign
        for name, (dtype, shape) in ROW_SHAPES.items():
            if not isinstance(rows[name], np.ndarray) or rows[name].dtype != dtype:
                raise foreign
            if rows[name].shape != (len(rows["envs"]), *shape):
                raise foreign
        envs, positions = rows["envs"], rows["positions"]
        if not ((envs >= 0) & (envs < self.num_envs)).all():
            raise foreign
        if not ((positions >= self.oldest[envs]) & (positions <= self.heads[envs])).all():
            raise foreign
        if not (rows["actions"] < self.num_actions).all() or not (rows["stack_depths"] <= 3).all():
            raise foreign


def check_new_folder(folder: Path) -> None:
    """Sees to it before the training that a replay can be saved there after it.

    Raises:
        SystemExit: with one line, if the folder holds something or cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A run that could not save all of it, and goes on, finds its own files.
        if any(not path.name.startswith("rows-") for path in folder.iterdir()):
            raise SystemExit(f"error: --save-replay {folder} is not empty; name a new folder")
        probe = folder / "probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SystemExit(f"error: --save-replay {folder}: {error.strerror}; name another folder") from None


def save_replay(folder: Path, replay: Replay, env_id: str, num_actions: int) -> None:
    """Saves all that a replay buffer holds; takes the memory of one file's rows beside it.

    Raises:
        SystemExit: with one line, if the disk is full, for one.
    """
    oldest, heads = held_positions(replay)
    try:
        files = [
            write_tree(folder / f"rows-{index:06d}.zst", rows)
            for index, rows in enumerate(rows_between(replay, oldest, heads))
        ]
        content = {
            "format": FORMAT,
            "version": VERSION,
            "env_id": env_id,
            "num_actions": num_actions,
            "oldest": oldest.tolist(),
            "heads": heads.tolist(),
            "files": files,
        }
        write_manifest(folder / MANIFEST, content)
    except OSError as error:
        raise SystemExit(
            f"error: --save-replay {folder}: {error.strerror}; make room, and start again with --resume auto"
        ) from None


def open_replay(
    folder: Path, env_id: str, num_actions: int, least_rows: int, least_steps: int = 1
) -> SavedReplay:
    """Looks at a saved replay's manifest; its rows are read later, by `SavedReplay.rows`.

    Raises:
        SystemExit: with one line, if it is no replay of that game, or damaged, or has fewer than `least_rows`
            frames, or in some ring fewer than `least_steps` steps.
    """
    source = f"--teacher-replay-path {folder}"
    if not folder.is_dir():
        raise SystemExit(f"error: {source} is not a folder; name one that --save-replay wrote")
    if not (folder / MANIFEST).exists():
        raise SystemExit(
            f"error: {source} has no {MANIFEST}: it was not saved to the end, or is no replay; save it again"
        )
    try:
        content = read_manifest(folder / MANIFEST)
        if content.get("format") != FORMAT:
            raise DamagedError(f"{MANIFEST} is not that of a replay")
        if content.get("version") != VERSION:
            raise DamagedError(f"{MANIFEST} has version {content.get('version')}, not {VERSION}")
        if (content["env_id"], content["num_actions"]) != (env_id, num_actions):
            raise DamagedError(
                f"it is a replay of {content['env_id']} with {content['num_actions']} actions, not of"
                f" {env_id} with {num_actions}"
            )
        oldest, heads = (np.array(content[name], dtype=np.int64) for name in ("oldest", "heads"))
        files = [FileEntry(*entry) for entry in content["files"]]
        saved = SavedReplay(folder, num_actions, oldest, heads, files)
        if oldest.ndim != 1 or heads.shape != oldest.shape or not len(heads) or (oldest < 0).any():
            raise ValueError
        if not (oldest <= heads).all() or not all(FILE_NAME.fullmatch(entry.name) for entry in files):
            raise ValueError
    except DamagedError as fault:
        raise SystemExit(f"error: {source}: {fault}; use a replay saved for this game") from None
    except (KeyError, TypeError, ValueError, OverflowError):
        raise SystemExit(f"error: {source}: {MANIFEST} is not that of a replay; save it again") from None
    fewest_steps = int((heads - oldest).min())
    if saved.num_rows < least_rows or fewest_steps < least_steps:
        raise SystemExit(
            f"error: {source} holds {saved.num_rows} frames and at least {fewest_steps} steps of every"
            f" environment, but {least_rows} and {least_steps} are needed; save a longer replay"
        )
    return saved
