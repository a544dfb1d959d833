"""The replay buffer's frames as one array of JAX."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class JaxFrames:
    """Frames uint8 (num_slots, 84, 84) on a device, updated in place."""

    def __init__(self, num_slots: int, device: jax.Device):
        self.frames = jnp.zeros((num_slots, 84, 84), jnp.uint8, device=device)

    def write(self, slots: np.ndarray, frames: np.ndarray) -> None:
        beyond = len(self.frames)  # where a write is dropped
        self.frames = _write(self.frames, padded(slots, fill=beyond), padded(frames))

    def take(self, slots: np.ndarray) -> Array:
        return _take(self.frames, slots)

    def read(self, slots: np.ndarray) -> np.ndarray:
        return np.asarray(self.take(padded(slots)))[: len(slots)]

    @staticmethod
    def host() -> jax.Device:
        return jax.devices("cpu")[0]

    @staticmethod
    def free_memory(device: jax.Device) -> int | None:
        """Bytes of a GPU that JAX can still take; None for the host."""
        if device.platform == "cpu":
            return None
        statistics = device.memory_stats()
        return statistics["bytes_limit"] - statistics["bytes_in_use"]


@partial(jax.jit, donate_argnums=0)
def _write(all_frames: Array, slots: Array, frames: Array) -> Array:
    return all_frames.at[slots].set(frames, mode="drop")


@jax.jit
def _take(all_frames: Array, slots: Array) -> Array:
    return all_frames.at[slots].get(mode="promise_in_bounds")


def padded(values: np.ndarray, fill: int = 0) -> np.ndarray:
    """Lengthens an array (n, …) to a power of two, as XLA compiles a program for every new length."""
    num_missing = (1 << (len(values) - 1).bit_length()) - len(values)
    if num_missing == 0:
        return values
    return np.pad(values, [(0, num_missing)] + [(0, 0)] * (values.ndim - 1), constant_values=fill)
