"""Run folders on the way between machines: whole, small, and never less than what had arrived."""

import itertools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cleanrl.utils.benchmark import copies as benchmark_copies
from cleanrl.utils.benchmark.copies import FolderSender, Home, SupersededError
from cleanrl.utils.run.checkpoint import Run, manifests, newest_checkpoint

NAME = "Pong__test__1"


@dataclass
class Args:
    env_id: str = "Pong"
    exp_name: str = "test"
    seed: int = 1
    checkpoint_interval: float = 1.0
    resume: str | None = None


class DeadMachineError(Exception):
    pass


class Machine:
    """One that works on a run, in a folder of its own, and dies before its call number `lives_until`."""

    def __init__(self, folder: Path, home: Home, lives_until: int | None = None):
        self.folder, self.home, self.lives_until = folder, home, lives_until
        (folder / "runs").mkdir(parents=True)
        self.calls: list[tuple] = []
        self.beginning = home.begin(NAME, folder.name)
        self.sender = FolderSender(folder / "runs", self.call)
        self.sender.fetch(self.beginning.files)

    def call(self, method: str, *arguments: Any) -> Any:
        if len(self.calls) == self.lives_until:
            raise DeadMachineError
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
    with Run(Args(), "test") as run:
        yield run


def save(run: Run, number: int) -> None:
    """A checkpoint, and a piece of a curve that was there before it."""
    with (run.folder / "events.out.tfevents.1").open("ab") as file:
        file.write(b"%04d" % number)
    run.save({"number": number, "noise": np.random.default_rng(number).bytes(5000)}, "none", None)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock"
    }


def home_folder(home: Home, run: Run) -> Path:
    return home.runs / run.folder.name


def test_the_copy_is_the_folder(home, machine, run):
    (run.folder / "videos").mkdir()
    (run.folder / "videos" / "1.mp4").write_bytes(b"film")
    for number in range(5):
        save(run, number)
        machine.send(run)
        assert contents(home_folder(home, run)) == contents(run.folder)


def test_what_has_not_changed_does_not_travel_and_curves_travel_as_they_grow(machine, run):
    save(run, 1)
    machine.send(run)
    before = len(machine.calls)
    machine.send(run)
    assert [call[0] for call in machine.calls[before:]] == ["report"]
    save(run, 2)
    before = len(machine.calls)
    machine.send(run)
    _, *calls = machine.calls[before:]
    name = run.folder.name
    assert calls[0] == ("append", f"{name}/events.out.tfevents.1", 4, b"0002")
    assert [call[1].rpartition("/")[2] for call in calls[1:]] == [
        "state-000002.zst", "checkpoint-000002.json",
    ]  # fmt: skip


def test_no_piece_is_larger_than_it_may_be(home, machine, run, monkeypatch):
    monkeypatch.setattr(benchmark_copies, "PIECE_BYTES", 1000)
    save(run, 1)
    machine.send(run)
    with (run.folder / "events.out.tfevents.1").open("ab") as file:
        file.write(bytes(range(250)) * 9)
    machine.send(run)
    pieces = [call for call in machine.calls if call[0] in ("write", "append")]
    assert len(pieces) > 9
    assert max(len(call[3]) for call in pieces) == 1000
    assert contents(home_folder(home, run)) == contents(run.folder)


def test_whenever_the_machine_dies_its_newest_checkpoint_that_arrived_is_whole(tmp_path, monkeypatch):
    """Also where two checkpoints were made between two calls, so that all that was sent before is gone."""
    monkeypatch.setattr(benchmark_copies, "PIECE_BYTES", 3000)
    numbers = []
    for lives_until in itertools.count():
        folder = tmp_path / str(lives_until)
        home = Home(folder / "home", {NAME: folder / "log"}, {NAME: None})
        (folder / "home").mkdir(parents=True)
        machine = Machine(folder / "machine", home, lives_until)
        monkeypatch.chdir(machine.folder)
        is_dead = False
        with Run(Args(), "test") as run:
            try:
                for number in range(7):
                    save(run, number)
                    if number % 3 == 0:
                        machine.send(run)
            except DeadMachineError:
                is_dead = True
            copy = home_folder(home, run)
        monkeypatch.chdir(folder)
        shutil.rmtree(machine.folder)
        if not manifests(copy):
            assert not numbers
            continue
        saved = newest_checkpoint(copy)
        assert saved.name == manifests(copy)[0].name  # none that is newer and not whole
        numbers.append(saved.read_state()["number"])
        assert (copy / "events.out.tfevents.1").stat().st_size >= saved.event_files["events.out.tfevents.1"]
        if not is_dead:
            break
        other = Machine(folder / "other", home)  # goes on with it
        monkeypatch.chdir(other.folder)
        assert other.beginning.folder == copy.name
        with Run(Args(resume=f"runs/{copy.name}"), "test") as run:
            assert run.resumed.read_state()["number"] == numbers[-1]
            save(run, 100)
            other.send(run)
        assert contents(copy) == contents(run.folder)
    assert numbers == sorted(numbers)
    assert set(numbers) == {0, 2, 3, 5, 6}


def test_a_checkpoint_that_goes_while_it_is_sent_is_left_out(home, machine, run, monkeypatch):
    save(run, 1)
    machine.send(run)
    save(run, 2)
    send_whole = FolderSender._send_whole

    def later(self, path: Path) -> None:
        monkeypatch.setattr(FolderSender, "_send_whole", send_whole)
        for number in (3, 4, 5):
            save(run, number)
        send_whole(self, path)

    monkeypatch.setattr(FolderSender, "_send_whole", later)
    machine.send(run)
    assert newest_checkpoint(home_folder(home, run)).read_state()["number"] == 1
    machine.send(run)
    assert contents(home_folder(home, run)) == contents(run.folder)


def test_the_newest_that_has_arrived_stays_while_it_is_being_removed_elsewhere(home, machine, run):
    save(run, 1)
    machine.send(run)
    before = contents(home.runs)
    (run.folder / "checkpoints" / "state-000001.zst").unlink()
    machine.send(run)
    assert contents(home.runs) == before
    for number in (2, 3, 4):
        save(run, number)
    machine.send(run)
    assert contents(home_folder(home, run)) == contents(run.folder)


def test_what_is_cut_off_a_curve_goes_here_too(home, machine, run):
    save(run, 1)
    (run.folder / "events.out.tfevents.2").write_bytes(b"of an attempt that was cut short")
    machine.send(run)
    os.truncate(run.folder / "events.out.tfevents.1", 2)
    (run.folder / "events.out.tfevents.2").unlink()
    machine.send(run)
    assert contents(home_folder(home, run)) == contents(run.folder)


def test_a_finished_run_comes_whole_or_is_not_finished(home, machine, run):
    save(run, 1)
    machine.send(run)
    model = run.folder / "test.cleanrl_model"
    model.write_bytes(b"weights")
    run.finish()
    machine.send(run)
    copy = home_folder(home, run)
    assert (copy / "checkpoints").exists()
    (copy / "test.cleanrl_model").write_bytes(b"weighty")
    (copy / "events.out.tfevents.1").unlink()
    machine.sender.finish(machine.folder / run.folder)
    assert contents(copy) == contents(run.folder)
    assert {path.name for path in copy.iterdir()} == {"events.out.tfevents.1", "test.cleanrl_model"}
    assert home.begin(NAME, "other").over == "done"


def test_a_machine_that_was_thought_dead_has_nothing_to_say(home, machine, run, tmp_path):
    save(run, 1)
    machine.send(run)
    before = contents(home.runs)
    Machine(tmp_path / "other", home)
    save(run, 2)
    for speak in (
        lambda: machine.call("report", run.folder.name, b"line\n"),
        lambda: machine.sender.send(machine.folder / run.folder),
        lambda: machine.call("remove", f"{run.folder.name}/events.out.tfevents.1"),
        lambda: machine.call("finish", {}),
    ):
        with pytest.raises(SupersededError, match="Pong__test__1 is at work on other by now"):
            speak()
    assert contents(home.runs) == before
    assert home.logs[NAME].read_bytes() == b""


def test_half_a_file_is_not_gone_on_with(home, machine, run, tmp_path):
    save(run, 1)
    machine.send(run)
    name = f"{run.folder.name}/checkpoints/state-000002.zst"
    machine.call("write", name, 0, b"half", False)
    assert not (home.runs / name).exists()
    other = Machine(tmp_path / "other", home)
    assert name + ".partial" not in other.beginning.files
    assert not list(home.runs.rglob("*.partial"))


def test_without_a_checkpoint_a_run_begins_anew(home, machine, run, tmp_path):
    machine.send(run)
    assert not manifests(home_folder(home, run))
    assert (home_folder(home, run) / "checkpoints").exists()  # or it would be taken for finished
    other = Machine(tmp_path / "other", home)
    assert (other.beginning.folder, other.beginning.files) == (None, ())


def test_what_is_asked_to_stop_does_not_begin(home, machine):
    assert machine.call("report", None, b"1\n") is False
    home.stop()
    assert machine.call("report", None, b"2\n") is True
    assert home.begin(NAME, "other").over == "stopped"
    assert home.logs[NAME].read_bytes() == b"1\n2\n"
