"""Replay buffers of any size: their frames are made when they are read."""

import numpy as np

from cleanrl.utils.replay.ring import ReplayBuffer


class MadeFrames:
    """Frames that are all of one grey, by their slot; what is written is dropped."""

    def __init__(self, num_slots: int):
        self.num_slots = num_slots

    def write(self, slots: np.ndarray, frames: np.ndarray) -> None:
        assert frames.shape == (len(slots), 84, 84)

    def read(self, slots: np.ndarray) -> np.ndarray:
        greys = (slots % 256).astype(np.uint8)
        return np.broadcast_to(greys[..., None, None], (*slots.shape, 84, 84)).copy()


def full_replay(num_rows: int, frames_type: type[MadeFrames] = MadeFrames) -> ReplayBuffer:
    """Of one environment, with so many rows."""
    replay = ReplayBuffer(num_rows - 4, 1, frames_type)
    replay.allocate()
    replay.heads[:] = num_rows - 1
    return replay
