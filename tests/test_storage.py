"""Files of data: what is written comes back the same, and what is damaged is never taken for it."""

import errno
import io
import os
import pickle
from collections import deque
from pathlib import Path
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import zstandard
from safetensors.numpy import save

from cleanrl.utils import storage
from cleanrl.utils.storage import (
    DamagedError,
    FileEntry,
    check_file,
    pack,
    read_manifest,
    read_tree,
    unpack,
    write_durably,
    write_manifest,
    write_tree,
)

TREE = {
    "none": None,
    "bits": [True, False],
    "numbers": (1, -(2**127), 0.1, float("inf")),
    "bytes": b"\x00\xffab",
    "no bytes": b"",
    "text": "λ\n",
    0: {1: {2: "int keys"}},
    (3, "tuple key"): [],
    "empty": {"dict": {}, "list": [], "tuple": ()},
    "arrays": [
        np.arange(6, dtype=np.int64).reshape(2, 3),
        np.array(3.5, np.float32),
        np.zeros((0, 4), np.uint8),
        np.arange(20, dtype=np.uint8).reshape(4, 5)[::2, ::-1],
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array([True, False]),
        np.uint64(2**63),
    ],
}


def assert_same(found: object, expected: object) -> None:
    if isinstance(expected, np.ndarray | np.generic):
        assert isinstance(found, np.ndarray)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tobytes() == expected.tobytes()
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for value, expected_value in zip(found, expected, strict=True):
            assert_same(value, expected_value)
        assert type(found) is type(expected)
    else:
        assert type(found) is type(expected)
        assert found == expected


class Trap:
    """Unpickling it would be noticed."""

    def __reduce__(self):
        return pytest.fail, ("something was unpickled",)


def entry_of(path: Path) -> FileEntry:
    """An entry whose checksum is right whatever the file holds."""
    return FileEntry(path.name, storage.hashlib.sha256(path.read_bytes()).hexdigest())


def test_every_kind_of_value_comes_back_the_same():
    assert_same(unpack(pack(TREE)), TREE)


@pytest.mark.parametrize("value", [None, 3, "text", b"bytes", [1], (1, 2), np.arange(3), {}])
def test_a_tree_may_be_a_single_value(value):
    assert_same(unpack(pack(value)), value)


def test_the_bits_of_nans_come_back():
    array = np.array([0x7FC00001, 0xFFC00000, 0x80000000], np.uint32).view(np.float32)
    assert unpack(pack(array)).tobytes() == array.tobytes()
    assert np.isnan(unpack(pack(float("nan"))))


@pytest.mark.parametrize("make", [torch.tensor, jnp.asarray], ids=["torch", "jax"])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.int32, bool])
def test_arrays_of_the_frameworks_come_back_as_those_of_numpy(make, dtype):
    array = np.array([[0, 1, 2], [3, 4, 5]], dtype)
    assert_same(unpack(pack({"array": make(array), "number": make(array[1, 1])})), {
        "array": array, "number": np.array(array[1, 1]),
    })  # fmt: skip


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, deque([1.0]), range(3), np.array([Trap()], object), Trap(), pack]
)
def test_what_is_no_data_is_refused(value):
    with pytest.raises(TypeError):
        pack({"value": value})


def test_a_tree_in_a_file_comes_back_the_same(tmp_path):
    entry = write_tree(tmp_path / "tree.zst", TREE)
    assert_same(read_tree(tmp_path, entry), TREE)
    assert [path.name for path in tmp_path.iterdir()] == ["tree.zst"]


def test_a_file_is_compressed(tmp_path):
    write_tree(tmp_path / "tree.zst", np.zeros(10**6))
    assert (tmp_path / "tree.zst").stat().st_size < 10_000


def test_without_more_threads_a_tree_is_written_by_one(tmp_path, monkeypatch):
    compressor = zstandard.ZstdCompressor

    def without_threads(threads: int = 0, **settings: int) -> Any:
        if threads:
            return mock.Mock(compress=mock.Mock(side_effect=zstandard.ZstdError("Allocation error")))
        return compressor(**settings)

    monkeypatch.setattr(zstandard, "ZstdCompressor", without_threads)
    entry = write_tree(tmp_path / "tree.zst", {"number": 3})
    assert read_tree(tmp_path, entry) == {"number": 3}


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_a_file_cut_short_is_damaged(tmp_path, share):
    entry = write_tree(tmp_path / "tree.zst", TREE)
    path = tmp_path / "tree.zst"
    os.truncate(path, int(share * path.stat().st_size))
    for read in (check_file, read_tree):
        with pytest.raises(DamagedError, match=r"^tree.zst is damaged"):
            read(tmp_path, entry)


def test_a_bit_that_flipped_anywhere_is_noticed(tmp_path):
    path = tmp_path / "tree.zst"
    entry = write_tree(path, TREE)
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :])
        with pytest.raises(DamagedError, match=r"^tree.zst is damaged"):
            read_tree(tmp_path, entry)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "tree.zst")
    with pytest.raises(DamagedError, match=r"^tree.zst is not a file$"):
        read_tree(tmp_path, FileEntry("tree.zst", "0" * 64))
    with pytest.raises(DamagedError, match=r"^tree.zst is not a file$"):
        read_manifest(tmp_path / "tree.zst")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DamagedError, match=r"^tree.zst cannot be read \(No such file"):
        read_tree(tmp_path, FileEntry("tree.zst", "0" * 64))


def compressed(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def pickled() -> bytes:
    return pickle.dumps({"state": Trap()})


def object_array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Trap()], object), allow_pickle=True)
    return file.getvalue()


def saved_by_torch() -> bytes:
    file = io.BytesIO()
    torch.save({"state": Trap()}, file)
    return file.getvalue()


FOREIGN = {
    "nothing": lambda: b"",
    "text": lambda: b"hello",
    "a pickle": pickled,
    "an object array": object_array,
    "a checkpoint of torch": saved_by_torch,
    "a compressed pickle": lambda: compressed(pickled()),
    "a compressed object array": lambda: compressed(object_array()),
    "a compressed checkpoint of torch": lambda: compressed(saved_by_torch()),
    "an archive without a tree": lambda: compressed(save({"0": np.zeros(3)})),
    "a tree without its arrays": lambda: compressed(
        save({}, metadata={"tree": '{"array": 0, "shape": [3]}'})
    ),
    "an array of another shape": lambda: compressed(
        save({"0": np.zeros(3)}, metadata={"tree": '{"array": 0, "shape": [4]}'})
    ),
    "an array in two places": lambda: compressed(
        save({"0": np.zeros(3)}, metadata={"tree": '[{"bytes": "0"}, {"bytes": "0"}]'})
    ),
    "more than a file may hold": lambda: compressed(bytes(storage.MOST_BYTES + 1)),
    "a description longer than any": lambda: compressed(
        save({}, metadata={"tree": "[" + "0," * (storage.MOST_JSON_BYTES // 2) + "0]"})
    ),
    "half an archive": lambda: compressed(pack(TREE)[:-20]),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_nothing_else_in_the_files_place_is_read_and_nothing_is_unpickled(tmp_path, kind):
    path = tmp_path / "tree.zst"
    path.write_bytes(FOREIGN[kind]())
    with pytest.raises(DamagedError, match=r"^tree.zst is not what it should be"):
        read_tree(tmp_path, entry_of(path))


def fail_with_full_disk(*args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fills_up_leaves_the_old_file_and_no_part_of_the_new_one(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    write_durably(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail_with_full_disk)
        with pytest.raises(OSError, match="No space left"):
            write_durably(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_durably(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_folder_after(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        calls.append(("fsync", name, os.path.getsize(name)))
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        calls.append(("replace", str(source), str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    path = tmp_path / "file"
    write_durably(path, b"12345")
    partial = f"{path}.partial"
    assert calls[:2] == [("fsync", partial, 5), ("replace", partial, str(path))]
    assert [call[:2] for call in calls[2:]] == [("fsync", str(tmp_path))]


def test_a_manifest_comes_back(tmp_path):
    content = {"text": "λ", "numbers": [1, 2.5, None], "nested": {"a": True}}
    write_manifest(tmp_path / "manifest.json", content)
    assert read_manifest(tmp_path / "manifest.json") == content


def test_a_manifest_notices_every_damage(tmp_path):
    path = tmp_path / "manifest.json"
    write_manifest(path, {"version": 1})
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(DamagedError, match=r"^manifest.json"):
            read_manifest(path)
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :])
        with pytest.raises(DamagedError, match=r"^manifest.json"):
            read_manifest(path)


@pytest.mark.parametrize("text", [b"[1, 2]", b"3", b"{", b"\xff", b"[" * 10**5, pickled()])
def test_a_manifest_that_holds_something_else_is_refused(tmp_path, text):
    path = tmp_path / "manifest.json"
    path.write_bytes(storage.hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
    with pytest.raises(DamagedError, match=r"^manifest.json is not what it should be"):
        read_manifest(path)


def test_a_sparse_file_larger_than_the_memory_is_damaged(tmp_path):
    for name in ("manifest.json", "tree.zst"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 2 * 10**11)
    with pytest.raises(DamagedError, match=r"^manifest.json is too large"):
        read_manifest(tmp_path / "manifest.json")
    with pytest.raises(DamagedError, match=r"^tree.zst is too large"):
        check_file(tmp_path, FileEntry("tree.zst", ""))


def test_what_nobody_could_read_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "MOST_BYTES", 1000)
    monkeypatch.setattr(storage, "MOST_JSON_BYTES", 1000)
    with pytest.raises(OSError, match="too large"):
        write_tree(tmp_path / "tree.zst", np.zeros(1000, np.uint8))
    longest = "a" * (1000 - 65 - len('{\n "a": ""\n}'))
    write_manifest(tmp_path / "manifest.json", {"a": longest})
    assert read_manifest(tmp_path / "manifest.json") == {"a": longest}
    with pytest.raises(OSError, match="too large"):
        write_manifest(tmp_path / "manifest.json", {"a": longest + "a"})


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(DamagedError, match=r"^manifest.json cannot be read"):
        read_manifest(tmp_path / "manifest.json")


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "precious").write_bytes(b"kept")
    (tmp_path / "file.partial").symlink_to(tmp_path / "precious")
    write_durably(tmp_path / "file", b"new")
    assert (tmp_path / "precious").read_bytes() == b"kept"
    assert (tmp_path / "file").read_bytes() == b"new"
    assert not (tmp_path / "file").is_symlink()
