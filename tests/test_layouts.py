"""cleanrl/utils/weights/layouts.py: names and shapes in both layouts, and whether weights fit a network.

That converted weights give the same Q-values: test_agreement.py.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
import torch

import cleanrl.qdagger_dqn_atari_impalacnn as torch_script
import cleanrl.qdagger_dqn_atari_jax_impalacnn as jax_script
from cleanrl.utils.weights.layouts import check_weights, fit_weights, flatten, to_flax, to_torch, unflatten

ROLES = pytest.mark.parametrize("role", ["teacher", "student"])
SHAPES = {
    "network.0.weight": (8, 4, 3, 3),
    "network.0.bias": (8,),
    "network.7.weight": (16, 8),
    "network.7.bias": (16,),
    "network.9.weight": (6, 16),
    "network.9.bias": (6,),
}

Weights = dict[str, np.ndarray]


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def network(script: ModuleType, role: str, num_actions: int) -> Any:
    return getattr(script, f"{role.title()}Network")(num_actions)


def torch_weights(role: str, num_actions: int = 6) -> Weights:
    torch.manual_seed(1)
    state_dict = network(torch_script, role, num_actions).state_dict()
    return {name: tensor.numpy().copy() for name, tensor in state_dict.items()}


# --------------------------------------------------------------------------------------------- converting


def test_flatten_and_unflatten():
    tree = {"params": {"Conv_0": {"kernel": 1, "bias": 2}, "Dense_0": {"bias": 3}}}
    flat = {"params/Conv_0/kernel": 1, "params/Conv_0/bias": 2, "params/Dense_0/bias": 3}
    assert flatten(tree) == flat
    assert unflatten(flat) == tree
    assert list(unflatten(flat)["params"]["Conv_0"]) == ["kernel", "bias"]


@ROLES
def test_flax_names_and_shapes_are_flaxs_own(role):
    observations = np.zeros((1, 4, 84, 84), np.uint8)
    own = flatten(jax.eval_shape(network(jax_script, role, 6).init, jax.random.key(1), observations))
    converted = to_flax(torch_weights(role))
    assert {name: array.shape for name, array in converted.items()} == {
        name: array.shape for name, array in own.items()
    }


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


# ----------------------------------------------------------------------------------------------- checking


def complaint(found: Weights, expected: Any = SHAPES, check: Callable = check_weights) -> str:
    with pytest.raises(SystemExit) as exit_info:
        check(found, expected, "file.safetensors", "DQN")
    message = exit_info.value.code
    assert len(message.splitlines()) == 1
    assert message.startswith(("error: file.safetensors holds weights of DQN", OTHER))
    return message


OTHER = "error: file.safetensors was taken for weights of DQN, but the architecture differs"


def good(**changed: np.ndarray) -> Weights:
    return {name: zeros(*shape) for name, shape in SHAPES.items()} | changed


def test_good_weights_pass():
    check_weights(good(), SHAPES, "file", "DQN")
    check_weights(good(), {name: list(shape) for name, shape in SHAPES.items()}, "file", "DQN")


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
    message = complaint(good(**changed))
    assert message.startswith(OTHER)
    assert all(f"{name} is {array.shape}, not {SHAPES[name]}" in message for name, array in changed.items())


def test_other_names_are_another_architecture():
    found = good(**{f"extra.{i}": zeros(2) for i in range(9)})
    del found["network.9.bias"]
    expected = "missing network.9.bias; unexpected 'extra.0', 'extra.1', 'extra.2' and 6 more"
    assert complaint(found) == f"{OTHER} ({expected})."
    assert r"unexpected 'a\nb\x1b[2J'" in complaint(good(**{"a\nb\x1b[2J": zeros(2)}))
    assert "missing network.0.weight, network.0.bias, network.7.weight and 3 more" in complaint({})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinite_values(value):
    found = good()
    found["network.7.bias"][3] = value
    assert "but network.7.bias has NaN or infinite values; use another file" in complaint(found)


def test_integers_are_no_weights():
    found = good(**{"network.7.bias": np.zeros(16, int)})
    assert "but network.7.bias is int64; save floating-point weights" in complaint(found)


# ------------------------------------------------------------------------------------------------ fitting


def every_like(role: str) -> list[Weights]:
    """A network's own parameters in both layouts and several orders; only their shapes count."""
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
            fitted = fit_weights(found, like, "file", "DQN")
            assert list(fitted) == list(like)
            np.testing.assert_equal(fitted, {name: expected[name] for name in like})


@ROLES
@pytest.mark.parametrize("in_file", [to_torch, to_flax])
def test_a_bad_file_gets_the_same_line_from_both_frameworks(role, in_file):
    weights = in_file(torch_weights(role))
    name = list(weights)[2]
    another = in_file(torch_weights("student" if role == "teacher" else "teacher"))
    without = {other: array for other, array in weights.items() if other != name}
    last_layer = list(weights)[-2].rpartition("/" if in_file is to_flax else ".")[0]
    cases = {
        f"{OTHER} (missing ": another,
        f"is (4,), not (6,), {last_layer}": in_file(torch_weights(role, 4)),
        f"(missing {name}; unexpected 'extra')": without | {"extra": zeros(1)},
        f"({name} is (1, 1), not {weights[name].shape})": weights | {name: zeros(1, 1)},
        f"but {name} has NaN": weights | {name: weights[name] * np.float32(np.nan)},
        f"but {name} is int64": weights | {name: weights[name].astype(int)},
    }
    for expected, found in cases.items():
        (line,) = {complaint(found, like, fit_weights) for like in every_like(role)}
        assert expected in line
        assert ("params/" in line) == (in_file is to_flax)
