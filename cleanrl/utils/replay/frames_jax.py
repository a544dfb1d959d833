"""The replay buffer's frames as one JAX array. Nothing is moved to or from a device implicitly."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cleanrl.utils.gpu_jax import free_memory
from cleanrl.utils.replay.ring import Batch


class JaxFrames:
    """Frames uint8 (num_slots, 84, 84) on a device, updated in place."""

    def __init__(self, num_slots: int, device: jax.Device):
        self.frames = jnp.zeros((num_slots, 84, 84), jnp.uint8, device=device)

    def write(self, slots: np.ndarray, frames: np.ndarray) -> None:
        frames = padded(frames)
        beyond = len(self.frames) + np.arange(len(frames))  # where a write is dropped
        slots = np.concatenate([slots, beyond])[: len(frames)]
        self.frames = _write(self.frames, *jax.device_put((slots, frames), self.frames.device))

    def read(self, slots: np.ndarray) -> np.ndarray:
        stacks = jax.device_put(padded(slots), self.frames.device)
        return jax.device_get(_read(self.frames, stacks))[: len(slots)]

    def place(self, batch: Batch, device: jax.Device) -> tuple[Array, Batch]:
        """The frames on `device`, and the batch with its stacks in them."""
        if device == self.frames.device:
            return self.frames, jax.device_put(batch, device)
        slots = np.stack([batch.stacks, batch.next_stacks])
        copies = _read(self.frames, jax.device_put(slots.reshape(-1), self.frames.device))
        stacks, next_stacks = np.arange(slots.size).reshape(slots.shape)
        return jax.device_put((copies, batch._replace(stacks=stacks, next_stacks=next_stacks)), device)

    @staticmethod
    def host() -> jax.Device:
        try:
            return jax.devices("cpu")[0]
        except RuntimeError:
            raise SystemExit(
                "error: JAX_PLATFORMS forbids a replay buffer in host memory; add ,cpu to its value"
            ) from None

    @staticmethod
    def free_memory(device: jax.Device) -> int | None:
        """Bytes of a GPU that are free, whoever else uses it; None for the host."""
        return None if device.platform == "cpu" else free_memory(device)


@partial(jax.jit, donate_argnums=0)
def _write(all_frames: Array, slots: Array, frames: Array) -> Array:
    return all_frames.at[slots].set(frames, mode="drop", unique_indices=True)


@jax.jit
def _read(all_frames: Array, slots: Array) -> Array:
    return all_frames.at[slots].get(mode="promise_in_bounds")


def padded(values: np.ndarray) -> np.ndarray:
    """Lengthens an array (n, …) to a power of two, as XLA compiles a program for every new length."""
    num_missing = (1 << (len(values) - 1).bit_length()) - len(values)
    if num_missing == 0:
        return values
    return np.pad(values, [(0, num_missing)] + [(0, 0)] * (values.ndim - 1))
