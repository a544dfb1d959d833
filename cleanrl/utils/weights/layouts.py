"""Names and shapes of every network's parameters, in PyTorch's layout and in flax's.

A layout is names and an order of axes: `network.0.weight` (out, in, height, width) in PyTorch,
`params/Conv_0/kernel` (height, width, in, out) in flax. Any file format may hold either.
"""

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
    weights: dict[str, np.ndarray], like: Mapping[str, Any], source: str, kind: str
) -> dict[str, np.ndarray]:
    """Returns `weights` in the names, layout and order of `like`, a network's own parameters.

    `like` is in either layout; its arrays may be anything with a shape. Errors are those of `check_weights`;
    they use the names of `weights`, so the layout of `like` does not affect them.
    """
    expected = {name: np.broadcast_to(np.float32(0), array.shape) for name, array in like.items()}
    expected = to_flax(expected) if is_flax(weights) else to_torch(expected)
    # Sorted: the message does not depend on the order.
    check_weights(weights, {name: expected[name].shape for name in sorted(expected)}, source, kind)
    fitted = to_flax(weights) if is_flax(like) else to_torch(weights)
    return {name: fitted[name] for name in like}


def check_weights(
    weights: dict[str, np.ndarray], expected_shapes: dict[str, tuple[int, ...]], source: str, kind: str
) -> None:
    """Checks that `weights` are finite numbers with exactly these names and shapes.

    Args:
        weights: the parameters.
        expected_shapes: shapes by name.
        source: where the weights come from, for the message.
        kind: of what agent they were taken to be, for the message.

    Raises:
        SystemExit: with a one-line error if they are not.
    """
    missing = [name for name in expected_shapes if name not in weights]
    unexpected = [QUOTE.repr(name) for name in weights if name not in expected_shapes]
    wrong_shapes = [
        f"{name} is {weights[name].shape}, not {tuple(shape)}"
        for name, shape in expected_shapes.items()
        if name in weights and weights[name].shape != tuple(shape)
    ]
    differences = [f"missing {_first_three(missing)}"] if missing else []
    differences += [f"unexpected {_first_three(unexpected)}"] if unexpected else []
    differences += [_first_three(wrong_shapes)] if wrong_shapes else []
    if differences:
        raise SystemExit(
            f"error: {source} was taken for weights of {kind}, but the architecture differs"
            f" ({'; '.join(differences)})."
        )
    for name, array in weights.items():
        if array.dtype.kind != "f":
            raise SystemExit(
                f"error: {source} holds weights of {kind}, but {name} is {array.dtype};"
                " save floating-point weights."
            )
        if not np.isfinite(array).all():
            raise SystemExit(
                f"error: {source} holds weights of {kind}, but {name} has NaN or infinite values;"
                " use another file."
            )


def _first_three(items: list[str]) -> str:
    """The first three; a whole network would fill the screen."""
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
