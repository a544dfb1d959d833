"""cleanrl/utils/weights.py: good files in every format and width, and the bad ones a user may hand over."""

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

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cleanrl.utils.weights import check_weights, read_weights

ROOT = Path(__file__).parent.parent
SHAPES = {
    "network.0.weight": (8, 4, 3, 3),
    "network.0.bias": (8,),
    "network.7.weight": (16, 8),
    "network.7.bias": (16,),
    "network.9.weight": (6, 16),
    "network.9.bias": (6,),
}
FORMATS = ["torch zip", "torch legacy", "safetensors"]


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def weights(**changed: np.ndarray) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors().items()} | changed


def save(path: Path, state_dict, format: str) -> Path:
    if format == "safetensors":
        save_file(state_dict, path)
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
        "import sys; sys.modules['torch'] = None; from cleanrl.utils.weights import read_weights;"
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
    for start in starts * 20:
        path.write_bytes(start + noise.randbytes(1000))
        refusal(path, capfd)


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


def complaint(found: dict[str, np.ndarray], expected=SHAPES, **role: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        check_weights(found, expected, "file.safetensors", **role)
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
