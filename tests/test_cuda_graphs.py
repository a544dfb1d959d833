"""Gradient steps and acting as CUDA graphs, simulated on a CPU, against calls that are not captured."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from both_scripts import DQN_TORCH, NUM_ACTIONS, TORCH, create_state, is_qdagger, network, weights
from rehearsal import RandomGame
from simulated_graph import SimulatedGraph

from cleanrl.utils import gpu_torch
from cleanrl.utils.run.state import capture, restore
from cleanrl.utils.storage import pack, unpack

pytestmark = pytest.mark.usefixtures("one_thread")
NUM_ENVS, NUM_STEPS = 2, 16
CUDA_GRAPH = gpu_torch.CudaGraph  # which the tests replace
SCRIPTS = pytest.mark.parametrize("script", [TORCH, DQN_TORCH], ids=["qdagger", "dqn"])


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch) -> None:
    """Adam as a graph needs it, but for what only a GPU has."""
    monkeypatch.setattr(gpu_torch, "can_capture", lambda device: True)
    monkeypatch.setattr(gpu_torch, "CudaGraph", SimulatedGraph)
    monkeypatch.setattr(gpu_torch.OneLaunch, "enabled", True)
    for script in (TORCH, DQN_TORCH):
        monkeypatch.setattr(script, "adam_options", lambda device: {"fused": True})
        for function in (script.update, script.forward):
            monkeypatch.setattr(function, "key", [])
    SimulatedGraph.made.clear()


def new_state(script: Any, **options: Any) -> tuple[Any, Any]:
    """A state whose replay buffer holds some random steps."""
    args = script.Args(batch_size=4, num_envs=NUM_ENVS, buffer_size=200, learning_rate=1e-3, **options)
    state = create_state(script, args)
    games, replay = RandomGame(NUM_ENVS), replay_of(state)
    games.reset(0)
    replay.start(games.observations)
    for _ in range(20):
        add_step(state, games)
    return args, state


def replay_of(state: Any) -> Any:
    return state.teacher_replay if hasattr(state, "teacher_replay") else state.replay


def add_step(state: Any, games: RandomGame) -> None:
    actions = games.rng.integers(NUM_ACTIONS, size=NUM_ENVS)
    games.step_async(actions)
    replay, step = replay_of(state), games.step_wait()
    if replay.num_q_values:
        replay.add(actions, step, games.rng.normal(size=(NUM_ENVS, NUM_ACTIONS)).astype(np.float32))
    else:
        replay.add(actions, step)


def train(
    script: Any,
    graphs: bool,
    restore_at: int | None = None,
    resume: Callable[..., Any] | None = None,
    **options: Any,
) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """The losses of gradient steps with another λ each, and the weights after them."""
    gpu_torch.OneLaunch.enabled = graphs
    args, state = new_state(script, **options)
    games = RandomGame(NUM_ENVS)
    games.reset(0)
    losses = []
    for step in range(NUM_STEPS):
        add_step(state, games)
        of_step = (
            script.learn(args, state, state.teacher_replay, [1 / (1 + step / 3)])
            if is_qdagger(script)
            else script.learn(args, state, 1)
        )
        losses.append({name: float(value) for name, value in of_step.items()})
        if step % 5 == 4:
            script.update_target_network(state, 0.3)
        if step == restore_at:
            state = (resume or resumed)(script, args, state)
    return losses, weights(network(state))


def resumed(script: Any, args: Any, state: Any) -> Any:
    """A new state with all that a checkpoint keeps of this one."""
    new = create_state(script, args)
    restore(new, unpack(pack(capture(state))))
    old_replay, new_replay = replay_of(state), replay_of(new)
    new_replay.start(np.zeros((NUM_ENVS, 4, 84, 84), np.uint8))
    slots = np.arange(NUM_ENVS * old_replay.num_slots)
    new_replay.write(slots, old_replay.read(slots))
    new_replay.heads = old_replay.heads.copy()
    return new


@functools.cache
def eager(script: Any, settings: str) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """Of training without graphs and interruptions."""
    return train(script, graphs=False, **OPTIONS[settings])


def replays() -> int:
    return sum(graph.num_replays for graph in SimulatedGraph.made)


PAPER = {"n_step": 3, "td_loss": "huber", "distill_weight": 3.0, "final_learning_rate": 1e-5}
OPTIONS = {"published": {}, "paper": PAPER}


@pytest.mark.parametrize("restore_at", [None, 8])
@pytest.mark.parametrize(
    ("script", "settings"),
    [(TORCH, "published"), (TORCH, "paper"), (DQN_TORCH, "published")],
    ids=["published", "paper", "dqn"],
)
def test_a_gradient_step_that_is_replayed_computes_the_same_bits(script, settings, restore_at):
    losses, learned = eager(script, settings)
    assert replays() == 0
    assert len({of_step["td_loss"] for of_step in losses}) == NUM_STEPS
    losses_again, learned_again = train(script, graphs=True, restore_at=restore_at, **OPTIONS[settings])
    assert losses_again == losses
    assert learned.keys() == learned_again.keys()
    for name in learned:
        np.testing.assert_array_equal(learned[name], learned_again[name])
    num_graphs = 1 if restore_at is None else 2
    assert len(SimulatedGraph.made) == num_graphs
    assert replays() == NUM_STEPS - num_graphs * gpu_torch.WARM_UP_CALLS


def baked_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_number(optimizer: torch.optim.Optimizer, value: float) -> None:
        optimizer.param_groups[0]["lr"] = value

    monkeypatch.setattr(TORCH, "set_learning_rate", set_number)


def baked_coefficient(monkeypatch: pytest.MonkeyPatch) -> None:
    update = TORCH.update.function
    held = []

    def update_with_a_number(args: Any, state: Any, frames: Any, batch: Any, distill_coeff: Any) -> Any:
        held[:] = held or [distill_coeff.clone()]  # as a number of the host would be
        return update(args, state, frames, batch, held[0])

    monkeypatch.setattr(TORCH.update, "function", update_with_a_number)


def another_target_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def update_target_network(state: Any, tau: float) -> None:
        moved = {
            name: target.lerp(parameter, tau)
            for (name, target), parameter in zip(
                state.target_network.named_parameters(), state.student.parameters(), strict=True
            )
        }
        for name, tensor in moved.items():
            *path, last = name.split(".")
            module = state.target_network.get_submodule(".".join(path))
            setattr(module, last, torch.nn.Parameter(tensor, requires_grad=False))

    monkeypatch.setattr(TORCH, "update_target_network", update_target_network)


@pytest.mark.parametrize("fault", [baked_learning_rate, baked_coefficient, another_target_network])
def test_what_a_graph_bakes_in_changes_the_result(monkeypatch, fault):
    """So that the test above can fail."""
    expected, _ = eager(TORCH, "paper")
    fault(monkeypatch)
    losses, _ = train(TORCH, graphs=True, **PAPER)
    assert losses[-1]["td_loss"] != pytest.approx(expected[-1]["td_loss"], rel=1e-4)


def adam_that_counts_on_the_host(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(TORCH, "adam_options", lambda device: {"fused": False})
    return "_local_scalar_dense"


def a_loss_that_is_read(monkeypatch: pytest.MonkeyPatch) -> str:
    td_loss = TORCH.td_loss

    def read_loss(*arguments: Any) -> Any:
        loss = td_loss(*arguments)
        return loss * (1.0 if loss.item() < 1e9 else 0.0)

    monkeypatch.setattr(TORCH, "td_loss", read_loss)
    return "_local_scalar_dense"


def a_shape_that_depends_on_numbers(monkeypatch: pytest.MonkeyPatch) -> str:
    td_targets = TORCH.td_targets

    def masked(rewards: Any, terminations: Any, *others: Any) -> Any:
        assert len(rewards[terminations > 0]) <= len(rewards)
        return td_targets(rewards, terminations, *others)

    monkeypatch.setattr(TORCH, "td_targets", masked)
    return "index"


@pytest.mark.parametrize(
    "fault", [adam_that_counts_on_the_host, a_loss_that_is_read, a_shape_that_depends_on_numbers]
)
def test_a_capture_that_fails_costs_one_warning_and_no_bit(monkeypatch, capsys, fault):
    operation = fault(monkeypatch)
    expected, _ = train(TORCH, graphs=False)
    losses, _ = train(TORCH, graphs=True)
    assert losses == expected
    assert replays() == 0
    warning, nothing = capsys.readouterr().err.split("\n")
    assert warning.startswith("warning: continuing without CUDA graphs: ")
    assert operation in warning
    assert not nothing
    assert not gpu_torch.OneLaunch.enabled


def test_the_reason_of_a_failed_capture_is_told_and_its_stream_is_left(monkeypatch):
    """CUDA then refuses to end the capture, before `torch.cuda.graph` has left the stream."""
    main, side = mock.Mock(), mock.Mock()
    current = [main]

    @contextmanager
    def stream(entered: mock.Mock) -> Iterator[None]:
        before, current[0] = current[0], entered
        try:
            yield
        finally:
            current[0] = before

    class Capture:
        def __init__(self, graph: Any, stream: mock.Mock):
            self.stream = stream

        def __enter__(self) -> None:
            current[0] = self.stream

        def __exit__(self, *of_exception: Any) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    stubs = {
        "stream": stream,
        "graph": Capture,
        "CUDAGraph": mock.Mock(),
        "current_stream": lambda: current[0],
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(gpu_torch, "capture_stream", lambda: side)
    call = mock.Mock(side_effect=[1, 2, 3, RuntimeError("operation not permitted: nonzero\nCUDA says more")])
    graph = CUDA_GRAPH(call)
    assert [graph() for _ in range(gpu_torch.WARM_UP_CALLS)] == [1, 2, 3]
    with pytest.raises(gpu_torch.CaptureError, match=r"^operation not permitted: nonzero$"):
        graph()
    assert current == [main]


@SCRIPTS
def test_acting_that_is_replayed_computes_the_same_q_values(script):
    rng, (_, state) = np.random.default_rng(0), new_state(script)
    networks = (network(state), network(state, "target")) if is_qdagger(script) else network(state)
    observations = rng.integers(256, size=(8, 5, 4, 84, 84), dtype=np.uint8)
    q_values = {}
    for enabled in (False, True):
        gpu_torch.OneLaunch.enabled = enabled
        q_values[enabled] = [script.compute_q_values(networks, each).copy() for each in observations]
    np.testing.assert_array_equal(q_values[True], q_values[False])
    assert replays() == len(observations) - gpu_torch.WARM_UP_CALLS
    if is_qdagger(script):
        one_by_one = [script.compute_q_values(one, observations[0]) for one in networks]
        np.testing.assert_array_equal(q_values[True][0], one_by_one)


@pytest.mark.parametrize("first", [{}, {"fused": True}], ids=["to a GPU", "to a CPU"])
def test_a_checkpoint_is_resumed_on_the_other_kind_of_device(monkeypatch, first):
    """On a GPU Adam is another: what a checkpoint brings must not make it the first one's again."""
    second = {"fused": True} if not first else {}
    uninterrupted, _ = eager(TORCH, "paper")
    monkeypatch.setattr(TORCH, "adam_options", lambda device: first)

    def resumed_elsewhere(script: Any, args: Any, state: Any) -> Any:
        monkeypatch.setattr(TORCH, "adam_options", lambda device: second)
        new = resumed(script, args, state)
        (settings,) = new.optimizer.param_groups
        assert bool(settings["fused"]) == bool(second)
        return new

    losses, _ = train(TORCH, graphs=False, restore_at=8, resume=resumed_elsewhere, **PAPER)
    for of_step, expected in zip(losses, uninterrupted, strict=True):
        assert of_step == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_other_shapes_and_other_arguments_get_a_graph_of_their_own():
    _, state = new_state(TORCH)
    for one in (state.student, state.target_network):
        for num_observations in (3, 2, 3):
            for _ in range(5):
                observations = np.full((num_observations, 4, 84, 84), 7, np.uint8)
                q_values = TORCH.compute_q_values(one, observations)
                assert q_values.shape == (num_observations, NUM_ACTIONS)
    assert [graph.num_replays for graph in SimulatedGraph.made] == [2] * 6


def test_the_losses_that_learn_returns_stay_what_they_were():
    args, state = new_state(TORCH)
    losses = [TORCH.learn(args, state, state.teacher_replay, [1.0])["td_loss"] for _ in range(6)]
    assert len({float(loss) for loss in losses}) == 6
