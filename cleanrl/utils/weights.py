"""Reading a network's parameters from a file that somebody else may have written."""

import os
import pickle
import re
import warnings
from pathlib import Path

import numpy as np

SAVE_AGAIN = "download or save it again"


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Returns a network's parameters by name, from a `torch.save`d state dict or a safetensors file.

    The content decides which of them it is, not the name. Floating-point parameters of any width come as
    float32. Nothing in the file is ever run. Raises SystemExit with one line if it is anything else.
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

    if head.startswith((b"PK\x03\x04", b"\x80")):  # a zip archive, or a bare pickle as torch wrote before 1.6
        weights = _read_torch(path)
    elif head[8:] == b"{":  # after 8 bytes of length, a JSON header
        weights = _read_safetensors(path)
    else:
        raise SystemExit(
            f"error: {path} is neither a torch state dict nor safetensors, or is damaged; {SAVE_AGAIN}."
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
            state_dict = torch.load(path, map_location="cpu", weights_only=True)
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
                f"error: {path} is no state dict ({name!r} is a {kind}); save network.state_dict() alone."
            )
    try:
        return {
            name: (tensor.float() if tensor.is_floating_point() else tensor).detach().numpy()
            for name, tensor in state_dict.items()
        }
    except Exception:
        raise SystemExit(
            f"error: {path} holds sparse or other special tensors; save ordinary dense ones."
        ) from None


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
                f"error: {path}: {name!r} is of type {tensor['dtype']}; save floating-point weights."
            )
        array = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
        if tensor["dtype"] == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        weights[name] = array.astype(np.float32)
    return weights


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
    # repr: these names are the file's, which may have put line breaks or terminal codes into them
    differences += [f"unexpected {_some([repr(name) for name in unexpected])}"] if unexpected else []
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
