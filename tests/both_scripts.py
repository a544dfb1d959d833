"""The four scripts as modules, what differs between PyTorch and JAX, and networks that take no time."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.serialization import msgpack_restore
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cleanrl.dqn_atari as DQN_TORCH
import cleanrl.dqn_atari_jax as DQN_JAX
import cleanrl.qdagger_dqn_atari_impalacnn as TORCH
import cleanrl.qdagger_dqn_atari_jax_impalacnn as JAX
from cleanrl.utils.replay.frames_jax import JaxFrames
from cleanrl.utils.replay.frames_torch import TorchFrames
from cleanrl.utils.replay.ring import Batch
from cleanrl.utils.weights.layouts import flatten, unflatten

Weights = dict[str, np.ndarray]

SCRIPTS = (TORCH, JAX, DQN_TORCH, DQN_JAX)
ROOT = Path(__file__).resolve().parents[1]
NUM_ACTIONS = 6
PONG_TEACHER = ROOT / "cleanrl" / "teachers" / "PongNoFrameskip-v4.safetensors"


def uses_torch(script: ModuleType) -> bool:
    return script in (TORCH, DQN_TORCH)


def is_qdagger(script: ModuleType) -> bool:
    return script in (TORCH, JAX)


def name_of(script: ModuleType) -> str:
    return script.__name__.rpartition(".")[2]


def device_of(script: ModuleType) -> Any:
    return torch.device("cpu") if uses_torch(script) else jax.devices("cpu")[0]


def create_state(script: ModuleType, args: Any) -> Any:
    return script.create_train_state(args, NUM_ACTIONS, device_of(script))


def trained_field(state: Any) -> str:
    return "student" if hasattr(state, "student_replay") else "q_network"


def network(state: Any, role: str = "trained") -> Any:
    """The "trained" network of a state, its "target" network, or the "ema_student" of QDagger's."""
    field = {"trained": trained_field(state), "target": "target_network"}.get(role, role)
    return getattr(getattr(state, "learner", state), field)


def weights(network: Any) -> Weights:
    """A copy of a network's parameters, under the framework's own names."""
    if isinstance(network, torch.nn.Module):
        return {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}
    return {name: np.array(array) for name, array in flatten(network.params).items()}


def set_weights(state: Any, new_weights: Weights, role: str = "trained") -> None:
    """Sets those of one of a state's networks."""
    if not hasattr(state, "learner"):
        tensors = {name: torch.tensor(array) for name, array in new_weights.items()}
        network(state, role).load_state_dict(tensors)
        return
    params = jax.device_put(unflatten(new_weights), state.device)
    field = {"trained": trained_field(state), "target": "target_network"}.get(role, role)
    state.learner = state.learner.replace(**{field: network(state, role).replace(params=params)})


def read_model(script: ModuleType, path: Path) -> Weights:
    """A saved network's parameters, as the framework itself reads them."""
    if uses_torch(script):
        return {name: tensor.numpy() for name, tensor in torch.load(path, weights_only=True).items()}
    return flatten(msgpack_restore(path.read_bytes()))


def read_curves(run_folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Each curve's (step, value) by its tag, as TensorBoard reads them."""
    events = EventAccumulator(str(run_folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def start_python(folder: Path, *arguments: str, **settings: str) -> subprocess.Popen:
    """Starts Python in a folder, in a process group of its own; `settings` are environment variables."""
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env=os.environ | {"PYTHONPATH": str(ROOT)} | settings,
    )  # fmt: skip


def run_python(folder: Path, *arguments: str, **settings: str) -> tuple[int, str, str]:
    """Its exit status, output and errors."""
    process = start_python(folder, *arguments, **settings)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def learn(
    script: ModuleType, args: Any, state: Any, batches: list[Batch], distill_coeffs: list[float] | None = None
) -> dict[str, float]:
    """A gradient step on each batch; the last one's losses.

    The batches have observations uint8 (batch, 4, 84, 84) in place of their frames' slots.
    """
    columns = [np.stack(column) if column[0] is not None else None for column in zip(*batches, strict=True)]
    stacked = Batch(*columns)
    observations = np.stack([stacked.stacks, stacked.next_stacks])
    stacks = np.arange(observations[..., 0, 0].size).reshape(observations.shape[:-2])
    frames_type, device = (TorchFrames if uses_torch(script) else JaxFrames), device_of(script)
    frames = frames_type(stacks.size, device)
    frames.write(stacks.reshape(-1), observations.reshape(-1, 84, 84))
    stacked = stacked._replace(stacks=stacks[0], next_stacks=stacks[1])
    replay = SimpleNamespace(sample=lambda batch_size, rng, num_batches: stacked, frames=frames)
    if is_qdagger(script):
        losses = script.learn(args, state, replay, distill_coeffs or [1.0] * len(batches))
    else:
        state.replay = replay
        losses = script.learn(args, state, len(batches))
    return {name: float(value) for name, value in losses.items()}


# ---------------------------------------------------------------------------------------------- networks


class TorchNumber(torch.nn.Module):
    """It is one number, its Q-value of everything: what was learned when can be read off it."""

    def __init__(self, num_actions: int, dense_width: int = 0):
        super().__init__()
        self.num_actions = num_actions
        self.number = torch.nn.Parameter(torch.ones(1))

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return self.number + torch.zeros(len(observations), self.num_actions)  # no view of what will change


class JaxNumber(flax.linen.Module):
    num_actions: int
    dense_width: int = 0

    @flax.linen.compact
    def __call__(self, observations: jax.Array) -> jax.Array:
        number = self.param("number", lambda key: jnp.ones(1))
        return jnp.broadcast_to(number, (len(observations), self.num_actions))


def pixels(observations: Any) -> Any:
    """Some pixels of every frame, (batch, 196) between 0 and 1."""
    return observations[:, :, ::12, ::12].reshape(len(observations), -1) / 255.0


class TorchLinear(torch.nn.Module):
    def __init__(self, num_actions: int, dense_width: int = 0):
        super().__init__()
        self.linear = torch.nn.Linear(196, num_actions)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return self.linear(pixels(observations))


class JaxLinear(flax.linen.Module):
    num_actions: int
    dense_width: int = 0

    @flax.linen.compact
    def __call__(self, observations: jax.Array) -> jax.Array:
        return flax.linen.Dense(self.num_actions)(pixels(observations))


def use_network(monkeypatch: pytest.MonkeyPatch, script: ModuleType, kind: str) -> None:
    """Has a script train a network that is one "number", or a "linear" one."""
    networks = {"number": (JaxNumber, TorchNumber), "linear": (JaxLinear, TorchLinear)}
    name = "StudentNetwork" if is_qdagger(script) else "QNetwork"
    monkeypatch.setattr(script, name, networks[kind][uses_torch(script)])


def linear_weights(script: ModuleType, kernel: np.ndarray, bias: np.ndarray) -> Weights:
    """Those of the linear network from a matrix (196, num_actions), under the framework's names."""
    if uses_torch(script):
        return {"linear.weight": np.ascontiguousarray(kernel.T), "linear.bias": bias}
    return {"params/Dense_0/kernel": kernel, "params/Dense_0/bias": bias}


def as_teacher(script: ModuleType, network: Any, sampling_temperature: float = 0.0) -> Any:
    """A network as a teacher, whose outputs are its Q-values."""
    return script.Teacher(network, np.zeros(0, np.float32), 0.0, sampling_temperature)


def linear_teacher(
    script: ModuleType, kernel: np.ndarray, bias: np.ndarray, sampling_temperature: float = 0.0
) -> Any:
    """The linear network as a teacher."""
    own = linear_weights(script, kernel, bias)
    if not uses_torch(script):
        function = script.QFunction(jax.device_put(unflatten(own)), JaxLinear(len(bias)))
        return as_teacher(script, function, sampling_temperature)
    network = TorchLinear(len(bias)).requires_grad_(False)
    network.load_state_dict({name: torch.tensor(array) for name, array in own.items()})
    return as_teacher(script, network, sampling_temperature)


def published_shapes(
    script: ModuleType, num_actions: int, dense_width: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of a teacher, or with a `dense_width` of a student."""
    layers = [  # torch's name of each, flax's name, and flax's shape of the kernel
        ("network.0", "Conv_0", (8, 8, 4, 32)),
        ("network.2", "Conv_1", (4, 4, 32, 64)),
        ("network.4", "Conv_2", (3, 3, 64, 64)),
        ("network.7", "Dense_0", (3136, 512)),
        ("network.9", "Dense_1", (512, num_actions)),
    ]
    if dense_width:
        layers = [("network.5", "Dense_0", (3872, dense_width))]
        layers += [("network.7", "Dense_1", (dense_width, num_actions))]
        for i, (inputs, outputs) in enumerate([(4, 16), (16, 32), (32, 32)]):
            layers += [(f"network.{i}.conv", f"ConvSequence_{i}/Conv_0", (3, 3, inputs, outputs))]
            for j, k in [(0, 0), (0, 1), (1, 0), (1, 1)]:
                in_flax = f"ConvSequence_{i}/ResidualBlock_{j}/Conv_{k}"
                layers += [(f"network.{i}.res_block{j}.conv{k}", in_flax, (3, 3, outputs, outputs))]
    shapes: dict[str, tuple[int, ...]] = {}
    for in_torch, in_flax, (*size, inputs, outputs) in layers:
        if uses_torch(script):
            shapes |= {f"{in_torch}.weight": (outputs, inputs, *size), f"{in_torch}.bias": (outputs,)}
        else:
            kernel = (*size, inputs, outputs)
            shapes |= {f"params/{in_flax}/kernel": kernel, f"params/{in_flax}/bias": (outputs,)}
    return shapes
