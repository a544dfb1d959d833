"""Files of weights: reads every format, decided by content, and saves a network's weights safely."""

import io
import itertools
import math
import os
import pickle
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from cleanrl.utils.bounds import shown
from cleanrl.utils.storage import write_durably
from cleanrl.utils.weights.archives import (
    MOST_BYTES,
    TOO_LARGE,
    BadWeightsError,
    checked,
    stable_baselines3_policy,
)
from cleanrl.utils.weights.layouts import QUOTE, flatten

SAVE_AGAIN = "download or save it again"
MOST_NUMBERS = 2**25  # in a file; twice those of the largest network here
MOST_HEADER, MOST_CONTAINERS = 2**20, 1000  # of safetensors, of msgpack
MOST_ATOMS, MOST_RETURN = 1000, 1e9  # of C51's arguments that are believed
MSGPACK_MAPS = (*range(0x81, 0x90), 0xDE, 0xDF)  # first bytes; 0x80, the empty map, is also a pickle's


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a network's parameters by name, from a torch state dict, flax msgpack or safetensors file.

    From a zip file saved by Stable-Baselines3 it takes the policy, and from {"model_weights", "args"}, as
    CleanRL saves some agents, the weights, with "atoms" if the arguments are those of C51. The content
    decides the format, not the file's name. Floating-point parameters of any width become float32, in the
    file's layout; flax's nested names are joined as in `flatten`. Nothing in the file is ever executed.

    Raises:
        SystemExit: with a one-line error for anything else.
    """
    try:
        return _read(Path(path))
    except BadWeightsError as fault:
        raise SystemExit(f"error: {shown(path)} {fault}") from None


def _read(path: Path) -> dict[str, np.ndarray]:
    """Raises BadWeightsError."""
    try:
        if path.exists() and not path.is_file():
            raise BadWeightsError("is not a file; name the weights file itself.")
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(9)
    except FileNotFoundError:
        raise BadWeightsError("does not exist; check the path.") from None
    except OSError as error:
        raise BadWeightsError(
            f"cannot be read ({os.strerror(error.errno)}); check its permissions."
        ) from None
    if size == 0:
        raise BadWeightsError(f"is empty; {SAVE_AGAIN}.")
    is_safetensors = head[8:] == b"{"  # a JSON header after 8 bytes of length, which may look like any format
    if size > MOST_BYTES or (is_safetensors and MOST_HEADER < int.from_bytes(head[:8], "little") < size):
        raise BadWeightsError(TOO_LARGE)

    if is_safetensors:
        weights = _read_safetensors(path)
    elif head.startswith((b"PK\x03\x04", b"\x80")):  # a zip archive, or a bare pickle as before torch 1.6
        weights = _read_torch(path)
    elif head[0] in MSGPACK_MAPS:
        weights = _read_flax(path)
    else:
        raise BadWeightsError(
            f"is neither a torch state dict nor flax msgpack nor safetensors, or is damaged; {SAVE_AGAIN}."
        )
    if not weights:
        raise BadWeightsError(f"holds no parameters; {SAVE_AGAIN}.")
    return weights


def _check_count(counts: Iterable[int]) -> None:
    """Raises BadWeightsError if there are more numbers than a network has: they may share their memory."""
    if sum(counts) > MOST_NUMBERS:
        raise BadWeightsError(TOO_LARGE)


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise BadWeightsError("is in torch's format; pip install torch, or use a safetensors file.") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with path.open("rb") as file:  # of a path torch believes the suffix
                content = checked(stable_baselines3_policy(file) or file)
                state_dict = torch.load(content, map_location="cpu", weights_only=True)
    except BadWeightsError:
        raise
    except pickle.UnpicklingError:  # torch's message has many lines and advises to trust the file
        raise BadWeightsError(
            "is refused: it holds Python objects besides tensors, which could run code, or is"
            " damaged; save network.state_dict() alone, or download it again."
        ) from None
    except Exception:  # EOFError, RuntimeError, OSError, IndexError …, depending on where the damage is
        raise BadWeightsError(f"is truncated, damaged or not a torch state dict; {SAVE_AGAIN}.") from None

    state_dict, atoms = _open_envelope(state_dict)
    if not isinstance(state_dict, dict):
        kind = type(state_dict).__name__
        raise BadWeightsError(f"holds a {kind}, not a state dict; save network.state_dict().")
    for name, tensor in state_dict.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            kind = type(tensor).__name__
            raise BadWeightsError(
                f"is not a state dict ({QUOTE.repr(name)} is a {kind}); save network.state_dict() alone."
            )
    _check_count(tensor.numel() for tensor in state_dict.values())
    try:
        return atoms | {
            name: (tensor.float() if tensor.is_floating_point() else tensor).detach().numpy()
            for name, tensor in state_dict.items()
        }
    except Exception:
        raise BadWeightsError("holds sparse or other special tensors; save ordinary dense ones.") from None


def _open_envelope(content: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """The weights in what a file holds, and C51's "atoms" if only its arguments have them."""
    content = _plain(content)
    if not isinstance(content, dict) or not isinstance(content.get("model_weights"), dict):
        return content, {}
    weights = _plain(content["model_weights"])
    args = content.get("args")
    match args if isinstance(args, dict) else {}:
        case {"v_min": float() | int() as low, "v_max": float() | int() as high, "n_atoms": int() as count}:
            if 2 <= count <= MOST_ATOMS and abs(low) < MOST_RETURN and abs(high) < MOST_RETURN:
                return weights, {"atoms": np.linspace(low, high, count, dtype=np.float32)}
    return weights, {}


def _plain(content: Any) -> Any:
    """A dict without the attributes that a file may give an OrderedDict, and which may hide its methods."""
    return dict(dict.items(content)) if isinstance(content, dict) else content


def _read_flax(path: Path) -> dict[str, np.ndarray]:
    try:
        from flax.serialization import msgpack_restore
    except ImportError:
        raise BadWeightsError("is in flax's format; pip install flax, or use a safetensors file.") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = path.read_bytes()
            _check_objects(data)
            tree, atoms = _open_envelope(msgpack_restore(data))
            weights = flatten(tree)
    except BadWeightsError:
        raise
    except Exception:  # ValueError, TypeError, RecursionError, KeyError …, depending on where the damage is
        raise BadWeightsError(f"is truncated, damaged or not flax parameters; {SAVE_AGAIN}.") from None
    for name, array in weights.items():
        if not isinstance(name, str) or not isinstance(array, np.ndarray):
            raise BadWeightsError(
                f"does not hold flax parameters ({QUOTE.repr(name)} is a"
                f" {type(array).__name__}); save flax.serialization.to_bytes(params) alone."
            )
        if "float" not in array.dtype.name:  # NumPy does not count bfloat16 as a kind of number
            dtype = array.dtype.name
            raise BadWeightsError(
                f"is not usable: {QUOTE.repr(name)} is of type {dtype}; save floating-point weights."
            )
    _check_count(array.size for array in weights.values())
    return atoms | {name: _to_float32(array) for name, array in weights.items()}


def _check_objects(data: bytes) -> None:
    """Raises BadWeightsError if msgpack holds more maps and lists than a network's parameters."""
    from msgpack import unpackb

    number = itertools.count(1)

    def count(container: Any) -> None:
        if next(number) > MOST_CONTAINERS:
            raise BadWeightsError(TOO_LARGE)

    def look(data: bytes) -> None:
        unpackb(data, list_hook=count, object_pairs_hook=count, ext_hook=look_into, raw=True, **limits)

    def look_into(code: int, data: bytes) -> None:
        if code in (1, 2, 3):  # flax's, which are msgpack again
            look(data)

    limits = {"max_array_len": MOST_CONTAINERS, "max_map_len": MOST_CONTAINERS, "strict_map_key": False}
    look(data)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, deserialize

    damaged = BadWeightsError(f"is truncated, damaged or not a safetensors file; {SAVE_AGAIN}.")
    try:
        tensors = deserialize(path.read_bytes())
    except SafetensorError:
        raise damaged from None
    _check_count((math.prod(tensor["shape"]) for _, tensor in tensors))
    weights = {}
    for name, tensor in tensors:
        # safetensors' own NumPy reader does not know bfloat16, the upper half of a float32
        kind = tensor["dtype"]
        dtype = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}.get(kind)
        if dtype is None:
            raise BadWeightsError(
                f"is not usable: {QUOTE.repr(name)} is of type {kind}; save floating-point weights."
            )
        try:
            array = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
        except ValueError:  # no array has that shape
            raise damaged from None
        if kind == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        weights[name] = _to_float32(array)
    return weights


def _to_float32(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # a float64 too large becomes infinite, which check_weights reports
        return array.astype(np.float32)


def save_weights(path: Path, network: Any) -> None:
    """Saves a network's weights, all of them or nothing.

    Args:
        path: the file, as published models have it: of a torch module its state dict, of a JAX function the
            msgpack of its `params`.
        network: a `torch.nn.Module`, or anything with `params`.

    Raises:
        SystemExit: with a one-line error if a weight is not finite. A file saved before stays as it is.
        OSError: the file cannot be written. A file saved before stays as it is.
    """
    if hasattr(network, "state_dict"):
        import torch

        state_dict = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
        is_finite = all(torch.isfinite(tensor).all() for tensor in state_dict.values())
        content = io.BytesIO()
        torch.save(state_dict, content)
        data = content.getvalue()
    else:
        from flax.serialization import to_bytes, to_state_dict

        arrays = flatten(to_state_dict(network.params)).values()
        is_finite = all(np.isfinite(np.asarray(array)).all() for array in arrays)
        data = to_bytes(network.params)
    if not is_finite:
        kept = f"kept as saved before: {path}" if path.exists() else f"not saved: {path}"
        raise SystemExit(f"error: the network's weights are not finite; {kept}; try a lower --learning-rate")
    write_durably(path, data)
