"""Saved replays and folders that are refused: always with one line that says what to do."""

import errno
import hashlib
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import zstandard
from both_scripts import use_network
from large_replay import MadeFrames, full_replay
from rehearsal import tiny_args
from replays import NUM_ACTIONS, PONG, ImpatientGenerator, Stream, filled, load, make_replay, save

from cleanrl.qdagger_dqn_atari_impalacnn import Args
from cleanrl.utils.replay.frames_torch import TorchFrames
from cleanrl.utils.replay.ring import ReplayBuffer
from cleanrl.utils.replay.saved_replay import check_new_folder, open_replay
from cleanrl.utils.storage import FileEntry, read_manifest, read_tree, write_manifest, write_tree

NUM_ENVS, ROWS_PER_FILE = 3, 17
Rows = dict[str, np.ndarray]

pytestmark = pytest.mark.usefixtures("one_thread")


def read_all(folder: Path, num_actions: int = NUM_ACTIONS, **options: Any) -> None:
    args = Args(**{"env_id": PONG, "batch_size": 1, "teacher_replay_path": folder} | options)
    saved = open_replay(args, num_actions)
    for _ in saved.rows(
        ReplayBuffer(100 * saved.num_envs, saved.num_envs, MadeFrames, num_actions=num_actions)
    ):
        pass


def refusal(action: Callable[..., object], *arguments: Any, **options: Any) -> str:
    """The one line with which an action on a folder is refused: it names it and says what to do."""
    with pytest.raises(SystemExit) as end:
        action(*arguments, **options)
    line = end.value.code
    assert line.startswith("error: ")
    assert str(arguments[0]) in line
    assert "\n" not in line
    assert "; " in line
    return line


@pytest.fixture(scope="module")
def whole_replay(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    replay = make_replay(TorchFrames, 60, NUM_ENVS, num_q_values=0)
    save(folder, filled(replay, Stream(NUM_ENVS, 12, end_probability=0.1)), ROWS_PER_FILE)
    return folder


@pytest.fixture
def replay(whole_replay, tmp_path) -> Path:
    """A saved replay that may be damaged."""
    return shutil.copytree(whole_replay, tmp_path / "replay")


def rows_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("rows-*.zst"))


def alter_manifest(folder: Path, **changes: Any) -> None:
    """Writes a manifest that differs, with the right checksum."""
    manifest = folder / "manifest.json"
    write_manifest(manifest, read_manifest(manifest) | changes)


def replace_file(folder: Path, index: int, data: bytes) -> None:
    """Writes a rows file that is something else, with the right checksum in the manifest."""
    path, files = rows_files(folder)[index], read_manifest(folder / "manifest.json")["files"]
    path.write_bytes(data)
    files[index] = [path.name, hashlib.sha256(data).hexdigest()]
    alter_manifest(folder, files=files)


def alter_rows(folder: Path, index: int, alter: Callable[[Rows], Any]) -> None:
    """Writes a rows file that differs, with the right checksum in the manifest."""
    files = read_manifest(folder / "manifest.json")["files"]
    rows = alter(read_tree(folder, FileEntry(*files[index])))
    files[index] = list(write_tree(folder / files[index][0], rows))
    alter_manifest(folder, files=files)


def test_a_replay_that_is_whole_is_not_refused(replay):
    read_all(replay)
    alter_manifest(replay)
    alter_rows(replay, 1, lambda rows: rows)
    read_all(replay)


# --------------------------------------------------------------------------------------------- incomplete


def test_a_half_written_replay_is_refused(replay):
    (replay / "manifest.json").unlink()
    assert "has no manifest.json: it is not a complete replay" in refusal(read_all, replay)


def test_what_is_not_a_folder_with_a_replay_is_refused(tmp_path):
    assert "is not a folder; name one that --save-replay wrote" in refusal(read_all, tmp_path / "nowhere")
    file = tmp_path / "file"
    file.touch()
    assert "is not a folder; name one that --save-replay wrote" in refusal(read_all, file)
    assert "has no manifest.json" in refusal(read_all, tmp_path)


def test_a_full_disk_leaves_a_folder_without_a_manifest_in_which_the_resumed_run_can_save_again(tmp_path):
    class FullDisk(MadeFrames):
        def read(self, slots: np.ndarray) -> np.ndarray:
            if slots[0] > 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().read(slots)

    line = refusal(save, tmp_path, full_replay(3 * ROWS_PER_FILE, FullDisk), ROWS_PER_FILE)
    assert f"--save-replay {tmp_path}: No space left on device; free some space" in line
    assert len(rows_files(tmp_path)) == 1
    assert "has no manifest.json" in refusal(read_all, tmp_path)
    check_new_folder(tmp_path, None)
    save(tmp_path, full_replay(ROWS_PER_FILE), ROWS_PER_FILE)
    read_all(tmp_path)


def test_only_the_resumed_run_that_saved_a_whole_replay_may_save_it_again(replay):
    (replay / "manifest.json.partial").touch()
    check_new_folder(replay, "runs/saved-it")
    for other in (None, "runs/another"):
        assert "is not empty; name a new folder" in refusal(check_new_folder, replay, other)
    (replay / "notes.txt").touch()
    assert "is not empty; name a new folder" in refusal(check_new_folder, replay, "runs/saved-it")


def test_a_missing_rows_file_is_named(replay):
    path = rows_files(replay)[1]
    path.unlink()
    assert f"{path.name} cannot be read (No such file or directory)" in refusal(read_all, replay)


@pytest.mark.parametrize("kept", [slice(0), slice(1, None), slice(-1)])
def test_a_manifest_that_does_not_name_all_rows_is_refused(replay, kept):
    """Without any, drawing from the buffer would not end."""
    alter_manifest(replay, files=read_manifest(replay / "manifest.json")["files"][kept])
    assert "as its manifest says" in refusal(read_all, replay)


# ----------------------------------------------------------------------------------------- damaged, foreign


@pytest.mark.parametrize("index", [0, -1])
@pytest.mark.parametrize("damage", ["cut", "emptied", "flipped"])
def test_a_damaged_rows_file_is_named(replay, index, damage):
    path = rows_files(replay)[index]
    data = path.read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    path.write_bytes({"cut": data[:-1], "emptied": b"", "flipped": flipped}[damage])
    line = refusal(read_all, replay)
    assert f"{path.name} is damaged: its checksum is not the manifest's" in line


@pytest.mark.parametrize("change", [(b'"version": 1', b'"version": 2'), (b"oldest", b"OLDEST"), (b"\n", b"")])
def test_an_altered_manifest_is_refused(replay, change):
    manifest = replay / "manifest.json"
    assert change[0] in manifest.read_bytes()
    manifest.write_bytes(manifest.read_bytes().replace(*change, 1))
    assert "manifest.json is" in refusal(read_all, replay)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"{}", b"\xff\xfe\n{}", b"[" * 10**5, bytes(1000), pickle.dumps({"a": 1})]
)
def test_a_manifest_that_is_something_else_is_refused(replay, content):
    (replay / "manifest.json").write_bytes(content)
    assert "manifest.json is" in refusal(read_all, replay)


@pytest.mark.parametrize("content", [[], [1], 5, None, [["format", "other"]], {}, {"format": "other"}])
def test_a_foreign_manifest_with_a_right_checksum_is_refused(replay, content):
    text = json.dumps(content).encode()
    (replay / "manifest.json").write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
    assert re.search(r"manifest\.json (is not|does not describe) ", refusal(read_all, replay))


def test_the_manifest_of_a_checkpoint_is_not_that_of_a_replay(replay):
    write_manifest(replay / "manifest.json", {"version": 1, "script": "dqn_atari", "files": []})
    assert "manifest.json does not describe a replay" in refusal(read_all, replay)


@pytest.mark.parametrize(
    "changes",
    [
        {"oldest": [0, 0]},
        {"oldest": []},
        {"oldest": [], "heads": []},
        {"oldest": [-1, 0, 0]},
        {"oldest": [0.5, 0, 0]},
        {"oldest": [True, False, False]},
        {"oldest": [10**6] * 3},
        {"heads": [5]},
        {"heads": 5},
        {"heads": [[15], [15], [15]]},
        {"heads": ["many", 0, 0]},
        {"heads": [10**30] * 3},
        {"heads": None},
        {"files": None},
        {"files": [["rows-000000.zst"]]},
        {"files": "rows"},
        {"files": {"rows-000000.zst": 1}},
    ],
    ids=str,
)
def test_a_manifest_that_makes_no_sense_is_refused(replay, changes):
    alter_manifest(replay, **changes)
    refusal(read_all, replay)


@pytest.mark.parametrize("name", ["oldest", "heads", "files", "env_id", "num_actions"])
def test_a_manifest_that_lacks_something_is_refused(replay, name):
    manifest = replay / "manifest.json"
    content = read_manifest(manifest)
    del content[name]
    write_manifest(manifest, content)
    assert "manifest.json does not describe a replay" in refusal(read_all, replay)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../replay/rows-000000.zst", "a/b.zst", ".", "..", "", 5, "\0"]
)
def test_a_manifest_cannot_name_files_elsewhere(replay, name):
    files = read_manifest(replay / "manifest.json")["files"]
    alter_manifest(replay, files=[[name, files[0][1]], *files[1:]])
    refusal(read_all, replay)


def set_item(name: str, index: int, value: Any) -> Callable[[Rows], Rows]:
    def alter(rows: Rows) -> Rows:
        column = rows[name].copy()
        column[index] = value
        return rows | {name: column}

    return alter


ALTERED_ROWS = {
    "an environment below 0": set_item("envs", 0, -1),
    "an environment too many": set_item("envs", 3, NUM_ENVS),
    "a position before the oldest": set_item("positions", 0, -1),
    "a position after the newest": set_item("positions", 3, 1000),
    "an action that the game does not have": set_item("actions", -1, NUM_ACTIONS),
    "a stack that reaches too far": set_item("stack_depths", 2, 4),
    "a frame missing": lambda rows: rows | {"frames": rows["frames"][:-1]},
    "smaller frames": lambda rows: rows | {"frames": rows["frames"][:, :80]},
    "frames of another type": lambda rows: rows | {"frames": rows["frames"].astype(np.int16)},
    "rewards of another type": lambda rows: rows | {"rewards": rows["rewards"].astype(np.float64)},
    "rewards in a list": lambda rows: rows | {"rewards": rows["rewards"].tolist()},
    "something else beside it": lambda rows: rows | {"another": rows["rewards"]},
    "no rewards": lambda rows: {name: values for name, values in rows.items() if name != "rewards"},
    "a list": lambda rows: list(rows.values()),
    "nothing": lambda rows: {},
}


@pytest.mark.parametrize("alter", ALTERED_ROWS.values(), ids=ALTERED_ROWS)
def test_rows_that_are_not_those_of_a_replay_are_refused(replay, alter):
    alter_rows(replay, 1, alter)
    line = refusal(read_all, replay)
    assert "rows-000001.zst does not hold rows of a replay buffer of this game; save or copy" in line


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("unpickled"),))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(100),
        zstandard.compress(b""),
        zstandard.compress(bytes(100)),
        pickle.dumps(Bomb()),
        zstandard.compress(pickle.dumps(Bomb())),
    ],
)
def test_a_rows_file_of_something_else_with_a_right_checksum_is_refused_and_not_run(
    replay, tmp_path, monkeypatch, data
):
    monkeypatch.chdir(tmp_path)
    replace_file(replay, 0, data)
    assert "rows-000000.zst is not what it should be; save or copy" in refusal(read_all, replay)
    assert not Path("unpickled").exists()


# -------------------------------------------------------------------------------------- of use for this run


def test_another_game_number_of_actions_or_version_is_refused(replay):
    line = refusal(read_all, replay, num_actions=4, env_id="BreakoutNoFrameskip-v4")
    assert f"it is a replay of {PONG} with 6 actions, not of BreakoutNoFrameskip-v4 with 4" in line
    assert f"with 6 actions, not of {PONG} with 18" in refusal(read_all, replay, num_actions=18)
    alter_manifest(replay, version=2)
    assert "manifest.json has version 2, not 1" in refusal(read_all, replay)
    for name in ("num_actions", "version"):
        alter_manifest(replay, **{"version": 1, name: "\x1b[2J\n"})
        assert refusal(read_all, replay).isprintable()


def test_fewer_frames_than_a_batch_are_refused(replay):
    num_rows = sum(len(log) + 1 for log in Stream(NUM_ENVS, 12, end_probability=0.1).logs)
    read_all(replay, batch_size=num_rows)
    line = refusal(read_all, replay, batch_size=num_rows + 1)
    assert f"holds {num_rows} frames and" in line
    assert f"but {num_rows + 1} and 1 are needed; save a longer replay" in line


def no_q_values(observations: np.ndarray) -> np.ndarray:
    return np.zeros((len(observations), NUM_ACTIONS), np.float32)


@pytest.mark.parametrize("end_probability", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("num_steps", [3, 40])
@pytest.mark.parametrize("capacity", [2, 4, 7])
def test_a_replay_with_too_few_steps_is_refused_and_from_any_other_there_is_something_to_draw(
    tmp_path, capacity, num_steps, end_probability
):
    """When the rewards of more steps are summed than in the run that saved it."""
    replay = make_replay(TorchFrames, capacity, 1, num_q_values=0)
    save(tmp_path, filled(replay, Stream(1, num_steps, end_probability)))
    refused = []
    for n_step in range(1, 12):
        line = None
        try:
            loaded = load(TorchFrames, tmp_path, no_q_values, n_step=n_step)
        except SystemExit as end:
            line = str(end)
        if line:
            assert line.endswith(f"but 1 and {n_step} are needed; save a longer replay")
            refused.append(n_step)
        else:
            assert loaded.can_sample
            loaded.draw(100, ImpatientGenerator())
    assert refused == list(range(refused[0], 12))
    assert refused[0] > 1


# ----------------------------------------------------------------------------------- refused before the work


@pytest.fixture
def start(monkeypatch, tmp_path) -> Callable[..., None]:
    """Starts a script in an empty folder, in which no run may be started."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def main(script: ModuleType, **options: Any) -> None:
        use_network(monkeypatch, script, "number")
        monkeypatch.setattr(script, "TrainingRun", mock.Mock(side_effect=AssertionError("a run was started")))
        try:
            script.main(tiny_args(script, **options))
        finally:
            assert not list(folder.iterdir())

    return main


def test_a_bad_replay_is_refused_before_the_teacher_plays(qdagger, replay, start):
    for folder, options, fault in [
        (replay / "nowhere", {}, "nowhere is not a folder"),
        (replay, {"batch_size": 50, "buffer_size": 50}, "but 50 and 1 are needed; save a longer replay"),
        (replay, {"n_step": 20, "teacher_steps": 200}, "and 20 are needed; save a longer replay"),
    ]:
        with pytest.raises(SystemExit, match=fault):
            start(qdagger, teacher_replay_path=folder, **options)
    (replay / "manifest.json").unlink()
    with pytest.raises(SystemExit, match=r"--teacher-replay-path .* has no manifest\.json"):
        start(qdagger, teacher_replay_path=replay)


def test_a_folder_that_is_not_a_new_one_is_refused_before_the_training(dqn, tmp_path, start):
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    for folder, fault in [
        (full, "is not empty; name a new folder"),
        (full / "file", "name another folder"),
        (full / "file" / "below", "name another folder"),
    ]:
        with pytest.raises(SystemExit) as end:
            start(dqn, save_replay=folder)
        assert end.value.code.startswith(f"error: --save-replay {folder}")
        assert end.value.code.endswith(fault)
        assert "\n" not in end.value.code
    assert list(full.iterdir()) == [full / "file"]


def test_a_new_folder_is_made_with_its_parents_and_left_empty(tmp_path):
    folder = tmp_path / "some" / "new" / "folder"
    for _ in range(2):
        check_new_folder(folder, None)
        assert list(folder.iterdir()) == []
