"""A replay is saved and loaded a file at a time: beside it, only a few files' rows are in memory."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from large_replay import LargeReplay
from traced_memory import peak_memory

from cleanrl.utils.replay import rows as replay_files
from cleanrl.utils.replay.rows import open_replay, save_replay

PONG, NUM_ACTIONS = "PongNoFrameskip-v4", 6
NUM_FILES, ROWS_PER_FILE = 30, 100
NUM_ROWS, BYTES_PER_FILE = NUM_FILES * ROWS_PER_FILE, ROWS_PER_FILE * 84 * 84


def saving(folder: Path) -> Callable[[], None]:
    replay_files.rows_between = partial(replay_files.rows_between, rows_per_file=ROWS_PER_FILE)
    return partial(save_replay, folder, LargeReplay(NUM_ROWS), PONG, NUM_ACTIONS)


def loading(folder: Path) -> Callable[[], None]:
    def load() -> None:
        for slots, rows in open_replay(folder, PONG, NUM_ACTIONS, 1).rows(NUM_ROWS):
            assert len(slots) == len(rows["frames"]) == ROWS_PER_FILE

    return load


def test_saving_and_loading_take_the_memory_of_a_few_files(tmp_path):
    assert peak_memory(saving, tmp_path) < 4 * BYTES_PER_FILE
    assert len(list(tmp_path.glob("rows-*.zst"))) == NUM_FILES
    assert peak_memory(loading, tmp_path) < 5 * BYTES_PER_FILE
