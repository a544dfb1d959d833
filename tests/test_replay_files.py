"""Replays that the DQN scripts save and the QDagger scripts load: what comes back.

What is refused: test_replay_refusals.py.
"""

import pickle
import re
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from both_scripts import PONG_TEACHER, TORCH, device_of, name_of, pixels, read_curves
from exact_kills import simplify
from replays import (
    FRAMES,
    NUM_ACTIONS,
    PONG,
    FramesType,
    Stream,
    assert_transitions,
    draw_everything,
    filled,
    keys_of,
    load,
    make_replay,
    save,
)
from resume_runs import differences, outcome, tiny_options

from cleanrl.dqn_atari import make_env
from cleanrl.utils.games.parallel_envs import StepResult
from cleanrl.utils.replay.frames_jax import JaxFrames
from cleanrl.utils.replay.frames_torch import TorchFrames
from cleanrl.utils.run.options import check_unchanged
from cleanrl.utils.run.training_run import TrainingRun

NUM_ENVS, CAPACITY_PER_ENV = 3, 20
# With the 24 slots that such a buffer has, spare ones included: no ring is full, some are, all are.
SHORT, MIDDLE, LONG = 12, 20, 45
TEACHER = np.random.default_rng(1).normal(size=(4 * 7 * 7, NUM_ACTIONS))

pytestmark = pytest.mark.usefixtures("one_thread")


def compute_q_values(observations: np.ndarray) -> np.ndarray:
    """Those of a teacher that costs no time: they depend on every frame of a stack."""
    return (pixels(observations) @ TEACHER).astype(np.float32)


def stream_of(num_steps: int) -> Stream:
    return Stream(NUM_ENVS, num_steps, end_probability=[0.02, 0.1, 0.2])  # so that the heads differ


def oldest(stream: Stream, env: int) -> int:
    """The first position whose row is saved."""
    return max(len(stream.logs[env]) + 1 - (CAPACITY_PER_ENV + 4), 0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[FramesType, int], tuple[Path, Stream]]:
    """A folder that a buffer of a DQN script was saved to after so many steps, and what these were."""
    streams, folders = {}, {}

    def save_after(frames_type: FramesType, num_steps: int) -> tuple[Path, Stream]:
        if num_steps not in streams:
            streams[num_steps] = stream_of(num_steps)
        if (frames_type, num_steps) not in folders:
            replay = make_replay(frames_type, CAPACITY_PER_ENV * NUM_ENVS, NUM_ENVS, num_q_values=0)
            folders[frames_type, num_steps] = folder = tmp_path_factory.mktemp("replay")
            save(folder, filled(replay, streams[num_steps]))
        return folders[frames_type, num_steps], streams[num_steps]

    return save_after


@pytest.mark.parametrize(
    ("writer", "reader"),
    [(TorchFrames, TorchFrames), (TorchFrames, JaxFrames), (JaxFrames, TorchFrames)],
    ids=["torch", "torch-jax", "jax-torch"],
)
@pytest.mark.parametrize(
    ("num_steps", "buffer_per_env", "n_step"),
    [
        (SHORT, 10**6, 1),
        (MIDDLE, 10**6, 1),
        (LONG, 10**6, 1),
        (LONG, CAPACITY_PER_ENV, 1),
        (LONG, 9, 1),
        (LONG, 10**6, 3),
        (LONG, 9, 3),
    ],
)
def test_what_is_loaded_is_what_was_saved(saved, writer, reader, num_steps, buffer_per_env, n_step):
    folder, stream = saved(writer, num_steps)
    assert len(list(folder.glob("rows-*.zst"))) > 2
    replay = load(reader, folder, compute_q_values, buffer_per_env * NUM_ENVS, n_step)
    batch = draw_everything(replay)
    keys = keys_of(batch)
    assert set(keys) == {
        (env, position)
        for env, position in stream.newest(buffer_per_env, n_step)
        if position - stream.at((env, position)).depth >= oldest(stream, env)  # its stack is whole
    }
    assert_transitions(batch, stream, keys, n_step)
    expected = compute_q_values(batch.observations)
    np.testing.assert_allclose(batch.teacher_q_values, expected, rtol=1e-4, atol=1e-4)


def test_a_file_of_which_nothing_fits_is_not_written(saved):
    """On a GPU, PyTorch cannot move an array without rows as `upload` moves them."""
    folder, _ = saved(TorchFrames, LONG)
    with mock.patch.object(TorchFrames, "write", autospec=True, side_effect=TorchFrames.write) as write:
        load(TorchFrames, folder, compute_q_values, buffer_size=9 * NUM_ENVS)
    num_rows = [len(slots) for (_, slots, _), _ in write.call_args_list]
    assert 0 < len(num_rows) < len(list(folder.glob("rows-*.zst")))
    assert min(num_rows) > 0


def test_the_streams_fill_none_some_and_all_of_the_rings():
    full = {
        steps: [oldest(stream_of(steps), env) > 0 for env in range(NUM_ENVS)]
        for steps in (SHORT, MIDDLE, LONG)
    }
    assert not any(full[SHORT])
    assert any(full[MIDDLE])
    assert not all(full[MIDDLE])
    assert all(full[LONG])
    logs = stream_of(LONG).logs
    assert len({len(log) for log in logs}) == NUM_ENVS
    assert any(t.terminated for log in logs for t in log if t)
    assert any(t.ended and not t.terminated for log in logs for t in log if t)


@pytest.mark.parametrize("num_steps", [SHORT, LONG])
def test_both_kinds_of_frames_are_saved_as_the_same_bytes(saved, num_steps):
    torch_files, jax_files = (
        {path.name: path.read_bytes() for path in saved(frames_type, num_steps)[0].iterdir()}
        for frames_type in FRAMES.values()
    )
    assert torch_files == jax_files


def test_nothing_is_unpickled(saved, monkeypatch):
    folder, _ = saved(TorchFrames, SHORT)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, mock.Mock(side_effect=AssertionError("unpickled")))
    load(TorchFrames, folder, compute_q_values)


# ------------------------------------------------------------------------------------- real games, real runs


@pytest.fixture(scope="module")
def pong(tmp_path_factory) -> Path:
    """A replay of two games of Pong, played at random, of 302 frames."""
    rng, num_envs = np.random.default_rng(0), 2
    envs = [make_env(PONG) for _ in range(num_envs)]
    replay = make_replay(TorchFrames, 1000, num_envs, num_q_values=0)
    replay.start(np.stack([env.reset(seed=seed)[0] for seed, env in enumerate(envs)]))
    no = np.zeros(num_envs, bool)
    for _ in range(150):
        actions = rng.integers(NUM_ACTIONS, size=num_envs)
        steps = [env.step(action) for env, action in zip(envs, actions, strict=True)]
        observations, rewards, *_ = zip(*steps, strict=True)
        observations = np.stack(observations)
        replay.add(actions, StepResult(observations, np.float32(rewards), no, no, observations, []))
    folder = tmp_path_factory.mktemp("pong")
    save(folder, replay, rows_per_file=10**6)
    return folder


def test_real_frames_take_less_than_a_tenth_of_their_size_on_disk(pong):
    assert sum(path.stat().st_size for path in pong.iterdir()) < 302 * 84 * 84 / 10


def test_the_teacher_in_the_buffer_is_the_real_one(qdagger, pong):
    args = qdagger.Args(teacher_model_path=PONG_TEACHER)
    teacher = qdagger.load_teacher(args, NUM_ACTIONS, device_of(qdagger))
    q_values = partial(qdagger.compute_q_values, teacher)
    batch = draw_everything(load(TorchFrames, pong, q_values, buffer_size=40))
    assert len(batch.actions) == 40
    np.testing.assert_allclose(batch.teacher_q_values, q_values(batch.observations), rtol=1e-4, atol=1e-4)
    assert batch.teacher_q_values.std(axis=0).min() > 0


def test_qdagger_trains_offline_on_the_replay_without_the_teacher_playing_and_with_one_set_of_frames(
    qdagger, pong, train, monkeypatch
):
    (name,) = (name for name in ("TorchFrames", "JaxFrames") if hasattr(qdagger, name))
    made = []

    class CountedFrames(getattr(qdagger, name)):
        def __init__(self, num_slots, device):
            super().__init__(num_slots, device)
            made.append(num_slots)

    train_offline, loaded = qdagger.train_offline, []

    def spying_train_offline(args, state, run) -> None:
        loaded.append(draw_everything(state.teacher_replay))
        train_offline(args, state, run)

    monkeypatch.setattr(qdagger, name, CountedFrames)
    monkeypatch.setattr(qdagger, "train_offline", spying_train_offline)
    monkeypatch.setattr(qdagger, "fill_teacher_replay", mock.Mock(side_effect=AssertionError("it played")))
    run_folder = train(qdagger, teacher_replay_path=pong, buffer_size=100, teacher_steps=10**9)
    assert len(loaded[0].actions) == 100
    (num_slots,) = made  # of both buffers, one after the other
    assert num_slots < 120
    curves = read_curves(run_folder)
    for tag in ("charts/offline/loss", "charts/offline/q_loss", "charts/offline/distill_loss", "losses/loss"):
        assert curves[tag]
        assert np.isfinite(curves[tag]).all()


def test_without_an_offline_phase_no_replay_is_loaded_and_no_such_phase_announced(
    qdagger, pong, train, monkeypatch, capsys
):
    monkeypatch.setattr(qdagger, "load_replay", mock.Mock(side_effect=AssertionError("it was loaded")))
    train(qdagger, teacher_replay_path=pong, offline_steps=0)
    assert re.findall(r"^\((\d)\) ", capsys.readouterr().out, re.MULTILINE) == ["3"]


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts the PyTorch script in a folder of that name, and stops it in the phase `stop_in`."""
    simplify(monkeypatch, TORCH)
    checkpoint = TrainingRun.checkpoint

    def start_in(folder: str, *options: str, stop_in: str | None = None) -> None:
        def checkpoint_or_stop(run: TrainingRun) -> None:
            is_loading = run.state.phase == "teacher" and run.state.teacher_replay.frames is not None
            if stop_in == ("loading" if is_loading else run.state.phase):
                signal.raise_signal(signal.SIGTERM)
            checkpoint(run)

        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        monkeypatch.setattr(TrainingRun, "checkpoint", checkpoint_or_stop)
        words = [*tiny_options(name_of(TORCH)), "--buffer-size", "1000", *options]
        monkeypatch.setattr(sys, "argv", [TORCH.__file__, *words])
        if stop_in is None:
            TORCH.main(TORCH.read_arguments(TORCH.Args))
        else:
            with pytest.raises(SystemExit, match="143"):
                TORCH.main(TORCH.read_arguments(TORCH.Args))

    return start_in


@pytest.mark.parametrize(
    ("phase", "is_full"), [("teacher", False), ("offline", False), ("offline", True), ("online", False)]
)
def test_a_resumed_run_needs_the_replay_only_until_it_has_taken_it_in(
    pong, saved, tmp_path, start, phase, is_full
):
    """It may then be gone; before, it may be at another place. The run ends with the bits of another one,
    though it is resumed twice, and also where the rings of the replay were full."""
    shutil.copytree(saved(TorchFrames, LONG)[0] if is_full else pong, tmp_path / "replay")
    replay = "--teacher-replay-path", str(tmp_path / "replay")
    start("calm", *replay)
    start("stopped", *replay, stop_in=phase)
    (tmp_path / "replay").rename(tmp_path / "elsewhere")
    if phase == "teacher":
        with pytest.raises(SystemExit, match="replay is not a folder"):
            start("stopped", "--resume", "auto")
        start("stopped", "--resume", "auto", "--teacher-replay-path", str(tmp_path / "elsewhere"))
    else:
        start("stopped", "--resume", "auto", stop_in=phase)
        start("stopped", "--resume", "auto")
    assert differences(outcome(tmp_path / "calm"), outcome(tmp_path / "stopped")) == []


def test_a_run_stopped_while_it_loads_a_replay_loads_all_of_it_again(pong, saved, tmp_path, start):
    """Of another size and number of environments, too."""
    replay = "--teacher-replay-path", str(saved(TorchFrames, LONG)[0])
    start("calm", *replay)
    start("stopped", "--teacher-replay-path", str(pong), stop_in="loading")
    start("stopped", "--resume", "auto", *replay, stop_in="loading")
    start("stopped", "--resume", "auto")
    assert differences(outcome(tmp_path / "calm"), outcome(tmp_path / "stopped")) == []


def test_a_run_cannot_be_resumed_with_a_replay_instead_of_the_teachers_play():
    for before, now in [(None, "replay"), ("replay", None)]:
        with pytest.raises(SystemExit, match=f"--teacher-replay-path is {now}, but runs/a has {before}"):
            check_unchanged(Path("runs/a"), {"teacher_replay_path": before}, {"teacher_replay_path": now})
    check_unchanged(Path("runs/a"), {"teacher_replay_path": "replay"}, {"teacher_replay_path": "moved"})


def test_a_run_may_be_resumed_with_a_script_that_has_got_an_option():
    check_unchanged(Path("runs/a"), {"seed": 1}, {"seed": 1, "q_penalty": 0.0})
    with pytest.raises(SystemExit, match="--seed is 2, but runs/a has 1"):
        check_unchanged(Path("runs/a"), {"seed": 1}, {"seed": 2, "q_penalty": 0.0})
