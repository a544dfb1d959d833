"""A replay buffer as a folder: `--save-replay` of DQN writes it, `--teacher-replay-path` of QDagger reads it.

A manifest is written last: without it the folder is not whole.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from cleanrl.utils.bounds import shown
from cleanrl.utils.progress import ProgressBar
from cleanrl.utils.replay.ring import ReplayBuffer
from cleanrl.utils.replay.rows import check_range, fitting_rows, held_positions, rows_between
from cleanrl.utils.storage import (
    DamagedError,
    FileEntry,
    read_manifest,
    write_manifest,
    write_tree,
)

MANIFEST = "manifest.json"
FILE_NAME = re.compile(r"rows-\d+\.zst")
FORMAT, VERSION = "qdagger replay", 1
STACKS_AT_A_TIME = 1024  # for the teacher's Q-values


@dataclass
class SavedReplay:
    """A folder that `save_replay` wrote."""

    folder: Path
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

    def rows(self, replay: ReplayBuffer) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """The rows that a replay buffer keeps, a part at a time, with their slots.

        Raises:
            SystemExit: with a one-line error, if a file is missing or damaged.
        """
        try:
            yield from fitting_rows(
                self.folder, self.files, self.oldest, self.heads, replay, has_q_values=False
            )
        except DamagedError as fault:
            raise SystemExit(f"error: {self.folder}: {fault}; save or copy the replay again") from None


def check_new_folder(folder: Path, resumed: str | None) -> None:
    """Ensures before the training that a replay can be saved there after it.

    Args:
        folder: may have what an interrupted run has saved of its replay.
        resumed: the folder of the run that is resumed, if one is; it may have saved all of it.

    Raises:
        SystemExit: with a one-line error, if the folder is not empty or cannot be written to.
    """

    def is_own(path: Path) -> bool:
        if path.name == MANIFEST and resumed:
            with suppress(DamagedError):
                return read_manifest(path).get("run") == Path(resumed).name
        return path.name.startswith("rows-") or path.name == f"{MANIFEST}.partial"

    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not all(is_own(path) for path in folder.iterdir()):
            raise SystemExit(f"error: --save-replay {folder} is not empty; name a new folder")
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise SystemExit(f"error: --save-replay {folder}: {error.strerror}; name another folder") from None


def save_replay(folder: Path, replay: ReplayBuffer, env_id: str, num_actions: int, run: str) -> None:
    """Saves all that a replay buffer of the run with that name holds, one file's rows in memory at a time.

    Raises:
        SystemExit: with a one-line error, for example if the disk is full.
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
            "run": run,
            "oldest": oldest.tolist(),
            "heads": heads.tolist(),
            "files": files,
        }
        write_manifest(folder / MANIFEST, content)
    except OSError as error:
        raise SystemExit(
            f"error: --save-replay {folder}: {error.strerror}; free some space, then resume the run"
        ) from None


def open_replay(args: Any, num_actions: int) -> SavedReplay:
    """Reads the manifest of the replay `teacher_replay_path`; its rows are read later, by `SavedReplay.rows`.

    Raises:
        SystemExit: with a one-line error, if it is not a replay of that game, is damaged, or has less than a
            batch of frames or, in some ring, fewer than `n_step` steps.
    """
    folder, env_id = args.teacher_replay_path, args.env_id
    source = f"--teacher-replay-path {folder}"
    if not folder.is_dir():
        raise SystemExit(f"error: {source} is not a folder; name one that --save-replay wrote")
    if not (folder / MANIFEST).exists():
        raise SystemExit(f"error: {source} has no {MANIFEST}: it is not a complete replay; save it again")
    try:
        content = read_manifest(folder / MANIFEST)
        if content.get("format") != FORMAT:
            raise DamagedError(f"{MANIFEST} does not describe a replay")
        if content.get("version") != VERSION:
            raise DamagedError(f"{MANIFEST} has version {shown(content.get('version'))}, not {VERSION}")
        if (content["env_id"], content["num_actions"]) != (env_id, num_actions):
            raise DamagedError(
                f"it is a replay of {shown(content['env_id'])} with {shown(content['num_actions'])}"
                f" actions, not of {env_id} with {num_actions}"
            )
        oldest, heads = check_range(content["oldest"], content["heads"])
        files = [FileEntry(*entry) for entry in content["files"]]
        saved = SavedReplay(folder, oldest, heads, files)
        if not all(FILE_NAME.fullmatch(entry.name) for entry in files):
            raise ValueError
    except DamagedError as fault:
        raise SystemExit(f"error: {source}: {fault}; use a replay saved for this game") from None
    except (KeyError, TypeError, ValueError, OverflowError):
        raise SystemExit(f"error: {source}: {MANIFEST} does not describe a replay; save it again") from None
    # Of a ring that was full, the 3 oldest rows lack frames, and the next may be one that ended an episode.
    fewest_steps = int((heads - oldest - np.where(oldest > 0, 4, 0)).min())
    if saved.num_rows < args.batch_size or fewest_steps < args.n_step:
        raise SystemExit(
            f"error: {source} holds {saved.num_rows} frames and at least {fewest_steps} steps of every"
            f" environment, but {args.batch_size} and {args.n_step} are needed; save a longer replay"
        )
    return saved


def load_replay(
    args: Any,
    replay: ReplayBuffer,
    compute_q_values: Callable[[np.ndarray], np.ndarray],
    checkpoint: Callable[[], None],
) -> None:
    """Fills `replay` from the replay `teacher_replay_path`, as far as it fits.

    Args:
        args: the script's.
        replay: a buffer for as many environments.
        compute_q_values: from observations uint8 (n, 4, 84, 84) to the Q-values to be kept with them.
        checkpoint: called before each call of `compute_q_values`; it may stop the run.

    Raises:
        SystemExit: with a one-line error, if a file is missing or damaged.
    """
    saved = open_replay(args, replay.num_q_values)
    replay.allocate()
    with ProgressBar("teacher's replay", 0, saved.num_rows, "frames") as progress:
        for slots, rows in saved.rows(replay):
            replay.write(slots, rows)
            # The frames of these stacks are in place: a file comes after those before it in time.
            for first in range(0, len(slots), STACKS_AT_A_TIME):
                checkpoint()
                chunk = slots[first : first + STACKS_AT_A_TIME]
                replay.columns["teacher_q_values"][chunk] = compute_q_values(replay.observations(chunk))
            progress.update(len(slots))
    replay.heads = saved.heads.copy()
