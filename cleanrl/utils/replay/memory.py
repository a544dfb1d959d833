"""How much memory there is, and how to say it."""

from pathlib import Path

import psutil

# What a run takes beside its replay buffer, measured and rounded up.
PROCESS_BYTES, WORKER_BYTES, GPU_BYTES = 1_500_000_000, 150_000_000, 2_000_000_000
CGROUP_FILES = [  # (limit, usage) of a container or a batch job: version 2, version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
]


def available_host_memory() -> int:
    """Bytes this process can still take: what the machine has, or less if its control group allows less."""
    available = psutil.virtual_memory().available
    for limit_file, usage_file in CGROUP_FILES:
        try:
            limit, usage = Path(limit_file).read_text(), Path(usage_file).read_text()
            available = min(available, max(int(limit) - int(usage), 0))
        except (OSError, ValueError):  # no such control group, or no limit ("max")
            continue
    return available


def gigabytes(num_bytes: float) -> str:
    """7_056_000_000 -> "7.06 GB" (10^9 bytes)."""
    return f"{num_bytes / 1e9:.2f} GB"


def place_replay_buffer(
    choice: str, capacity: int, num_bytes: int, num_workers: int, free_gpu: int | None
) -> str:
    """Says what the run will need and decides where the replay buffer lies: "cpu" or "cuda".

    Args:
        choice: "auto" (on the training device if it fits, else in host memory), "cpu" or "cuda".
        capacity: frames of the largest buffer of the run, to say what would fit.
        num_bytes: what it takes.
        num_workers: worker processes of the run.
        free_gpu: free bytes of the training device; None if that is the host.

    Raises:
        SystemExit: with one line, if it does not fit.
    """
    beside = {"cpu": PROCESS_BYTES + num_workers * WORKER_BYTES, "cuda": GPU_BYTES}
    free = {"cpu": available_host_memory() - beside["cpu"]}
    if free_gpu is not None:
        free["cuda"] = free_gpu - beside["cuda"]
    place = choice
    if choice == "auto":
        place = "cuda" if free.get("cuda", 0) >= num_bytes else "cpu"
    if place not in free:
        raise SystemExit("error: --buffer-device cuda needs a GPU that can be used; use --buffer-device cpu")
    memory = {"cpu": "host memory", "cuda": "GPU memory"}[place]
    print(
        f"memory: {gigabytes(num_bytes)} of {memory} for the replay buffer, about {gigabytes(beside[place])} "
        f"for all else; {gigabytes(free[place] + beside[place])} are free"
    )
    if num_bytes > free[place]:
        fitting = int(0.99 * capacity * max(free[place], 0) / num_bytes)
        remedies = [f"--buffer-size {fitting}"] if fitting else []
        remedies += ["--buffer-device cpu"] if place == "cuda" and num_bytes <= free["cpu"] else []
        lacking = gigabytes(num_bytes - free[place])
        raise SystemExit(
            f"error: a replay buffer of {capacity:,} frames needs {lacking} more {memory} than there is; "
            + (f"use {' or '.join(remedies)}" if remedies else "free some memory first")
        )
    return place
