"""Environments that step in worker processes while the learner computes.

Each worker process holds several environments, so that a step of all of them costs one message per core, not
one per environment. Observations travel through shared memory and are never pickled. An environment whose
episode ends is reset in the same step; the observation that ended the episode comes beside the first one of
the next.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from cleanrl.utils.games.env_state import get_state, set_state
from cleanrl.utils.signals import STOP_SIGNALS

IDLE = -1  # the action that leaves an environment untouched
WORKER_TIMEOUT_S = 120
# Workers import the script that holds the wrappers, and these with it: once, in the process they fork from.
HEAVY_MODULES = [
    *("torch", "jax", "flax", "optax", "stable_baselines3", "gymnasium", "ale_py", "cv2", "tyro"),
    *("huggingface_hub.hf_api", "tensorboard.summary.writer.record_writer"),
]


class WorkerError(RuntimeError):
    """A worker process died, hangs, or its environment raised an error."""


class FinishedGame(NamedTuple):
    """A whole game, from start to game over: all lives, rewards unclipped."""

    env_index: int
    episodic_return: float
    episodic_length: int  # emulator frames


class StepResult(NamedTuple):
    """One step of all N environments; of one that was left IDLE only the observation means anything.

    observations: (N, *observation_shape); where an episode ended, the first one of the next
    rewards: (N,) float32
    terminations, truncations: (N,) bool
    final_observations: (N, *observation_shape), valid only where an episode ended: the one that ended it
    finished_games: the games that ended in this step
    """

    observations: np.ndarray
    rewards: np.ndarray
    terminations: np.ndarray
    truncations: np.ndarray
    final_observations: np.ndarray
    finished_games: list[FinishedGame]


def _shared_arrays(buffers: list, layout: list) -> list[np.ndarray]:
    return [
        np.frombuffer(buffer, dtype).reshape(shape)
        for buffer, (shape, dtype) in zip(buffers, layout, strict=True)
    ]


def _work(connection, env_fns: dict[int, Callable[[], gym.Env]], buffers: list, layout: list) -> None:
    """Serves commands from the main process until it sends "close" or is gone."""
    for number in STOP_SIGNALS:  # may reach the whole group; the main process decides
        signal.signal(number, signal.SIG_IGN)
    observations, rewards, terminations, truncations, final_observations = _shared_arrays(buffers, layout)
    try:
        envs = {index: env_fn() for index, env_fn in env_fns.items()}
        while True:
            command, arguments = connection.recv()
            finished_games = []
            if command == "close":
                break
            if command == "get_states":
                connection.send([get_state(env) for env in envs.values()])
                continue
            for index, env in envs.items():
                if command == "set_states":
                    env.reset()
                    set_state(env, arguments[index]["env"])
                    observations[index] = arguments[index]["observation"]
                elif command == "reset":
                    observations[index], _ = env.reset(seed=arguments[index])
                elif arguments[index] != IDLE:
                    observation, reward, terminated, truncated, _ = env.step(arguments[index])
                    if terminated or truncated:
                        final_observations[index] = observation
                        observation, info = env.reset()
                        if "episode" in info:
                            finished_games.append(
                                FinishedGame(index, info["episode"]["r"], info["episode"]["l"])
                            )
                    observations[index] = observation
                    rewards[index], terminations[index], truncations[index] = reward, terminated, truncated
            connection.send(finished_games)
        for env in envs.values():
            env.close()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(1)  # the main process is gone: so are we, silently
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})".split())
        with contextlib.suppress(OSError):
            connection.send(text)


def _start_fork_server(context) -> None:
    """Starts the process that workers fork from, deaf to the signals that end the main process."""
    from multiprocessing import forkserver, resource_tracker  # fail to import on Windows

    context.set_forkserver_preload([name for name in HEAVY_MODULES if name in sys.modules])
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # unblocks two of them, once it has started
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


class ParallelEnvs:
    """N environments in `num_workers` processes; a context manager that ends them.

    `observations` (N, *observation_shape) are the current ones.

    The environments report a finished game in the info of the *reset* that follows it, as
    `info["episode"] = {"r": return, "l": length}`: a game can end inside another wrapper's reset.

    Args:
        env_fns: one picklable function per environment that makes it.
        num_workers: processes; by default one per CPU core that this process may use, at most one per
            environment.
        probe_fn: makes an environment with the same spaces, to look at; by default the first of `env_fns`.
    """

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gym.Env]],
        num_workers: int | None = None,
        probe_fn: Callable[[], gym.Env] | None = None,
    ):
        self.num_envs = len(env_fns)
        probe = (probe_fn or env_fns[0])()
        self.observation_space, self.action_space = probe.observation_space, probe.action_space
        probe.close()
        stacked = (self.num_envs, *self.observation_space.shape)
        dtype = self.observation_space.dtype.type
        per_env = (self.num_envs,)
        ends = [(per_env, np.bool_), (per_env, np.bool_)]
        layout = [(stacked, dtype), (per_env, np.float32), *ends, (stacked, dtype)]

        self._connections, self._processes = [], []
        try:
            self._start_workers(env_fns, layout, min(self.num_envs, num_workers or available_cores()))
        except BaseException as error:
            self.close()  # the workers are deaf to the SIGTERM that would end them when Python exits
            if not isinstance(error, OSError | EOFError):
                raise
            raise WorkerError(
                f"environment workers cannot be started ({error}); free or change the folder for temporary"
                f" files (TMPDIR), {os.environ.get('TMPDIR', '/tmp')}, or allow more processes (ulimit -u)"
            ) from None

    def _start_workers(self, env_fns: Sequence[Callable[[], gym.Env]], layout: list, number: int) -> None:
        # Not "fork": a copy of a process with threads (torch, JAX, CUDA) can deadlock.
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            _start_fork_server(context)
        buffers = [
            context.RawArray(ctypes.c_uint8, int(np.prod(shape)) * np.dtype(type_).itemsize)
            for shape, type_ in layout
        ]
        self._arrays = _shared_arrays(buffers, layout)
        for indices in np.array_split(np.arange(self.num_envs), number):
            connection, worker_connection = context.Pipe()
            own_env_fns = {int(index): env_fns[index] for index in indices}
            process = context.Process(
                target=_work, args=(worker_connection, own_env_fns, buffers, layout), daemon=True
            )
            process.start()
            worker_connection.close()  # or the end of the worker would go unnoticed
            self._connections.append(connection)
            self._processes.append(process)

    def reset(self, seed: int | Sequence[int]) -> np.ndarray:
        """Starts the first game of every environment, each with a seed of its own that `seed` determines.

        Returns observations (N, *observation_shape).
        """
        self._send("reset", [int(own) for own in np.random.SeedSequence(seed).generate_state(self.num_envs)])
        self._receive()
        self.observations = self._arrays[0].copy()
        return self.observations

    def get_states(self) -> list[dict[str, Any]]:
        """The whole state of every environment, as plain data, between two steps."""
        self._send("get_states", [None] * self.num_envs)
        states_and_observations = zip(self._receive(), self._arrays[0].copy(), strict=True)
        return [{"env": state, "observation": observation} for state, observation in states_and_observations]

    def set_states(self, states: list[dict[str, Any]]) -> None:
        """Brings every environment into a state that `get_states` gave."""
        self._send("set_states", states)
        self._receive()
        self.observations = self._arrays[0].copy()

    def step_async(self, actions: np.ndarray) -> None:
        """Starts a step of every environment, without waiting, with `actions`, integers (N,)."""
        self._send("step", [int(action) for action in actions])

    def step_wait(self) -> StepResult:
        """Waits for the step that `step_async` started.

        Raises:
            WorkerError: a worker died, hangs, or its environment raised an error.
        """
        finished_games = self._receive()
        result = StepResult(*(array.copy() for array in self._arrays), finished_games)
        self.observations = result.observations
        return result

    def _send(self, command: str, arguments: list) -> None:
        for connection, process in zip(self._connections, self._processes, strict=True):
            try:
                connection.send((command, arguments))
            except (BrokenPipeError, ConnectionResetError):
                self._receive_from(connection, process)  # its last message, if any
                raise self._died(process) from None

    def _receive(self) -> list:
        """What the workers answered, in the order of the environments."""
        answers = [
            self._receive_from(connection, process)
            for connection, process in zip(self._connections, self._processes, strict=True)
        ]
        return [item for answer in answers for item in answer]

    def _receive_from(self, connection, process) -> list:
        try:
            # A second at a time: after a suspension, all of it would be over before the workers wake up.
            if not any(connection.poll(1.0) for _ in range(WORKER_TIMEOUT_S)):
                raise WorkerError(
                    f"environment worker {process.pid} hangs: no answer for {WORKER_TIMEOUT_S} s (use"
                    " fewer --num-envs)"
                )
            answer = connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._died(process) from None
        if isinstance(answer, str):
            raise WorkerError(f"an environment failed: {answer}")
        return answer

    def _died(self, process) -> WorkerError:
        process.join(timeout=5)
        return WorkerError(
            f"environment worker {process.pid} died (exit code {process.exitcode}); out of memory?"
        )

    def close(self) -> None:
        """Ends the worker processes, whatever they are doing."""
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send(("close", None))
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        for connection in self._connections:
            connection.close()

    def __enter__(self) -> "ParallelEnvs":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def available_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
