"""What the JAX scripts do for a GPU, as far as a CPU can tell; and how a device is chosen."""

import ctypes
import os
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from both_scripts import (
    DQN_JAX,
    JAX,
    NUM_ACTIONS,
    TORCH,
    create_state,
    linear_weights,
    run_python,
    use_network,
)
from rehearsal import RandomGame, rehearse

from cleanrl.utils import gpu_jax
from cleanrl.utils.replay.frames_jax import JaxFrames

PHASES = {JAX: ("fill_teacher_replay", "train_offline", "train_online"), DQN_JAX: ("train",)}
SCRIPTS = pytest.mark.parametrize("script", [JAX, DQN_JAX], ids=["qdagger", "dqn"])


def guarded(function: Callable, guard: str) -> Callable:
    def call(*arguments: Any) -> Any:
        with jax.transfer_guard(guard):
            return function(*arguments)

    return call


def train_guarded(monkeypatch: pytest.MonkeyPatch, script: Any) -> Any:
    """Trains a linear network for a while; only the buffers are made without the guard."""
    for phase in PHASES[script]:
        monkeypatch.setattr(script, phase, guarded(getattr(script, phase), "disallow"))
    monkeypatch.setattr(JaxFrames, "__init__", guarded(JaxFrames.__init__, "allow"))
    start = linear_weights(
        script, np.zeros((196, NUM_ACTIONS), np.float32), np.zeros(NUM_ACTIONS, np.float32)
    )
    return rehearse(script, 3, RandomGame, start=start, target_network_frequency=7, tau=0.5)


@SCRIPTS
def test_nothing_is_moved_between_host_and_device_implicitly(monkeypatch, script):
    happened = train_guarded(monkeypatch, script)
    assert happened.state.gradient_steps > 40


@SCRIPTS
def test_an_implicit_transfer_is_seen(monkeypatch, script):
    """So that the test above can fail."""
    compute_q_values = script.compute_q_values

    def implicit(networks: Any, observations: np.ndarray) -> np.ndarray:
        script.forward(networks, observations)
        return compute_q_values(networks, observations)

    monkeypatch.setattr(script, "compute_q_values", implicit)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train_guarded(monkeypatch, script)


@pytest.fixture
def filled_state(monkeypatch) -> Any:
    use_network(monkeypatch, JAX, "linear")
    args = JAX.Args(num_envs=3, buffer_size=100, batch_size=4, n_step=3)
    state, games = create_state(JAX, args), RandomGame(3)
    games.reset(0)
    state.teacher_replay.start(games.observations)
    for _ in range(20):
        games.step_async(np.zeros(3, int))
        q_values = np.zeros((3, NUM_ACTIONS), np.float32)
        state.teacher_replay.add(np.zeros(3, int), games.step_wait(), q_values)
    return args, state


@pytest.mark.parametrize("num_steps", [1, 2, 10])
def test_all_gradient_steps_of_a_call_are_one_program(monkeypatch, filled_state, num_steps):
    args, state = filled_state
    update, programs = JAX.update, []
    monkeypatch.setattr(JAX, "update", lambda *inputs: programs.append(inputs) or update(*inputs))
    JAX.learn(args, state, state.teacher_replay, [0.5] * num_steps)
    ((_, _, frames, batches, coefficients),) = programs
    assert frames is state.teacher_replay.frames.frames
    assert batches.actions.shape == (num_steps, args.batch_size)
    assert coefficients.shape == (num_steps,)
    assert state.gradient_steps == num_steps


def loops_of_unknown_length(program: str) -> list[str]:
    """The `while` loops of a compiled program that the device would have to ask the host about."""
    loops = [line for line in program.splitlines() if re.search(r"= .*\bwhile\(", line)]
    return [line for line in loops if "known_trip_count" not in line]


def test_the_host_need_not_know_when_the_gradient_steps_of_a_call_are_done(monkeypatch, filled_state):
    """As on a GPU the steps are a loop, whose length is known when it is compiled."""
    args, state = filled_state
    replay = state.teacher_replay
    batches = replay.sample(args.batch_size, state.rng, num_batches=300)
    inputs = *replay.frames.place(batches, state.device), np.ones(300, np.float32)
    with mock.patch.object(jax, "default_backend", return_value="gpu"):
        program = JAX.update.lower(args, state.learner, *inputs).compile().as_text()
    assert "while(" in program
    assert not loops_of_unknown_length(program)


def test_a_loop_of_unknown_length_is_seen():
    def drawing(key: Any) -> Any:
        return jax.lax.while_loop(lambda x: x.sum() < 1e3, lambda x: x * x + 1, key)

    assert loops_of_unknown_length(jax.jit(drawing).lower(jnp.ones(3)).compile().as_text())


# ------------------------------------------------------------------------------------------- the device


@pytest.mark.parametrize(
    ("options", "before", "expected"),
    [
        ({}, "", ["--xla_gpu_deterministic_ops=true"]),
        ({"torch_deterministic": False}, "--xla_dump_to=x", ["--xla_dump_to=x"]),
        (
            {"cuda_graphs": False},
            "--xla_dump_to=x",
            ["--xla_dump_to=x", "--xla_gpu_deterministic_ops=true", "--xla_gpu_enable_command_buffer="],
        ),
        ({}, "--xla_gpu_deterministic_ops=false", ["--xla_gpu_deterministic_ops=false"]),
    ],
)
def test_options_become_flags_of_xla_beside_the_users_own(monkeypatch, options, before, expected):
    monkeypatch.setenv("XLA_FLAGS", before)
    assert JAX.choose_device(JAX.Args(**options)) == jax.devices()[0]
    assert os.environ["XLA_FLAGS"].split() == expected


@pytest.mark.parametrize("script", [JAX, TORCH], ids=["jax", "torch"])
def test_a_gpu_that_cannot_be_used_is_a_one_line_error(monkeypatch, script):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might")

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "zeros", fail)
    line = r"^error: the GPU cannot be used \(CUDA error: out of memory\); use --no-cuda or free its memory$"
    with pytest.raises(SystemExit, match=line):
        script.choose_device(script.Args())


def test_a_platform_that_is_not_there_is_a_one_line_error(tmp_path):
    program = "import cleanrl.dqn_atari_jax as script; script.choose_device(script.Args())"
    status, _, errors = run_python(tmp_path, "-c", program, JAX_PLATFORMS="cuda")
    assert status == 1
    line = "error: the GPU cannot be used (JAX_PLATFORMS names none that is there); use --no-cuda or"
    assert errors.splitlines()[-1] == f"{line} free its memory"


SLOW_CALL = """
import jax, sys
import cleanrl.dqn_atari_jax as script
if "chosen" in sys.argv:
    script.choose_device(script.Args())
matrix = jax.numpy.eye(1000)
power = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, y: y @ x, x)).lower(matrix).compile()
print(power(matrix).is_ready())
"""


@pytest.mark.parametrize(("chosen", "is_ready"), [(["chosen"], "True"), ([], "False")])
def test_on_a_cpu_no_gradient_steps_are_left_to_wait_for(tmp_path, chosen, is_ready):
    """A run that is asked to stop would wait for up to 32 calls: 22 s of `--preset quick` on two cores."""
    status, output, errors = run_python(tmp_path, "-c", SLOW_CALL, *chosen)
    assert (status, output.split()) == (0, [is_ready]), errors


# ------------------------------------------------------------------------------------------------- memory


class Driver:
    """In the place of CUDA's: of two GPUs, the second has 3 GB free."""

    def __init__(self, fails: str = ""):
        self.fails, self.contexts, self.retained = fails, [], 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            if name == self.fails:
                return 2
            getattr(self, f"_{name}", lambda *_: None)(*arguments)
            return 0

        if name.startswith("_"):
            raise AttributeError(name)
        return call

    def _cuDeviceGet(self, device: Any, ordinal: int) -> None:
        device._obj.value = 100 + ordinal

    def _cuDevicePrimaryCtxRetain(self, context: Any, device: ctypes.c_int) -> None:
        self.retained += 1
        context._obj.value = device.value

    def _cuCtxPushCurrent_v2(self, context: ctypes.c_void_p) -> None:
        self.contexts.append(context.value)

    def _cuMemGetInfo_v2(self, free: Any, total: Any) -> None:
        free._obj.value = {100: 1, 101: 3}[self.contexts[-1]] * 10**9

    def _cuCtxPopCurrent_v2(self, context: Any) -> None:
        self.contexts.pop()

    def _cuDevicePrimaryCtxRelease_v2(self, device: ctypes.c_int) -> None:
        self.retained -= 1


def gpu(bytes_limit: float, bytes_in_use: float = 0.0) -> Any:
    statistics = {"bytes_limit": int(bytes_limit), "bytes_in_use": int(bytes_in_use)}
    return SimpleNamespace(platform="gpu", local_hardware_id=1, memory_stats=lambda: statistics)


@pytest.mark.parametrize(
    ("fails", "limit", "in_use", "expected"),
    [
        ("", 60e9, 1e9, 3e9),  # others have taken nearly all of it
        ("", 5e9, 4e9, 1e9),  # JAX may take no more
        ("cuInit", 60e9, 1e9, 59e9),
        ("cuDevicePrimaryCtxRetain", 60e9, 1e9, 59e9),
        ("cuMemGetInfo_v2", 60e9, 1e9, 59e9),
    ],
)
def test_memory_that_other_processes_hold_on_the_gpu_is_not_free(monkeypatch, fails, limit, in_use, expected):
    driver = Driver(fails)
    monkeypatch.setattr(gpu_jax.ctypes, "CDLL", lambda name: driver)
    assert JaxFrames.free_memory(gpu(limit, in_use)) == expected
    assert not driver.retained
    assert not driver.contexts


def test_without_a_driver_jax_says_what_is_free():
    assert JaxFrames.free_memory(gpu(60e9, 1e9)) == 59e9
    assert JaxFrames.free_memory(JaxFrames.host()) is None
