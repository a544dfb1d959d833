import numpy as np

from cleanrl.utils.replay.rows import ROW_SHAPES


class LargeReplay:
    """Stands in for a replay buffer of one full ring: its rows are made when they are read."""

    def __init__(self, num_rows: int):
        self.num_slots, self.heads = num_rows, np.array([num_rows - 1])

    def read(self, slots: np.ndarray) -> dict[str, np.ndarray]:
        rows = {
            name: np.zeros((len(slots), *shape), dtype)
            for name, (dtype, shape) in ROW_SHAPES.items()
            if name not in ("envs", "positions")
        }
        rows["frames"] += (slots % 256).astype(np.uint8)[:, None, None]
        return rows
