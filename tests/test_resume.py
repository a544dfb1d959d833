"""Every script, stopped again and again in all its phases, ends with the bits of an uninterrupted run.

Within this process, with small networks and games cut short; test_kills.py kills whole processes.
"""

import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest
from both_scripts import is_qdagger, name_of
from exact_kills import simplify
from resume_runs import differences, outcome, the_run, tiny_options
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from cleanrl.utils.run.training_run import TrainingRun

# Where a run is stopped, one after the other: when a field of its state has at least this value for the third
# time that it could make a checkpoint. It can before each step, also of the games of an evaluation.
QDAGGER_STOPS = [
    ("teacher_step", 0),  # while the teacher is evaluated
    ("teacher_step", 2),
    ("teacher_step", 14),
    ("offline_step", 1),
    ("offline_step", 4),  # while the student is evaluated
    ("online_step", 2),
    ("online_step", 30),
    ("online_step", 40),  # while the student is evaluated
    ("online_step", 60),  # in the final evaluation
]
DQN_STOPS = [("step", 0), ("step", 6), ("step", 30), ("step", 40), ("step", 48), ("step", 60)]


@pytest.fixture
def tiny(script, monkeypatch) -> ModuleType:
    simplify(monkeypatch, script)
    return script


def texts(path: Path) -> list[str]:
    """What an event file holds beside curves."""
    values = (value for event in EventFileLoader(str(path)).Load() for value in event.summary.value)
    return [value.tag for value in values if value.tensor.string_val]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_run_that_is_stopped_in_every_phase_ends_as_an_uninterrupted_one(tiny, tmp_path, monkeypatch):
    checkpoint, looks, stops, where = TrainingRun.checkpoint, [], [], []
    numbers = [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]

    def stop_before_checkpoint(run: TrainingRun) -> None:
        if stops and getattr(run.state, stops[0][0]) >= stops[0][1]:
            looks.append(vars(run.state).copy())
        if len(looks) == 3:
            signal.raise_signal(numbers[len(stops) % len(numbers)])
        checkpoint(run)

    def start(folder: str, *options: str) -> None:
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        frequency = "--online-eval-frequency" if is_qdagger(tiny) else "--eval-frequency"
        options = (*tiny_options(name_of(tiny)), "--checkpoint-interval", "0", frequency, "40", *options)
        monkeypatch.setattr(sys, "argv", [tiny.__file__, *options])
        tiny.main(tiny.read_arguments(tiny.Args))

    start("calm")
    monkeypatch.setattr(TrainingRun, "checkpoint", stop_before_checkpoint)
    stops += QDAGGER_STOPS if is_qdagger(tiny) else DQN_STOPS
    while stops:
        with pytest.raises(SystemExit) as stop:
            start("stopped", "--resume", "auto")
        assert stop.value.code == 128 + numbers[len(stops) % len(numbers)]
        where.append(looks[-1])
        looks.clear()
        stops.pop(0)
    start("stopped", "--resume", "auto")

    if is_qdagger(tiny):
        phases = ["teacher"] * 3 + ["offline"] * 2 + ["online"] * 4
        assert [state["phase"] for state in where] == phases
        assert where[0]["teacher_return"] is None
        assert where[4]["evaluated_step"] < where[4]["offline_step"] == 4
    assert differences(outcome(tmp_path / "calm"), outcome(tmp_path / "stopped")) == []
    run_folder = the_run(tmp_path / "stopped")
    assert len(list(run_folder.glob("events.*"))) == len(where) + 1
    once = [tag for path in run_folder.glob("events.*") for tag in texts(path)]
    assert sorted(once) == ["custom_scalars__config__", "hyperparameters/text_summary"]
    assert not (run_folder / "checkpoints").exists()
