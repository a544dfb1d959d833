"""The replay buffer's frames as one tensor of PyTorch."""

import numpy as np
import torch
from torch import Tensor


class TorchFrames:
    """Frames uint8 (num_slots, 84, 84) on a device."""

    def __init__(self, num_slots: int, device: torch.device):
        self.frames = torch.empty((num_slots, 84, 84), dtype=torch.uint8, device=device)

    def write(self, slots: np.ndarray, frames: np.ndarray) -> None:
        self.frames[self._on_device(slots)] = self._on_device(frames)

    def take(self, slots: np.ndarray) -> Tensor:
        return self.frames[self._on_device(slots)]

    def read(self, slots: np.ndarray) -> np.ndarray:
        return self.take(slots).cpu().numpy()

    def _on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.frames.device)

    @staticmethod
    def host() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def free_memory(device: torch.device) -> int | None:
        """Bytes that are free on a GPU; None for the host."""
        return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
