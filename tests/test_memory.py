"""Where the replay buffer goes, and what is said if it fits nowhere."""

import re
from types import SimpleNamespace

import pytest
from large_replay import MadeFrames

from cleanrl import dqn_atari, qdagger_dqn_atari_impalacnn
from cleanrl.utils.devices import memory_shortage
from cleanrl.utils.run import memory
from cleanrl.utils.run.memory import (
    GPU_BYTES,
    PROCESS_BYTES,
    WORKER_BYTES,
    place_replay_buffer,
    plan_replay,
    plan_replays,
)

GB = 10**9
BESIDE = PROCESS_BYTES + 2 * WORKER_BYTES


@pytest.fixture
def place(monkeypatch):
    """Asks for a buffer of 7 GB for 1,000,000 frames, with so much memory free beside what the run needs."""

    def ask(choice: str, host_gb: float, gpu_gb: float | None) -> str:
        monkeypatch.setattr(memory, "available_host_memory", lambda: int(host_gb * GB) + BESIDE)
        free_gpu = None if gpu_gb is None else int(gpu_gb * GB) + GPU_BYTES
        return place_replay_buffer(choice, 1_000_000, 7 * GB, num_workers=2, free_gpu=free_gpu)

    return ask


@pytest.mark.parametrize(
    ("choice", "host_gb", "gpu_gb", "expected"),
    [
        ("auto", 8, None, "cpu"),
        ("auto", 8, 8, "cuda"),
        ("auto", 8, 6, "cpu"),
        ("auto", 0, 8, "cuda"),
        ("cpu", 8, 80, "cpu"),
        ("cuda", 0, 8, "cuda"),
    ],
)
def test_the_buffer_goes_where_it_fits(place, choice, host_gb, gpu_gb, expected):
    assert place(choice, host_gb, gpu_gb) == expected


@pytest.mark.parametrize(
    ("choice", "host_gb", "gpu_gb", "words"),
    [
        ("auto", 3.5, None, ["1,000,000 frames needs 3.50 GB more host memory", "--buffer-size 495000"]),
        ("auto", 3.5, 6, ["3.50 GB more host memory"]),
        ("cuda", 8, 3.5, ["3.50 GB more GPU memory", "--buffer-size 495000 or --buffer-device cpu"]),
        ("cuda", 8, None, ["--buffer-device cuda needs a usable GPU", "use --buffer-device cpu"]),
        ("cpu", -1, None, ["8.00 GB more host memory", "free some memory"]),
    ],
)
def test_what_fits_nowhere_is_refused_with_a_remedy(place, choice, host_gb, gpu_gb, words):
    with pytest.raises(SystemExit) as stop:
        place(choice, host_gb, gpu_gb)
    message = str(stop.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


class PlacedFrames(MadeFrames):
    """As of a framework whose GPU has as much room as 100,000 frames need."""

    def __init__(self, num_slots: int, device: str):
        super().__init__(num_slots)
        self.device = device

    @staticmethod
    def host() -> str:
        return "host"

    @staticmethod
    def free_memory(device: str) -> int | None:
        return GPU_BYTES + 100_000 * 7200 if device == "gpu" else None


@pytest.mark.parametrize(
    ("buffer_size", "device", "expected"),
    [(100_000, "gpu", "gpu"), (110_000, "gpu", "host"), (100_000, "host", "host")],
)
def test_the_frames_lie_on_the_training_device_if_they_fit_else_on_the_host(buffer_size, device, expected):
    qdagger_args = qdagger_dqn_atari_impalacnn.Args(buffer_size=buffer_size)
    planned = [plan_replay(dqn_atari.Args(buffer_size=buffer_size), 4, PlacedFrames, device)]
    planned += plan_replays(qdagger_args, 18, PlacedFrames, device)
    assert len(planned) == 3
    for replay in planned:
        assert replay.frames is None
        replay.allocate()
        assert replay.frames.device == expected
        assert buffer_size <= replay.frames.num_slots < buffer_size + 100


@pytest.mark.parametrize(("device", "made_at_once"), [("gpu", 1), ("host", 0)])
def test_qdaggers_buffers_share_their_frames_which_are_taken_of_a_gpu_at_once(device, made_at_once):
    """So that another run is not told that this memory is free."""
    made = []

    class CountedFrames(PlacedFrames):
        def __init__(self, num_slots: int, device: str):
            super().__init__(num_slots, device)
            made.append(self)

    args = qdagger_dqn_atari_impalacnn.Args(teacher_steps=1_000, total_timesteps=2_000)
    of_teacher, of_student = plan_replays(args, 18, CountedFrames, device)
    assert len(made) == made_at_once
    of_teacher.allocate()
    of_teacher.free()
    of_student.allocate()
    assert made == [of_student.frames]
    assert made[0].num_slots == of_student.num_envs * of_student.num_slots > of_teacher.num_slots * 8


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory. Tried to allocate"), MemoryError()])
def test_frames_that_another_run_took_meanwhile_are_a_one_line_error(error):
    class TakenFrames(PlacedFrames):
        def __init__(self, num_slots: int, device: str):
            raise error

    args = dqn_atari.Args(buffer_size=1_000)
    with pytest.raises(SystemExit, match=r"^error: .*memory.*use --buffer-device cpu or a smaller"):
        plan_replay(args, 4, TakenFrames, "gpu")


@pytest.mark.parametrize(
    ("error", "is_shortage"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 7.00 GiB.\nMore"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes."), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (OSError("out of memory"), False),
    ],
)
def test_errors_that_mean_that_memory_is_short_are_told_in_one_line(error, is_shortage):
    shortage = memory_shortage(error)
    assert (shortage is not None) == is_shortage
    assert not is_shortage or ("\n" not in shortage and "--buffer-device cpu" in shortage)


@pytest.mark.parametrize(
    ("teacher_steps", "total_timesteps", "largest"),
    [(20_000, 10_000, 22_000), (10_000, 20_000, 22_000), (10_000, 100_000, 30_000)],
)
def test_the_larger_of_qdaggers_buffers_is_planned_for_which_holds_its_steps_at_most(
    capsys, teacher_steps, total_timesteps, largest
):
    options = {"teacher_steps": teacher_steps, "total_timesteps": total_timesteps, "buffer_size": 30_000}
    plan_replays(qdagger_dqn_atari_impalacnn.Args(**options), 18, PlacedFrames, "host")
    stated = float(re.search(r"memory: ([\d.]+) GB of host memory", capsys.readouterr().out)[1])
    assert stated == pytest.approx(largest * 7137 / GB, abs=0.011)


def test_the_size_that_is_advised_fits(place, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        place("auto", 3.5, None)
    advised = int(re.search(r"use --buffer-size (\d+)", str(stop.value)).group(1))
    assert place_replay_buffer("auto", advised, 7000 * advised, num_workers=2, free_gpu=None) == "cpu"


@pytest.fixture
def control_groups(tmp_path, monkeypatch):
    """The folder of control groups, with this process in the ones that are given."""
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=100_000))

    def limit(own: str, folder: str, version: int, limit: str, usage: int, cached: int) -> int:
        (tmp_path / "own").write_text(own)
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        names = {
            1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            2: ("memory.max", "memory.current", "inactive_file"),
        }[version]
        contents = (f"{limit}\n", f"{usage}\n", f"anon 1\n{names[2]} {cached}\n")
        for name, content in zip((*names[:2], "memory.stat"), contents, strict=True):
            (tmp_path / folder / name).write_text(content)
        return memory.available_host_memory()

    return limit


def test_the_limit_of_a_container_counts(control_groups):
    assert control_groups("0::/\n", "", 2, "max", 1000, 0) == 100_000
    assert control_groups("0::/\n", "", 2, "5000", 1000, 0) == 4000
    assert control_groups("0::/\n", "", 2, "5000", 6000, 0) == 0


def test_cached_files_count_as_free(control_groups):
    assert control_groups("0::/\n", "", 2, "5000", 4500, 4000) == 4500


@pytest.mark.parametrize(
    ("own", "version", "place"),
    [
        ("0::/slurm/job_1/step_0\n", 2, "slurm/job_1"),
        ("5:cpu:/\n4:memory:/slurm/job_1/step_0\n", 1, "memory/slurm/job_1"),
        ("4:memory:/docker/1\n", 1, "memory"),  # which is all that a container sees
    ],
)
def test_the_limit_of_a_batch_job_counts(control_groups, own, version, place):
    assert control_groups(own, f"{place}_2", version, "2000", 1000, 0) == 100_000  # of another job
    assert control_groups(own, place, version, "5000", 1000, 500) == 4500


def test_without_control_groups_the_machines_memory_counts(control_groups, tmp_path):
    control_groups("0::/\n", "", 2, "5000", 1000, 0)
    (tmp_path / "own").unlink()
    assert memory.available_host_memory() == 100_000
