"""The replay buffer's frames as one PyTorch tensor."""

import numpy as np
import torch
from torch import Tensor

from cleanrl.utils.gpu_torch import upload
from cleanrl.utils.replay.ring import Batch


class TorchFrames:
    """Frames uint8 (num_slots, 84, 84) on a device."""

    def __init__(self, num_slots: int, device: torch.device):
        self.frames = torch.empty((num_slots, 84, 84), dtype=torch.uint8, device=device)
        self.copies = torch.empty(0)  # of a batch's frames, on the device that wants them

    def write(self, slots: np.ndarray, frames: np.ndarray) -> None:
        slots, frames = upload([slots, frames], self.frames.device)
        self.frames[slots] = frames

    def read(self, slots: np.ndarray) -> np.ndarray:
        (slots,) = upload([slots], self.frames.device)
        return self.frames[slots].cpu().numpy()

    def place(self, batch: Batch, device: torch.device) -> tuple[Tensor, Batch]:
        """The frames on `device`, in one place for all batches of a size; and the batch, its stacks there."""
        if device == self.frames.device:
            return self.frames, batch
        slots = np.stack([batch.stacks, batch.next_stacks])
        copies = self.frames[torch.from_numpy(slots.reshape(-1))]
        if self.copies.shape != copies.shape:
            self.copies = torch.empty_like(copies, device=device)
        self.copies.copy_(copies.pin_memory() if device.type == "cuda" else copies, non_blocking=True)
        stacks, next_stacks = np.arange(slots.size).reshape(slots.shape)
        return self.copies, batch._replace(stacks=stacks, next_stacks=next_stacks)

    @staticmethod
    def host() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def free_memory(device: torch.device) -> int | None:
        """Bytes that are free on a GPU, whoever else uses it; None for the host."""
        return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
