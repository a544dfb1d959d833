import os
import signal
import tempfile
from collections.abc import Iterator
from unittest import mock

import pytest

# Before any test module imports PyTorch: see the training script.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# What one JAX process compiled, the next one reads: most of a short run's time. Gone with the session, unless
# the caller has a folder for it.
compiled_programs = tempfile.TemporaryDirectory(prefix="jax_compiled_")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", compiled_programs.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# A shell that starts the tests in the background has them, and what they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """The JAX scripts set XLA's variables when they start; here, they start many times in one process."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tensors so small that PyTorch's threads only wait for each other."""
    import torch  # not before the variables above are set

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
