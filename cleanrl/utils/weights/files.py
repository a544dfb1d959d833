"""A network's parameters: from a file that somebody else may have written, in torch's layout or in flax's.

A layout is names and the order of axes: `network.0.weight` (out, in, height, width) in torch,
`params/Conv_0/kernel` (height, width, in, out) in flax. Any file format may hold either.
"""

import io
import os
import pickle
import re
import reprlib
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SAVE_AGAIN = "download or save it again"
MSGPACK_MAPS = (*range(0x81, 0x90), 0xDE, 0xDF)  # first bytes; 0x80, the empty map, is also a pickle's

QUOTE = reprlib.Repr()  # for names from the file, which may hold line breaks or terminal codes, or be endless
QUOTE.maxstring = 80

STABLE_BASELINES3_LAYERS = {
    "q_net.features_extractor.cnn.0": "network.0",
    "q_net.features_extractor.cnn.2": "network.2",
    "q_net.features_extractor.cnn.4": "network.4",
    "q_net.features_extractor.linear.0": "network.7",
    "q_net.q_net.0": "network.9",
}


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Returns a network's parameters by name, from a torch state dict, flax msgpack or safetensors file.

    A zip file that Stable-Baselines3's DQN saved is read as well: the Q-network in it, under our names. The
    content decides which of them it is, not the name. Floating-point parameters of any width come as
    float32, in the file's layout; flax's nested names are joined as in `flatten`. Nothing in the file is ever
    run. Raises SystemExit with one line if it is anything else.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise SystemExit(f"error: {path} is not a file; name the weights file itself.")
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(9)
    except FileNotFoundError:
        raise SystemExit(f"error: {path} does not exist; check the path.") from None
    except OSError as error:
        raise SystemExit(
            f"error: {path} cannot be read ({os.strerror(error.errno)}); check its permissions."
        ) from None
    if size == 0:
        raise SystemExit(f"error: {path} is empty; {SAVE_AGAIN}.")

    if head[8:] == b"{":  # after 8 bytes of length, which may begin like any other format, a JSON header
        weights = _read_safetensors(path)
    elif head.startswith((b"PK\x03\x04", b"\x80")):  # a zip archive, or a bare pickle as before torch 1.6
        weights = _read_torch(path)
    elif head[0] in MSGPACK_MAPS:
        weights = _read_flax(path)
    else:
        raise SystemExit(
            f"error: {path} is neither a torch state dict nor flax msgpack nor safetensors, or is damaged;"
            f" {SAVE_AGAIN}."
        )
    if not weights:
        raise SystemExit(f"error: {path} holds no parameters; {SAVE_AGAIN}.")
    return weights


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise SystemExit(
            f"error: {path} is in torch's format; pip install torch, or use a safetensors file."
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            policy = _policy_of_stable_baselines3(path)
            state_dict = torch.load(policy or path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's text goes over many lines and advises to trust the file
        raise SystemExit(
            f"error: {path} is refused: it holds Python objects beside tensors, which could run code, or is"
            " damaged; save network.state_dict() alone, or download it again."
        ) from None
    except Exception:  # EOFError, RuntimeError, OSError, IndexError …: it depends on where the damage is
        raise SystemExit(
            f"error: {path} is cut short, damaged or no torch state dict; {SAVE_AGAIN}."
        ) from None

    if not isinstance(state_dict, dict):
        kind = type(state_dict).__name__
        raise SystemExit(f"error: {path} holds a {kind}, not a state dict; save network.state_dict().")
    for name, tensor in state_dict.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            kind = type(tensor).__name__
            raise SystemExit(
                f"error: {path} is no state dict ({QUOTE.repr(name)} is a {kind});"
                " save network.state_dict() alone."
            )
    if policy:
        state_dict = _from_stable_baselines3(state_dict)
    try:
        return {
            name: (tensor.float() if tensor.is_floating_point() else tensor).detach().numpy()
            for name, tensor in state_dict.items()
        }
    except Exception:
        raise SystemExit(
            f"error: {path} holds sparse or other special tensors; save ordinary dense ones."
        ) from None


def _policy_of_stable_baselines3(path: Path) -> io.BytesIO | None:
    """The state dict in a zip file of Stable-Baselines3; None if `path` is something else."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        if "policy.pth" not in archive.namelist():
            return None
        return io.BytesIO(archive.read("policy.pth"))


def _from_stable_baselines3(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The Q-network's parameters under our names, without the target network's."""
    renamed = {}
    for name, tensor in state_dict.items():
        layer, _, parameter = name.rpartition(".")
        if layer in STABLE_BASELINES3_LAYERS:
            renamed[f"{STABLE_BASELINES3_LAYERS[layer]}.{parameter}"] = tensor
        elif not name.startswith("q_net_target."):
            renamed[name] = tensor
    return renamed


def _read_flax(path: Path) -> dict[str, np.ndarray]:
    try:
        from flax.serialization import msgpack_restore
    except ImportError:
        raise SystemExit(
            f"error: {path} is in flax's format; pip install flax, or use a safetensors file."
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weights = flatten(msgpack_restore(path.read_bytes()))
    except Exception:  # ValueError, TypeError, RecursionError, KeyError …: it depends on where the damage is
        raise SystemExit(
            f"error: {path} is cut short, damaged or no flax parameters; {SAVE_AGAIN}."
        ) from None
    for name, array in weights.items():
        if not isinstance(name, str) or not isinstance(array, np.ndarray):
            raise SystemExit(
                f"error: {path} is no flax parameters ({QUOTE.repr(name)} is a {type(array).__name__});"
                " save flax.serialization.to_bytes(params) alone."
            )
        if "float" not in array.dtype.name:  # NumPy counts bfloat16 as no kind of number
            dtype = array.dtype.name
            raise SystemExit(
                f"error: {path}: {QUOTE.repr(name)} is of type {dtype}; save floating-point weights."
            )
    return {name: _to_float32(array) for name, array in weights.items()}


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, deserialize

    try:
        tensors = deserialize(path.read_bytes())
    except SafetensorError:
        raise SystemExit(
            f"error: {path} is cut short, damaged or no safetensors file; {SAVE_AGAIN}."
        ) from None
    weights = {}
    for name, tensor in tensors:
        # safetensors' own NumPy reader knows no bfloat16, which is the upper half of a float32
        dtype = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}.get(tensor["dtype"])
        if dtype is None:
            raise SystemExit(
                f"error: {path}: {QUOTE.repr(name)} is of type {tensor['dtype']};"
                " save floating-point weights."
            )
        array = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
        if tensor["dtype"] == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        weights[name] = _to_float32(array)
    return weights


def _to_float32(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # a float64 too large becomes infinite, which check_weights reports
        return array.astype(np.float32)


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{"params": {"Conv_0": {"bias": array, …}}} to {"params/Conv_0/bias": array, …}."""
    weights = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            weights |= {name + "/" + rest: leaf for rest, leaf in flatten(value).items()}
        else:
            weights[name] = value
    return weights


def unflatten(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`, in plain dicts."""
    tree: dict[str, Any] = {}
    for name, value in weights.items():
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


class _Network(NamedTuple):
    flax_layers: dict[str, str]
    """torch's name of each layer: flax's"""
    flattened: tuple[int, int, int]
    """channels, height and width of what the first dense layer takes"""


_TEACHER = _Network(
    {
        "network.0": "params/Conv_0",
        "network.2": "params/Conv_1",
        "network.4": "params/Conv_2",
        "network.7": "params/Dense_0",
        "network.9": "params/Dense_1",
    },
    flattened=(64, 7, 7),
)
_STUDENT = _Network(
    {f"network.{i}.conv": f"params/ConvSequence_{i}/Conv_0" for i in range(3)}
    | {
        f"network.{i}.res_block{j}.conv{k}": f"params/ConvSequence_{i}/ResidualBlock_{j}/Conv_{k}"
        for i in range(3)
        for j in range(2)
        for k in range(2)
    }
    | {"network.5": "params/Dense_0", "network.7": "params/Dense_1"},
    flattened=(32, 11, 11),
)


def to_flax(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A teacher's or a student's parameters in flax's layout, C-contiguous; as they are if they have it.

    The names and shapes must be the network's own, but for the width of the dense layers.
    """
    if _in_flax_layout(weights):
        return dict(weights)
    network = _STUDENT if "network.0.conv.weight" in weights else _TEACHER
    converted = {}
    for name, array in weights.items():
        torch_layer, parameter = name.rsplit(".", 1)
        layer = network.flax_layers[torch_layer]
        if array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
        elif array.ndim == 2 and layer == "params/Dense_0":  # like a convolution as large as its input
            array = array.reshape(-1, *network.flattened).transpose(2, 3, 1, 0).reshape(-1, len(array))
        else:
            array = array.T
        parameter = {"weight": "kernel", "bias": "bias"}[parameter]
        converted[f"{layer}/{parameter}"] = np.ascontiguousarray(array)
    return converted


def to_torch(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `to_flax`."""
    if not _in_flax_layout(weights):
        return dict(weights)
    network = _STUDENT if "params/ConvSequence_0/Conv_0/kernel" in weights else _TEACHER
    torch_layers = {layer: torch_layer for torch_layer, layer in network.flax_layers.items()}
    channels, height, width = network.flattened
    converted = {}
    for name, array in weights.items():
        layer, parameter = name.rsplit("/", 1)
        if array.ndim == 4:
            array = array.transpose(3, 2, 0, 1)
        elif array.ndim == 2 and layer == "params/Dense_0":
            array = array.reshape(height, width, channels, -1).transpose(3, 2, 0, 1).reshape(array.T.shape)
        else:
            array = array.T
        parameter = {"kernel": "weight", "bias": "bias"}[parameter]
        converted[f"{torch_layers[layer]}.{parameter}"] = np.ascontiguousarray(array)
    return converted


def _in_flax_layout(weights: Mapping[str, Any]) -> bool:
    return any(name.startswith("params/") for name in weights)


def fit_weights(
    weights: dict[str, np.ndarray], like: Mapping[str, Any], source: str, role: str = "teacher"
) -> dict[str, np.ndarray]:
    """Returns `weights` in the names, layout and order of `like`, a network's own parameters.

    `like` is in either layout; its arrays may be anything with a shape. Raises SystemExit with the line of
    `check_weights`, which speaks in the names of `weights` and so is the same whatever layout `like` has.
    """
    expected = {name: np.broadcast_to(np.float32(0), array.shape) for name, array in like.items()}
    expected = to_flax(expected) if _in_flax_layout(weights) else to_torch(expected)
    # sorted: the same line for every order, and in both networks and layouts the last layer stays last
    check_weights(weights, {name: expected[name].shape for name in sorted(expected)}, source, role)
    fitted = to_flax(weights) if _in_flax_layout(like) else to_torch(weights)
    return {name: fitted[name] for name in like}


def check_weights(
    weights: dict[str, np.ndarray],
    expected_shapes: dict[str, tuple[int, ...]],
    source: str,
    role: str = "teacher",
) -> None:
    """Raises SystemExit with one line unless `weights` are finite numbers of exactly these names and shapes.

    The last entry of `expected_shapes` is of the last layer, whose width is the game's number of actions.
    `source` is where the weights come from and `role` whose they are, for the message.
    """
    missing = [name for name in expected_shapes if name not in weights]
    unexpected = [name for name in weights if name not in expected_shapes]
    wrong = [
        name
        for name, shape in expected_shapes.items()
        if name in weights and weights[name].shape != tuple(shape)
    ]
    if not missing and not unexpected and wrong:
        actions = _differing_actions(weights, expected_shapes, wrong)
        if actions:
            raise SystemExit(
                f"error: {source}: the {role} has {actions[0]} actions, this game has {actions[1]};"
                f" use a {role} trained on this game."
            )
    differences = [f"missing {_some(missing)}"] if missing else []
    differences += [f"unexpected {_some([QUOTE.repr(name) for name in unexpected])}"] if unexpected else []
    shapes = [f"{name} is {weights[name].shape}, not {tuple(expected_shapes[name])}" for name in wrong]
    differences += [_some(shapes)] if shapes else []
    if differences:
        raise SystemExit(
            f"error: {source}: another architecture than the {role}'s ({'; '.join(differences)})."
        )
    for name, array in weights.items():
        if array.dtype.kind != "f":
            raise SystemExit(
                f"error: {source}: {name} of the {role} is {array.dtype}; use floating-point weights."
            )
        if not np.isfinite(array).all():
            raise SystemExit(
                f"error: {source}: {name} of the {role} has NaN or infinite values; use another {role}."
            )


def _differing_actions(
    weights: dict[str, np.ndarray], expected_shapes: dict[str, tuple[int, ...]], wrong: list[str]
) -> tuple[int, int] | None:
    """The two numbers of actions, if the width of the last layer is all that differs."""
    layers = {name: re.split(r"[./]\w+$", name)[0] for name in expected_shapes}
    last_layer = [name for name in layers if layers[name] == list(layers.values())[-1]]
    if wrong != last_layer:
        return None
    differing = set()
    for name in wrong:
        have, want = weights[name].shape, tuple(expected_shapes[name])
        if len(have) != len(want):
            return None
        differing |= {(a, b) for a, b in zip(have, want, strict=True) if a != b}
    return differing.pop() if len(differing) == 1 else None


def _some(items: list[str]) -> str:
    """The first three of them, since a whole network would fill the screen."""
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
