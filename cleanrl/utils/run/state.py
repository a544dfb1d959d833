"""A run's state in a checkpoint. The state is a script's `TrainState`; every field is saved, by its kind:

| a field that is                                | is saved as                                  |
|------------------------------------------------|----------------------------------------------|
| a PyTorch module or optimizer                  | its `state_dict()`                           |
| a dataclass of JAX arrays                      | its leaves                                   |
| a NumPy random generator                       | the state of its bit generator               |
| a replay buffer                                | its rows, in files of their own              |
| a number, string, None, array, or a list, tuple or dict of these | itself                     |
"""

import dataclasses
import hashlib
import sys
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

import numpy as np

from cleanrl.utils.bounds import MOST, has_kind, shown
from cleanrl.utils.replay.ring import ReplayBuffer
from cleanrl.utils.storage import DamagedError, pack, unpack

TORCH_NUMBERS = "torch's random numbers"  # are saved beside the fields
OF_DEVICE = ("params", "fused", "capturable", "foreach")  # settings of an optimizer


def check_fields(state: Any) -> None:
    """Raises TypeError with the name of the first field that cannot be saved, or would not be restored."""
    saved = capture(state)
    for name, value in vars(state).items():
        try:
            if not _is_alike(_restore(value, unpack(pack(saved[name]))), value):
                raise TypeError("it would come back as another type")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _refusal(state, name, error) from None


def replays_of(state: Any) -> dict[str, ReplayBuffer]:
    """The replay buffers that take memory, by the names of their fields."""
    found = {name: value for name, value in vars(state).items() if isinstance(value, ReplayBuffer)}
    return {name: replay for name, replay in found.items() if replay.frames is not None}


def capture(state: Any) -> dict[str, Any]:
    """All of a state but its replay buffers' content, as `storage.pack` takes it.

    Raises:
        TypeError: with the name of a field whose value `restore` would not take.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(state)}
    saved: dict[str, Any] = {}
    for name, value in vars(state).items():
        try:
            saved[name] = _capture(value)
            if not _can_be(saved[name], name, kinds[name]):
                raise TypeError("a value must be of the field's type, finite, and not negative if it counts")
        except TypeError as error:
            raise _refusal(state, name, error) from None
    if torch := sys.modules.get("torch"):
        saved[TORCH_NUMBERS] = torch.get_rng_state().numpy()
    return saved


def restore(state: Any, saved: dict[str, Any]) -> None:
    """Brings a new state, made with the same options, to where `capture` saw one.

    Raises:
        DamagedError: `saved` is of another kind of state, or has a value that no run has: of another type,
            negative, or not finite.
    """
    other = "it is of another version of the script, whose state differs in"
    if not isinstance(saved, dict):
        raise DamagedError("its state is not what it should be")
    saved = dict(saved)
    torch_numbers = saved.pop(TORCH_NUMBERS, None)
    if differing := saved.keys() ^ vars(state).keys():
        raise DamagedError(f"{other} {', '.join(sorted(map(shown, differing)))}")
    kinds = {field.name: field.type for field in dataclasses.fields(state)}
    for name, content in saved.items():
        value = getattr(state, name)
        try:
            is_sound = _can_be(content, name, kinds[name])
            if is_sound:
                setattr(state, name, _restore(value, content))
        except (AttributeError, LookupError, TypeError, ValueError, OverflowError):
            raise DamagedError(f"{other} {name}") from None
        if not is_sound:
            raise DamagedError(f"its {name} cannot be that of a run")
    torch = sys.modules.get("torch")
    if torch and torch_numbers is not None:
        try:
            torch.set_rng_state(torch.tensor(torch_numbers))
        except (RuntimeError, TypeError, ValueError):
            raise DamagedError(f"{TORCH_NUMBERS} are not what they should be") from None


def is_finite(content: Any) -> bool:
    """Whether all numbers in nested lists and dicts are."""
    if isinstance(content, dict):
        return all(map(is_finite, content.values()))
    if isinstance(content, list | tuple):
        return all(map(is_finite, content))
    if isinstance(content, float | np.ndarray | np.generic):
        return not np.issubdtype(np.asarray(content).dtype, np.inexact) or bool(np.isfinite(content).all())
    return True


def _can_be(content: Any, name: str, kind: Any) -> bool:
    """Whether a field can have a value. What counts, by its name steps or seconds, is not negative."""
    if not is_finite(content):
        return False
    if not _is_of_numbers(kind):
        return True
    counts = kind in (int, float) and name.endswith(("step", "steps", "seconds"))
    return is_number_of_a_run(content, kind) and not (counts and content < 0)


def is_number_of_a_run(content: Any, kind: Any) -> bool:
    """Whether a value, or a list of them, is of that type, and no number in it beyond those of any run."""
    numbers = content if isinstance(content, list) else [content]
    return has_kind(content, kind) and all(
        abs(number) <= MOST for number in numbers if isinstance(number, int | float)
    )


def _is_of_numbers(kind: Any) -> bool:
    """Whether a type is one of numbers and strings, or of lists of them."""
    if get_origin(kind) is Literal:
        return True
    if get_origin(kind) in (list, UnionType):
        return all(map(_is_of_numbers, get_args(kind)))
    return kind in (int, float, bool, str, NoneType)


def _is_alike(restored: Any, value: Any) -> bool:
    """Whether two values, and what is in them, are of the same types; a NumPy number may be Python's."""
    if isinstance(value, np.generic):
        return True
    if type(restored) is not type(value):
        return False
    if isinstance(value, dict):
        return all(_is_alike(restored[key], item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_alike, restored, value))
    return True


def _refusal(state: Any, name: str, reason: Exception) -> TypeError:
    return TypeError(f"{type(state).__name__}.{name} cannot be saved in a checkpoint: {reason}")


def fingerprint(network: Any) -> str:
    """SHA-256 of a network's parameters, however and wherever they were stored."""
    return hashlib.sha256(pack(_capture(network))).hexdigest()


def _capture(value: Any) -> Any:
    if isinstance(value, ReplayBuffer):
        return None
    if hasattr(value, "state_dict"):
        return value.state_dict()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if dataclasses.is_dataclass(value):
        import jax

        return jax.tree.leaves(value)
    if isinstance(value, np.generic):
        return value.item()
    if hasattr(value, "__array__") and not isinstance(value, np.ndarray):
        raise TypeError("only within a module or dataclass does it come back as an array of its framework")
    return value


def _restore(value: Any, content: Any) -> Any:
    """Raises AttributeError, KeyError, TypeError or ValueError if `content` is not of such a value."""
    if isinstance(value, ReplayBuffer):
        return value
    if hasattr(value, "param_groups"):
        _restore_optimizer(value, content)
        return value
    if hasattr(value, "load_state_dict"):
        try:
            value.load_state_dict(_to_tensors(content))
        except RuntimeError as error:
            raise ValueError from error
        return value
    if isinstance(value, np.random.Generator):
        value.bit_generator.state = content
        return value
    if dataclasses.is_dataclass(value):
        import jax

        leaves, structure = jax.tree.flatten(value)
        for old, new in zip(leaves, content, strict=True):
            if (old.shape, old.dtype) != (new.shape, new.dtype):
                raise ValueError
        devices = [leaf.sharding for leaf in leaves]
        return jax.tree.unflatten(structure, jax.device_put(content, devices))
    return content


def _restore_optimizer(optimizer: Any, content: dict[str, Any]) -> None:
    """What belongs to a device stays the run's own: the file's may be another. So do the moments' layouts."""
    import torch

    groups = []
    for own, saved in zip(optimizer.state_dict()["param_groups"], content["param_groups"], strict=True):
        settings = {name: saved[name] for name in own.keys() - {*OF_DEVICE}}
        settings["lr"] = float(settings["lr"])  # of a GPU, an array
        if not all(_is_alike(value, own[name]) for name, value in settings.items()):
            raise ValueError
        groups.append(own | settings)
    optimizer.load_state_dict({"state": _to_tensors(content["state"]), "param_groups": groups})
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if value.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter).copy_(value)
            elif value.dim():
                raise ValueError


def _to_tensors(tree: Any) -> Any:
    """Nested dicts and lists with each array as a tensor."""
    import torch

    if isinstance(tree, dict):
        return {key: _to_tensors(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_to_tensors(value) for value in tree]
    return torch.tensor(tree) if isinstance(tree, np.ndarray) else tree


def read_numbers(values: list[Any]) -> list[float]:
    """Numbers, and arrays of one number on a device, as floats: in one read for all of a framework."""
    numbers = dict(enumerate(values))
    if torch := sys.modules.get("torch"):
        tensors = {index: value for index, value in numbers.items() if isinstance(value, torch.Tensor)}
        if tensors:
            numbers |= zip(tensors, torch.stack(list(tensors.values())).tolist(), strict=True)
    if jax := sys.modules.get("jax"):
        numbers |= jax.device_get({index: v for index, v in numbers.items() if isinstance(v, jax.Array)})
    return [float(number) for number in numbers.values()]
