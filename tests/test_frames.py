"""The replay buffer's frames, in PyTorch and in JAX, against an array of NumPy."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
import pytest
import torch
from replays import FRAMES, FramesType

from cleanrl.utils.replay import frames_jax
from cleanrl.utils.replay.frames_jax import JaxFrames
from cleanrl.utils.replay.frames_torch import TorchFrames
from cleanrl.utils.replay.ring import Batch


@pytest.fixture(params=FRAMES)
def frames_type(request) -> FramesType:
    return FRAMES[request.param]


def random_frames(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(256, size=(*shape, 84, 84), dtype=np.uint8)


def exercise(frames_type: FramesType, num_slots: int, num_lengths: int) -> None:
    """Writes and reads every number of frames below `num_lengths`, and compares."""
    rng, frames = np.random.default_rng(0), frames_type(num_slots, frames_type.host())
    expected = random_frames(rng, num_slots)
    frames.write(np.arange(num_slots), expected)
    for length in range(num_lengths):
        slots = rng.permutation(num_slots)[:length]
        expected[slots] = new = random_frames(rng, length)
        frames.write(slots, new)
        np.testing.assert_array_equal(frames.read(slots), new)
    np.testing.assert_array_equal(frames.read(np.arange(num_slots)), expected)
    stacks = rng.integers(num_slots, size=24)
    np.testing.assert_array_equal(frames.read(stacks), expected[stacks])


def test_what_was_written_is_read_and_nothing_else_changes(frames_type):
    exercise(frames_type, num_slots=20, num_lengths=18)


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_a_batch_finds_its_frames_on_the_device_that_wants_them(is_elsewhere):
    """For JAX see test_reproducible.py."""
    rng, frames = np.random.default_rng(0), TorchFrames(40, TorchFrames.host())
    all_frames = random_frames(rng, 40)
    frames.write(np.arange(40), all_frames)
    device = torch.device("cpu", 0) if is_elsewhere else TorchFrames.host()  # not equal to one without index
    places = set()
    for _ in range(3):
        stacks, next_stacks = rng.integers(40, size=(2, 5, 4))
        nothing = np.zeros(5, np.float32)
        batch = Batch(stacks, np.zeros(5, np.int64), nothing, next_stacks, nothing, nothing)
        placed, of_placed = frames.place(batch, device)
        np.testing.assert_array_equal(placed.numpy()[of_placed.stacks], all_frames[stacks])
        np.testing.assert_array_equal(placed.numpy()[of_placed.next_stacks], all_frames[next_stacks])
        places.add((placed.data_ptr(), len(placed)))
    assert places == {(placed.data_ptr(), 2 * 5 * 4 if is_elsewhere else 40)}


@contextmanager
def compiled_programs() -> Iterator[list[str]]:
    """The programs that JAX compiles, or loads from its cache on disk, meanwhile."""
    programs = []

    def listen(event: str, duration: float, **details) -> None:
        if event.endswith("backend_compile_duration"):
            programs.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield programs
    jax.monitoring.unregister_event_duration_listener(listen)


def test_jax_compiles_a_few_programs_for_any_number_of_frames():
    num_slots = 61  # as in no other test
    with compiled_programs() as programs:
        exercise(JaxFrames, num_slots, num_lengths=num_slots)
        # To write and to read 1, 2, 4, … 64 of them; to make them, and to take the stacks.
        assert 10 < len(programs) <= 2 * 7 + 4
        exercise(JaxFrames, num_slots, num_lengths=num_slots)
        assert len(programs) <= 2 * 7 + 4


def test_jax_writes_in_place():
    frames = JaxFrames(5000, JaxFrames.host())
    old, where = frames.frames, frames.frames.unsafe_buffer_pointer()
    for length in (1, 2, 3):
        frames.write(np.arange(length), np.ones((length, 84, 84), np.uint8))
        assert frames.frames.unsafe_buffer_pointer() == where
    assert old.is_deleted()
    # Nor is it copied to and fro on the way.
    program = frames_jax._write.lower(frames.frames, np.arange(2), np.ones((2, 84, 84), np.uint8)).compile()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == frames.frames.nbytes
    assert memory.temp_size_in_bytes < 10 * 84 * 84
