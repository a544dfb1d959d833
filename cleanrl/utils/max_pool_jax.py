"""The Impala-CNN's max-pooling, whose gradient is fast in JAX on a CPU, too."""

import jax.numpy as jnp
from jax import Array, lax


def max_pool(x: Array, as_torch: bool = False) -> Array:
    """3×3 maximum with stride 2 and SAME padding (PyTorch's: 1) of finite x (batch, height, width, channels).

    The same as `nn.max_pool`, in its gradient too, which XLA would compute several times slower on a CPU.
    """
    for axis in (2, 1):
        padding = [(0, 0)] * 4
        padding[axis] = (1 if as_torch else x.shape[axis] % 2, 1)
        length = (x.shape[axis] + 1) // 2
        wider = jnp.pad(x, padding, constant_values=-jnp.inf)
        first, second, third = (lax.slice_in_dim(wider, i, i + 2 * length - 1, 2, axis) for i in range(3))
        # Of equal numbers the first gets the whole gradient; jnp.maximum would split it.
        x = jnp.where(first >= second, first, second)
        x = jnp.where(x >= third, x, third)
    return x
