"""Data on disk: trees of arrays in compressed files, and manifests that hold their checksums.

Nothing that is read is ever run: a file holds a safetensors archive of the arrays, and JSON for the rest.
"""

import errno
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard
from safetensors import SafetensorError
from safetensors.numpy import load, save

COMPRESSION_LEVEL = 3
MOST_BYTES, MOST_JSON_BYTES = 2**29, 2**24  # of a file's content, and of the JSON in it
DAMAGED = (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError, zstandard.ZstdError)


class DamagedError(Exception):
    """A file is missing, cut short, altered or not what it should be; the text says which and how."""


class FileEntry(NamedTuple):
    """A file of a manifest."""

    name: str
    sha256: str


def pack(tree: Any) -> bytes:
    """A tree of dicts, lists, tuples, strings, bytes, numbers, None and arrays (of any framework)."""
    arrays: dict[str, np.ndarray] = {}
    description = _describe(tree, arrays)
    return save(arrays, metadata={"tree": json.dumps(description)})


def _describe(tree: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The tree as JSON can hold it; its arrays are added to `arrays` under the names that stand in it."""
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    if isinstance(tree, dict):
        return {"dict": [[_describe(key, arrays), _describe(item, arrays)] for key, item in tree.items()]}
    if isinstance(tree, list):
        return [_describe(item, arrays) for item in tree]
    if isinstance(tree, tuple):
        return {"tuple": [_describe(item, arrays) for item in tree]}
    if is_bytes := isinstance(tree, bytes):
        array = np.frombuffer(tree, np.uint8)
    elif hasattr(tree, "__array__"):  # NumPy also takes other sequences, which would come back as arrays
        array = np.asarray(tree.cpu() if hasattr(tree, "cpu") else tree)  # a torch tensor may lie on a GPU
    else:
        raise TypeError(f"a {type(tree).__name__} cannot be packed")
    if array.dtype == object:
        raise TypeError("an array of objects cannot be packed")
    name = str(len(arrays))
    # safetensors takes no 0-dimensional and no non-contiguous arrays as they are.
    arrays[name] = np.ascontiguousarray(array).reshape(array.shape or (1,))
    return {"bytes" if is_bytes else "array": name, "shape": list(array.shape)}


def unpack(data: bytes) -> Any:
    """What `pack` was given, with NumPy arrays.

    Raises:
        ValueError, KeyError, TypeError, RecursionError, SafetensorError: it is not what `pack` gives.
    """
    header_length = int.from_bytes(data[:8], "little")
    if header_length > MOST_JSON_BYTES:
        raise ValueError("a longer description than that of anything packed here")
    header = json.loads(data[8 : 8 + header_length])
    return _restore(json.loads(header["__metadata__"]["tree"]), load(data))


def _restore(description: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(description, list):
        return [_restore(item, arrays) for item in description]
    if not isinstance(description, dict):
        return description
    if "dict" in description:
        return {_restore(key, arrays): _restore(item, arrays) for key, item in description["dict"]}
    if "tuple" in description:
        return tuple(_restore(item, arrays) for item in description["tuple"])
    if "bytes" in description:
        return arrays.pop(description["bytes"]).tobytes()  # each array has one place in the tree
    return arrays.pop(description["array"]).reshape(description["shape"])


def write_tree(path: Path, tree: Any) -> FileEntry:
    """Writes a compressed tree; when this returns, it is on the disk.

    Raises:
        OSError: it cannot be written, or is larger than `read_tree` takes.
    """
    data = pack(tree)
    _check_size(data, MOST_BYTES)
    try:
        data = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL, threads=-1).compress(data)
    except zstandard.ZstdError:  # no more threads are allowed
        data = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL).compress(data)
    write_durably(path, data)
    return FileEntry(path.name, hashlib.sha256(data).hexdigest())


def check_file(folder: Path, entry: FileEntry) -> bytes:
    """The bytes of a file as they were written.

    Raises:
        DamagedError: it is missing or altered.
    """
    data = _read_bytes(folder / entry.name, MOST_BYTES)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise DamagedError(f"{entry.name} is damaged: its checksum is not the manifest's")
    return data


def _check_size(data: bytes, most_bytes: int) -> None:
    """Raises OSError if a file would be too large to be read again."""
    if len(data) > most_bytes:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))


def _read_bytes(path: Path, most_bytes: int) -> bytes:
    """Raises DamagedError if it cannot be read, or is larger than any such file that is written here."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise DamagedError(f"{path.name} is not a file")
        if status.st_size > most_bytes:
            raise DamagedError(f"{path.name} is too large to be what it should be")
        return path.read_bytes()
    except OSError as error:
        raise DamagedError(f"{path.name} cannot be read ({os.strerror(error.errno)})") from None


def read_tree(folder: Path, entry: FileEntry) -> Any:
    """Reads what `write_tree` wrote.

    Raises:
        DamagedError: it is missing, altered or nothing of the kind.
    """
    data = check_file(folder, entry)
    try:
        if not 0 <= zstandard.frame_content_size(data) <= MOST_BYTES:
            raise ValueError
        data = zstandard.ZstdDecompressor().decompress(data)
        return unpack(data)
    except DAMAGED:
        raise DamagedError(f"{entry.name} is not what it should be") from None


def write_durably(path: Path, data: bytes) -> None:
    """Writes a file that exists as a whole or not at all, even after a power failure."""
    partial = path.with_name(path.name + ".partial")
    try:
        if partial.is_symlink():  # nothing is written through a link
            partial.unlink()
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)  # makes room on a disk that is full
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads what `write_manifest` wrote.

    Raises:
        DamagedError: it is missing, altered or nothing of the kind.
    """
    try:
        checksum, _, text = _read_bytes(path, MOST_JSON_BYTES).partition(b"\n")
        if hashlib.sha256(text).hexdigest() != checksum.decode():
            raise DamagedError(f"{path.name} is damaged: its checksum is wrong")
        return dict(json.loads(text))
    except (ValueError, TypeError, RecursionError):
        raise DamagedError(f"{path.name} is not what it should be") from None


def write_manifest(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON below its own checksum.

    Raises:
        OSError: it cannot be written, or is larger than `read_manifest` takes.
    """
    text = json.dumps(content, indent=1).encode()
    _check_size(text, MOST_JSON_BYTES - 65)  # the checksum's line
    write_durably(path, hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
