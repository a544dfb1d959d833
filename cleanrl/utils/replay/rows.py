"""A replay buffer's rows, one a slot, in files: what checkpoints and saved replays are made of."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cleanrl.utils.bounds import MOST, has_kind
from cleanrl.utils.replay.ring import COLUMNS, ReplayBuffer
from cleanrl.utils.storage import DamagedError, FileEntry, read_tree

ROWS_PER_FILE = 16_384  # 116 MB of frames before compression
MOST_ROWS = 10**8  # 700 GB of frames
MOST_VALUE = 1e9  # of a reward or Q-value; its square, too, is a float32
ROW_SHAPES = {"envs": (np.int64, ()), "positions": (np.int64, ()), "frames": (np.uint8, (84, 84))} | {
    name: (dtype, ()) for name, dtype in COLUMNS.items()
}


def held_positions(replay: ReplayBuffer) -> tuple[np.ndarray, np.ndarray]:
    """The oldest and the newest position of every ring; the newest is that of the current observation."""
    return np.maximum(replay.heads + 1 - replay.num_slots, 0), replay.heads.copy()


def rows_between(
    replay: ReplayBuffer, first: np.ndarray, last: np.ndarray, rows_per_file: int = ROWS_PER_FILE
) -> Iterator[dict[str, np.ndarray]]:
    """What the slots of every ring's positions `first` to `last` hold, both (num_envs,) and inclusive.

    One file's rows at a time, each ring's in order, all rings side by side; with each row its `envs` index
    and its `positions`.
    """
    lengths = last - first + 1
    num_parts = -(-int(lengths.sum()) // rows_per_file)
    for part in range(num_parts):
        starts, ends = first + lengths * part // num_parts, first + lengths * (part + 1) // num_parts
        envs = np.repeat(np.arange(len(first)), ends - starts)
        positions = np.concatenate([np.arange(*ring) for ring in zip(starts, ends, strict=True)])
        rows = replay.read(envs * replay.num_slots + positions % replay.num_slots)
        yield {"envs": envs, "positions": positions, **rows}


def check_range(oldest: Any, heads: Any, num_envs: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The oldest and the newest position of every ring, int64 (num_envs,), from numbers in a file.

    Raises:
        DamagedError: they are not that, or not of so many rings.
    """
    try:
        if not (has_kind(oldest, list[int]) and has_kind(heads, list[int])):
            raise TypeError
        oldest, heads = (np.array(numbers, dtype=np.int64) for numbers in (oldest, heads))
    except (TypeError, OverflowError):
        raise DamagedError("its positions are invalid") from None
    is_range = oldest.shape == heads.shape and len(heads) > 0
    if not is_range or (oldest < 0).any() or (oldest > heads).any() or (heads > MOST).any():
        raise DamagedError("its positions are invalid")
    if (heads - oldest + 1).sum() > MOST_ROWS:
        raise DamagedError("it is larger than any replay buffer")
    if num_envs is not None and len(heads) != num_envs:
        raise DamagedError(f"it has {len(heads)} environments, not {num_envs}")
    return oldest, heads


def fitting_rows(
    folder: Path,
    files: Iterable[FileEntry],
    oldest: np.ndarray,
    heads: np.ndarray,
    replay: ReplayBuffer,
    has_q_values: bool,
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Of files with the positions `oldest` to `heads`, the rows that a replay buffer keeps, a part at a time.

    With them the slots, integers (rows,), where they belong in it. A row that comes again replaces the one
    before. A transition whose stack of frames would start before the oldest row no longer counts as one.

    Args:
        folder: where the files are.
        files: nothing is known of what is in them.
        oldest, heads: as `check_range` gave them.
        replay: it has as many rings.
        has_q_values: whether there are Q-values in the files.

    Raises:
        DamagedError: a file is missing, damaged or does not hold such rows, or some rows are missing.
    """
    num_slots, starts = replay.num_slots, np.cumsum([0, *(heads - oldest + 1)])
    is_there = np.zeros(starts[-1], bool)
    for entry in files:
        rows = read_tree(folder, entry)
        if not _are_rows(rows, heads, replay, has_q_values):
            raise DamagedError(f"{entry.name} does not hold rows of a replay buffer of this game")
        envs, positions = rows["envs"], rows["positions"]
        held = positions >= oldest[envs]
        is_there[(starts[envs] + positions - oldest[envs])[held]] = True
        kept = held & (positions > heads[envs] - num_slots)
        is_whole = positions - rows["stack_depths"] >= oldest[envs]
        rows = {**rows, "is_transition": rows["is_transition"] & is_whole}
        slots = envs * num_slots + positions % num_slots
        if kept.any():
            yield slots[kept], {name: values[kept] for name, values in rows.items()}
    if not is_there.all():
        raise DamagedError(
            f"its files hold {is_there.sum()} frames, not {len(is_there)} as its manifest says"
        )


def _are_rows(rows: Any, heads: np.ndarray, replay: ReplayBuffer, has_q_values: bool) -> bool:
    shapes = dict(ROW_SHAPES)
    if has_q_values:
        shapes["teacher_q_values"] = np.float32, (replay.num_q_values,)
    if not isinstance(rows, dict) or rows.keys() != shapes.keys():
        return False
    for name, (dtype, shape) in shapes.items():
        values = rows[name]
        if not isinstance(values, np.ndarray) or values.dtype != dtype:
            return False
        if values.shape != (len(rows["envs"]), *shape):
            return False
        if dtype == np.float32 and not (np.abs(values) <= MOST_VALUE).all():
            return False
    envs, positions = rows["envs"], rows["positions"]
    if not ((envs >= 0) & (envs < len(heads))).all():
        return False
    if not ((positions >= 0) & (positions <= heads[envs])).all():
        return False
    is_each_once = len(np.unique(envs * (MOST + 1) + positions)) == len(envs)
    return bool(
        is_each_once and (rows["actions"] < replay.num_actions).all() and (rows["stack_depths"] <= 3).all()
    )
