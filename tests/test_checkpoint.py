"""Checkpoints: a run that ends in any way, at any instant, goes on as if it had not."""

import dataclasses
import errno
import functools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from resume_runs import (
    KILLED,
    SCRIPTS,
    Command,
    Server,
    differences,
    outcome,
    storm,
    the_run,
    tiny_options,
)

from cleanrl.utils import signals as interrupts
from cleanrl.utils import storage
from cleanrl.utils.replay.rows import held_positions
from cleanrl.utils.run import checkpoint
from cleanrl.utils.run.checkpoint import (
    MAY_CHANGE,
    Checkpoint,
    Run,
    manifests,
    newest_checkpoint,
    newest_unfinished_run,
)
from cleanrl.utils.signals import Stopped, StopSignals

KILLS = 12  # of each of the two scripts that are killed at exact instants
TORCH_SCRIPTS = [script for script in SCRIPTS if "jax" not in script]


@dataclasses.dataclass
class Args:
    env_id: str = "Pong"
    exp_name: str = "test"
    seed: int = 1
    learning_rate: float = 0.1
    total_timesteps: int = 100
    checkpoint_interval: float = 0.001
    save_replay: Path | None = None
    resume: str | None = None


class Ring:
    """A replay buffer of numbers; what a position holds is known from its environment and itself."""

    def __init__(self, num_envs: int, num_slots: int):
        self.num_slots = num_slots
        self.heads = np.zeros(num_envs, np.int64)
        total = num_envs * num_slots
        self.values = {
            "frames": np.zeros(total, np.int64),
            "actions": np.full(total, -1),
            "stack_depths": np.zeros(total, np.uint8),
            "is_transition": np.zeros(total, bool),
        }
        for env in range(num_envs):
            self._observe(env)

    def _slot(self, env: int) -> int:
        return env * self.num_slots + self.heads[env] % self.num_slots

    def _observe(self, env: int) -> None:
        slot = self._slot(env)
        self.values["frames"][slot] = 1000 * env + self.heads[env]
        self.values["stack_depths"][slot] = min(self.heads[env], 3)
        self.values["is_transition"][slot] = False

    def add(self, *steps: int) -> None:
        """Makes so many steps in each environment."""
        for env, count in enumerate(steps):
            for _ in range(count):
                slot = self._slot(env)
                self.values["actions"][slot] = 7 * self.heads[env]
                self.values["is_transition"][slot] = True
                self.heads[env] += 1
                self._observe(env)

    def read(self, slots: np.ndarray) -> dict[str, np.ndarray]:
        return {name: values[slots] for name, values in self.values.items()}

    def held(self) -> dict[tuple[int, int], tuple[int, int, bool]]:
        """By environment and position: frame, action (of a transition) and whether it is one.

        Without the oldest three rows of a ring that is full: only their frames mean anything.
        """
        found = {}
        for env, (oldest, head) in enumerate(zip(*held_positions(self), strict=True)):
            for position in range(oldest + 3 * (oldest > 0), head + 1):
                slot = env * self.num_slots + position % self.num_slots
                frame, action, _, is_transition = (values[slot] for values in self.values.values())
                found[env, position] = (frame, action if is_transition else None, is_transition)
        return found


def read_back(saved: Checkpoint, num_slots: int) -> Ring:
    ring = Ring(len(saved.buffer.heads), num_slots)
    ring.values["is_transition"][:] = False
    for slots, rows in saved.rows(num_slots):
        for name, values in ring.values.items():
            values[slots] = rows[name]
    ring.heads = np.array(saved.buffer.heads)
    return ring


def manifests_in(folder: Path) -> list[Path]:
    return list(folder.glob("runs/*/checkpoints/checkpoint-*.json"))


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run():
    with Run(Args(), "script") as run:
        yield run


def resumed(folder: Path, script: str = "script", **options: object) -> Run:
    return Run(Args(resume=str(folder), **options), script)


def files(run: Run, kind: str) -> dict[str, tuple]:
    """What would not be the same if a file were written again."""
    found = {}
    for path in sorted((run.folder / "checkpoints").glob(kind)):
        status = path.stat()
        found[path.name] = (status.st_ino, status.st_mtime_ns, path.read_bytes())
    return found


def damage(path: Path, kind: str) -> None:
    data = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :])


# ------------------------------------------------------------------------------------------------ saving


def test_a_checkpoint_holds_the_state_and_the_options(run):
    run.save({"weights": np.arange(3)}, "replay", None)
    saved = newest_checkpoint(run.folder)
    assert saved.read_state()["weights"].tolist() == [0, 1, 2]
    assert saved.buffer is None
    assert (saved.script, saved.options["learning_rate"]) == ("script", 0.1)


def test_only_new_rows_are_written_and_no_file_is_written_again(run):
    ring = Ring(2, 100)
    before, sizes = {}, []
    for _ in range(6):
        ring.add(4, 3)
        run.save(None, "replay", ring)
        rows = files(run, "rows-*")
        assert before.items() <= rows.items()
        assert len(rows) == len(before) + 1
        (new,) = rows.keys() - before.keys()
        entry = next(entry for entry in newest_checkpoint(run.folder).files() if entry.name == new)
        sizes.append(len(storage.read_tree(run.folder / "checkpoints", entry)["envs"]))
        before = rows
    assert sizes == [5 + 4] * 6  # with the row that was the newest before, then without an action


def test_a_checkpoint_without_new_rows_writes_none(run):
    ring = Ring(2, 100)
    ring.add(4, 3)
    run.save(None, "replay", ring)
    before = files(run, "rows-*")
    run.save(None, "replay", ring)
    assert files(run, "rows-*") == before
    assert newest_checkpoint(run.folder).rows(100)


def test_two_checkpoints_are_kept_and_files_that_none_needs_go(run):
    ring = Ring(2, 10)
    for _ in range(12):
        ring.add(4, 3)
        run.save(None, "replay", ring)
        kept = [Checkpoint(path) for path in manifests(run.folder)]
        needed = {entry.name for saved in kept for entry in saved.files()}
        names = {path.name for path in (run.folder / "checkpoints").iterdir()}
        assert names == needed | {"lock"} | {path.name for path in manifests(run.folder)}
        assert len(kept) <= 2
        for saved in kept:
            saved.check()
    assert len(kept) == 2
    assert len(files(run, "rows-*")) <= 5


def test_a_buffer_of_another_phase_is_saved_from_its_start_and_the_old_one_goes(run):
    ring, other = Ring(1, 50), Ring(1, 20)
    ring.add(30)
    run.save(None, "teacher", ring)
    old = files(run, "rows-*")
    other.add(5)
    run.save(None, "online", other)
    assert read_back(newest_checkpoint(run.folder), 20).held() == other.held()
    run.save(None, "online", other)
    assert not old.keys() & files(run, "rows-*").keys()


@pytest.mark.parametrize("seed", range(4))
def test_wrapped_rings_of_unequal_heads_come_back(run, seed):
    rng = np.random.default_rng(seed)
    ring = Ring(3, 17)
    for _ in range(8):
        ring.add(*rng.integers(0, 12, size=3))
        run.save(None, "replay", ring)
        assert read_back(newest_checkpoint(run.folder), 17).held() == ring.held()


def test_a_ring_that_was_lapped_between_two_checkpoints_comes_back(run):
    ring = Ring(2, 10)
    ring.add(4, 3)
    run.save(None, "replay", ring)
    ring.add(35, 3)
    run.save(None, "replay", ring)
    assert read_back(newest_checkpoint(run.folder), 10).held() == ring.held()


@pytest.mark.parametrize("num_slots", [8, 40])
def test_a_ring_of_another_size_takes_what_fits(run, num_slots):
    ring = Ring(2, 16)
    ring.add(5, 3)
    run.save(None, "replay", ring)
    ring.add(25, 7)
    run.save(None, "replay", ring)
    saved = newest_checkpoint(run.folder)
    found, held = read_back(saved, num_slots), ring.held()
    for (env, position), row in found.held().items():
        if (env, position) in held:
            assert row == held[env, position]
        else:
            assert not row[2], "its stack, or all of it, is older than what was saved"
    last = [key for key in held if key[1] > ring.heads[key[0]] - min(num_slots, 16) + 3]
    assert set(last) <= found.held().keys()


def test_a_run_gone_on_with_adds_to_the_rows_that_are_there(run):
    ring = Ring(2, 30)
    ring.add(9, 9)
    run.save(None, "replay", ring)
    run.__exit__(None, None, None)
    before = files(run, "rows-*")
    later = resumed(run.folder)
    ring.add(2, 2)
    later.save(None, "replay", ring)
    after = files(run, "rows-*")
    assert before.items() <= after.items()
    assert len(after) == len(before) + 1
    assert read_back(newest_checkpoint(run.folder), 30).held() == ring.held()


def test_the_end_of_a_run_removes_its_checkpoints(run):
    run.save(None, "replay", None)
    run.finish()
    assert not (run.folder / "checkpoints").exists()


def test_the_first_checkpoint_is_due_at_once_and_others_after_the_interval(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    with Run(Args(checkpoint_interval=10), "script") as run:
        assert run.is_due()
        run.save(None, "replay", None)
        now[0] += 9
        assert not run.is_due()
        now[0] += 1
        assert run.is_due()


def test_without_an_interval_one_is_due_only_when_the_run_is_stopped():
    with Run(Args(checkpoint_interval=0), "script") as run:
        assert not run.is_due()
        signal.raise_signal(signal.SIGTERM)
        assert run.is_due()


# ------------------------------------------------------------------------------------------------ faults


@pytest.mark.parametrize("instant", range(4))
def test_a_full_disk_costs_only_that_checkpoint(run, monkeypatch, capsys, instant):
    ring = Ring(2, 30)
    ring.add(3, 4)
    run.save("before", "replay", ring)
    ring.add(3, 4)
    before = {path.name: path.read_bytes() for path in (run.folder / "checkpoints").iterdir()}
    calls = []

    def fail(*args: object) -> None:
        calls.append(args)
        if len(calls) > instant:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        run.save("while it is full", "replay", ring)
    assert "warning: no checkpoint could be written (No space left on device)" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (run.folder / "checkpoints").iterdir()} == before
    assert newest_checkpoint(run.folder).read_state() == "before"

    ring.add(3, 4)
    run.save("after", "replay", ring)
    assert capsys.readouterr().err == ""
    saved = newest_checkpoint(run.folder)
    assert saved.read_state() == "after"
    assert read_back(saved, 30).held() == ring.held()


DAMAGES = ["missing", "truncated", "bit-flipped"]


@pytest.fixture
def two_checkpoints(run):
    ring = Ring(2, 30)
    for state in ("first", "second"):
        ring.add(3, 4)
        run.save(state, "replay", ring)
    run.__exit__(None, None, None)
    return run.folder


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("file", ["state", "rows"])
def test_after_damage_the_checkpoint_before_is_used_and_the_damaged_one_named(
    two_checkpoints, capsys, file, kind
):
    newest = sorted((two_checkpoints / "checkpoints").glob(f"{file}-*"))[-1]
    damage(newest, kind)
    assert resumed(two_checkpoints).resumed.read_state() == "first"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: checkpoint-000002 of {two_checkpoints} cannot be used: {newest.name}")


@pytest.mark.parametrize("kind", ["truncated", "bit-flipped"])
def test_a_damaged_manifest_is_passed_over_too(two_checkpoints, capsys, kind):
    damage(two_checkpoints / "checkpoints" / "checkpoint-000002.json", kind)
    assert resumed(two_checkpoints).resumed.read_state() == "first"
    assert "checkpoint-000002.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("kind", DAMAGES)
def test_if_none_is_whole_the_run_is_refused(two_checkpoints, kind):
    for path in (two_checkpoints / "checkpoints").glob("state-*"):
        damage(path, kind)
    before = sorted(path.name for path in two_checkpoints.rglob("*"))
    with pytest.raises(SystemExit, match=r"^error: no checkpoint of .* is whole; restore its files") as end:
        resumed(two_checkpoints)
    assert "\n" not in str(end.value)
    assert sorted(path.name for path in two_checkpoints.rglob("*")) == before


def test_after_damage_the_next_checkpoint_is_good(two_checkpoints):
    damage(sorted((two_checkpoints / "checkpoints").glob("rows-*"))[-1], "truncated")
    run = resumed(two_checkpoints)
    ring = Ring(2, 30)
    ring.add(3, 4)
    ring.add(5, 5)
    run.save("third", "replay", ring)
    saved = newest_checkpoint(two_checkpoints)
    assert saved.read_state() == "third"
    assert read_back(saved, 30).held() == ring.held()


def test_a_checkpoint_of_another_version_is_refused(two_checkpoints, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "VERSION", 2)
    with pytest.raises(SystemExit, match=r"^error: no checkpoint"):
        resumed(two_checkpoints)
    assert "checkpoint-000002.json has version 1, not 2" in capsys.readouterr().err


def test_another_scripts_checkpoint_is_refused(two_checkpoints):
    with pytest.raises(SystemExit, match=r"^error: .* is a run of script\.py, not of other\.py$"):
        resumed(two_checkpoints, "other")


@pytest.mark.parametrize(
    ("option", "value"), [("env_id", "Breakout"), ("learning_rate", 0.2), ("seed", 2), ("exp_name", "x")]
)
def test_an_option_that_makes_it_another_run_is_refused_by_name(two_checkpoints, option, value):
    before = getattr(Args, option)
    name = option.replace("_", "-")
    with pytest.raises(SystemExit, match=rf"^error: --{name} is {value}, but .* began with {before}; .*$"):
        resumed(two_checkpoints, **{option: value})


def test_an_option_that_may_change_is_taken(two_checkpoints):
    assert {"total_timesteps", "checkpoint_interval", "save_replay"} <= MAY_CHANGE
    run = resumed(two_checkpoints, total_timesteps=200, checkpoint_interval=3.0, save_replay=Path("replay"))
    run.save("third", "replay", None)
    options = newest_checkpoint(two_checkpoints).options
    assert (options["total_timesteps"], options["save_replay"]) == (200, "replay")


def test_a_folder_without_a_checkpoint_is_refused_and_stays_as_it_was():
    Path("runs/finished").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"^error: --resume runs/finished has no checkpoint: it is finished"):
        resumed(Path("runs/finished"))
    assert list(Path("runs/finished").iterdir()) == []


def test_no_folder_at_all_is_refused():
    with pytest.raises(SystemExit, match=r"^error: --resume nothing is not a folder"):
        resumed(Path("nothing"))
    assert not Path("nothing").exists()


HOLD = """
import sys
from pathlib import Path
from types import SimpleNamespace
from cleanrl.utils.run.checkpoint import Run
options = {"env_id": "Pong", "exp_name": "test", "seed": 1, "checkpoint_interval": 1, "resume": sys.argv[1]}
Run(SimpleNamespace(**options), "script")
"""


def test_a_second_process_on_a_run_is_refused(run):
    run.save(None, "replay", None)
    environment = os.environ | {"PYTHONPATH": str(Path(checkpoint.__file__).parents[2])}
    command = [sys.executable, "-c", HOLD, str(run.folder)]
    second = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert second.returncode == 1
    assert second.stderr == f"error: another process is at work on {run.folder}; wait for its end\n"
    assert newest_checkpoint(run.folder)


def test_a_folder_is_free_again_after_its_run(run):
    run.save(None, "replay", None)
    with pytest.raises(SystemExit, match="another process is at work"):
        resumed(run.folder)
    run.__exit__(None, None, None)
    assert resumed(run.folder).resumed


@pytest.mark.parametrize("is_new", [True, False])
def test_a_folder_that_cannot_be_written_to_is_refused(two_checkpoints, monkeypatch, is_new):
    def refuse(*args: object, **keywords: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    target = (Path, "mkdir") if is_new else (checkpoint.filelock.FileLock, "acquire")
    monkeypatch.setattr(*target, refuse)
    with pytest.raises(SystemExit, match=r"^error: .* cannot be written to \(Read-only file system\); .*$"):
        Run(Args(resume=None if is_new else str(two_checkpoints)), "script")


def test_the_newest_unfinished_run_of_the_same_experiment_is_found():
    for name, has_checkpoint in {
        "Pong__test__1__100": True,
        "Pong__test__1__200": True,
        "Pong__test__1__300": False,
        "Pong__test__2__400": True,
        "Pong__other__1__400": True,
        "Breakout__test__1__400": True,
    }.items():
        folder = Path("runs") / name / "checkpoints"
        folder.mkdir(parents=True)
        if has_checkpoint:
            storage.write_manifest(folder / "checkpoint-000001.json", {})
    assert newest_unfinished_run("Pong", "test", 1) == Path("runs/Pong__test__1__200")
    assert newest_unfinished_run("Pong", "test", 3) is None


def test_events_that_came_after_the_checkpoint_go(run, capsys):
    events = run.folder / "events.out.tfevents.1.host.1.0"
    events.write_bytes(b"before")
    run.save(None, "replay", None)
    run.__exit__(None, None, None)
    events.write_bytes(b"before and after")
    later = run.folder / "events.out.tfevents.2.host.2.0"
    later.write_bytes(b"after")
    resumed(run.folder)._lock.release()
    assert events.read_bytes() == b"before"
    assert not later.exists()
    events.write_bytes(b"bef")
    resumed(run.folder)
    assert f"warning: {events} lacks some of the run's curves" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_with_a_line_and_its_status(capsys, number, status):
    run = Run(Args(), "script")

    def work() -> None:
        with run:
            run.save(None, "replay", None)
            assert not run.is_due()
            signal.raise_signal(number)
            run.raise_if_stopped()  # not before a checkpoint could be made
            assert run.is_due()
            run.raise_if_stopped()

    with pytest.raises(SystemExit) as end:
        work()
    assert end.value.code == status
    assert capsys.readouterr().err == f"stopped by {number.name}; go on with --resume {run.folder}\n"


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once(monkeypatch, second):
    ended = []
    monkeypatch.setattr(interrupts.os, "_exit", ended.append)
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGTERM)
        assert (signals.received, ended) == (signal.SIGTERM, [])
        signal.raise_signal(second)
    assert ended == [128 + second]


def test_the_handlers_from_before_come_back():
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with Run(Args(), "script"):
        assert all(signal.getsignal(number) != old for number, old in zip(numbers, before, strict=True))
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_run_that_is_stopped_before_its_first_checkpoint_says_that_there_is_none(capsys):
    run = Run(Args(), "script")
    with pytest.raises(SystemExit), run:
        raise Stopped(signal.SIGTERM)
    assert capsys.readouterr().err == "stopped by SIGTERM; there is no checkpoint\n"


# --------------------------------------------------------------------------- runs killed at exact instants


@pytest.fixture(scope="module", params=TORCH_SCRIPTS)
def server(request):
    with Server(request.param) as server:
        yield server


@pytest.fixture(scope="module")
def uninterrupted(server, tmp_path_factory):
    """The outcome of a run without checkpoints, and the instants of one with."""
    folder = tmp_path_factory.mktemp(server.script)
    status, _, output = server.run(folder / "without", "--checkpoint-interval", "0")
    assert status == 0, output
    status, instants, output = server.run(folder / "with")
    assert status == 0, output
    expected = outcome(folder / "without")
    assert differences(expected, outcome(folder / "with")) == []
    return expected, instants


def test_a_run_killed_at_many_instants_comes_out_the_same(server, uninterrupted):
    expected, instants = uninterrupted
    rng = random.Random(0)
    kills, folder = 0, Path("0")
    while kills < KILLS or manifests_in(folder):
        last = kills >= KILLS
        kill_at = None if last else int(instants ** rng.uniform(0.3, 1))
        status, _, output = server.run(folder, "--resume", "auto", kill_at=kill_at)
        assert status == 0 or (status == KILLED and not last), output
        kills += status == KILLED
        if status == 0:
            assert differences(expected, outcome(folder)) == []
            folder = Path(str(kills))


def test_a_run_killed_as_it_ends_loses_nothing(server, uninterrupted):
    expected, instants = uninterrupted
    for back in (1, 2, 5, 9, 14):
        folder = Path(str(back))
        assert server.run(folder, kill_at=instants - back)[0] == KILLED
        if manifests_in(folder):
            status, _, output = server.run(folder, "--resume", "auto")
            assert status == 0, output
        assert differences(expected, outcome(folder)) == []


def test_a_run_whose_disk_is_full_for_a_while_goes_on_and_loses_nothing(server, uninterrupted):
    expected, instants = uninterrupted
    full = (instants // 2, instants // 2 + 30)
    status, seen, output = server.run(Path("run"), full_disk=full)
    assert status == 0, output
    assert output.count("warning: no checkpoint could be written (No space left on device)") > 1
    assert seen > full[1] + 100
    assert differences(expected, outcome(Path("run"))) == []
    for folder, kill_at in ((Path("while full"), full[1] - 4), (Path("after"), full[1] + 60)):
        assert server.run(folder, full_disk=full, kill_at=kill_at)[0] == KILLED
        status, _, output = server.run(folder, "--resume", "auto")
        assert status == 0, output
        assert differences(expected, outcome(folder)) == []


def test_resume_auto_without_an_unfinished_run_starts_a_new_one(server, uninterrupted):
    status, _, output = server.run(Path("run"), "--resume", "auto")
    assert status == 0, output
    assert "--resume auto: no unfinished run; this is a new one" in output
    assert differences(uninterrupted[0], outcome(Path("run"))) == []


# --------------------------------------------------------------------------------------- whole commands


@pytest.fixture(scope="module")
def calm_outcome(tmp_path_factory):
    """Gives the outcome of a script's uninterrupted run."""

    @functools.cache
    def outcome_of(script: str) -> dict:
        folder = tmp_path_factory.mktemp("calm")
        command = Command(folder, script, *tiny_options(script), "--checkpoint-interval", "0")
        assert command.end() == 0, command.output
        return outcome(folder)

    return outcome_of


@pytest.mark.parametrize("script", ["dqn_atari_jax", "qdagger_dqn_atari_impalacnn"])
def test_a_stopped_command_goes_on_as_if_it_had_not_been(script, calm_outcome):
    first = Command(Path(), script, *tiny_options(script), "--checkpoint-interval", "0.001")
    assert first.wait_for_checkpoints(10)
    start = time.monotonic()
    assert first.end(signal.SIGTERM) == 128 + signal.SIGTERM
    assert time.monotonic() - start < 30
    run_folder = the_run(Path())
    assert first.output.splitlines()[-1] == f"stopped by SIGTERM; go on with --resume {run_folder}"
    # With the run's own options, but for that one.
    second = Command(Path(), script, "--resume", str(run_folder), "--checkpoint-interval", "600")
    assert second.end() == 0, second.output
    assert differences(calm_outcome(script), outcome(Path())) == []


def test_a_killed_worker_ends_the_command_with_a_line_that_says_how_to_go_on():
    command = Command(Path(), "dqn_atari", *tiny_options("dqn_atari"), "--checkpoint-interval", "0.001")
    assert command.wait_for_checkpoints(2)
    os.kill(command.workers()[0], signal.SIGKILL)
    assert command.end() == 1
    last = command.output.splitlines()[-1]
    assert last.startswith("error: environment worker")
    assert last.endswith(f"go on with --resume {the_run(Path())}")
    assert "Traceback" not in command.output


def test_a_small_storm_of_kills_changes_nothing(calm_outcome):
    assert len(storm(Path("storm"), "dqn_atari", tiny_options("dqn_atari"), kills=3, seed=0)) == 3
    for folder in Path("storm").iterdir():
        assert differences(calm_outcome("dqn_atari"), outcome(folder)) == []
