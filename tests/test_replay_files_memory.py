"""A replay is saved and loaded a file at a time: beside it, only a few files' rows are in memory."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from large_replay import MadeFrames, full_replay
from traced_memory import peak_memory

from cleanrl.utils.replay import saved_replay
from cleanrl.utils.replay.ring import ReplayBuffer

PONG, NUM_ACTIONS = "PongNoFrameskip-v4", 6
NUM_FILES, ROWS_PER_FILE = 30, 100
NUM_ROWS, BYTES_PER_FILE = NUM_FILES * ROWS_PER_FILE, ROWS_PER_FILE * 84 * 84


def saving(folder: Path) -> Callable[[], None]:
    saved_replay.rows_between = partial(saved_replay.rows_between, rows_per_file=ROWS_PER_FILE)
    return partial(saved_replay.save_replay, folder, full_replay(NUM_ROWS), PONG, NUM_ACTIONS, "a run")


def loading(folder: Path) -> Callable[[], None]:
    def compute_q_values(observations: np.ndarray) -> np.ndarray:
        return np.zeros((len(observations), NUM_ACTIONS), np.float32)

    args = SimpleNamespace(teacher_replay_path=folder, env_id=PONG, batch_size=1, n_step=1)
    replay = ReplayBuffer(NUM_ROWS, 1, MadeFrames, NUM_ACTIONS)
    return partial(saved_replay.load_replay, args, replay, compute_q_values, checkpoint=lambda: None)


def test_saving_and_loading_take_the_memory_of_a_few_files(tmp_path):
    assert peak_memory(saving, tmp_path) < 4 * BYTES_PER_FILE
    assert len(list(tmp_path.glob("rows-*.zst"))) == NUM_FILES
    # With the stacks of a file's observations, of four frames each.
    assert peak_memory(loading, tmp_path) < 10 * BYTES_PER_FILE
