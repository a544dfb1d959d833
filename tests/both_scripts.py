"""The two training scripts behind one face, so that a test of one is a test of the other."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.serialization import msgpack_restore

import cleanrl.qdagger_dqn_atari_impalacnn as torch_module
import cleanrl.qdagger_dqn_atari_jax_impalacnn as jax_module
from cleanrl.utils.games.parallel_envs import StepResult
from cleanrl.utils.weights.files import flatten, to_torch, unflatten

LOSSES = ("loss", "td_loss", "distill_loss", "q_values")


def no_checkpoint(envs: Any = None) -> None:
    pass


Weights = dict[str, np.ndarray]


class TorchScalar(torch.nn.Module):
    """A student that is one number, its Q-value of everything: what was learned when can be read off it."""

    def __init__(self, num_actions: int, dense_width: int):
        super().__init__()
        self.num_actions = num_actions
        self.number = torch.nn.Parameter(torch.ones(1))

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return self.number + torch.zeros(len(observations), self.num_actions)  # no view of what will change


class TorchConstant(torch.nn.Module):
    def __init__(self, q_values: list[float]):
        super().__init__()
        self.q_values = torch.tensor(q_values)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return self.q_values.expand(len(observations), -1)


class JaxScalar(flax.linen.Module):
    num_actions: int
    dense_width: int

    @flax.linen.compact
    def __call__(self, observations: jax.Array) -> jax.Array:
        number = self.param("number", lambda key: jnp.ones(1))
        return jnp.broadcast_to(number, (len(observations), self.num_actions))


class JaxConstant(flax.linen.Module):
    q_values: tuple[float, ...]

    def __call__(self, observations: jax.Array) -> jax.Array:
        return jnp.broadcast_to(jnp.array(self.q_values), (len(observations), len(self.q_values)))


class TorchScript:
    module: ModuleType = torch_module
    path = Path(torch_module.__file__)
    Scalar = TorchScalar
    other_frameworks = ("jax", "jaxlib", "flax", "optax")
    gradient_step = "update"  # the name of the function that Ctrl-C must not leave half-done

    def read_student(self, path: Path) -> Weights:
        return {name: tensor.numpy() for name, tensor in torch.load(path, weights_only=True).items()}

    def create_state(self, args: Any) -> Any:
        return self.module.create_train_state(args, 6, torch.device("cpu"))

    def weights(self, state: Any, name: str = "student") -> Weights:
        """The student's or the target network's, in the script's own names; a copy."""
        network = getattr(state, name)
        return {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}

    def teacher_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(w.shape) for name, w in self.module.TeacherNetwork(6).state_dict().items()}

    def set_weights(self, state: Any, name: str, weights: Weights) -> None:
        getattr(state, name).load_state_dict({name: torch.tensor(w) for name, w in weights.items()})

    def to_torch(self, weights: Weights) -> Weights:
        return weights

    def constant_teacher(self, q_values: list[float]) -> TorchConstant:
        return TorchConstant(q_values)

    def create_replay(self, capacity: int, num_envs: int, n_step: int = 1, gamma: float = 0.99) -> Any:
        return self.module.ReplayBuffer(capacity, num_envs, 6, n_step, gamma, torch.device("cpu"))

    def start(self, replay: Any, observations: np.ndarray) -> Any:
        replay.start(observations)
        return replay

    def add(self, replay: Any, actions: np.ndarray, step: StepResult, teacher_q_values: np.ndarray) -> Any:
        replay.add(actions, step, teacher_q_values)
        return replay

    def batch(self, replay: Any, slots: np.ndarray) -> Any:
        return replay.gather(torch.from_numpy(slots))

    def update(self, state: Any, batch: Any, distill_coeff: float, args: Any) -> dict[str, float]:
        losses = self.module.update(args, state, batch, distill_coeff)
        return {name: value.item() for name, value in losses.items()}

    def move_target(self, state: Any, batch: Any, tau: float, args: Any) -> None:
        self.module.update_target_network(state, tau)

    def distill_loss(self, state: Any, batch: Any, temperature: float) -> float:
        with torch.no_grad():
            q_values = state.student(batch.observations)
            return self.module.distill_loss(q_values, batch.teacher_q_values, temperature).item()

    def explore(self, epsilon: np.ndarray, q_values: np.ndarray) -> np.ndarray:
        return self.module.explore(np.random.default_rng(0), epsilon, q_values)

    def record_epsilon(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        """The list to which every ε that is acted on will be appended."""
        recorded, explore = [], self.module.explore

        def recording_explore(rng, epsilon, q_values):
            recorded.extend(np.broadcast_to(epsilon, len(q_values)))
            return explore(rng, epsilon, q_values)

        monkeypatch.setattr(self.module, "explore", recording_explore)
        return recorded

    def stub_losses(self, monkeypatch: pytest.MonkeyPatch, loss: Callable[[int], float]) -> None:
        """Replaces the gradient steps of the offline phase; `loss` gives the loss of each."""

        def update(args, state, batch, distill_coeff):
            return dict.fromkeys(LOSSES, torch.tensor(loss(state.offline_step + 1)))

        monkeypatch.setattr(self.module, "update", update)


class JaxScript:
    module: ModuleType = jax_module
    path = Path(jax_module.__file__)
    Scalar = JaxScalar
    other_frameworks = ("torch",)
    gradient_step = "sample_and_update"

    @property
    def device(self) -> jax.Device:
        return jax.devices("cpu")[0]

    def read_student(self, path: Path) -> Weights:
        return flatten(msgpack_restore(path.read_bytes()))

    def create_state(self, args: Any) -> Any:
        return self.module.create_train_state(args, 6, self.device)

    def weights(self, state: Any, name: str = "student") -> Weights:
        params = flatten(getattr(state.learner, name).params)
        return {name: np.array(array) for name, array in params.items()}

    def teacher_shapes(self) -> dict[str, tuple[int, ...]]:
        network, observations = self.module.TeacherNetwork(6), jnp.zeros((1, 4, 84, 84), jnp.uint8)
        params = jax.eval_shape(network.init, jax.random.key(0), observations)
        return {name: array.shape for name, array in flatten(params).items()}

    def set_weights(self, state: Any, name: str, weights: Weights) -> None:
        function = getattr(state.learner, name)
        params = jax.device_put(unflatten(weights), self.device)
        state.learner = state.learner.replace(**{name: function.replace(params=params)})

    def to_torch(self, weights: Weights) -> Weights:
        return to_torch(weights)

    def constant_teacher(self, q_values: list[float]) -> Any:
        return self.module.QFunction({}, JaxConstant(tuple(q_values)))

    def create_replay(self, capacity: int, num_envs: int, n_step: int = 1, gamma: float = 0.99) -> Any:
        return self.module.ReplayBuffer.create(capacity, num_envs, 6, n_step, gamma, self.device)

    def start(self, replay: Any, observations: np.ndarray) -> Any:
        return replay.start(observations)

    def add(self, replay: Any, actions: np.ndarray, step: StepResult, teacher_q_values: np.ndarray) -> Any:
        return replay.add(actions, step, teacher_q_values)

    def batch(self, replay: Any, slots: np.ndarray) -> Any:
        return replay.gather(jnp.asarray(slots))

    def update(
        self, state: Any, batch: Any, distill_coeff: float, args: Any, target_share: float = 0.0
    ) -> dict[str, float]:
        learning_rate = self.module.learning_rate(args, distill_coeff)
        schedule = self.module.Schedule(*np.float32([distill_coeff, learning_rate, target_share]))
        settings = self.module.Settings.of(args)
        state.learner, losses = self.module.update_alone(state.learner, batch, schedule, settings)
        return {name: float(value) for name, value in losses.items()}

    def move_target(self, state: Any, batch: Any, tau: float, args: Any) -> None:
        student = self.weights(state)
        self.update(state, batch, 0.0, args, target_share=tau)  # the two are one step here
        self.set_weights(state, "student", student)

    def distill_loss(self, state: Any, batch: Any, temperature: float) -> float:
        q_values = self.module.forward(state.learner.student, batch.observations)
        return float(self.module.distill_loss(q_values, batch.teacher_q_values, temperature))

    def explore(self, epsilon: np.ndarray, q_values: np.ndarray) -> np.ndarray:
        return np.asarray(self.module.explore(jax.random.key(0), epsilon, jnp.asarray(q_values)))

    def record_epsilon(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        recorded, act = [], self.module.act

        def recording_act(q_function, observations, epsilon, key):
            recorded.extend(np.broadcast_to(epsilon, len(observations)))
            return act(q_function, observations, epsilon, key)

        monkeypatch.setattr(self.module, "act", recording_act)
        return recorded

    def stub_losses(self, monkeypatch: pytest.MonkeyPatch, loss: Callable[[int], float]) -> None:
        def learn(args, state, distill_coeffs, target_shares):
            steps = state.offline_step + 1 + np.arange(len(distill_coeffs))
            return dict.fromkeys(LOSSES, np.array([loss(step) for step in steps]))

        monkeypatch.setattr(self.module, "learn", learn)


TORCH, JAX = TorchScript(), JaxScript()
