"""Every script, stopped again and again in all its phases, ends with the bits of a run that was left alone.

Within this process, with games cut short; tests/test_checkpoint.py kills whole processes.
"""

import importlib
import itertools
import os
import signal
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
from both_scripts import JAX, TORCH
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from cleanrl.utils.run.checkpoint import Run, newest_checkpoint

TEACHER = Path(__file__).resolve().parents[1] / "cleanrl" / "teachers" / "PongNoFrameskip-v4.safetensors"
DQN = {
    "env_id": "PongNoFrameskip-v4",
    "num_envs": 2,
    "repeat_action_probability": 0.25,
    "learning_starts": 16,
    "total_timesteps": 80,
    "buffer_size": 40,
    "batch_size": 8,
    "target_network_frequency": 12,
    "eval_episodes": 1,
    "cuda": False,
    "checkpoint_interval": 0.0,
}
QDAGGER = DQN | {
    "teacher_model_path": TEACHER,
    "return_normalization": "random",
    "teacher_steps": 60,
    "teacher_eval_episodes": 1,
    "offline_steps": 8,
    "offline_eval_frequency": 4,
    "n_step": 3,
}
GAME_FRAMES = 80  # of an evaluation game: 20 steps
# How often a run looks whether it must stop before it does. It looks before each step of a game, too.
LEGS = {
    "qdagger_dqn_atari_impalacnn": [10, 30, 29, 3, 10, 25, 30, 12],
    "qdagger_dqn_atari_jax_impalacnn": [10, 30, 29, 3, 10, 25, 30, 12],
    "dqn_atari": [1, 12, 9, 15, 10],
    "dqn_atari_jax": [1, 12, 9, 15, 10],
}


@pytest.fixture(params=sorted(LEGS))
def script(request, monkeypatch):
    module = importlib.import_module(f"cleanrl.{request.param}")
    monkeypatch.setattr(module, "evaluate", partial(module.evaluate, max_game_frames=GAME_FRAMES))
    monkeypatch.setattr(module, "LOSS_INTERVAL", 2)
    monkeypatch.setattr(module, "CHART_INTERVAL", 10)
    for adapter in (TORCH, JAX):
        if adapter.module is module:
            monkeypatch.setattr(module, "StudentNetwork", adapter.Scalar)
    with mock.patch.dict(os.environ):
        yield module


def outcome(run_folder: Path) -> tuple[dict, dict]:
    """The models' bytes, and every point of every curve, in the order of the files."""
    events = EventAccumulator(str(run_folder), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    events.Reload()
    tags = set(events.Tags()["scalars"]) - {"charts/SPS"}
    curves = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    return {path.name: path.read_bytes() for path in run_folder.glob("*.cleanrl_model")}, curves


def tensors(path: Path) -> list[str]:
    """What an event file holds beside curves."""
    values = (value for event in EventFileLoader(str(path)).Load() for value in event.summary.value)
    return [value.tag for value in values if value.tensor.string_val]


def test_a_run_that_is_stopped_in_every_phase_ends_as_one_that_is_not(script, tmp_path, monkeypatch):
    name = script.__name__.rpartition(".")[2]
    args = script.Args(**QDAGGER if name.startswith("qdagger") else DQN)
    for folder in ("calm", "stopped"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "calm")
    script.main(args)
    monkeypatch.chdir(tmp_path / "stopped")
    visits, look = itertools.count(1), Run.is_due
    places = []

    def is_due(self) -> bool:
        if legs and next(visits) == legs[0]:
            self._signals.received = signal.SIGTERM
        return look(self)

    monkeypatch.setattr(Run, "is_due", is_due)
    legs = list(LEGS[name])
    while legs:
        with pytest.raises(SystemExit) as stop:
            script.main(args)
        assert stop.value.code == 128 + signal.SIGTERM
        (folder,) = Path("runs").iterdir()
        state = newest_checkpoint(folder).read_state()
        places.append((state.get("phase"), bool(state["env_states"])))
        args.resume = str(folder)
        visits = itertools.count(1)
        legs.pop(0)
    script.main(args)

    if name.startswith("qdagger"):
        for phase in ("teacher", "offline", "online"):
            assert (phase, phase != "offline") in places
    models, curves = outcome(folder)
    (calm,) = (tmp_path / "calm" / "runs").iterdir()
    expected_models, expected_curves = outcome(calm)
    assert models == expected_models
    assert curves == expected_curves
    once = [tag for path in folder.glob("events.*") for tag in tensors(path)]
    assert sorted(once) == ["custom_scalars__config__", "hyperparameters/text_summary"]
    assert len(curves["charts/epsilon"]) == 8
    assert curves["losses/td_loss"]
    assert not (folder / "checkpoints").exists()
