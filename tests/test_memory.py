"""Where the replay buffer goes, and what is said if it fits nowhere."""

import re

import pytest

from cleanrl.utils.replay import memory
from cleanrl.utils.replay.memory import GPU_BYTES, PROCESS_BYTES, WORKER_BYTES, place_replay_buffer

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
        (
            "auto",
            3.5,
            None,
            ["1,000,000 frames needs 3.50 GB more host memory", "use --buffer-size 495000"],
        ),
        ("auto", 3.5, 6, ["3.50 GB more host memory"]),
        ("cuda", 8, 3.5, ["3.50 GB more GPU memory", "--buffer-size 495000 or --buffer-device cpu"]),
        ("cuda", 8, None, ["--buffer-device cuda needs a GPU", "use --buffer-device cpu"]),
        ("cpu", -1, None, ["8.00 GB more host memory", "free some memory"]),
    ],
)
def test_what_fits_nowhere_is_refused_with_a_remedy(place, choice, host_gb, gpu_gb, words):
    with pytest.raises(SystemExit) as stop:
        place(choice, host_gb, gpu_gb)
    message = str(stop.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_the_size_that_is_advised_fits(place, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        place("auto", 3.5, None)
    advised = int(re.search(r"use --buffer-size (\d+)", str(stop.value)).group(1))
    assert place_replay_buffer("auto", advised, 7000 * advised, num_workers=2, free_gpu=None) == "cpu"


def test_the_limit_of_a_container_counts(monkeypatch, tmp_path):
    limit, usage = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(memory, "CGROUP_FILES", [(str(limit), str(usage))])
    unlimited = memory.available_host_memory()
    limit.write_text("max\n")
    usage.write_text("1000\n")
    assert memory.available_host_memory() == pytest.approx(unlimited, rel=0.2)
    limit.write_text("5000\n")
    assert memory.available_host_memory() == 4000
