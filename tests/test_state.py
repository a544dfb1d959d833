"""A run's state in a checkpoint: each field comes back by its kind, or the run does not start."""

import dataclasses
import math
import os
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from both_scripts import ROOT, run_python
from replays import Stream, filled, make_replay
from torch import nn

from cleanrl.utils.replay.frames_torch import TorchFrames
from cleanrl.utils.replay.ring import ReplayBuffer
from cleanrl.utils.run.state import capture, check_fields, read_numbers, replays_of, restore
from cleanrl.utils.storage import DamagedError, pack, unpack

pytestmark = pytest.mark.usefixtures("one_thread")


@flax.struct.dataclass
class Learner:
    params: dict[str, jax.Array]
    optimizer_state: optax.OptState
    activation: Callable = flax.struct.field(pytree_node=False, default=jnp.tanh)


@dataclasses.dataclass
class State:
    network: nn.Module
    optimizer: torch.optim.Optimizer
    learner: Learner
    rng: np.random.Generator
    replay: ReplayBuffer
    phase: str = "first"
    best_return: float | None = None
    returns: list[float] = dataclasses.field(default_factory=list)
    games: dict[str, int] = dataclasses.field(default_factory=dict)
    step: int = 0


def new_network(seed: int = 0, width: int = 3, memory_format: torch.memory_format | None = None) -> nn.Module:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(2, width, 2), nn.Flatten(), nn.Linear(4 * width, 1))
    return network.to(memory_format=memory_format) if memory_format else network


def new_learner(seed: int = 0, width: int = 3) -> Learner:
    params = {"kernel": jax.random.normal(jax.random.key(seed), (width, 2)), "bias": jnp.zeros(2)}
    return Learner(params, optax.adam(0.1).init(params))


def new_state(seed: int = 0) -> State:
    network = new_network(seed)
    replay = make_replay(TorchFrames, 20, 2)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    return State(network, optimizer, new_learner(seed), np.random.default_rng(seed), replay)


def train(network: nn.Module, optimizer: torch.optim.Optimizer, rng: np.random.Generator, steps: int) -> None:
    for _ in range(steps):
        inputs = torch.from_numpy(rng.random((5, 2, 3, 3), dtype=np.float32))
        optimizer.zero_grad()
        network(inputs).square().mean().backward()
        optimizer.step()


@jax.jit
def train_learner(learner: Learner) -> Learner:
    def loss(params: dict[str, jax.Array]) -> jax.Array:
        return (learner.activation(params["kernel"]) + params["bias"] + 1).var()

    gradients = jax.grad(loss)(learner.params)
    steps, optimizer_state = optax.adam(0.1).update(gradients, learner.optimizer_state)
    return learner.replace(params=optax.apply_updates(learner.params, steps), optimizer_state=optimizer_state)


def saved(state: Any) -> dict[str, Any]:
    """What a checkpoint holds of it, read back."""
    return unpack(pack(capture(state)))


def bits(tree: Any) -> list[bytes]:
    """Of every array in a tree of a framework's."""
    if isinstance(tree, nn.Module):
        return [tensor.numpy().tobytes() for tensor in tree.state_dict().values()]
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_every_kind_of_field_comes_back_and_goes_on_as_it_would_have():
    state = new_state(seed=1)
    filled(state.replay, Stream(2, 5, 0.1))
    train(state.network, state.optimizer, state.rng, steps=3)
    state.learner = train_learner(state.learner)
    state.phase, state.best_return, state.step = "second", 0.1 + 0.2, 7
    state.returns, state.games = [1.0, 2.5], {"Pong": 3}
    content = saved(state)

    resumed = new_state(seed=2)
    replay = resumed.replay
    restore(resumed, content)
    for field in dataclasses.fields(State)[5:]:
        assert getattr(resumed, field.name) == getattr(state, field.name)
    assert resumed.replay is replay  # its rows are in files of their own
    assert resumed.learner.activation is jnp.tanh
    for one in (state, resumed):
        train(one.network, one.optimizer, one.rng, steps=3)
        one.learner = train_learner(one.learner)
    assert bits(resumed.network) == bits(state.network)
    assert bits(resumed.learner) == bits(state.learner)
    assert resumed.rng.random() == state.rng.random()


@pytest.mark.parametrize(
    "value",
    [
        3, 2**100, 0.1, True, "λ", None, b"\x00", [1, [2.5]], (1, "a"), {"a": {1: None}}, np.arange(3),
        [np.eye(2)],
    ],
    ids=str,
)  # fmt: skip
def test_a_new_field_needs_nothing_else(value):
    longer = dataclasses.make_dataclass("Longer", ["added"])
    check_fields(longer(value))
    resumed = longer(None)
    restore(resumed, saved(longer(value)))
    assert type(resumed.added) is type(value)
    np.testing.assert_equal(resumed.added, value)


@pytest.mark.parametrize(
    "value",
    [
        {1, 2},
        lambda: 0,
        deque([1.0]),
        object(),
        Stream,
        [1, {2}],
        {"key": deque()},
        range(3),
        np.array([None]),
        torch.zeros(2),  # would come back as an array of NumPy
        jnp.zeros(2),
        Counter("a"),  # would come back as a dict, as a NamedTuple as a tuple
        optax.ScaleByAdamState(0, 1, 2),
        pytest.param({"weight": torch.zeros(2)}, id="tensors"),
        Learner({"kernel": 0.5}, ()),  # a number, not an array
        pytest.param(new_state, id="a dataclass that JAX does not know"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_field_that_cannot_be_saved_is_named(value):
    value = value() if value is new_state else value
    state = dataclasses.make_dataclass("Longer", ["step", "added"])(0, value)
    with pytest.raises(TypeError, match=r"^Longer\.added cannot be saved in a checkpoint: .+"):
        check_fields(state)


@pytest.mark.parametrize(
    ("name", "kind", "value"),
    [
        ("lowest_return", float, -20.7),
        ("balance", int, -1),
        ("highest_return", float | None, None),
        ("highest_return", float | None, -20.7),
        ("returns", list[float], [-1.0, 2.0]),
    ],
)
def test_numbers_of_a_new_field_may_be_negative(name, kind, value):
    longer = dataclasses.make_dataclass("Longer", [(name, kind)])
    check_fields(longer(value))
    resumed = longer(kind(0) if kind in (int, float) else None)
    restore(resumed, saved(longer(value)))
    assert getattr(resumed, name) == value


@pytest.mark.parametrize(
    ("name", "kind", "value"),
    [
        ("highest_return", float, -math.inf),
        ("highest_return", float | None, math.nan),
        ("array", np.ndarray, np.array([0.0, np.nan])),
        ("number", int, 10**13),
        ("number", int, "3"),
        ("played_step", int, -1),
        ("seconds", float, -0.1),
    ],
)
def test_what_would_not_be_restored_is_an_error_at_the_start(name, kind, value):
    longer = dataclasses.make_dataclass("Longer", [(name, kind)])
    for refuse in (check_fields, capture):  # at a run's start, and before a checkpoint would be useless
        with pytest.raises(
            TypeError, match=rf"^Longer\.{name} cannot be saved in a checkpoint: a value must be of "
        ):
            refuse(longer(value))
    with pytest.raises(DamagedError, match=f"its {name} cannot be that of a run"):
        restore(longer(None), {name: value})


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [(int, np.int64(3), 3), (float, np.float32(0.5), 0.5), (bool, np.bool_(True), True)],
)
def test_a_number_of_numpy_comes_back_as_one_of_python(kind, value, expected):
    longer = dataclasses.make_dataclass("Longer", [("number", kind)])
    resumed = longer(kind(0))
    restore(resumed, saved(longer(value)))
    assert (type(resumed.number), resumed.number) == (kind, expected)


def test_the_random_numbers_of_torch_continue():
    """Those of dropout, for example."""
    torch.manual_seed(1)
    torch.rand(3)
    content = saved(new_state())
    expected = torch.rand(5)
    resumed = new_state(2)
    restore(resumed, content)
    assert (torch.rand(5) == expected).all()
    content = saved(resumed)
    content["torch's random numbers"] = np.zeros(3)
    with pytest.raises(DamagedError, match=r"^torch's random numbers are not what they should be$"):
        restore(resumed, content)


SCHEDULERS = {
    "exponential": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8),
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_scheduled_learning_rate_continues(make):
    def start(seed: int) -> Any:
        network = new_network(seed)
        groups = [{"params": network[0].parameters(), "lr": 0.01}, {"params": network[2].parameters()}]
        optimizer = torch.optim.AdamW(groups, lr=0.1)
        scheduled = dataclasses.make_dataclass("Scheduled", ["network", "optimizer", "scheduler"])
        return scheduled(network, optimizer, make(optimizer))

    def go_on(state: Any) -> None:
        for _ in range(4):
            train(state.network, state.optimizer, np.random.default_rng(0), steps=1)
            state.scheduler.step()

    state, resumed = start(1), start(2)
    go_on(state)
    restore(resumed, saved(state))
    for one in (state, resumed):
        go_on(one)
    assert bits(resumed.network) == bits(state.network)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_adams_moments_have_their_parameters_strides(memory_format):
    network = new_network(memory_format=memory_format)
    optimizer = torch.optim.Adam(network.parameters())
    train(network, optimizer, np.random.default_rng(0), steps=1)
    other = new_network(1, memory_format=memory_format)
    resumed = dataclasses.make_dataclass("Pair", ["network", "optimizer"])(
        other, torch.optim.Adam(other.parameters())
    )
    restore(resumed, saved(type(resumed)(network, optimizer)))
    assert len(resumed.optimizer.state) == 4
    for parameter, moments in resumed.optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            assert moments[name].stride() == parameter.stride()
    rngs = [np.random.default_rng(1) for _ in range(2)]
    train(network, optimizer, rngs[0], steps=5)
    train(other, resumed.optimizer, rngs[1], steps=5)
    assert bits(other) == bits(network)


def test_the_optimizers_settings_of_the_device_are_the_runs_not_the_files():
    state, resumed = new_state(), new_state()
    settings = {"fused": True, "foreach": False, "capturable": False}
    resumed.optimizer = torch.optim.Adam(resumed.network.parameters(), **settings)
    train(state.network, state.optimizer, state.rng, steps=2)
    restore(resumed, saved(state))
    (group,) = resumed.optimizer.param_groups
    assert {name: group[name] for name in settings} == settings
    assert all(moments["step"] == 2 for moments in resumed.optimizer.state.values())
    train(resumed.network, resumed.optimizer, resumed.rng, steps=1)  # with what those settings need


ON_A_SECOND_DEVICE = """
import jax
from test_state import new_state, restore, saved
second = jax.devices()[1]
resumed = new_state()
resumed.learner = jax.device_put(resumed.learner, second)
restore(resumed, saved(new_state(1)))
print({leaf.devices() == {second} for leaf in jax.tree.leaves(resumed.learner)})
"""


def test_what_jax_restores_is_on_the_device_where_it_was(tmp_path):
    variables = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    status, output, errors = run_python(tmp_path, "-c", ON_A_SECOND_DEVICE, **variables)
    assert (status, output) == (0, "{True}\n"), errors


def wide_adam() -> torch.optim.Optimizer:
    network = new_network(width=4)
    optimizer = torch.optim.Adam(network.parameters())
    train(network, optimizer, np.random.default_rng(0), steps=1)
    return optimizer


def two_parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(1)) for _ in range(2)]


OTHERS = {
    "network: wider": lambda: new_network(width=4),
    "network: other layers": lambda: nn.Linear(1, 1),
    "optimizer: of wider layers": wide_adam,
    "optimizer: a number": lambda: 3,
    "optimizer: of two groups": lambda: torch.optim.Adam([{"params": [p]} for p in two_parameters()]),
    "optimizer: without numbers": lambda: torch.optim.Adam(new_network().parameters(), maximize=None),
    "learner: wider": lambda: new_learner(width=4),
    "learner: fewer arrays": lambda: Learner({"kernel": jnp.zeros(2)}, ()),
    "rng: a text": lambda: "PCG64",
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_whose_field_has_another_kind_or_shape_is_refused_by_name(other):
    name = other.partition(":")[0]
    content = saved(dataclasses.replace(new_state(), **{name: OTHERS[other]()}))
    with pytest.raises(DamagedError, match=rf"^it is of another version .* differs in {name}$"):
        restore(new_state(), content)


def test_a_generators_state_that_is_too_large_for_it_is_refused():
    content = saved(new_state())
    for states in (content["rng"]["state"], content["rng"]):
        states["state"] = 10**400
        with pytest.raises(DamagedError, match=r"differs in rng$"):
            restore(new_state(), content)


def test_an_optimizers_moments_that_are_an_array_are_refused():
    state = new_state()
    train(state.network, state.optimizer, state.rng, steps=1)
    content = saved(state)
    content["optimizer"]["state"][0] = np.zeros(3, np.float32)
    with pytest.raises(DamagedError, match=r"differs in optimizer$"):
        restore(new_state(), content)


def test_a_checkpoint_with_other_fields_is_refused_by_their_names():
    content = saved(new_state())
    content["removed"] = content.pop("step")
    with pytest.raises(DamagedError, match=r"^it is of another version .* differs in removed, step$"):
        restore(new_state(), content)
    del content["removed"], content["replay"]
    with pytest.raises(DamagedError, match=r"differs in replay, step$"):
        restore(new_state(), content)
    content |= {"\x1b[2J": 0, 5: 0}  # from a stranger, and part of the line
    with pytest.raises(DamagedError) as error:
        restore(new_state(), content)
    assert str(error.value).isprintable()


def test_replay_buffers_that_take_memory_are_found():
    state = new_state()
    assert replays_of(state) == {}
    state.replay.allocate()
    assert replays_of(state) == {"replay": state.replay}
    state.replay.free()
    assert replays_of(state) == {}


def test_numbers_are_read_from_both_frameworks_and_none():
    values = [1, torch.tensor(2.5), np.float32(3.5), jnp.float32(4.5), torch.tensor(5), jnp.array(6)]
    assert read_numbers(values) == [1.0, 2.5, 3.5, 4.5, 5.0, 6.0]
    assert read_numbers([]) == []
