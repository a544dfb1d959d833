"""Checkpoints on the disk: what is written and kept, and what damage and a full disk cost.

How a run makes and resumes them: test_training_run.py.
"""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from replays import Stream, assert_transitions, draw_everything, equal, fill, filled, keys_of, make_replay

from cleanrl.utils.replay.frames_torch import TorchFrames
from cleanrl.utils.replay.ring import ReplayBuffer
from cleanrl.utils.run.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    cut_events,
    newest_checkpoint,
    saved_options,
)
from cleanrl.utils.run.folders import (
    is_finished,
    lock_run,
    manifests,
    newest_unfinished_run,
    release_finished,
)
from cleanrl.utils.storage import FileEntry, read_manifest, read_tree, write_manifest

DAMAGES = ["missing", "truncated", "bit-flipped"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run's."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "lock").touch()
    return tmp_path


@pytest.fixture
def writer(folder) -> CheckpointWriter:
    return CheckpointWriter(folder, resumed=None)


def save(writer: CheckpointWriter, state: Any = None, **replays: ReplayBuffer) -> Checkpoint:
    """Saves a checkpoint and returns the newest."""
    writer.save("script", {"seed": 1}, state, replays)
    return newest_checkpoint(writer.run_folder)


def new_replay(slots_per_env: int = 10, num_envs: int = 2) -> ReplayBuffer:
    """Its rings have that many slots, of which at most all but 4 are transitions that can be drawn."""
    return make_replay(TorchFrames, (slots_per_env - 4) * num_envs, num_envs)


def assert_restored(saved: Checkpoint, name: str, replay: ReplayBuffer, stream: Stream) -> None:
    """From a new buffer all that could be drawn from the saved one can be drawn, and nothing else."""
    restored = make_replay(TorchFrames, replay.capacity, replay.num_envs)
    saved.restore_replay(name, restored)
    batch = draw_everything(restored)
    assert equal(batch, draw_everything(replay))
    assert_transitions(batch, stream, keys_of(batch))
    rngs = np.random.default_rng(0), np.random.default_rng(0)
    assert np.array_equal(restored.draw(50, rngs[0]), replay.draw(50, rngs[1]))


def files(folder: Path, kind: str = "*") -> dict[str, tuple]:
    """What would not be the same if a file were written again."""
    found = {}
    for path in sorted((folder / "checkpoints").glob(kind)):
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


def test_a_checkpoint_holds_the_state_the_options_and_the_script(writer, folder):
    saved = save(writer, {"weights": np.arange(3)})
    assert saved.read_state()["weights"].tolist() == [0, 1, 2]
    assert (saved.script, saved.options, saved.replays) == ("script", {"seed": 1}, {})
    assert saved_options(folder) == {"seed": 1}


@pytest.mark.parametrize(("slots", "num_envs"), [(100, 1), (9, 2), (15, 3)])
def test_a_replay_buffer_comes_back_at_every_step(writer, slots, num_envs):
    stream, replay = Stream(num_envs, 40, 0.1, seed=slots), new_replay(slots, num_envs)
    for _ in fill(replay, stream):
        assert_restored(save(writer, replay=replay), "replay", replay, stream)


def test_rings_that_were_overwritten_between_two_checkpoints_come_back(writer):
    stream, replay = Stream(2, 60, 0.1), new_replay()
    for step in fill(replay, stream):
        if step in (5, 8, 59):
            assert_restored(save(writer, replay=replay), "replay", replay, stream)


def test_only_new_rows_are_written_and_no_file_twice(writer, folder):
    replay, heads, before = new_replay(100), -1, {}
    for step in fill(replay, Stream(2, 42, 0.1)):
        if step % 7:
            continue
        saved = save(writer, replay=replay)
        after = files(folder, "rows-*")
        assert before.items() <= after.items()
        (new,) = after.keys() - before.keys()
        entry = next(entry for entry in saved.files() if entry.name == new)
        # Also the row that was the newest before: what followed it was not known.
        num_rows = (replay.heads - np.maximum(heads, 0) + 1).sum()
        assert len(read_tree(folder / "checkpoints", entry)["positions"]) == num_rows
        before, heads = after, replay.heads.copy()


def test_a_checkpoint_without_new_rows_writes_none(writer, folder):
    stream, replay = Stream(2, 20, 0.1), new_replay()
    filled(replay, stream)
    save(writer, replay=replay)
    before = files(folder, "rows-*")
    assert_restored(save(writer, replay=replay), "replay", replay, stream)
    assert files(folder, "rows-*") == before


def test_two_checkpoints_are_kept_and_a_file_that_neither_needs_goes(writer, folder):
    replay = new_replay()
    for step in fill(replay, Stream(2, 60, 0.1)):
        if step % 4:
            continue
        save(writer, replay=replay)
        kept = [Checkpoint(path) for path in manifests(folder)]
        for saved in kept:
            saved.check()
        needed = {entry.name for saved in kept for entry in saved.files()}
        assert files(folder).keys() == needed | {saved.name for saved in kept} | {"lock"}
        assert len(kept) == min(step // 4 + 1, 2)
    assert len(files(folder, "rows-*")) <= 5


def test_replay_buffers_are_saved_by_their_names_until_they_are_freed(writer, folder):
    streams, (teacher, student) = [Stream(2, 20, 0.1, seed) for seed in (0, 1)], (new_replay(), new_replay())
    filled(teacher, streams[0])
    save(writer, teacher=teacher)
    first = files(folder, "rows-*")
    filled(student, streams[1])
    saved = save(writer, teacher=teacher, student=student)
    for name, replay, stream in zip(("teacher", "student"), (teacher, student), streams, strict=True):
        assert_restored(saved, name, replay, stream)
    for _ in range(2):
        assert_restored(save(writer, student=student), "student", student, streams[1])
    assert not first.keys() & files(folder, "rows-*").keys()


@pytest.mark.parametrize("slots", [12, 40])
def test_a_buffer_of_another_size_takes_what_fits(writer, slots):
    stream, replay = Stream(2, 60, 0.1), new_replay(20)
    for step in fill(replay, stream):
        if step % 20 == 19:
            saved = save(writer, replay=replay)
    other = new_replay(slots)
    saved.restore_replay("replay", other)
    batch = draw_everything(other)
    assert_transitions(batch, stream, keys_of(batch))
    lost = set(keys_of(draw_everything(replay))) - set(keys_of(batch))
    assert all(position <= replay.heads[env] - min(slots, 20) + 4 for env, position in lost)


def test_a_resumed_run_adds_to_the_rows_that_are_saved(writer, folder):
    stream, replay = Stream(2, 40, 0.1), new_replay(30)
    for step in fill(replay, stream):
        if step == 20:
            saved, before = save(writer, replay=replay), files(folder, "rows-*")
            writer = CheckpointWriter(folder, resumed=saved)
    saved = save(writer, replay=replay)
    after = files(folder, "rows-*")
    assert before.items() <= after.items()
    assert len(after) == len(before) + 1
    assert_restored(saved, "replay", replay, stream)


def test_a_full_buffer_that_is_resumed_as_a_larger_one_can_be_saved_again(writer, folder):
    """As when a resumed run gets more --total-timesteps."""
    stream = Stream(2, 60, 0.1)
    replay = filled(new_replay(20), stream)
    saved, larger = save(writer, replay=replay), new_replay(35)
    for _ in range(2):
        saved.restore_replay("replay", larger)
        saved = save(CheckpointWriter(folder, resumed=saved), replay=larger)
    batch = draw_everything(larger)
    assert set(keys_of(batch)) >= set(keys_of(draw_everything(replay)))
    assert_transitions(batch, stream, keys_of(batch))


@pytest.mark.parametrize("is_nfs", [False, True])
def test_a_finished_run_has_no_checkpoints(writer, folder, monkeypatch, is_nfs):
    save(writer)
    lock = lock_run(folder)

    def unlink_on_nfs(path: Path, missing_ok: bool = False) -> None:
        """A file that is open does not go: it is renamed."""
        if path.name == "lock" and lock.is_locked:
            path.rename(path.with_name(".nfs0001"))
        else:
            unlink(path, missing_ok)

    unlink = Path.unlink
    if is_nfs:
        monkeypatch.setattr(Path, "unlink", unlink_on_nfs)
    writer.remove_all()
    release_finished(folder, lock)
    assert list(folder.iterdir()) == []


# ------------------------------------------------------------------------------------------------ faults


@pytest.mark.parametrize("instant", range(4))
def test_a_full_disk_costs_only_that_checkpoint(writer, folder, monkeypatch, capsys, instant):
    stream, replay = Stream(2, 30, 0.1), new_replay()
    steps = fill(replay, stream)
    next(steps)
    save(writer, "before", replay=replay)
    before, calls = files(folder), []

    def fail(*args: object) -> None:
        calls.append(args)
        if len(calls) > instant:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    next(steps)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        assert save(writer, "while it is full", replay=replay).read_state() == "before"
    assert "warning: no checkpoint could be written (No space left on device)" in capsys.readouterr().err
    assert files(folder) == before

    next(steps)
    saved = save(writer, "after", replay=replay)
    assert capsys.readouterr().err == ""
    assert saved.read_state() == "after"
    assert_restored(saved, "replay", replay, stream)


@pytest.fixture
def stream() -> Stream:
    return Stream(2, 30, 0.1)


@pytest.fixture
def two_checkpoints(writer, folder, stream) -> Path:
    """A run's folder, with the checkpoints "first" and "second"."""
    replay = new_replay()
    for step in fill(replay, stream):
        if step in (9, 19):
            save(writer, "first" if step == 9 else "second", replay=replay)
    return folder


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("file", ["state", "rows"])
def test_after_damage_the_checkpoint_before_is_used_and_the_damaged_file_named(
    two_checkpoints, capsys, file, kind
):
    newest = sorted((two_checkpoints / "checkpoints").glob(f"{file}-*"))[-1]
    damage(newest, kind)
    assert newest_checkpoint(two_checkpoints).read_state() == "first"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: checkpoint-000002 of {two_checkpoints} cannot be used: {newest.name}")


@pytest.mark.parametrize("kind", ["truncated", "bit-flipped"])
def test_a_damaged_manifest_is_passed_over_too(two_checkpoints, capsys, kind):
    damage(two_checkpoints / "checkpoints" / "checkpoint-000002.json", kind)
    assert newest_checkpoint(two_checkpoints).read_state() == "first"
    assert "checkpoint-000002.json is damaged" in capsys.readouterr().err
    assert saved_options(two_checkpoints) == {"seed": 1}


@pytest.mark.parametrize("lacking", ["script", "options", "event_files", "state", "replays"])
def test_a_manifest_that_is_not_a_checkpoints_is_passed_over_too(two_checkpoints, capsys, lacking):
    path = two_checkpoints / "checkpoints" / "checkpoint-000002.json"
    content = read_manifest(path)
    del content[lacking]
    write_manifest(path, content)
    assert newest_checkpoint(two_checkpoints).read_state() == "first"
    assert "checkpoint-000002.json does not describe a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("kind", DAMAGES)
def test_if_none_is_complete_the_run_is_refused_and_left_alone(two_checkpoints, kind):
    for path in (two_checkpoints / "checkpoints").glob("state-*"):
        damage(path, kind)
    before = files(two_checkpoints)
    with pytest.raises(SystemExit, match=r"^error: no checkpoint of [^\n]* can be used; restore its files"):
        newest_checkpoint(two_checkpoints)
    assert files(two_checkpoints) == before


def test_after_damage_the_next_checkpoint_is_good(two_checkpoints, stream):
    damage(sorted((two_checkpoints / "checkpoints").glob("rows-*"))[-1], "truncated")
    resumed = newest_checkpoint(two_checkpoints)
    writer = CheckpointWriter(two_checkpoints, resumed)
    replay = filled(new_replay(), stream)
    saved = save(writer, "third", replay=replay)
    assert saved.read_state() == "third"
    assert_restored(saved, "replay", replay, stream)
    for path in manifests(two_checkpoints):
        Checkpoint(path).check()


def test_a_checkpoint_of_version_1_is_refused_in_a_line_that_says_what_to_do(two_checkpoints):
    for path in manifests(two_checkpoints):
        write_manifest(path, {"version": 1, "state": FileEntry("state-000001.zst", "0" * 64)})
    line = (
        f"error: --resume {two_checkpoints}: checkpoint-000002.json has version 1, not 3; finish the run with"
        " the version that started it, or start again without --resume"
    )
    for read in (newest_checkpoint, saved_options):
        with pytest.raises(SystemExit) as end:
            read(two_checkpoints)
        assert end.value.code == line
    for path in manifests(two_checkpoints):
        write_manifest(path, {"version": "\x1b[2J\n" * 10**4})
    with pytest.raises(SystemExit) as end:
        newest_checkpoint(two_checkpoints)
    assert end.value.code.isprintable()
    assert len(end.value.code) < 1000


def test_the_newest_unfinished_run_of_the_same_experiment_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
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
            write_manifest(folder / "checkpoint-000001.json", {})
    assert newest_unfinished_run("Pong", "test", 1) == Path("runs/Pong__test__1__200")
    assert newest_unfinished_run("Pong", "test", 3) is None


# ------------------------------------------------------------------------------------- what is not ours


def put_foreign_files(folder: Path) -> dict[str, bytes]:
    """As file managers, editors and people leave them; and a link in the place of a file of ours."""
    checkpoints = folder / "checkpoints"
    for name in (
        "._checkpoint-000001.json", "checkpoint-000002 (copy).json", "checkpoint-9.json.bak", "rows-x.zst",
        "notes.txt", "state-latest.zst",
    ):  # fmt: skip
        (checkpoints / name).write_text(name)
    (checkpoints / "old-runs").mkdir()
    (checkpoints / "old-runs" / "checkpoint-000001.json").write_text("{}")
    (folder / "elsewhere").write_text("elsewhere")
    (checkpoints / "state-000777.zst").symlink_to(folder / "elsewhere")
    (checkpoints / "checkpoint-000099.json").mkdir()
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_foreign_files_are_ignored_and_stay(folder, capsys):
    (folder / "checkpoints" / "lock").unlink()
    foreign = put_foreign_files(folder)
    assert manifests(folder) == []
    writer = CheckpointWriter(folder, None)
    for state in (1, 2, 3):
        saved = save(writer, state)
    assert [path.name for path in manifests(folder)] == ["checkpoint-000003.json", "checkpoint-000002.json"]
    again = CheckpointWriter(folder, saved)
    assert save(again, 4).read_state() == 4
    assert len(manifests(folder)) == 2
    assert capsys.readouterr() == ("", "")
    again.remove_all()
    assert {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == foreign


def test_a_run_has_finished_though_foreign_files_stay(folder, writer):
    put_foreign_files(folder)
    lock = lock_run(folder)
    assert not is_finished(folder)  # it has just begun
    save(writer)
    lock.release()
    (folder / "checkpoints" / "lock").unlink()  # as the error of a locked run advises
    assert not is_finished(folder)
    writer.remove_all()
    release_finished(folder, lock_run(folder))
    assert is_finished(folder)
    assert (folder / "checkpoints" / "notes.txt").read_text() == "notes.txt"


def test_numbers_beyond_six_digits_are_newer(folder, writer):
    writer._number = 999_998
    for state in (1, 2):
        save(writer, state)
    assert [path.name for path in manifests(folder)] == ["checkpoint-1000000.json", "checkpoint-999999.json"]
    assert newest_checkpoint(folder).read_state() == 2


EMPTY = {"capacity": 9, "oldest": [0], "heads": [0], "files": []}


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("event_files", {"../victim": 0}),
        ("event_files", {"/tmp/victim": 0}),
        ("event_files", {"a/b": 0}),
        ("event_files", {"..": 0}),
        ("event_files", {"": 0}),
        ("event_files", {"events.out.tfevents.1": -1}),
        ("event_files", {"events.out.tfevents.1": "0"}),
        ("event_files", ["events.out.tfevents.1"]),
        ("state", ["../state.zst", "0" * 64]),
        ("options", ["seed"]),
        ("replays", {"replay": EMPTY | {"capacity": -1}}),
        ("replays", {"replay": EMPTY | {"capacity": "9"}}),
        *(
            ("replays", {"replay": EMPTY | {"files": [{"name": "rows-1.zst", "sha256": "", "last": last}]}})
            for last in ("a", None, [], [0, 0], ["0"], [0.5])
        ),
    ],
)
def test_a_manifest_with_other_places_in_it_is_passed_over(two_checkpoints, capsys, part, value):
    newest = manifests(two_checkpoints)[0]
    write_manifest(newest, read_manifest(newest) | {part: value})
    assert newest_checkpoint(two_checkpoints).name == manifests(two_checkpoints)[1].name
    assert f"{newest.name} does not describe a checkpoint" in capsys.readouterr().err


def test_an_event_file_that_is_a_link_is_not_cut(folder, writer, capsys):
    (folder / "victim").write_text("precious")
    (folder / "events.out.tfevents.1").symlink_to(folder / "victim")
    (folder / "events.out.tfevents.2").write_text("curves and what came later")
    saved = save(writer)
    saved.event_files = {"events.out.tfevents.1": 0, "events.out.tfevents.2": 6}
    cut_events(folder, saved)
    assert (folder / "victim").read_text() == "precious"
    assert (folder / "events.out.tfevents.2").read_text() == "curves"
    assert "events.out.tfevents.1 lacks some of the run's curves" in capsys.readouterr().err
