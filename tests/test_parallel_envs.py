"""Environments in worker processes play what single ones play, and no process outlives the others."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import psutil
import pytest

from cleanrl.utils.games import parallel_envs
from cleanrl.utils.games.parallel_envs import IDLE, FinishedGame, ParallelEnvs, WorkerError
from cleanrl.utils.games.statistics import EpisodeStatistics

ROOT = Path(__file__).parent.parent
CONTINUE, TERMINATE, TRUNCATE, DIE, RAISE, HANG = range(6)


class TinyEnv(gym.Env):
    """Ends and fails when told to; a game has two episodes. Observes a random number and its counts."""

    observation_space = gym.spaces.Box(0, 2**31 - 1, (3,), np.int32)
    action_space = gym.spaces.Discrete(6)
    episodes = steps = 0
    game_return = 0.0

    def observe(self) -> np.ndarray:
        return np.array([self.np_random.integers(2**31), self.episodes, self.steps], dtype=np.int32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        info = {}
        if self.episodes and self.episodes % 2 == 0:
            info["episode"] = {"r": self.game_return, "l": self.steps}
            self.game_return, self.steps = 0.0, 0
        self.episodes += 1
        return self.observe(), info

    def step(self, action):
        if action == DIE:
            os.kill(os.getpid(), signal.SIGKILL)
        if action == RAISE:
            raise ValueError("the ball is gone")
        if action == HANG:
            time.sleep(3600)
        self.steps += 1
        reward = float(self.np_random.integers(-5, 6))
        self.game_return += reward
        return self.observe(), reward, action == TERMINATE, action == TRUNCATE, {}


class BrokenInWorkers(TinyEnv):
    def __init__(self):
        if multiprocessing.parent_process():
            raise ValueError("no such ROM")


def make_pong() -> gym.Env:
    pong = gym.make("PongNoFrameskip-v4", max_num_frames_per_episode=150)
    return gym.wrappers.AtariPreprocessing(EpisodeStatistics(pong))


def own_workers() -> list[psutil.Process]:
    """They are children of the fork server, which is a child of this process."""
    return [child for child in psutil.Process().children(recursive=True) if child.ppid() != os.getpid()]


def is_gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until_gone(processes: list[psutil.Process]) -> None:
    deadline = time.monotonic() + 60
    while not all(is_gone(process) for process in processes):
        assert time.monotonic() < deadline, f"still there: {processes}"
        time.sleep(0.05)


def check_against_single_envs(env_fn, num_workers: int, actions_of_steps: np.ndarray) -> list[FinishedGame]:
    """Plays the same by hand, one environment after the other; returns the games that were finished."""
    num_envs = actions_of_steps.shape[1]
    singles = [env_fn() for _ in range(num_envs)]
    seeds = [int(seed) for seed in np.random.SeedSequence((7, 1)).generate_state(num_envs)]
    expected = np.stack([env.reset(seed=seed)[0] for env, seed in zip(singles, seeds, strict=True)])
    all_finished_games = []
    with ParallelEnvs([env_fn] * num_envs, num_workers) as envs:
        assert len(own_workers()) == num_workers
        assert envs.observation_space == singles[0].observation_space
        assert envs.action_space == singles[0].action_space
        np.testing.assert_array_equal(envs.reset(seed=(7, 1)), expected)
        for actions in actions_of_steps:
            envs.step_async(actions)
            step = envs.step_wait()
            finished_games = []
            for index, (env, action) in enumerate(zip(singles, actions, strict=True)):
                observation, reward, terminated, truncated, _ = env.step(int(action))
                if terminated or truncated:
                    np.testing.assert_array_equal(step.final_observations[index], observation)
                    observation, info = env.reset()
                    if "episode" in info:
                        game = info["episode"]
                        finished_games.append(FinishedGame(index, game["r"], game["l"]))
                np.testing.assert_array_equal(step.observations[index], observation)
                assert step.rewards[index] == reward
                assert (step.terminations[index], step.truncations[index]) == (terminated, truncated)
            assert step.finished_games == finished_games
            all_finished_games += finished_games
    return all_finished_games


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_four_environments_play_what_four_single_ones_play(num_workers):
    rng = np.random.default_rng(0)
    actions = rng.choice([CONTINUE, TERMINATE, TRUNCATE], size=(200, 4), p=[0.8, 0.1, 0.1])
    finished_games = check_against_single_envs(TinyEnv, num_workers, actions)
    assert len(finished_games) > 20


def test_environments_of_pong_play_what_single_ones_play():
    actions = np.random.default_rng(0).integers(6, size=(80, 3))
    finished_games = check_against_single_envs(make_pong, 2, actions)
    assert {game.env_index for game in finished_games} == {0, 1, 2}


def test_results_of_a_step_are_not_overwritten_by_the_next():
    with ParallelEnvs([TinyEnv] * 2) as envs:
        first = envs.reset(seed=0)
        kept = first.copy()
        envs.step_async(np.array([TERMINATE, CONTINUE]))
        step = envs.step_wait()
        kept_step = [array.copy() for array in step[:5]]
        envs.step_async(np.array([CONTINUE, TRUNCATE]))
        envs.step_wait()
        np.testing.assert_array_equal(first, kept)
        for array, kept_array in zip(step[:5], kept_step, strict=True):
            np.testing.assert_array_equal(array, kept_array)


def test_each_environment_has_a_seed_of_its_own_that_the_seed_determines():
    with ParallelEnvs([TinyEnv] * 4, num_workers=2) as envs:
        random_numbers = envs.reset(seed=5)[:, 0]
        assert len(set(random_numbers)) == 4
        np.testing.assert_array_equal(envs.reset(seed=5)[:, 0], random_numbers)
        assert not set(envs.reset(seed=6)[:, 0]) & set(random_numbers)


def test_an_idle_environment_is_left_untouched():
    with ParallelEnvs([TinyEnv] * 3, num_workers=2) as envs:
        before = envs.reset(seed=0)
        for _ in range(5):
            envs.step_async(np.array([CONTINUE, IDLE, CONTINUE]))
            step = envs.step_wait()
            np.testing.assert_array_equal(step.observations[1], before[1])
        envs.step_async(np.array([IDLE, CONTINUE, IDLE]))
        np.testing.assert_array_equal(envs.step_wait().observations[:, 2], [5, 1, 5])


def test_there_are_no_more_workers_than_environments():
    with ParallelEnvs([TinyEnv] * 2, num_workers=5) as envs:
        envs.reset(seed=0)
        assert len(own_workers()) == 2


def step_with(action: int) -> None:
    """A step in which the second of three environments does something else than to continue."""
    with ParallelEnvs([TinyEnv] * 3, num_workers=3) as envs:
        envs.reset(seed=0)
        envs.step_async(np.array([CONTINUE, action, CONTINUE]))
        envs.step_wait()


def test_a_killed_worker_is_reported_at_once():
    start = time.monotonic()
    with pytest.raises(WorkerError, match=r"died \(exit code -9\)"):
        step_with(DIE)
    assert time.monotonic() - start < 15
    assert not own_workers()


def test_a_worker_killed_between_two_steps_is_reported_at_once():
    with ParallelEnvs([TinyEnv] * 2, num_workers=1) as envs:
        envs.reset(seed=0)
        (worker,) = own_workers()
        worker.kill()
        wait_until_gone([worker])
        with pytest.raises(WorkerError, match=rf"worker {worker.pid} died \(exit code -9\)"):
            envs.step_async(np.array([CONTINUE, CONTINUE]))


def test_an_error_in_an_environment_is_reported_with_its_message():
    with pytest.raises(
        WorkerError,
        match=r"^an environment failed: ValueError: the ball is gone \(.*test_parallel_envs.py:\d+\)$",
    ):
        step_with(RAISE)
    assert not own_workers()


def test_an_environment_that_cannot_be_made_in_a_worker_is_reported_with_its_message():
    with ParallelEnvs([BrokenInWorkers] * 2, num_workers=2) as envs:
        wait_until_gone(own_workers())
        with pytest.raises(WorkerError, match=r"^an environment failed: ValueError: no such ROM \(.*\)$"):
            envs.reset(seed=0)


@pytest.mark.slow  # `close` waits 5 s for it
def test_a_hanging_worker_is_reported_after_the_timeout(monkeypatch):
    with ParallelEnvs([TinyEnv] * 2, num_workers=2) as envs:
        envs.reset(seed=0)
        monkeypatch.setattr(parallel_envs, "WORKER_TIMEOUT_S", 1)
        envs.step_async(np.array([CONTINUE, HANG]))
        start = time.monotonic()
        with pytest.raises(WorkerError, match="hangs: no answer for 1 s"):
            envs.step_wait()
        assert time.monotonic() - start < 60
    assert not own_workers()  # close ended it nevertheless


SUSPENDED = """
import time
import numpy as np
from cleanrl.utils.games import parallel_envs
from test_parallel_envs import CONTINUE, TinyEnv

class SlowEnv(TinyEnv):
    def step(self, action):
        time.sleep(1)
        return super().step(action)

if __name__ == "__main__":
    parallel_envs.WORKER_TIMEOUT_S = 5
    with parallel_envs.ParallelEnvs([SlowEnv] * 2, num_workers=2) as envs:
        envs.reset(seed=0)
        print("plays", flush=True)
        for _ in range(3):
            envs.step_async(np.full(2, CONTINUE))
            envs.step_wait()
"""


@pytest.mark.slow  # it is suspended for longer than a worker may take to answer
def test_a_suspended_run_continues(tmp_path):
    (tmp_path / "program.py").write_text(SUSPENDED)
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "program.py"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=variables, stdout=subprocess.PIPE, process_group=0, text=True
    )
    assert process.stdout.readline() == "plays\n"
    time.sleep(0.5)  # it waits for the workers
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(6)
    os.killpg(process.pid, signal.SIGCONT)
    assert process.wait(timeout=60) == 0


LONG_TMPDIR = """
from cleanrl.utils.games.parallel_envs import ParallelEnvs, WorkerError
from test_parallel_envs import TinyEnv
if __name__ == "__main__":
    try:
        ParallelEnvs([TinyEnv])
    except WorkerError as error:
        print(error)
"""


def test_workers_that_cannot_be_started_are_reported_with_what_to_change(tmp_path):
    (tmp_path / "program.py").write_text(LONG_TMPDIR)
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    variables = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith(
        "environment workers cannot be started (AF_UNIX path too long); free or change"
    )
    assert str(folder) in done.stdout


def test_close_ends_all_workers_even_in_the_middle_of_a_step():
    envs = ParallelEnvs([TinyEnv] * 4, num_workers=4)
    envs.reset(seed=0)
    workers = own_workers()
    assert len(workers) == 4
    envs.step_async(np.full(4, CONTINUE))
    envs.close()
    wait_until_gone(workers)


MAIN = """
import sys, time
from functools import partial
import numpy as np
{imports}
from cleanrl.utils.games.parallel_envs import ParallelEnvs

def main():
    print("starts", flush=True)
    with ParallelEnvs([{env_fn}] * 4, num_workers=2) as envs:
        envs.reset(seed=0)
        print("ready", flush=True)
        while {keeps_stepping}:
            envs.step_async(np.zeros(4, dtype=int))
            envs.step_wait()
        time.sleep(600)

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""
WITH_PONG = {
    "imports": "from cleanrl.qdagger_dqn_atari_impalacnn import make_env",
    "env_fn": "partial(make_env, 'PongNoFrameskip-v4')",
}
WITH_TINY_ENV = {"imports": "from test_parallel_envs import TinyEnv", "env_fn": "TinyEnv"}


@pytest.fixture
def start_main(tmp_path):
    """Starts MAIN as a script in a process group of its own; ends what is left of it after the test."""
    started = []

    def start(**parts) -> subprocess.Popen:
        script = tmp_path / "main.py"
        script.write_text(MAIN.format(**parts))
        process = subprocess.Popen(
            [sys.executable, str(script)],
            env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        process.wait()


@pytest.mark.parametrize("keeps_stepping", [pytest.param(True, marks=pytest.mark.slow), False])
def test_when_the_main_process_is_killed_its_workers_end_too_without_a_word(keeps_stepping, start_main):
    process = start_main(**WITH_PONG if keeps_stepping else WITH_TINY_ENV, keeps_stepping=keeps_stepping)
    assert (process.stdout.readline(), process.stdout.readline()) == ("starts\n", "ready\n")
    descendants = psutil.Process(process.pid).children(recursive=True)
    assert len(descendants) >= 3  # the fork server and its two workers
    process.kill()
    wait_until_gone(descendants)
    _, errors = process.communicate(timeout=60)
    assert errors == ""


def test_ctrl_c_lets_the_main_process_end_its_workers_without_a_word(start_main):
    process = start_main(**WITH_TINY_ENV, keeps_stepping=True)
    assert (process.stdout.readline(), process.stdout.readline()) == ("starts\n", "ready\n")
    descendants = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    wait_until_gone(descendants)
    assert (output, errors, process.returncode) == ("interrupted\n", "", 0)


def test_a_closed_terminal_leaves_the_workers_to_the_main_process(start_main):
    """Its SIGHUP reaches the whole group, but the main process decides."""
    process = start_main(**WITH_TINY_ENV, keeps_stepping=True)
    assert (process.stdout.readline(), process.stdout.readline()) == ("starts\n", "ready\n")
    descendants = psutil.Process(process.pid).children(recursive=True)
    for descendant in descendants:
        for number in (signal.SIGHUP, signal.SIGUSR1):
            descendant.send_signal(number)
    time.sleep(0.5)
    assert process.poll() is None
    assert all(descendant.status() != psutil.STATUS_ZOMBIE for descendant in descendants)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (output, errors, process.returncode) == ("interrupted\n", "", 0)


@pytest.mark.slow
def test_ctrl_c_while_the_workers_start_ends_everything_without_a_word(start_main):
    process = start_main(**WITH_PONG, keeps_stepping=True)
    assert process.stdout.readline() == "starts\n"
    descendants = []
    while len(descendants) < 2:  # the resource tracker, the fork server
        descendants = psutil.Process(process.pid).children(recursive=True)
    time.sleep(0.5)  # the fork server imports torch
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    wait_until_gone(descendants)
    assert (output.splitlines()[-1], errors, process.returncode) == ("interrupted", "", 0)
