"""What a gradient step does, against NumPy in float64 and by hand. When it comes: test_phases.py."""

from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
import torch
from both_scripts import (
    DQN_JAX,
    DQN_TORCH,
    JAX,
    NUM_ACTIONS,
    PONG_TEACHER,
    TORCH,
    Weights,
    create_state,
    is_qdagger,
    learn,
    linear_teacher,
    linear_weights,
    name_of,
    network,
    pixels,
    published_shapes,
    set_weights,
    use_network,
    uses_torch,
    weights,
)
from rehearsal import NoGame, RandomGame, rehearse

from cleanrl.utils.games.parallel_envs import StepResult
from cleanrl.utils.gpu_torch import set_learning_rate
from cleanrl.utils.replay.ring import Batch
from cleanrl.utils.weights.layouts import flatten

pytestmark = pytest.mark.usefixtures("one_thread")


def random_linear(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return (
        rng.normal(size=(196, NUM_ACTIONS)).astype(np.float32),
        rng.normal(size=NUM_ACTIONS).astype(np.float32),
    )


def random_batch(rng: np.random.Generator, size: int, has_teacher: bool) -> Batch:
    """As `learn` of both_scripts takes it: with observations in place of their stacks' slots."""
    steps = rng.integers(1, 4, size)
    return Batch(
        stacks=rng.integers(256, size=(size, 4, 84, 84), dtype=np.uint8),
        actions=rng.integers(NUM_ACTIONS, size=size),
        rewards=rng.choice([-1, 0, 1], size).astype(np.float32),
        next_stacks=rng.integers(256, size=(size, 4, 84, 84), dtype=np.uint8),
        terminations=(np.arange(size) % 3 == 1).astype(np.float32),
        discounts=(0.9**steps).astype(np.float32),
        teacher_q_values=rng.normal(size=(size, NUM_ACTIONS)).astype(np.float32) if has_teacher else None,
    )


def softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x.astype(np.float64))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


class Reference:
    """A linear network that learns by the formulas, in float64."""

    def __init__(self, start: tuple[np.ndarray, ...], target: tuple[np.ndarray, ...], args: Any):
        self.parameters, self.target = ([array.astype(np.float64) for array in of] for of in (start, target))
        self.means, self.squares = ([np.zeros_like(p) for p in self.parameters] for _ in range(2))
        self.average = [parameter.copy() for parameter in self.parameters]
        self.steps, self.args = 0, vars(args)

    def learn(self, batch: Batch, coefficient: float) -> dict[str, float]:
        x, next_x = pixels(batch.stacks), pixels(batch.next_stacks)
        samples = range(len(batch.actions))
        kernel, bias = self.target
        best = (next_x @ kernel + bias).max(axis=1)
        targets = batch.rewards + batch.discounts * (1 - batch.terminations) * best
        kernel, bias = self.parameters
        q_values = x @ kernel + bias
        taken = q_values[samples, batch.actions]
        errors = taken - targets
        slopes = np.zeros_like(q_values)
        if self.args.get("td_loss") == "huber":
            td_loss = np.where(abs(errors) <= 1, errors**2 / 2, abs(errors) - 0.5).mean()
            slopes[samples, batch.actions] = np.clip(errors, -1, 1) / len(samples)
        else:
            td_loss = (errors**2).mean()
            slopes[samples, batch.actions] = 2 * errors / len(samples)
        losses = {"td_loss": td_loss, "q_values": taken.mean()}
        if batch.teacher_q_values is not None:
            temperature = self.args["temperature"]
            policy, teacher = softmax(q_values / temperature), softmax(batch.teacher_q_values / temperature)
            distill_loss = (teacher * np.log(teacher / policy)).sum(axis=1).mean()
            weight = coefficient * self.args["distill_weight"]
            slopes += weight * (policy - teacher) / temperature / len(samples)
            losses |= {"distill_loss": distill_loss, "loss": td_loss + weight * distill_loss}
        self._adam_step([x.T @ slopes, slopes.sum(axis=0)], coefficient)
        return losses

    def _adam_step(self, gradients: list[np.ndarray], coefficient: float) -> None:
        self.steps += 1
        rate = self.args["learning_rate"]
        if (final_rate := self.args.get("final_learning_rate")) is not None:
            rate = final_rate + coefficient * (rate - final_rate)
        for i, gradient in enumerate(gradients):
            self.means[i] += 0.1 * (gradient - self.means[i])
            self.squares[i] += 0.001 * (gradient**2 - self.squares[i])
            root = np.sqrt(self.squares[i] / (1 - 0.999**self.steps))
            mean = self.means[i] / (1 - 0.9**self.steps)
            self.parameters[i] -= rate * mean / (root + self.args.get("adam_epsilon", 1e-8))
            decay = self.args.get("average_decay", 0.0)
            self.average[i] = decay * self.average[i] + (1 - decay) * self.parameters[i]


PAPER = {"td_loss": "huber", "adam_epsilon": 0.3, "final_learning_rate": 3e-4}
PAPER |= {"temperature": 0.5, "distill_weight": 3.0}  # what the paper sets otherwise, if to other numbers
AVERAGED = {"average_decay": 0.75}


@pytest.mark.parametrize(
    ("script", "options"),
    [
        *[(script, options) for script in (TORCH, JAX) for options in ({}, PAPER, AVERAGED)],
        *[(script, {}) for script in (DQN_TORCH, DQN_JAX)],
    ],
    ids=lambda value: name_of(value) if isinstance(value, ModuleType) else next(iter(value), "published"),
)
def test_gradient_steps_are_adam_steps_down_the_losses(script, monkeypatch, options):
    use_network(monkeypatch, script, "linear")
    args = script.Args(learning_rate=3e-3, **options)
    rng, state = np.random.default_rng(0), create_state(script, args)
    start, target = random_linear(rng), random_linear(rng)
    set_weights(state, linear_weights(script, *start))
    set_weights(state, linear_weights(script, *target), "target")
    if is_qdagger(script):
        set_weights(state, linear_weights(script, *start), "ema_student")
    reference = Reference(start, target, args)
    for coefficients in ([1.0, 0.4], [0.0, 0.7]):
        batches = [random_batch(rng, 8, is_qdagger(script)) for _ in coefficients]
        losses = learn(script, args, state, batches, coefficients)
        for batch, coefficient in zip(batches, coefficients, strict=True):
            expected = reference.learn(batch, coefficient)
        assert losses == pytest.approx(expected, rel=1e-4)
        learned, expected = weights(network(state)), linear_weights(script, *reference.parameters)
        assert learned.keys() == expected.keys()
        for name in learned:
            np.testing.assert_allclose(learned[name], expected[name], atol=2e-5)
        if is_qdagger(script):
            averaged = weights(network(state, "ema_student"))
            for name, array in linear_weights(script, *reference.average).items():
                np.testing.assert_allclose(averaged[name], array, atol=2e-5)
                assert options == AVERAGED or np.array_equal(averaged[name], learned[name])
    assert state.gradient_steps == 4
    for name, array in weights(network(state, "target")).items():
        np.testing.assert_array_equal(array, linear_weights(script, *target)[name])


def test_all_networks_start_alike(script, monkeypatch):
    use_network(monkeypatch, script, "linear")
    state = create_state(script, script.Args())
    trained = weights(network(state))
    for role in ("target", "ema_student")[: 1 + is_qdagger(script)]:
        copy = weights(network(state, role))
        assert trained.keys() == copy.keys()
        assert all(np.array_equal(trained[name], copy[name]) for name in trained)


def test_the_target_network_moves_by_tau(script, monkeypatch):
    use_network(monkeypatch, script, "linear")
    state = create_state(script, script.Args())

    def constant(value: float) -> Weights:
        return {name: np.full_like(array, value) for name, array in weights(network(state)).items()}

    set_weights(state, constant(3.0))
    set_weights(state, constant(1.0), "target")
    for tau, expected in [(0.25, 1.5), (0.0, 1.5), (1.0, 3.0)]:
        script.update_target_network(state, tau)
        assert all((array == expected).all() for array in weights(network(state, "target")).values())
        assert all((array == 3.0).all() for array in weights(network(state)).values())


def test_only_the_learning_network_drops_units():
    """Where a copy has dropout, for example: not the networks that act, teach or are bootstrapped from."""
    args = TORCH.Args(teacher_model_path=PONG_TEACHER)
    state = create_state(TORCH, args)
    assert state.student.training
    for other in (state.ema_student, state.target_network, TORCH.load_teacher(args, 6, state.device)):
        assert not any(module.training for module in other.modules())


def test_the_learning_rate_is_set_in_every_group_of_any_optimizer():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.RMSprop([{"params": [parameter]} for parameter in parameters], lr=1.0)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_offline_learning_brings_the_student_to_its_teacher():
    kernel, bias = random_linear(np.random.default_rng(0))
    happened = rehearse(
        TORCH,
        8,
        RandomGame,
        teacher=linear_teacher(TORCH, kernel / 8, bias),
        start=linear_weights(TORCH, 0 * kernel, 0 * bias),
        loss_interval=10,
        teacher_steps=400,
        offline_steps=150,
        total_timesteps=8,
        batch_size=32,
        learning_rate=1e-2,
        distill_weight=3.0,  # the rewards here say nothing
    )
    distill_losses = happened.values("charts/offline/distill_loss")
    assert distill_losses[-3:].mean() < 0.6 * distill_losses[0]


class WhichActionGame(NoGame):
    """The brightest row of the newest frame says which action is rewarded."""

    def reset(self, seed: Any) -> None:
        super().reset(seed)
        self.rng = np.random.default_rng(0)
        self.rewards: list[float] = []
        for _ in range(4):  # the first frame, four times, is all that a buffer takes to begin with
            self.rng = np.random.default_rng(0)
            self._ask()

    def _ask(self) -> None:
        self.right = self.rng.integers(NUM_ACTIONS, size=self.num_envs)
        self.observations = np.roll(self.observations, -1, axis=1)
        self.observations[:, -1] = 0
        self.observations[np.arange(self.num_envs), -1, 12 * self.right] = 255

    def step_wait(self) -> StepResult:
        rewards = np.float32(self.actions[-1] == self.right)
        self.rewards += list(rewards)
        self._ask()
        return super().step_wait()._replace(observations=self.observations, rewards=rewards)


def test_it_learns_which_action_an_observation_asks_for(algorithm):
    options = {"gamma": 0.0, "learning_rate": 1e-2, "total_timesteps": 1200, "learning_starts": 100}
    options |= {"train_frequency": 2, "exploration_fraction": 0.1}
    if is_qdagger(algorithm):
        options |= {"offline_steps": 1, "distill_weight": 0.0}  # its teacher knows nothing
    kernel, bias = random_linear(np.random.default_rng(0))
    start = linear_weights(algorithm, kernel / 8, bias)
    happened = rehearse(algorithm, 4, WhichActionGame, start=start, loss_interval=100, **options)
    rewards = happened.run.games.rewards
    assert np.mean(rewards[:100]) < 0.4
    assert np.mean(rewards[-200:]) > 0.9


# ---------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize(
    ("script", "name", "settings"),
    [
        *[(script, "TeacherNetwork", {}) for script in (TORCH, JAX)],
        *[(script, "QNetwork", {}) for script in (DQN_TORCH, DQN_JAX)],
        *[
            (script, "StudentNetwork", {"dense_width": width})
            for script in (TORCH, JAX)
            for width in (256, 512)
        ],
    ],
    ids=lambda value: name_of(value) if isinstance(value, ModuleType) else str(value),
)
def test_networks_have_the_published_names_and_shapes(script, name, settings):
    made = getattr(script, name)(18, **settings)
    if uses_torch(script):
        parameters = made.state_dict()
    else:
        parameters = flatten(jax.eval_shape(made.init, jax.random.key(0), np.zeros((1, 4, 84, 84), np.uint8)))
    shapes = {name: tuple(array.shape) for name, array in parameters.items()}
    assert shapes == published_shapes(script, 18, **settings)
