"""What to tell a user whose GPU cannot be used, or whose GPU or host has too little memory."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def first_use_of_gpu() -> Iterator[None]:
    """Within it the framework touches the GPU for the first time.

    Raises:
        SystemExit: with a one-line error, if it cannot.
    """
    try:
        yield
    except (RuntimeError, AssertionError) as error:  # JAX asserts that a platform of JAX_PLATFORMS is there
        reason = str(error).partition("\n")[0] or "JAX_PLATFORMS names none that is there"
        raise SystemExit(
            f"error: the GPU cannot be used ({reason}); use --no-cuda or free its memory"
        ) from None


def memory_shortage(error: BaseException) -> str | None:
    """What to say of an error that means that the host or a GPU has no more memory; None for any other."""
    text = str(error).partition("\n")[0].rstrip(".")
    # CUDA, cuBLAS and cuDNN, XLA, PyTorch on a CPU
    signs = ("out of memory", "alloc_failed", "resource_exhausted", "can't allocate memory")
    if isinstance(error, MemoryError):
        text = f"the host is out of memory ({text})"
    elif not isinstance(error, RuntimeError) or not any(sign in text.lower() for sign in signs):
        return None
    return (
        f"{text}; close other programs, or use --buffer-device cpu or a smaller --buffer-size or --batch-size"
    )
