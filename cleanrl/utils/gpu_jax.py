"""Which device JAX trains on, and how much of its memory is free."""

import ctypes
import os
from typing import Any

import jax

from cleanrl.utils.devices import first_use_of_gpu


def choose_device(args: Any) -> jax.Device:
    """The GPU if there is one and it is wanted, else the CPU. Must come before JAX computes anything.

    XLA launches what it compiled as CUDA graphs of its own, unless `args.cuda_graphs` is off.

    Raises:
        SystemExit: with a one-line error, if there is a GPU that cannot be used.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves room for another run
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # its older name, which forbids the new one
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")  # JAX's 0.75 would waste a small GPU
    flags = os.environ.get("XLA_FLAGS", "")
    if args.torch_deterministic and "--xla_gpu_deterministic_ops" not in flags:
        flags += " --xla_gpu_deterministic_ops=true"
    if not args.cuda_graphs and "--xla_gpu_enable_command_buffer" not in flags:
        flags += " --xla_gpu_enable_command_buffer="
    os.environ["XLA_FLAGS"] = flags.strip()
    # Otherwise, on a CPU, up to 32 calls of `learn` are queued, and a stopped run waits for all of them.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if not args.cuda:
        jax.config.update("jax_platforms", "cpu")
    with first_use_of_gpu():
        device = jax.devices()[0]
        jax.device_put(0, device).block_until_ready()
    return device


def free_memory(gpu: jax.Device) -> int:
    """Bytes of a GPU that JAX can still take: `memory_stats` does not know what other processes took."""
    statistics = gpu.memory_stats()
    allowed = statistics["bytes_limit"] - statistics["bytes_in_use"]
    free = free_in_driver(gpu.local_hardware_id)
    return allowed if free is None else min(allowed, free)


def free_in_driver(ordinal: int) -> int | None:
    """Bytes of a GPU that no process has taken, as its driver says; None if the driver does not say."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    if (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), ordinal)
        or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    ):
        return None
    failed = driver.cuCtxPushCurrent_v2(context)
    if not failed:
        failed = driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        driver.cuCtxPopCurrent_v2(ctypes.byref(context))
    driver.cuDevicePrimaryCtxRelease_v2(device)
    return None if failed else free.value
