"""Run folders sent between machines: complete, in small pieces, and never worse than what had arrived."""

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cleanrl.utils.benchmark import copies as benchmark_copies
from cleanrl.utils.benchmark.copies import FolderSender, Home, SupersededError
from cleanrl.utils.run.checkpoint import CheckpointWriter, cut_events, newest_checkpoint
from cleanrl.utils.run.folders import lock_run, manifests, release_finished

NAME = "Pong__test__1"


class Run:
    """A run in the current folder: its checkpoints, of increasing numbers, and its curve."""

    def __init__(self, resume: str | None = None):
        self.folder = Path("runs") / (resume or f"{NAME}__7")
        (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (self.folder / "checkpoints" / "lock").touch()
        resumed = newest_checkpoint(self.folder) if resume else None
        if resumed:
            cut_events(self.folder, resumed)
        self.resumed_number = resumed.read_state()["number"] if resumed else None
        self.checkpoints = CheckpointWriter(self.folder, resumed)

    def save(self, number: int) -> None:
        """Saves a checkpoint, and before it a piece of the curve."""
        with (self.folder / "events.out.tfevents.1").open("ab") as file:
            file.write(b"%04d" % number)
        noise = np.random.default_rng(number).bytes(5000)
        self.checkpoints.save("test", {}, {"number": number, "noise": noise}, {})


class DeadMachineError(Exception):
    pass


class Machine:
    """Works on a run in its own folder; runs `before_call` with each call's method, and may die in it."""

    def __init__(self, folder: Path, home: Home, before_call: Callable[[str], Any] = lambda method: None):
        self.folder, self.home, self.before_call = folder, home, before_call
        (folder / "runs").mkdir(parents=True)
        self.calls: list[tuple] = []
        self.beginning = home.begin(NAME, folder.name)
        self.sender = FolderSender(folder / "runs", self.call)
        self.sender.fetch(self.beginning.files)

    def call(self, method: str, *arguments: Any) -> Any:
        self.before_call(method)
        self.calls.append((method, *arguments))
        return getattr(self.home, method)(NAME, self.beginning.attempt, *arguments)

    def send(self, run: Run) -> None:
        self.call("report", run.folder.name, b"")
        self.sender.send(self.folder / run.folder)


@pytest.fixture
def home(tmp_path):
    (tmp_path / "home" / "runs").mkdir(parents=True)
    return Home(tmp_path / "home" / "runs", {NAME: tmp_path / "home" / "log"}, {NAME: None})


@pytest.fixture
def machine(tmp_path, home, monkeypatch):
    machine = Machine(tmp_path / "machine", home)
    monkeypatch.chdir(machine.folder)
    return machine


@pytest.fixture
def run(machine):
    return Run()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock"
    }


def home_folder(home: Home, run: Run) -> Path:
    return home.runs / run.folder.name


def test_a_folder_that_goes_away_while_files_are_sent_is_no_error(machine, run, monkeypatch):
    """As the checkpoints' when a run finishes."""
    going = run.folder / "checkpoints" / "going"
    going.mkdir()
    scandir = os.scandir

    def scandir_too_late(path: Any) -> Any:
        if Path(path).name == going.name:
            raise FileNotFoundError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scandir_too_late)
    machine.send(run)


def test_the_copy_is_the_folder(home, machine, run):
    (run.folder / "videos").mkdir()
    (run.folder / "videos" / "1.mp4").write_bytes(b"film")
    for number in range(5):
        run.save(number)
        machine.send(run)
        assert contents(home_folder(home, run)) == contents(run.folder)


def test_only_changes_are_sent_and_of_curves_only_what_is_new(machine, run):
    run.save(1)
    machine.send(run)
    before = len(machine.calls)
    machine.send(run)
    assert [call[0] for call in machine.calls[before:]] == ["report"]
    run.save(2)
    before = len(machine.calls)
    machine.send(run)
    _, *calls = machine.calls[before:]
    name = run.folder.name
    assert calls[0] == ("append", f"{name}/events.out.tfevents.1", 4, b"0002")
    assert [call[1].rpartition("/")[2] for call in calls[1:]] == [
        "state-000002.zst", "checkpoint-000002.json",
    ]  # fmt: skip


def test_no_piece_is_too_large(home, machine, run, monkeypatch):
    monkeypatch.setattr(benchmark_copies, "PIECE_BYTES", 1000)
    run.save(1)
    machine.send(run)
    with (run.folder / "events.out.tfevents.1").open("ab") as file:
        file.write(bytes(range(250)) * 9)
    machine.send(run)
    pieces = [call for call in machine.calls if call[0] in ("write", "append")]
    assert len(pieces) > 9
    assert max(len(call[3]) for call in pieces) == 1000
    assert contents(home_folder(home, run)) == contents(run.folder)


def dies_after(num_calls: int) -> Callable[[str], None]:
    calls = iter(range(num_calls))

    def before_call(method: str) -> None:
        if next(calls, None) is None:
            raise DeadMachineError

    return before_call


def test_whenever_the_machine_dies_the_newest_checkpoint_that_arrived_is_complete(tmp_path, monkeypatch):
    """Even if two checkpoints were saved between two calls, so that everything sent before is gone."""
    monkeypatch.setattr(benchmark_copies, "PIECE_BYTES", 3000)
    numbers, is_dead = [], True
    for num_calls in itertools.count():
        folder = tmp_path / str(num_calls)
        (folder / "home").mkdir(parents=True)
        home = Home(folder / "home", {NAME: folder / "log"}, {NAME: None})
        machine = Machine(folder / "machine", home, dies_after(num_calls))
        monkeypatch.chdir(machine.folder)
        run = Run()
        try:
            for number in range(7):
                run.save(number)
                if number % 3 == 0:
                    machine.send(run)
            is_dead = False
        except DeadMachineError:
            pass
        copy = home_folder(home, run)
        shutil.rmtree(machine.folder)
        if not manifests(copy):
            assert not numbers
            continue
        saved = newest_checkpoint(copy)
        assert saved.name == manifests(copy)[0].name  # no newer one that is incomplete
        numbers.append(saved.read_state()["number"])
        assert (copy / "events.out.tfevents.1").stat().st_size >= saved.event_files["events.out.tfevents.1"]
        if not is_dead:
            break
        other = Machine(folder / "other", home)  # resumes the run
        monkeypatch.chdir(other.folder)
        run = Run(resume=other.beginning.folder)
        assert run.resumed_number == numbers[-1]
        run.save(100)
        other.send(run)
        assert contents(copy) == contents(run.folder)
    assert numbers == sorted(numbers)
    assert set(numbers) == {0, 2, 3, 5, 6}


def test_a_checkpoint_that_is_removed_while_it_is_sent_is_left_out(home, machine, run):
    run.save(1)
    machine.send(run)
    run.save(2)

    def replace_checkpoints(method: str) -> None:
        if method == "append":  # to the curve, before the checkpoint's files
            machine.before_call = lambda method: None
            for number in (3, 4, 5):
                run.save(number)

    machine.before_call = replace_checkpoints
    machine.send(run)
    assert newest_checkpoint(home_folder(home, run)).read_state()["number"] == 1
    machine.send(run)
    assert contents(home_folder(home, run)) == contents(run.folder)


def test_the_newest_that_arrived_stays_until_a_newer_one_arrives(home, machine, run):
    run.save(1)
    machine.send(run)
    before = contents(home.runs)
    (run.folder / "checkpoints" / "state-000001.zst").unlink()
    machine.send(run)
    assert contents(home.runs) == before
    for number in (2, 3, 4):
        run.save(number)
    machine.send(run)
    assert contents(home_folder(home, run)) == contents(run.folder)


def test_what_is_removed_from_a_curve_is_removed_at_home(home, machine, run):
    run.save(1)
    (run.folder / "events.out.tfevents.2").write_bytes(b"of an attempt that died")
    machine.send(run)
    os.truncate(run.folder / "events.out.tfevents.1", 2)
    (run.folder / "events.out.tfevents.2").unlink()
    machine.send(run)
    assert contents(home_folder(home, run)) == contents(run.folder)


def test_a_finished_run_is_complete_or_not_finished(home, machine, run):
    run.save(1)
    machine.send(run)
    model = run.folder / "test.cleanrl_model"
    model.write_bytes(b"weights")
    lock = lock_run(run.folder)
    run.checkpoints.remove_all()
    release_finished(run.folder, lock)
    machine.send(run)
    copy = home_folder(home, run)
    assert (copy / "checkpoints").exists()
    (copy / "test.cleanrl_model").write_bytes(b"weighty")
    (copy / "events.out.tfevents.1").unlink()
    machine.sender.finish(machine.folder / run.folder)
    assert contents(copy) == contents(run.folder)
    assert {path.name for path in copy.iterdir()} == {"events.out.tfevents.1", "test.cleanrl_model"}
    assert home.begin(NAME, "other").over == "done"


def test_a_machine_wrongly_considered_dead_is_refused(home, machine, run, tmp_path):
    run.save(1)
    machine.send(run)
    before = contents(home.runs)
    Machine(tmp_path / "other", home)
    run.save(2)
    for speak in (
        lambda: machine.call("report", run.folder.name, b"line\n"),
        lambda: machine.sender.send(machine.folder / run.folder),
        lambda: machine.call("remove", f"{run.folder.name}/events.out.tfevents.1"),
        lambda: machine.call("finish", {}),
    ):
        with pytest.raises(SupersededError, match="Pong__test__1 is now running on other"):
            speak()
    assert contents(home.runs) == before
    assert home.logs[NAME].read_bytes() == b""


def test_half_a_file_is_not_used(home, machine, run, tmp_path):
    run.save(1)
    machine.send(run)
    name = f"{run.folder.name}/checkpoints/state-000002.zst"
    machine.call("write", name, 0, b"half", False)
    assert not (home.runs / name).exists()
    other = Machine(tmp_path / "other", home)
    assert name + ".partial" not in other.beginning.files
    assert not list(home.runs.rglob("*.partial"))


def test_without_a_checkpoint_a_run_starts_again(home, machine, run, tmp_path):
    machine.send(run)
    assert not manifests(home_folder(home, run))
    assert (home_folder(home, run) / "checkpoints").exists()  # or it would look finished
    other = Machine(tmp_path / "other", home)
    assert (other.beginning.folder, other.beginning.files) == (None, ())


def test_nothing_starts_while_stopping(home, machine):
    assert machine.call("report", None, b"1\n") is False
    home.stop()
    assert machine.call("report", None, b"2\n") is True
    assert home.begin(NAME, "other").over == "stopped"
    assert home.logs[NAME].read_bytes() == b"1\n2\n"
