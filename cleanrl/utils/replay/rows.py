"""A replay buffer's rows, one a slot, in files: what checkpoints and saved replays are made of."""

from collections.abc import Iterable, Iterator

import numpy as np

from cleanrl.utils.replay.ring import ReplayBuffer

ROWS_PER_FILE = 16_384  # 116 MB of frames before compression


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


def fitting_rows(
    parts: Iterable[dict[str, np.ndarray]], oldest: np.ndarray, heads: np.ndarray, num_slots: int
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Of rows that hold the positions `oldest` to `heads`, those that a buffer of `num_slots` keeps.

    With them the slots, integers (rows,), where they belong in it. A transition whose stack of frames would
    start before the oldest row no longer counts as one.
    """
    for rows in parts:
        envs, positions = rows["envs"], rows["positions"]
        kept = positions > heads[envs] - num_slots
        is_whole = positions - rows["stack_depths"] >= oldest[envs]
        rows = {**rows, "is_transition": rows["is_transition"] & is_whole}
        slots = envs * num_slots + positions % num_slots
        yield slots[kept], {name: values[kept] for name, values in rows.items()}
