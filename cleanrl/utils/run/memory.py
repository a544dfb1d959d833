"""How much memory the replay buffers take, whether there is that much, and where they are kept."""

import math
from contextlib import suppress
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import psutil

from cleanrl.utils.devices import memory_shortage
from cleanrl.utils.games.parallel_envs import available_cores
from cleanrl.utils.replay.ring import Frames, ReplayBuffer
from cleanrl.utils.replay.saved_replay import open_replay
from cleanrl.utils.run.checkpoint import replay_sizes

# What a run takes besides its replay buffer, measured and rounded up.
PROCESS_BYTES, WORKER_BYTES, GPU_BYTES = 1_500_000_000, 150_000_000, 2_000_000_000
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
CGROUP_FILES = [  # limit, usage, and the file cache in it, a line of memory.stat: version 2, version 1
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
]
SLOTS_PER_STEP = 1.1  # the observation that ends an episode has a slot too


def plan_replay(args: Any, num_actions: int, frames_type: type, device: Any) -> ReplayBuffer:
    """DQN's replay buffer, without memory yet, after stating how much it will take.

    Args:
        args: the script's.
        num_actions: of the game.
        frames_type: TorchFrames or JaxFrames.
        device: where the networks are trained.

    Raises:
        SystemExit: with a one-line error, if it does not fit.
    """
    sizes = [(min(args.buffer_size, math.ceil(SLOTS_PER_STEP * args.total_timesteps)), args.num_envs)]
    return _plan(args, sizes, frames_type, device, num_actions=num_actions)[0]


def plan_replays(args: Any, num_actions: int, frames_type: type, device: Any) -> list[ReplayBuffer]:
    """QDagger's two replay buffers, the teacher's and the student's: as `plan_replay`, for the larger one.

    Only one of them may take memory at a time. The teacher's is as large as the saved replay, if any. A
    resumed run that has loaded it does not look for it again: the teacher's buffer is then as large as the
    one in the checkpoint or, if the online phase has begun and it is no longer used, as the student's.

    Raises:
        SystemExit: with a one-line error, if it does not fit, or the saved replay cannot be used.
    """
    frames, num_envs = math.ceil(SLOTS_PER_STEP * args.teacher_steps), args.num_envs
    if args.teacher_replay_path:
        taken_in = replay_sizes(Path(args.resume)) if args.resume else {}
        if size := taken_in.get("teacher_replay") or taken_in.get("student_replay"):
            frames, num_envs = size
        else:
            saved = open_replay(args, num_actions)
            frames, num_envs = saved.capacity, saved.num_envs
    sizes = [
        (min(args.buffer_size, frames), num_envs),
        (min(args.buffer_size, math.ceil(SLOTS_PER_STEP * args.total_timesteps)), args.num_envs),
    ]
    settings = {"num_q_values": num_actions, "n_step": args.n_step, "num_actions": num_actions}
    return _plan(args, sizes, frames_type, device, **settings)


def _plan(
    args: Any, sizes: list[tuple[int, int]], frames_type: type, device: Any, **settings: Any
) -> list[ReplayBuffer]:
    @cache
    def the_frames() -> Frames:  # only one of the buffers has them at a time
        return frames_type(max(buffer.num_envs * buffer.num_slots for buffer in buffers), frames_device)

    print(f"training on {device}")
    buffers = [
        ReplayBuffer(*size, lambda num_slots: the_frames(), gamma=args.gamma, **settings) for size in sizes
    ]
    largest = max(buffers, key=lambda buffer: buffer.num_bytes)
    place = place_replay_buffer(
        args.buffer_device,
        largest.capacity,
        largest.num_bytes,
        num_workers=min(args.num_envs, available_cores()),
        free_gpu=frames_type.free_memory(device),
    )
    frames_device = device if place == "cuda" else frames_type.host()
    if place == "cuda":
        try:
            the_frames()  # before another run is told that this memory is free
        except (RuntimeError, MemoryError) as error:
            if shortage := memory_shortage(error):
                raise SystemExit(f"error: {shortage}") from None
            raise
    return buffers


def available_host_memory() -> int:
    """Bytes this process can still take: what the machine has, or less if a control group allows less."""
    available = psutil.virtual_memory().available
    for group, (limit_file, usage_file, cached) in product(_control_groups(), CGROUP_FILES):
        try:
            limit, usage = int((group / limit_file).read_text()), int((group / usage_file).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            # Cached files give way to what the process takes.
            available = min(available, max(limit - usage + int(stat[cached]), 0))
        except (OSError, ValueError, KeyError):  # no such control group, or no limit ("max")
            continue
    return available


def _control_groups() -> list[Path]:
    """Folders of the control groups of this process, as of a container or batch job, and of those around."""
    groups = []
    with suppress(OSError):
        for line in OWN_CGROUPS.read_text().splitlines():  # as 4:memory:/slurm/job_1, or 0::/ of version 2
            _, controllers, path = line.split(":", 2)
            root = CGROUPS / controllers
            group = root / path.lstrip("/")
            groups += [folder for folder in (group, *group.parents) if folder.is_relative_to(root)]
    return groups


def gigabytes(num_bytes: float) -> str:
    """7_056_000_000 -> "7.06 GB" (10^9 bytes)."""
    return f"{num_bytes / 1e9:.2f} GB"


def place_replay_buffer(
    choice: str, capacity: int, num_bytes: int, num_workers: int, free_gpu: int | None
) -> str:
    """States what the run will need and decides where the replay buffer lies: "cpu" or "cuda".

    Args:
        choice: "auto" (on the training device if it fits, else in host memory), "cpu" or "cuda".
        capacity: frames of the largest buffer of the run, to say what would fit.
        num_bytes: what it takes.
        num_workers: worker processes of the run.
        free_gpu: free bytes of the training device; None if that is the host.

    Raises:
        SystemExit: with a one-line error, if it does not fit.
    """
    beside = {"cpu": PROCESS_BYTES + num_workers * WORKER_BYTES, "cuda": GPU_BYTES}
    free = {"cpu": available_host_memory() - beside["cpu"]}
    if free_gpu is not None:
        free["cuda"] = free_gpu - beside["cuda"]
    place = choice
    if choice == "auto":
        place = "cuda" if free.get("cuda", 0) >= num_bytes else "cpu"
    if place not in free:
        raise SystemExit("error: --buffer-device cuda needs a usable GPU; use --buffer-device cpu")
    memory = {"cpu": "host memory", "cuda": "GPU memory"}[place]
    print(
        f"memory: {gigabytes(num_bytes)} of {memory} for the replay buffer, about {gigabytes(beside[place])} "
        f"for everything else; {gigabytes(free[place] + beside[place])} is free"
    )
    if num_bytes > free[place]:
        fitting = int(0.99 * capacity * max(free[place], 0) / num_bytes)
        remedies = [f"--buffer-size {fitting}"] if fitting else []
        remedies += ["--buffer-device cpu"] if place == "cuda" and num_bytes <= free["cpu"] else []
        lacking = gigabytes(num_bytes - free[place])
        raise SystemExit(
            f"error: a replay buffer of {capacity:,} frames needs {lacking} more {memory} than is free; "
            + (f"use {' or '.join(remedies)}" if remedies else "free some memory first")
        )
    return place
