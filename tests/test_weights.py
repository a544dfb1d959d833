"""cleanrl/utils/weights: good files of every format and width, bad ones users may have, saving."""

import contextlib
import errno
import io
import json
import math
import os
import pickle
import random
import re
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.serialization
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
import torch
from flax.serialization import msgpack_serialize, to_bytes
from safetensors.torch import save_file

from cleanrl.utils.bounds import shown
from cleanrl.utils.weights.archives import MOST_BYTES, MOST_RECORDS
from cleanrl.utils.weights.files import MOST_NUMBERS, read_weights, save_weights
from cleanrl.utils.weights.layouts import flatten, unflatten

ROOT = Path(__file__).parent.parent
FORMATS = ["torch zip", "torch legacy", "safetensors", "flax"]
DAMAGED_FLAX = "truncated, damaged or not flax parameters"


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"network.0.weight": (8, 4, 3, 3), "network.0.bias": (8,), "network.9.weight": (6, 16)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """In the same type: bfloat16, which NumPy lacks, is JAX's."""
    return tensor.double().numpy().astype(np.dtype(str(tensor.dtype).removeprefix("torch.")))


def write(path: Path, state_dict: Any, format: str) -> Path:
    if format == "safetensors":
        save_file(state_dict, path)
    elif format == "flax":
        path.write_bytes(to_bytes({name: to_numpy(tensor) for name, tensor in state_dict.items()}))
    else:
        torch.save(state_dict, path, _use_new_zipfile_serialization=format == "torch zip")
    return path


def refusal(path: Path, capfd) -> str:
    """The error of a bad file: always one line that names it, and nothing else is printed."""
    with (
        warnings.catch_warnings(record=True, action="always") as caught,
        pytest.raises(SystemExit) as exit_info,
    ):
        read_weights(path)
    assert not caught
    message = exit_info.value.code
    assert isinstance(message, str)
    assert len(message.splitlines()) == 1
    assert message.startswith(f"error: {shown(path)}")
    assert len(message) < len(str(path)) + 200
    assert exit_info.value.__suppress_context__ or exit_info.value.__context__ is None
    assert capfd.readouterr() == ("", "")
    return message


# -------------------------------------------------------------------------------------------- good files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_reads_every_format_by_content(format, dtype, tmp_path):
    expected = tensors(dtype)
    read = read_weights(str(write(tmp_path / "teacher.cleanrl_model", expected, format)))
    assert list(read) == list(expected) or format == "safetensors"  # which sorts
    for name, tensor in expected.items():
        assert read[name].dtype == np.float32
        np.testing.assert_array_equal(read[name], tensor.float().numpy())


def test_reads_what_a_module_saves(tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8, 6))
    for state_dict in (module.state_dict(), OrderedDict(module.named_parameters())):
        read = read_weights(write(tmp_path / "module", state_dict, "torch zip"))
        np.testing.assert_array_equal(read["2.weight"], module[2].weight.detach().numpy())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".msgpack", ".zip", ""])
def test_the_suffix_of_a_file_means_nothing(format, suffix, tmp_path):
    path = write(tmp_path / f"teacher{suffix}", tensors(), format)
    np.testing.assert_equal(read_weights(path), {name: tensor.numpy() for name, tensor in tensors().items()})


def test_safetensors_need_no_torch(tmp_path):
    half = {name: tensor.bfloat16() for name, tensor in tensors().items()}
    code = (
        "import sys; sys.modules['torch'] = None; from cleanrl.utils.weights.files import read_weights;"
        "read_weights(sys.argv[1])"
    )

    def run(path: Path) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True)

    assert run(write(tmp_path / "a", half, "safetensors")).returncode == 0
    refused = run(write(tmp_path / "b", half, "torch zip"))
    advice = "is in torch's format; pip install torch, or use a safetensors file.\n"
    assert (refused.returncode, refused.stderr) == (1, f"error: {tmp_path / 'b'} {advice}")


def test_without_flax(tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "flax.serialization", None)
    path = tmp_path / "file"
    path.write_bytes(b"\x81\xa6params\x80")
    advice = "is in flax's format; pip install flax, or use a safetensors file."
    assert refusal(path, capfd) == f"error: {path} {advice}"


def test_safetensors_may_begin_with_any_byte(tmp_path):
    """They begin with the length of their header: one of 128 bytes with 0x80, as pickles do."""
    header = json.dumps({"weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    path = tmp_path / "file"
    for size in range(128, 128 + 256):
        path.write_bytes(size.to_bytes(8, "little") + header.ljust(size) + bytes(8))
        assert list(read_weights(path)) == ["weight"]


def test_reads_flax_dicts_of_every_size(tmp_path):
    path = tmp_path / "file"
    for size, first_byte in {1: 0x81, 15: 0x8F, 16: 0xDE}.items():
        path.write_bytes(to_bytes({f"Dense_{i}": {"bias": np.zeros(1, np.float32)} for i in range(size)}))
        assert path.read_bytes()[0] == first_byte
        assert list(read_weights(path)) == [f"Dense_{i}/bias" for i in range(size)]
    path.write_bytes(b"\xdf\0\0\0" + path.read_bytes()[2:])  # as from 65,536 entries on
    assert list(read_weights(path)) == [f"Dense_{i}/bias" for i in range(size)]


def test_reads_arrays_that_flax_saves_in_pieces(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 64)
        path = write(tmp_path / "file", tensors(), "flax")
    assert b"__msgpack_chunked_array__" in path.read_bytes()
    np.testing.assert_equal(read_weights(path), {name: tensor.numpy() for name, tensor in tensors().items()})


@pytest.mark.parametrize("format", FORMATS)
def test_numbers_beyond_float32_are_infinite(format, tmp_path):
    path = write(tmp_path / "file", {"weight": torch.tensor([1e300, -1e300], dtype=torch.float64)}, format)
    with warnings.catch_warnings(action="error"):
        assert np.isinf(read_weights(path)["weight"]).all()


# --------------------------------------------------------------------------------------------- bad files


def test_missing_empty_and_unreadable_files(tmp_path, capfd, monkeypatch):
    path = write(tmp_path / "file", tensors(), "torch zip")
    (tmp_path / "empty").touch()
    (tmp_path / "page").write_text("<!doctype html>")
    for bad, expected in {
        tmp_path / "nothing": "does not exist; check",
        tmp_path: "is not a file",
        tmp_path / "empty": "is empty; download",
        tmp_path / ("x" * 300): "cannot be read (File name too long)",
        tmp_path / "page": "neither a torch state dict nor flax msgpack nor safetensors",
    }.items():
        assert expected in refusal(bad, capfd)

    def denied(*_):  # chmod does not stop root
        raise PermissionError(errno.EACCES, "")

    monkeypatch.setattr(Path, "open", denied)
    assert "cannot be read (Permission denied); check" in refusal(path, capfd)


def test_a_path_is_part_of_the_line_without_control_characters_and_shortened(tmp_path, capfd):
    folder = tmp_path / "\x1b[2J\n" / ("long" * 50)
    folder.mkdir(parents=True)
    (folder / "file").touch()
    with pytest.raises(SystemExit) as end:
        read_weights(folder / "file")
    assert end.value.code.isprintable()
    assert re.fullmatch(r"error: .*… \(\d+ characters\) is empty; .*", end.value.code)


@pytest.mark.parametrize("format", FORMATS)
def test_truncated_at_any_length(format, tmp_path, capfd):
    content = write(tmp_path / "whole", tensors(), format).read_bytes()
    path = tmp_path / "cut"
    lengths = {*range(1, 40), *range(40, len(content), 97), len(content) - 10, len(content) - 1}
    for length in sorted(lengths):
        path.write_bytes(content[:length])
        refusal(path, capfd)


def test_random_bytes(tmp_path, capfd):
    path = tmp_path / "noise"
    noise = random.Random(1)
    starts = [b"", b"PK\x03\x04", b"\x80\x02", b"\x80", (300).to_bytes(8, "little") + b"{"]
    starts += [b"\x81", b"\x82\xa6params", b"\x81\xa6params\x81\xa6kernel", b"\xde", b"\xdf\0\0"]
    for start in starts * 20:
        path.write_bytes(start + noise.randbytes(1000))
        refusal(path, capfd)


def test_flipped_bytes_in_a_flax_file(tmp_path, capfd):
    """Each is refused in one line, or changed only a name or a number."""
    content = write(tmp_path / "whole", tensors(), "flax").read_bytes()
    path = tmp_path / "flipped"
    noise = random.Random(1)
    refused = 0
    for position in (*range(80), *noise.sample(range(len(content)), 100)):
        flipped = bytearray(content)
        flipped[position] ^= noise.randrange(1, 256)
        path.write_bytes(flipped)
        read = None
        with contextlib.suppress(SystemExit):
            read = read_weights(path)
        if read is None:
            refusal(path, capfd)
            refused += 1
        else:
            assert all(isinstance(name, str) and array.dtype == np.float32 for name, array in read.items())
    assert refused > 20


class Touch:
    """Unpickling it would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_code_in_a_pickle_is_not_run(protocol, tmp_path, capfd):
    trap = tmp_path / "touched"
    path = tmp_path / "teacher.cleanrl_model"
    path.write_bytes(pickle.dumps({"network.0.weight": Touch(trap)}, protocol=protocol))
    refusal(path, capfd)
    assert not trap.exists()
    with path.open("rb") as file:
        pickle.load(file)
    assert trap.exists()  # so it was a real trap


@pytest.mark.parametrize("format", ["torch zip", "torch legacy"])
def test_code_in_a_torch_file_is_not_run(format, tmp_path, capfd):
    trap = tmp_path / "touched"
    path = write(tmp_path / "teacher.cleanrl_model", tensors() | {"network.11.bias": Touch(trap)}, format)
    assert "could run code" in refusal(path, capfd)
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()


def test_code_in_a_msgpack_is_not_run(tmp_path, capfd):
    """Where an array of objects would be unpickled, as `numpy.load` may do."""
    trap = tmp_path / "touched"
    path = tmp_path / "teacher.cleanrl_model"
    for dtype in ("object", "O", "V8", "|O8"):
        objects = msgpack.packb(([1], dtype, pickle.dumps([Touch(trap)])))
        path.write_bytes(msgpack.packb({"params": {"bias": msgpack.ExtType(1, objects)}}))
        refusal(path, capfd)
    assert not trap.exists()


@pytest.mark.parametrize("format", ["torch zip", "torch legacy"])
def test_pickles_that_are_no_state_dict(format, tmp_path, capfd):
    path = tmp_path / "file"
    cases = {
        "holds a list, not a state dict": [torch.zeros(3)],
        "holds a Tensor, not a state dict": torch.zeros(3),
        "('steps' is a int)": {"steps": 3},
        "('model' is a dict); save network.state_dict() alone": {"model": tensors()},
        "(0 is a Tensor)": {0: torch.zeros(3)},
        "sparse or other special tensors": {"weight": torch.eye(3).to_sparse()},
        "save network.state_dict() alone": torch.nn.Linear(2, 2),
        "holds no parameters": {},
    }
    for expected, content in cases.items():
        assert expected in refusal(write(path, content, format), capfd)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "no weights at all")
    assert "not a torch state dict" in refusal(path, capfd)


def test_safetensors_that_lie(tmp_path, capfd):
    path = tmp_path / "file"
    header = json.dumps({"weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    lies = [
        (2**63 - 1).to_bytes(8, "little") + header + bytes(8),  # a header longer than any memory
        (10**9).to_bytes(8, "little") + header + bytes(8),
        len(header).to_bytes(8, "little") + header + bytes(4),
        len(header).to_bytes(8, "little") + header.replace(b"[2]", b"[9]") + bytes(8),
        len(header).to_bytes(8, "little") + header.replace(b"F32", b"F99") + bytes(8),
    ]
    for content in lies:
        path.write_bytes(content)
        assert "not a safetensors file" in refusal(path, capfd)
    save_file({"steps": torch.arange(3)}, path)
    assert "'steps' is of type I64" in refusal(path, capfd)
    save_file({}, path)
    assert "holds no parameters" in refusal(path, capfd)


def test_tensors_of_no_numbers_are_read_as_they_are(tmp_path):
    for shape in ((0,), (4, 0)):
        save_file({"weight": torch.zeros(shape)}, tmp_path / "file")
        assert read_weights(tmp_path / "file")["weight"].shape == shape


@pytest.mark.parametrize("shape", [[1] * 70, [0, 2**62, 2**62], [0, 2**62, 4]])
def test_a_shape_that_no_array_has_is_refused(shape, tmp_path, capfd):
    num_bytes = 4 * math.prod(shape)
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, num_bytes]}}).encode()
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header + bytes(num_bytes))
    assert "not a safetensors file" in refusal(tmp_path / "file", capfd)


def zip_of(*files: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", method) as writer:
        for name, content in files:
            writer.writestr(name, content)
    return archive.getvalue()


def zeros() -> bytes:
    return bytes(MOST_BYTES + 1)


def decoys() -> bytes:
    """More than one policy is none, and torch reads what is beside them."""
    return zip_of(("archive/data.pkl", zeros()), ("x/policy.pth", b""), ("y/policy.pth", b""))


LISTS = b"\x80\x02" + b"]" * 200_000 + b"."
VERSION, MACHINE = pickle.dumps(1001, protocol=2), pickle.dumps({"little_endian": True}, protocol=2)
MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # how files of torch before 1.6 begin


def many_tensors() -> bytes:
    header = {f"{index}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for index in range(20_000)}
    return len(json.dumps(header)).to_bytes(8, "little") + json.dumps(header).encode()


def views_of_few_numbers() -> bytes:
    file = io.BytesIO()
    torch.save({"unexpected": torch.zeros(1, dtype=torch.half).expand(MOST_NUMBERS + 1)}, file)
    return file.getvalue()


def sparse_safetensors(count: int) -> bytes:
    header = {"weight": {"dtype": "F16", "shape": [count], "data_offsets": [0, 2 * count]}}
    return len(json.dumps(header)).to_bytes(8, "little") + json.dumps(header).encode()


@pytest.mark.parametrize(
    ("make", "num_bytes"),  # of the file, which is sparse beyond its content
    [
        (views_of_few_numbers, 0),
        (lambda: zip_of(("policy.pth", zeros())), 0),
        (lambda: zip_of(("archive/data/0", zeros())), 0),
        (lambda: zip_of(("policy.pth", zip_of(("archive/data/0", zeros())))), 0),
        (decoys, 0),
        (lambda: zip_of(("policy.pth", decoys())), 0),
        (lambda: zip_of(*((str(index), b"") for index in range(MOST_RECORDS + 1))), 0),
        (lambda: zip_of(("archive/data.pkl", LISTS)), 0),
        (lambda: LISTS, 0),
        (lambda: MAGIC + LISTS, 0),
        (lambda: MAGIC + LISTS + zip_of(("data.pkl", b"")), 0),
        (lambda: zip_of(("a/a.pkl", b"\xff"), ("a/data.pkl", LISTS)), 0),
        (lambda: zip_of(*((f"a/{index}.pkl", b"N.") for index in range(5)), ("a/data.pkl", LISTS)), 0),
        (lambda: zip_of(("policy.pth", b""), method=zipfile.ZIP_BZIP2), 0),
        (lambda: msgpack.packb({"a": [[[]] * 100] * 100}), 0),
        (lambda: msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb([[[]] * 100] * 100))}), 0),
        (many_tensors, 0),
        (partial(sparse_safetensors, 10**11), 2 * 10**11),
        (
            partial(sparse_safetensors, MOST_NUMBERS + 1),
            len(sparse_safetensors(MOST_NUMBERS + 1)) + 2**26 + 2,
        ),
        (lambda: b"\x81", 2 * 10**11),
    ],
    ids=[
        "views",
        "a policy",
        "a tensor",
        "a tensor in a policy",
        "decoys",
        "decoys in a policy",
        "records",
        "lists",
        "lists in a bare pickle",
        "lists in an old file",
        "lists before an archive",
        "lists behind what is no pickle",
        "lists behind five pickles",
        "a method without bounds",
        "lists in msgpack",
        "lists in an array of msgpack",
        "tensors",
        "a sparse file",
        "half precision",
        "msgpack",
    ],
)
def test_a_file_that_would_fill_the_memory_is_refused_before_it_does(make, num_bytes, tmp_path, capfd):
    path = tmp_path / "file"
    path.write_bytes(make())
    if num_bytes:
        os.truncate(path, num_bytes)
    assert "holds more than any network here" in refusal(path, capfd)


def array(shape: object, dtype: object, content: bytes) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, content)))


def chunked(**parts: object) -> dict:
    return {"__msgpack_chunked_array__": True, **parts}


def bias(value: object) -> dict:
    return {"params": {"bias": value}}


ONE = array([1], "float32", bytes(4))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"step": 3}, "('step' is a int); save flax.serialization.to_bytes(params) alone"),
        (bias(3), "('params/bias' is a int)"),
        (bias("text"), "is a str"),
        (bias(None), "is a NoneType"),
        (bias([ONE]), "is a list"),
        (bias(b"bytes"), "is a bytes"),
        (bias(1j), "is a complex"),
        (bias(np.float32(1)), "is a float32"),
        (bias(msgpack.ExtType(9, b"")), "is a ExtType"),
        (bias(np.ones(2, int)), "'params/bias' is of type int64; save floating-point"),
        (bias(np.ones(2, complex)), "is of type complex128"),
        (bias(array([1], "U1", bytes(4))), "is of type str32"),
        (bias(array([1], "f4,f4", bytes(8))), "is of type void64"),
        (bias(array([1], "V4", bytes(4))), "is of type void32"),
        (bias(array([1], "a4", bytes(4))), "is of type bytes32"),  # NumPy warns about the letter
        ({"x" * 10_000: 3}, "..."),
        ({0: ONE}, "(0 is a ndarray)"),
        ({"params": {0: ONE}}, DAMAGED_FLAX),
        ({b"params": {"bias": ONE}}, DAMAGED_FLAX),
        ({"params": {}}, "holds no parameters"),
        (bias(array([1], "object", bytes(8))), DAMAGED_FLAX),
        (bias(array([1], [["a", "O"]], bytes(8))), DAMAGED_FLAX),
        (bias(array([10**15], "float32", bytes(4))), DAMAGED_FLAX),
        (bias(array([1], "S2000000000", bytes(4))), DAMAGED_FLAX),
        (bias(array("shape", "float32", bytes(4))), DAMAGED_FLAX),
        (bias(msgpack.ExtType(1, b"")), DAMAGED_FLAX),
        (bias(msgpack.ExtType(2, b"\x90")), DAMAGED_FLAX),
        (bias(chunked()), DAMAGED_FLAX),
        (bias(chunked(shape={"0": 10**15}, chunks={"0": ONE})), DAMAGED_FLAX),
        (bias(chunked(shape={"0": 1}, chunks=[ONE])), DAMAGED_FLAX),
        (chunked(shape={"0": 1}, chunks={"0": ONE}), DAMAGED_FLAX),
        (b"\x81\xa1a" * 100_000 + b"\xc0", DAMAGED_FLAX),
        (b"\x81\xa1a" * 1000 + b"\xc0", DAMAGED_FLAX),
        (b"\x81\xa1a" * 300 + b"\xc0", "..."),
        (b"\x81\xa1a\xc0\x00", DAMAGED_FLAX),
        (b"\x81\x91\x00\xc0", DAMAGED_FLAX),
        (b"\x81\xa1\xff\xc0", DAMAGED_FLAX),
        (b"\xdf\xff\xff\xff\xff", DAMAGED_FLAX),
        (b"\x81\xa1a\xdd\xff\xff\xff\xff", DAMAGED_FLAX),
        (b"\x81\xa1a\xc6\xff\xff\xff\xff", DAMAGED_FLAX),
        (b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", DAMAGED_FLAX),
        (b"\x80", "not a torch state dict"),
    ],
    ids=range(42),
)
def test_msgpack_that_is_no_parameters(content, expected, tmp_path, capfd):
    path = tmp_path / "file"
    path.write_bytes(content if isinstance(content, bytes) else msgpack_serialize(content))
    assert expected in refusal(path, capfd)


# ------------------------------------------------------------------------------------------------ saving


def torch_network() -> torch.nn.Module:
    torch.manual_seed(1)
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8, 6))
    return network.to(memory_format=torch.channels_last)


def jax_function() -> SimpleNamespace:
    weights = {name: jnp.asarray(tensor.numpy()) for name, tensor in torch_network().state_dict().items()}
    return SimpleNamespace(params=unflatten({f"params/{name}": array for name, array in weights.items()}))


def weights_of(network: Any) -> dict[str, np.ndarray]:
    found = network.state_dict() if hasattr(network, "state_dict") else flatten(network.params)
    return {name: np.asarray(array) for name, array in found.items()}


def test_torch_weights_are_saved_as_a_state_dict(tmp_path):
    path, network = tmp_path / "model", torch_network()
    save_weights(path, network)
    state_dict = torch.load(path, weights_only=True)
    assert all(tensor.is_contiguous() for tensor in state_dict.values())
    torch_network().load_state_dict(state_dict)
    np.testing.assert_equal(read_weights(path), weights_of(network))


def test_jax_weights_are_saved_as_flaxs_bytes(tmp_path):
    path, function = tmp_path / "model", jax_function()
    save_weights(path, function)
    assert path.read_bytes() == to_bytes(function.params)
    np.testing.assert_equal(read_weights(path), weights_of(function))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("make", [torch_network, jax_function])
def test_weights_that_are_not_finite_are_refused(make, value, tmp_path):
    path, good, bad = tmp_path / "model", make(), make()
    if make is torch_network:
        bad[2].bias.data[3] = value
    else:
        bad.params["params"]["2.bias"] = bad.params["params"]["2.bias"].at[3].set(value)
    with pytest.raises(SystemExit) as refused:
        save_weights(path, bad)
    assert refused.value.code == (
        f"error: the network's weights are not finite; not saved: {path}; try a lower --learning-rate"
    )
    assert not list(tmp_path.iterdir())
    save_weights(path, good)
    content = path.read_bytes()
    with pytest.raises(SystemExit, match=f"not finite; kept as saved before: {path}; try a lower"):
        save_weights(path, bad)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("make", [torch_network, jax_function])
def test_a_file_that_cannot_be_replaced_stays(make, tmp_path, monkeypatch):
    path, network = tmp_path / "model", make()
    path.write_bytes(b"saved before")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        save_weights(path, network)
    assert path.read_bytes() == b"saved before"
    assert list(tmp_path.iterdir()) == [path]


def calls(function: str, *arguments: bytes) -> bytes:
    """A pickle of what a function makes, of the few that torch lets a pickle call."""
    return b"\x80\x02c" + function.replace(" ", "\n").encode() + b"\n(" + b"".join(arguments) + b"tR."


@pytest.mark.parametrize(
    "pickled",
    [
        calls("builtins bytearray", b"J" + (2**24).to_bytes(4, "little")),
        calls("torch._utils _rebuild_parameter_with_state"),
        calls("_codecs encode", b"X\x01\x00\x00\x00a", b"X\x06\x00\x00\x00latin1"),
    ],
)
def test_a_pickle_that_calls_what_no_state_dict_needs_is_refused(pickled, tmp_path, capfd):
    for content in (
        MAGIC + VERSION + MACHINE + pickled,
        zip_of(("a/data.pkl", pickled), ("a/version", b"3")),
    ):
        (tmp_path / "file").write_bytes(content)
        assert "it holds Python objects besides tensors" in refusal(tmp_path / "file", capfd)


def test_a_record_of_a_zip_holds_no_more_than_it_says(tmp_path, capfd):
    content = bytearray(zip_of(("policy.pth", bytes(10**7))))
    for header, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        start = content.find(header) + offset
        content[start : start + 4] = (1000).to_bytes(4, "little")
    (tmp_path / "file").write_bytes(content)
    tracemalloc.start()
    refusal(tmp_path / "file", capfd)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6


def test_torch_reads_the_records_that_were_checked(tmp_path):
    """Of two with one name Python takes the last, torch the first."""
    good = io.BytesIO()
    torch.save({"a": torch.ones(2)}, good)
    with zipfile.ZipFile(good) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    (pickle_name,) = (name for name, _ in records if name.endswith(".pkl"))
    with pytest.warns(UserWarning, match="Duplicate name"):
        (tmp_path / "file").write_bytes(zip_of((pickle_name, LISTS), *records))
    np.testing.assert_array_equal(read_weights(tmp_path / "file")["a"], [1, 1])


@pytest.mark.parametrize("is_in_envelope", [False, True])
def test_attributes_from_a_file_do_not_hide_the_methods_of_its_dict(is_in_envelope, tmp_path):
    weights = OrderedDict(a=torch.ones(2))
    vars(weights).update(get=5, values=5)
    torch.save({"model_weights": weights} if is_in_envelope else weights, tmp_path / "file")
    np.testing.assert_array_equal(read_weights(tmp_path / "file")["a"], [1, 1])
