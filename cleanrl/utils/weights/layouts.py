"""Names and shapes of every network's parameters, in PyTorch's layout and in flax's.

A layout is names and an order of axes: `network.0.weight` (out, in, height, width) in PyTorch,
`params/Conv_0/kernel` (height, width, in, out) in flax. Any file format may hold either.
"""

import re
import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

QUOTE = reprlib.Repr()  # for names from a file, which may be endless or hold line breaks or terminal codes
QUOTE.maxstring = 80


class _Network(NamedTuple):
    flax_layers: dict[str, str]
    """flax's name of each layer, by PyTorch's"""
    flattened: tuple[int, int, int]
    """channels, height and width of the first dense layer's input"""


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
_STABLE_BASELINES3_LAYERS = {
    "q_net.features_extractor.cnn.0": "network.0",
    "q_net.features_extractor.cnn.2": "network.2",
    "q_net.features_extractor.cnn.4": "network.4",
    "q_net.features_extractor.linear.0": "network.7",
    "q_net.q_net.0": "network.9",
}


def is_flax(weights: Mapping[str, Any]) -> bool:
    """Whether the names are flax's."""
    return any(name.startswith("params/") for name in weights)


def is_student(weights: Mapping[str, Any]) -> bool:
    """Whether the names, in either layout, are those of the Impala-CNN."""
    return "network.0.conv.weight" in weights or "params/ConvSequence_0/Conv_0/kernel" in weights


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


def from_stable_baselines3(policy: Mapping[str, Any]) -> dict[str, Any]:
    """The Q-network's parameters of a `DQNPolicy` under our names; the target network's are left out."""
    renamed = {}
    for name, tensor in policy.items():
        layer, _, parameter = name.rpartition(".")
        if layer in _STABLE_BASELINES3_LAYERS:
            renamed[f"{_STABLE_BASELINES3_LAYERS[layer]}.{parameter}"] = tensor
        elif not name.startswith("q_net_target."):
            renamed[name] = tensor
    return renamed


def to_flax(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A teacher's or a student's parameters in flax's layout, C-contiguous; unchanged if already in it.

    Names and shapes must be the network's own, but the first dense layer may have any width.
    """
    if is_flax(weights):
        return dict(weights)
    network = _STUDENT if is_student(weights) else _TEACHER
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
    if not is_flax(weights):
        return dict(weights)
    network = _STUDENT if is_student(weights) else _TEACHER
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


def fit_weights(
    weights: dict[str, np.ndarray], like: Mapping[str, Any], source: str, role: str = "teacher"
) -> dict[str, np.ndarray]:
    """Returns `weights` in the names, layout and order of `like`, a network's own parameters.

    `like` is in either layout; its arrays may be anything with a shape. Errors are those of `check_weights`;
    they use the names of `weights`, so the layout of `like` does not affect them.
    """
    expected = {name: np.broadcast_to(np.float32(0), array.shape) for name, array in like.items()}
    expected = to_flax(expected) if is_flax(weights) else to_torch(expected)
    # Sorted: the message does not depend on the order, and the last layer stays last in every layout.
    check_weights(weights, {name: expected[name].shape for name in sorted(expected)}, source, role)
    fitted = to_flax(weights) if is_flax(like) else to_torch(weights)
    return {name: fitted[name] for name in like}


def check_weights(
    weights: dict[str, np.ndarray],
    expected_shapes: dict[str, tuple[int, ...]],
    source: str,
    role: str = "teacher",
) -> None:
    """Checks that `weights` are finite numbers with exactly these names and shapes.

    Args:
        weights: the parameters.
        expected_shapes: shapes by name; the last layer, whose width is the number of actions, comes last.
        source: where the weights come from, for the message.
        role: which network they belong to, for the message.

    Raises:
        SystemExit: with a one-line error if they are not.
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
    differences = [f"missing {_first_three(missing)}"] if missing else []
    if unexpected:
        differences.append(f"unexpected {_first_three([QUOTE.repr(name) for name in unexpected])}")
    shapes = [f"{name} is {weights[name].shape}, not {tuple(expected_shapes[name])}" for name in wrong]
    differences += [_first_three(shapes)] if shapes else []
    if differences:
        raise SystemExit(f"error: {source}: the architecture is not the {role}'s ({'; '.join(differences)}).")
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
    """The two numbers of actions if only the width of the last layer differs."""
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


def _first_three(items: list[str]) -> str:
    """The first three; a whole network would fill the screen."""
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
