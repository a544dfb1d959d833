"""cleanrl/utils/weights/files.py: good files in every format, width and layout, and the bad ones users may have."""

import contextlib
import functools
import importlib.util
import json
import os
import pickle
import random
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cleanrl.qdagger_dqn_atari_impalacnn import Args, StudentNetwork, TeacherNetwork, load_teacher
from cleanrl.utils.weights.files import (
    check_weights,
    fit_weights,
    flatten,
    read_weights,
    to_flax,
    to_torch,
    unflatten,
)

ROOT = Path(__file__).parent.parent
SHAPES = {
    "network.0.weight": (8, 4, 3, 3),
    "network.0.bias": (8,),
    "network.7.weight": (16, 8),
    "network.7.bias": (16,),
    "network.9.weight": (6, 16),
    "network.9.bias": (6,),
}
needs_flax = pytest.mark.skipif(
    not importlib.util.find_spec("flax"), reason="pip install -r requirements/requirements-jax.txt"
)
FORMATS = ["torch zip", "torch legacy", "safetensors", pytest.param("flax", marks=needs_flax)]


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def weights(**changed: np.ndarray) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors().items()} | changed


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """In the same type: bfloat16, which NumPy lacks, in the one that comes with JAX."""
    return tensor.double().numpy().astype(np.dtype(str(tensor.dtype).removeprefix("torch.")))


def save(path: Path, state_dict, format: str) -> Path:
    if format == "safetensors":
        save_file(state_dict, path)
    elif format == "flax":
        from flax.serialization import to_bytes

        path.write_bytes(to_bytes({name: to_numpy(tensor) for name, tensor in state_dict.items()}))
    else:
        torch.save(state_dict, path, _use_new_zipfile_serialization=format == "torch zip")
    return path


def refusal(path: Path, capfd) -> str:
    """What `read_weights` says of a bad file: always one line that names it, and nothing else is printed."""
    with (
        warnings.catch_warnings(record=True, action="always") as caught,
        pytest.raises(SystemExit) as exit_info,
    ):
        read_weights(path)
    assert not caught
    message = exit_info.value.code
    assert isinstance(message, str)
    assert len(message.splitlines()) == 1
    assert message.startswith(f"error: {path}")
    assert len(message) < len(str(path)) + 200
    assert exit_info.value.__suppress_context__ or exit_info.value.__context__ is None
    assert capfd.readouterr() == ("", "")
    return message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_reads_every_format_by_content(format, dtype, tmp_path):
    path = save(tmp_path / "teacher.cleanrl_model", tensors(dtype), format)
    read = read_weights(str(path))
    assert list(read) == list(SHAPES) or format == "safetensors"  # which sorts
    check_weights(read, SHAPES, str(path))
    for name, tensor in tensors(dtype).items():
        assert read[name].dtype == np.float32
        np.testing.assert_array_equal(read[name], tensor.float().numpy())


def test_reads_what_a_module_saves(tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8, 6))
    for state_dict in (module.state_dict(), OrderedDict(module.named_parameters())):
        read = read_weights(save(tmp_path / "module", state_dict, "torch zip"))
        np.testing.assert_array_equal(read["2.weight"], module[2].weight.detach().numpy())


def test_safetensors_need_no_torch(tmp_path):
    half = {name: tensor.bfloat16() for name, tensor in tensors().items()}
    code = (
        "import sys; sys.modules['torch'] = None; from cleanrl.utils.weights.files import read_weights;"
        "read_weights(sys.argv[1])"
    )

    def run(path: Path) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True)

    assert run(save(tmp_path / "a", half, "safetensors")).returncode == 0
    refused = run(save(tmp_path / "b", half, "torch zip"))
    assert refused.returncode == 1
    assert (
        refused.stderr
        == f"error: {tmp_path / 'b'} is in torch's format; pip install torch, or use a safetensors file.\n"
    )


def test_without_flax(tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "flax.serialization", None)
    path = tmp_path / "file"
    path.write_bytes(b"\x81\xa6params\x80")
    assert (
        refusal(path, capfd)
        == f"error: {path} is in flax's format; pip install flax, or use a safetensors file."
    )


def test_safetensors_may_begin_with_any_byte(tmp_path):
    """They begin with the length of their header: one of 128 bytes with 0x80, as pickles do."""
    header = json.dumps({"weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    path = tmp_path / "file"
    for size in range(128, 128 + 256):
        path.write_bytes(size.to_bytes(8, "little") + header.ljust(size) + bytes(8))
        assert list(read_weights(path)) == ["weight"]


@needs_flax
def test_reads_what_flax_saves(tmp_path):
    from flax.serialization import to_bytes

    path = tmp_path / "file"
    for size, first_byte in {1: 0x81, 15: 0x8F, 16: 0xDE}.items():
        path.write_bytes(to_bytes({f"Dense_{i}": {"bias": zeros(1)} for i in range(size)}))
        assert path.read_bytes()[0] == first_byte
        assert list(read_weights(path)) == [f"Dense_{i}/bias" for i in range(size)]
    path.write_bytes(b"\xdf\0\0\0" + path.read_bytes()[2:])  # as from 65,536 entries on
    assert list(read_weights(path)) == [f"Dense_{i}/bias" for i in range(size)]


@needs_flax
@pytest.mark.usefixtures("small_chunks")
def test_reads_arrays_that_flax_saves_in_pieces(tmp_path):
    path = save(tmp_path / "file", tensors(), "flax")
    assert b"__msgpack_chunked_array__" in path.read_bytes()
    np.testing.assert_equal(read_weights(path), weights())


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr("flax.serialization.MAX_CHUNK_SIZE", 64)


@pytest.mark.parametrize("format", FORMATS)
def test_numbers_beyond_float32_are_infinite(format, tmp_path, capfd):
    path = save(tmp_path / "file", {"weight": torch.tensor([1e300, -1e300], dtype=torch.float64)}, format)
    with warnings.catch_warnings(action="error"):
        assert np.isinf(read_weights(path)["weight"]).all()


def test_no_such_file_folder_empty(tmp_path, capfd):
    assert "does not exist; check" in refusal(tmp_path / "nothing", capfd)
    assert "is not a file" in refusal(tmp_path, capfd)
    (tmp_path / "empty").touch()
    assert "is empty; download" in refusal(tmp_path / "empty", capfd)
    assert "cannot be read (File name too long)" in refusal(tmp_path / ("x" * 300), capfd)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file(tmp_path, capfd):
    path = save(tmp_path / "secret", tensors(), "torch zip")
    path.chmod(0)
    assert "cannot be read (Permission denied); check" in refusal(path, capfd)


def test_unreadable_file_as_any_user(tmp_path, capfd, monkeypatch):
    path = save(tmp_path / "secret", tensors(), "torch zip")

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert "cannot be read (Permission denied); check" in refusal(path, capfd)


@pytest.mark.parametrize("format", FORMATS)
def test_cut_short_at_any_length(format, tmp_path, capfd):
    content = save(tmp_path / "whole", tensors(), format).read_bytes()
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


@needs_flax
def test_flipped_bytes_in_a_flax_file(tmp_path, capfd):
    """Each is refused in one line, or it changed no more than a name or a number."""
    content = save(tmp_path / "whole", tensors(), "flax").read_bytes()
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
    path = save(tmp_path / "teacher.cleanrl_model", tensors() | {"network.11.bias": Touch(trap)}, format)
    assert "could run code" in refusal(path, capfd)
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()


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
        assert expected in refusal(save(path, content, format), capfd)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "no weights at all")
    assert "no torch state dict" in refusal(path, capfd)


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
        assert "no safetensors file" in refusal(path, capfd)
    save_file({"steps": torch.arange(3)}, path)
    assert "'steps' is of type I64" in refusal(path, capfd)
    save_file({}, path)
    assert "holds no parameters" in refusal(path, capfd)


def test_none_of_the_formats(tmp_path, capfd):
    path = tmp_path / "file"
    path.write_text("<!doctype html>")
    assert "neither a torch state dict nor flax msgpack nor safetensors" in refusal(path, capfd)


@needs_flax
def test_msgpack_that_is_no_parameters(tmp_path, capfd):
    import msgpack
    from flax.serialization import msgpack_serialize

    def array(shape: object, dtype: object, content: bytes) -> msgpack.ExtType:
        return msgpack.ExtType(1, msgpack.packb((shape, dtype, content)))

    def chunked(**parts: object) -> dict:
        return {"__msgpack_chunked_array__": True, **parts}

    damaged = "cut short, damaged or no flax parameters"
    one = array([1], "float32", bytes(4))
    cases = [
        ({"step": 3}, "('step' is a int); save flax.serialization.to_bytes(params) alone"),
        ({"params": {"bias": 3}}, "('params/bias' is a int)"),
        ({"params": {"bias": "text"}}, "is a str"),
        ({"params": {"bias": None}}, "is a NoneType"),
        ({"params": {"bias": [one]}}, "is a list"),
        ({"params": {"bias": b"bytes"}}, "is a bytes"),
        ({"params": {"bias": 1j}}, "is a complex"),
        ({"params": {"bias": np.float32(1)}}, "is a float32"),
        ({"params": {"bias": msgpack.ExtType(9, b"")}}, "is a ExtType"),
        ({"params": {"bias": np.ones(2, int)}}, "'params/bias' is of type int64; save floating-point"),
        ({"params": {"bias": np.ones(2, complex)}}, "is of type complex128"),
        ({"params": {"bias": array([1], "U1", bytes(4))}}, "is of type str32"),
        ({"params": {"bias": array([1], "f4,f4", bytes(8))}}, "is of type void64"),
        ({"params": {"bias": array([1], "V4", bytes(4))}}, "is of type void32"),
        ({"params": {"bias": array([1], "a4", bytes(4))}}, "is of type bytes32"),  # NumPy warns of the letter
        ({"x" * 10_000: 3}, "..."),
        ({0: one}, "(0 is a ndarray)"),
        ({"params": {0: one}}, damaged),
        ({b"params": {"bias": one}}, damaged),
        ({"params": {}}, "holds no parameters"),
        ({"params": {"bias": array([1], "object", bytes(8))}}, damaged),
        ({"params": {"bias": array([1], [["a", "O"]], bytes(8))}}, damaged),
        ({"params": {"bias": array([10**15], "float32", bytes(4))}}, damaged),
        ({"params": {"bias": array([1], "S2000000000", bytes(4))}}, damaged),
        ({"params": {"bias": array("shape", "float32", bytes(4))}}, damaged),
        ({"params": {"bias": msgpack.ExtType(1, b"")}}, damaged),
        ({"params": {"bias": msgpack.ExtType(2, b"\x90")}}, damaged),
        ({"params": {"bias": chunked()}}, damaged),
        ({"params": {"bias": chunked(shape={"0": 10**15}, chunks={"0": one})}}, damaged),
        ({"params": {"bias": chunked(shape={"0": 1}, chunks=[one])}}, damaged),
        (chunked(shape={"0": 1}, chunks={"0": one}), damaged),
        (b"\x81\xa1a" * 100_000 + b"\xc0", damaged),
        (b"\x81\xa1a" * 1000 + b"\xc0", damaged),
        (b"\x81\xa1a" * 300 + b"\xc0", "..."),
        (b"\x81\xa1a\xc0\x00", damaged),
        (b"\x81\x91\x00\xc0", damaged),
        (b"\x81\xa1\xff\xc0", damaged),
        (b"\xdf\xff\xff\xff\xff", damaged),
        (b"\x81\xa1a\xdd\xff\xff\xff\xff", damaged),
        (b"\x81\xa1a\xc6\xff\xff\xff\xff", damaged),
        (b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", damaged),
        (b"\x80", "no torch state dict"),
    ]
    path = tmp_path / "file"
    for content, expected in cases:
        path.write_bytes(content if isinstance(content, bytes) else msgpack_serialize(content))
        assert expected in refusal(path, capfd), content


@needs_flax
def test_code_in_a_msgpack_is_not_run(tmp_path, capfd):
    """Where an array of objects would be unpickled, as `numpy.load` may do."""
    import msgpack

    trap = tmp_path / "touched"
    path = tmp_path / "teacher.cleanrl_model"
    for dtype in ("object", "O", "V8", "|O8"):
        objects = msgpack.packb(([1], dtype, pickle.dumps([Touch(trap)])))
        path.write_bytes(msgpack.packb({"params": {"bias": msgpack.ExtType(1, objects)}}))
        refusal(path, capfd)
    assert not trap.exists()


def complaint(found: dict[str, np.ndarray], expected=SHAPES, check=check_weights, **role: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        check(found, expected, "file.safetensors", **role)
    message = exit_info.value.code
    assert len(message.splitlines()) == 1
    assert message.startswith("error: file.safetensors: ")
    return message


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def test_good_weights_pass():
    check_weights(weights(), SHAPES, "file")
    check_weights(weights(), {name: list(shape) for name, shape in SHAPES.items()}, "file")


def test_another_games_number_of_actions():
    other = weights(**{"network.9.weight": zeros(4, 16), "network.9.bias": zeros(4)})
    expected = "has 4 actions, this game has 6; use a teacher trained on this game"
    assert f"the teacher {expected}" in complaint(other)
    assert f"the student {expected.replace('teacher', 'student')}" in complaint(other, role="student")


def test_another_games_number_of_actions_in_flax_names():
    expected = {
        "params/Conv_0/kernel": (3, 3, 4, 8),
        "params/Dense_1/bias": (6,),
        "params/Dense_1/kernel": (16, 6),
    }
    found = {name: zeros(*shape) for name, shape in expected.items()}
    check_weights(found, expected, "file")
    found |= {"params/Dense_1/bias": zeros(18), "params/Dense_1/kernel": zeros(16, 18)}
    assert "has 18 actions, this game has 6" in complaint(found, expected)


@pytest.mark.parametrize(
    "changed",
    [
        {"network.9.weight": zeros(6, 32)},  # a wider layer before the last one
        {"network.9.weight": zeros(4, 32), "network.9.bias": zeros(4)},
        {"network.9.bias": zeros(6, 1)},
        {"network.9.weight": zeros(4, 16, 1), "network.9.bias": zeros(4, 1)},
        {"network.7.bias": zeros(4), "network.9.weight": zeros(4, 16), "network.9.bias": zeros(4)},
        {"network.0.weight": zeros(8, 3, 3, 4)},
    ],
)
def test_other_shapes_are_another_architecture(changed):
    message = complaint(weights(**changed))
    assert "another architecture" in message
    assert all(f"{name} is {array.shape}, not {SHAPES[name]}" in message for name, array in changed.items())


def test_other_names_are_another_architecture():
    found = weights(**{f"extra.{i}": zeros(2) for i in range(9)})
    del found["network.9.bias"]
    message = complaint(found)
    assert "another architecture" in message
    assert "missing network.9.bias; unexpected 'extra.0', 'extra.1', 'extra.2' and 6 more" in message
    assert r"unexpected 'a\nb\x1b[2J'" in complaint(weights(**{"a\nb\x1b[2J": zeros(2)}))
    assert "missing network.0.weight, network.0.bias, network.7.weight and 3 more" in complaint({})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinite_values(value):
    found = weights()
    found["network.7.bias"][3] = value
    assert "network.7.bias of the teacher has NaN or infinite values" in complaint(found)


def test_integers_are_no_weights():
    assert "network.7.bias of the teacher is int64" in complaint(
        weights(**{"network.7.bias": np.zeros(16, int)})
    )


NETWORKS = {"teacher": TeacherNetwork, "student": StudentNetwork}
ROLES = pytest.mark.parametrize("role", NETWORKS)
OBSERVATIONS = np.random.default_rng(1).integers(0, 256, (3, 4, 84, 84), np.uint8)


@functools.cache
def flax_networks() -> SimpleNamespace:
    """The design's networks. Auto-named by flax, they say which names and shapes are flax's."""
    from flax import linen as nn

    class Teacher(nn.Module):
        num_actions: int

        @nn.compact
        def __call__(self, observations):
            x = observations.transpose(0, 2, 3, 1) / 255.0
            x = nn.relu(nn.Conv(32, (8, 8), 4, padding="VALID")(x))
            x = nn.relu(nn.Conv(64, (4, 4), 2, padding="VALID")(x))
            x = nn.relu(nn.Conv(64, (3, 3), 1, padding="VALID")(x))
            x = nn.relu(nn.Dense(512)(x.reshape(len(x), -1)))
            return nn.Dense(self.num_actions)(x)

    class ResidualBlock(nn.Module):
        @nn.compact
        def __call__(self, x):
            channels = x.shape[-1]
            y = nn.Conv(channels, (3, 3))(nn.relu(x))
            return x + nn.Conv(channels, (3, 3))(nn.relu(y))

    class ConvSequence(nn.Module):
        channels: int

        @nn.compact
        def __call__(self, x):
            x = nn.Conv(self.channels, (3, 3))(x)
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
            x = ResidualBlock()(x)
            return ResidualBlock()(x)

    class Student(nn.Module):
        num_actions: int

        @nn.compact
        def __call__(self, observations):
            x = observations.transpose(0, 2, 3, 1) / 255.0
            for channels in (16, 32, 32):
                x = ConvSequence(channels)(x)
            x = nn.relu(nn.Dense(256)(nn.relu(x.reshape(len(x), -1))))
            return nn.Dense(self.num_actions)(x)

    return SimpleNamespace(teacher=Teacher(6), student=Student(6))


def torch_network(role: str, num_actions: int = 6) -> torch.nn.Module:
    torch.manual_seed(1)
    return NETWORKS[role](num_actions).requires_grad_(False)


def torch_weights(role: str, num_actions: int = 6) -> dict[str, np.ndarray]:
    state_dict = torch_network(role, num_actions).state_dict()
    return {name: tensor.numpy().copy() for name, tensor in state_dict.items()}


def flax_params(role: str) -> dict:
    """Random ones, biases too, which flax itself would start at zero."""
    import jax

    shapes = jax.eval_shape(getattr(flax_networks(), role).init, jax.random.key(1), OBSERVATIONS)
    rng = np.random.default_rng(1)
    return unflatten(
        {
            name: rng.normal(0, np.prod(like.shape[:-1]) ** -0.5, like.shape).astype(np.float32)
            for name, like in flatten(shapes).items()
        }
    )


def flax_q_values(role: str, params: dict, observations: np.ndarray) -> np.ndarray:
    import jax

    with jax.default_device(jax.devices("cpu")[0]):  # a GPU would multiply in fewer bits
        return np.asarray(jax.jit(getattr(flax_networks(), role).apply)(params, observations))


def assert_same_q_values(actual: np.ndarray, expected: np.ndarray) -> None:
    """The frameworks add the same thousands of float32 products in another order, which leaves 1e-6 between
    them; a parameter in the wrong place, 1e-2 and more."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@needs_flax
@ROLES
def test_torch_weights_give_flax_the_same_q_values(role):
    expected = torch_network(role)(torch.from_numpy(OBSERVATIONS)).numpy()
    params = unflatten(to_flax(torch_weights(role)))
    assert_same_q_values(flax_q_values(role, params, OBSERVATIONS), expected)


@needs_flax
@ROLES
def test_flax_weights_give_torch_the_same_q_values(role, tmp_path):
    from flax.serialization import to_bytes

    params = flax_params(role)
    path = tmp_path / "file"
    path.write_bytes(to_bytes(params))
    if role == "teacher":
        args = Args(env_id="PongNoFrameskip-v4", teacher_model_path=path)
        network = load_teacher(args, num_actions=6, device=torch.device("cpu"))
    else:
        network = torch_network(role)
        fitted = fit_weights(read_weights(path), network.state_dict(), str(path), role)
        network.load_state_dict({name: torch.from_numpy(array) for name, array in fitted.items()})
    expected = flax_q_values(role, params, OBSERVATIONS)
    assert_same_q_values(network(torch.from_numpy(OBSERVATIONS)).numpy(), expected)


@needs_flax
@ROLES
def test_flax_names_and_shapes_are_flaxs_own(role):
    def shapes(weights: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
        return {name: array.shape for name, array in weights.items()}

    assert shapes(to_flax(torch_weights(role))) == shapes(flatten(flax_params(role)))


@ROLES
@pytest.mark.parametrize("num_actions", [3, 18])
def test_round_trip_has_the_same_bits(role, num_actions):
    in_torch = torch_weights(role, num_actions)
    in_flax = to_flax(in_torch)
    for original, there_and_back in ((in_torch, to_torch(in_flax)), (in_flax, to_flax(to_torch(in_flax)))):
        assert list(original) == list(there_and_back)
        assert all(original[name].tobytes() == there_and_back[name].tobytes() for name in original)
    for array in (*in_flax.values(), *to_torch(in_flax).values()):
        assert array.flags.c_contiguous
        assert array.dtype == np.float32
    assert all(to_torch(in_torch)[name] is array for name, array in in_torch.items())
    assert all(to_flax(in_flax)[name] is array for name, array in in_flax.items())


@ROLES
def test_first_dense_layer_may_have_another_width(role):
    in_torch = torch_weights(role)
    first, last = ("network.7", "network.9") if role == "teacher" else ("network.5", "network.7")
    in_torch[f"{first}.weight"] = in_torch[f"{first}.weight"][:100]
    in_torch[f"{last}.weight"] = in_torch[f"{last}.weight"][:, :100]
    in_flax = to_flax(in_torch)
    assert in_flax["params/Dense_0/kernel"].shape == (in_torch[f"{first}.weight"].shape[1], 100)
    np.testing.assert_equal(to_torch(in_flax), in_torch)


def test_flatten_and_unflatten():
    tree = {"params": {"Conv_0": {"kernel": 1, "bias": 2}, "Dense_0": {"bias": 3}}}
    flat = {"params/Conv_0/kernel": 1, "params/Conv_0/bias": 2, "params/Dense_0/bias": 3}
    assert flatten(tree) == flat
    assert unflatten(flat) == tree
    assert list(unflatten(flat)["params"]["Conv_0"]) == ["kernel", "bias"]


def every_like(role: str) -> list[dict[str, np.ndarray]]:
    """A network's own parameters in both layouts and every order of names: the shapes alone must do."""
    in_torch = torch_weights(role)
    orders = [in_torch, to_flax(in_torch)]
    orders += [dict(sorted(weights.items())) for weights in orders]
    return [
        {name: np.broadcast_to(np.float32(0), array.shape) for name, array in like.items()} for like in orders
    ]


@ROLES
def test_fits_every_layout_and_order(role):
    in_torch = torch_weights(role)
    in_flax = to_flax(in_torch)
    for like in every_like(role):
        expected = in_torch if "network.7.bias" in like else in_flax
        for found in (in_torch, in_flax, dict(reversed(in_torch.items())), dict(sorted(in_flax.items()))):
            fitted = fit_weights(found, like, "file", role)
            assert list(fitted) == list(like)
            np.testing.assert_equal(fitted, {name: expected[name] for name in like})


@ROLES
@pytest.mark.parametrize("in_file", [to_torch, to_flax])
def test_a_bad_file_gets_the_same_line_from_both_frameworks(role, in_file):
    good = in_file(torch_weights(role))
    name = list(good)[2]
    another = in_file(torch_weights("student" if role == "teacher" else "teacher"))
    cases = {
        f"the {role} has 4 actions, this game has 6; use a {role} trained": in_file(torch_weights(role, 4)),
        f"another architecture than the {role}'s (missing ": another,
        f"(missing {name}; unexpected 'extra')": good | {"extra": zeros(1)},
        f"({name} is (1, 1), not {good[name].shape})": good | {name: zeros(1, 1)},
        f"{name} of the {role} has NaN": good | {name: good[name] * np.float32(np.nan)},
        f"{name} of the {role} is int64": good | {name: good[name].astype(int)},
    }
    del cases[f"(missing {name}; unexpected 'extra')"][name]
    for expected, found in cases.items():
        lines = {complaint(found, like, fit_weights, role=role) for like in every_like(role)}
        assert len(lines) == 1
        (line,) = lines
        assert expected in line
        assert ("actions" in line) or ("params/" in line) == (in_file is to_flax)
