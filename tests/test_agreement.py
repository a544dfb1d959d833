"""The PyTorch script against the JAX script: the same weights and batches must give the same numbers.

Both run on the CPU. In float32 they differ by roundings, one of which may switch a ReLU, and Adam makes as
much of a tiny gradient as of a large one. So gradients and Adam are compared in float64 as well, where
roundings are 5e8 times smaller and nothing else is left.

The networks differ in one thing by design: torch's max-pool pads a row and a column on every side, flax's
SAME only at the end where the size is even. Unless a test says otherwise, torch pads like SAME here.
"""

from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from both_scripts import no_checkpoint
from flax import serialization
from safetensors.torch import load_file
from torch.nn import functional as F

import cleanrl.qdagger_dqn_atari_impalacnn as torch_script
import cleanrl.qdagger_dqn_atari_jax_impalacnn as jax_script
from cleanrl.utils.games.parallel_envs import StepResult
from cleanrl.utils.weights.files import read_weights
from cleanrl.utils.weights.layouts import flatten, to_flax, to_torch, unflatten

ACTIONS = 6
BATCH = 4
CPU = torch.device("cpu")
PONG_TEACHER = Path(jax_script.__file__).parent / "teachers" / "PongNoFrameskip-v4.safetensors"
RESULTS = ["loss", "td_loss", "distill_loss", "q_values"]
CHI_SQUARE_5_DOF = 20.5  # exceeded with probability 0.001; the seeds are fixed

pad_less_max_pool2d = F.max_pool2d


def same_max_pool2d(x: torch.Tensor, kernel_size: int, stride: int, padding: int) -> torch.Tensor:
    """What the torch script asks for, save for SAME padding: as much as is needed, the odd one at the end."""
    assert (kernel_size, stride, padding) == (3, 2, 1)
    padding = []
    for size in (x.shape[-1], x.shape[-2]):
        total = max((-(-size // 2) - 1) * 2 + 3 - size, 0)
        padding += [total // 2, total - total // 2]
    return pad_less_max_pool2d(F.pad(x, padding, value=-np.inf), 3, 2)


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.fixture
def torch_pads_like_flax(monkeypatch):
    monkeypatch.setattr(torch_script.F, "max_pool2d", same_max_pool2d)


@pytest.fixture
def dtype(request):
    """Makes a width of floating-point numbers, "float32" or "float64", that of both scripts."""
    torch.set_default_dtype(getattr(torch, request.param))
    with jax.enable_x64(request.param == "float64"):
        yield request.param
    torch.set_default_dtype(torch.float32)


in_float32_and_float64 = pytest.mark.parametrize("dtype", ["float32", "float64"], indirect=True)


# ---------------------------------------------------------------------------------------------- materials


def noise(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 4, 84, 84), dtype=np.uint8)


def blocks(n: int, seed: int = 0) -> np.ndarray:
    """Few rectangles on an empty screen, black in every second observation, that move from frame to frame."""
    rng = np.random.default_rng(seed)
    observations = np.zeros((n, 4, 84, 84), np.uint8)
    observations[1::2] = 87
    for observation in observations:
        for _ in range(8):
            y, x, height, width = rng.integers([0, 0, 1, 1], [74, 74, 20, 20])
            speed, grey = rng.integers([-3, 0], [4, 256])
            for t, frame in enumerate(observation):
                left = max(x + speed * t, 0)
                frame[y : y + height, left : left + width] = grey
    return observations


@cache
def pong(n: int) -> np.ndarray:
    """Of a game with random actions, one observation in 25 steps."""
    env = torch_script.make_env("PongNoFrameskip-v4")
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    observations = []
    for _ in range(n):
        for _ in range(25):
            observation, _, terminated, _, _ = env.step(rng.integers(ACTIONS))
            if terminated:
                env.reset()
        observations.append(observation)
    env.close()
    return np.stack(observations)


OBSERVATIONS = {"noise": noise, "blocks": blocks, "pong": pong}


def make_batch(dtype: str, seed: int = 0) -> tuple[torch_script.Batch, jax_script.Batch]:
    """The same batch for both scripts; half of it is noise, half are Pong and blocks."""
    rng = np.random.default_rng(seed)
    half = BATCH // 2

    def draw_observations() -> np.ndarray:
        screens = np.concatenate([pong(24), blocks(8)])[rng.choice(32, size=half, replace=False)]
        return np.concatenate([noise(half, rng.integers(1000)), screens])

    observations, next_observations = draw_observations(), draw_observations()
    actions = rng.integers(ACTIONS, size=BATCH)
    rewards = rng.integers(-1, 2, BATCH).astype(dtype)
    terminations = rng.permutation(np.arange(BATCH) % 2).astype(dtype)
    discounts = (0.99 ** rng.integers(1, 4, BATCH)).astype(dtype)
    teacher_q_values = rng.normal(size=(BATCH, ACTIONS), scale=2).astype(dtype)
    fields = [observations, actions, rewards, next_observations, terminations, discounts, teacher_q_values]
    jax_fields = [jnp.array(field.astype(np.int32) if field is actions else field) for field in fields]
    return torch_script.Batch(*map(torch.tensor, fields)), jax_script.Batch(*jax_fields)


def numpy_weights(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Copies, in torch's names."""
    return {name: tensor.numpy(force=True).copy() for name, tensor in module.state_dict().items()}


def jax_weights(q_function: jax_script.QFunction) -> dict[str, np.ndarray]:
    """In torch's names."""
    return to_torch({name: np.asarray(array) for name, array in flatten(q_function.params).items()})


def to_jax(module: torch.nn.Module) -> jax_script.QFunction:
    is_teacher = isinstance(module, torch_script.TeacherNetwork)
    network = jax_script.TeacherNetwork if is_teacher else jax_script.StudentNetwork
    params = jax.tree.map(jnp.array, unflatten(to_flax(numpy_weights(module))))
    return jax_script.QFunction(params, network(ACTIONS))


def make_network(network: type[torch.nn.Module], zero_biases: bool = False) -> torch.nn.Module:
    """Initialised by torch; flax starts with biases of 0, which makes many activations exactly 0."""
    torch.manual_seed(1)
    module = network(ACTIONS).requires_grad_(False)
    for name, parameter in module.named_parameters():
        if zero_biases and name.endswith("bias"):
            parameter.zero_()
    return module


LEARNING_RATE = 1e-3  # so large that ten steps change the losses


def make_states() -> tuple[torch_script.TrainState, jax_script.Learner]:
    """The same student in both, and the same target network, which is another one."""
    args = torch_script.Args(learning_rate=LEARNING_RATE, seed=2)
    state = torch_script.create_train_state(args, ACTIONS, CPU)
    state.target_network.load_state_dict(make_network(torch_script.StudentNetwork).state_dict())
    student = to_jax(state.student)
    optimizer_state = optax.adam(LEARNING_RATE).init(student)
    return state, jax_script.Learner(student, to_jax(state.target_network), optimizer_state)


def jax_update(
    learner: jax_script.Learner, batch: jax_script.Batch, coefficient: float, share: float, temperature: float
) -> tuple[jax_script.Learner, dict[str, float]]:
    """The script's own, compiled; uses up the learner."""
    dtype = batch.rewards.dtype
    schedule = jax_script.Schedule(*np.array([coefficient, LEARNING_RATE, share], dtype))
    settings = jax_script.Settings.of(jax_script.Args(temperature=temperature))
    learner, results = jax_script.update_alone(learner, batch, schedule, settings)
    assert {result.dtype for result in results.values()} == {dtype}
    return learner, {name: float(result) for name, result in results.items()}


def assert_close_in_scale(actual: Any, expected: Any, tolerance: float, name: str = "") -> None:
    """The largest difference is at most this share of the largest number."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    difference = np.abs(actual - expected).max() / np.abs(expected).max()
    assert difference <= tolerance, f"{name}: {difference:.1e}"


def assert_equal_results(
    results: dict[str, float], expected: dict[str, torch.Tensor], tolerance: float
) -> None:
    assert set(results) == set(expected) == set(RESULTS)
    for name in RESULTS:
        # Q-values of both signs cancel in their mean.
        absolute = 0.1 * tolerance if name == "q_values" else 0
        assert results[name] == pytest.approx(expected[name].item(), rel=tolerance, abs=absolute), name


# ----------------------------------------------------------------------------------------------- networks


# Of the largest. float32 rounds by 6e-8 of a number, and the scripts add up thousands of products, in up to
# 17 layers, in different orders: measured on one machine, up to 2e-6.
Q_TOLERANCE = 1e-5


@pytest.mark.parametrize("kind", OBSERVATIONS)
@pytest.mark.parametrize("zero_biases", [False, True])
@pytest.mark.parametrize("name", ["TeacherNetwork", "StudentNetwork"])
def test_q_values(torch_pads_like_flax, name, zero_biases, kind):
    module = make_network(getattr(torch_script, name), zero_biases)
    observations = OBSERVATIONS[kind](8)
    expected = torch_script.compute_q_values(module, CPU, observations)
    q_values = jax_script.compute_q_values(to_jax(module), observations)
    assert q_values.dtype == expected.dtype == np.float32
    assert_close_in_scale(q_values, expected, Q_TOLERANCE)
    # Also in what sets the observations apart, which is a small part of these Q-values.
    assert_close_in_scale(
        q_values - q_values.mean(axis=0), expected - expected.mean(axis=0), 10 * Q_TOLERANCE
    )


def test_without_the_same_padding_the_students_differ():
    module = make_network(torch_script.StudentNetwork)
    expected = torch_script.compute_q_values(module, CPU, noise(8))
    q_values = jax_script.compute_q_values(to_jax(module), noise(8))
    assert np.abs(q_values - expected).max() > 1000 * Q_TOLERANCE * np.abs(expected).max()


# Few levels of grey, so that windows are full of ties, and below 0, so that a padding of 0 would win.
POOLED = {
    "noise": lambda rng, shape: rng.normal(size=shape),
    "levels": lambda rng, shape: rng.integers(-3, 0, shape),
    "blocks": lambda rng, shape: np.repeat(np.repeat(rng.integers(-3, 0, shape), 5, 1), 5, 2)[
        :, : shape[1], : shape[2]
    ],
    "constant": lambda rng, shape: np.full(shape, -1),
}
SIZES = [(84, 84), (42, 42), (21, 21), (1, 1), (2, 2), (3, 3), (84, 21), (3, 2), (1, 4)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_max_pool_is_flaxs_and_torchs(size):
    rng = np.random.default_rng(0)
    shape = (2, *size, 3)
    x = np.concatenate([make(rng, shape) for make in POOLED.values()]).astype(np.float32)

    def pool_with_gradient(max_pool, x, output_gradient):
        y, pull_back = jax.vjp(max_pool, x)
        return y, pull_back(output_gradient)[0]

    # Whole numbers add up to the same bits in any order.
    output_gradient = rng.integers(-9, 10, (len(x), -(-size[0] // 2), -(-size[1] // 2), 3)).astype(np.float32)
    flax_max_pool = partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2), padding="SAME")
    expected, expected_gradient = jax.jit(partial(pool_with_gradient, flax_max_pool))(x, output_gradient)
    pool = jax.jit(partial(pool_with_gradient, jax_script.max_pool))
    y, gradient = pool(x, output_gradient)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(gradient, expected_gradient)

    torch_x = torch.tensor(x.transpose(0, 3, 1, 2)).requires_grad_()
    torch_y = same_max_pool2d(torch_x, 3, 2, 1)
    torch_y.backward(torch.tensor(output_gradient.transpose(0, 3, 1, 2)))
    np.testing.assert_array_equal(y, torch_y.detach().numpy().transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(gradient, torch_x.grad.numpy().transpose(0, 2, 3, 1))


# ------------------------------------------------------------------------------------------------- losses


def torch_losses(temperature: float, q_values: np.ndarray, *others: np.ndarray) -> tuple:
    """Targets y; TD loss and its gradient by the Q-values; distillation loss and its gradient."""
    q_values = torch.tensor(q_values, requires_grad=True)
    actions, teacher_q_values, *td_inputs = map(torch.tensor, others)
    targets = torch_script.td_targets(*td_inputs)
    losses = (
        torch_script.td_loss(q_values, actions, targets),
        torch_script.distill_loss(q_values, teacher_q_values, temperature),
    )
    return targets, *((loss.detach(), torch.autograd.grad(loss, q_values)[0]) for loss in losses)


@jax.jit
def jax_losses(temperature: float, q_values: jax.Array, *others: jax.Array) -> tuple:
    """The same."""
    actions, teacher_q_values, *td_inputs = others
    targets = jax_script.td_targets(*td_inputs)
    losses = (
        lambda q_values: jax_script.td_loss(q_values, actions, targets),
        lambda q_values: jax_script.distill_loss(q_values, teacher_q_values, temperature),
    )
    return targets, *(jax.value_and_grad(loss)(q_values) for loss in losses)


def draw_loss_inputs(scale: float) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    q_values, teacher_q_values, next_q_values = rng.normal(size=(3, 32, ACTIONS), scale=scale)
    rewards, discounts = rng.normal(size=(2, 32))
    inputs = [q_values, teacher_q_values, rewards, rng.integers(2, size=32), discounts, next_q_values]
    inputs = [array.astype(np.float32) for array in inputs]
    return [inputs[0], rng.integers(ACTIONS, size=32), *inputs[1:]]


# Measured: 1.5e-7, a few roundings, as exp and log of either library err by a unit in the last place.
LOSS_TOLERANCE = 1e-6


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_losses_and_their_gradients_by_the_q_values(temperature):
    inputs = draw_loss_inputs(scale=1.0)
    expected_targets, *expected = torch_losses(temperature, *inputs)
    targets, *actual = jax_losses(temperature, *inputs)
    assert_close_in_scale(targets, expected_targets, LOSS_TOLERANCE)
    for (loss, gradient), (expected_loss, expected_gradient) in zip(actual, expected, strict=True):
        assert float(loss) == pytest.approx(expected_loss.item(), rel=LOSS_TOLERANCE)
        assert_close_in_scale(gradient, expected_gradient, LOSS_TOLERANCE)


def test_losses_of_policies_without_doubt():
    """Q-values of up to 3000 at temperature 0.01: log π goes down to -3e5, exp of it is 0."""
    inputs = draw_loss_inputs(scale=1000)
    _, *expected = torch_losses(0.01, *inputs)
    _, *actual = jax_losses(0.01, *inputs)
    for (loss, gradient), (expected_loss, expected_gradient) in zip(actual, expected, strict=True):
        assert torch.isfinite(expected_loss)
        assert float(loss) == pytest.approx(expected_loss.item(), rel=LOSS_TOLERANCE)
        assert_close_in_scale(gradient, expected_gradient, LOSS_TOLERANCE)


def test_distill_coefficient_is_equal():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(500):
        returns = list(rng.normal(5, 20, rng.integers(8, 11)))
        arguments = {
            "online_step": int(rng.integers(2000)),
            "recent_returns": returns,
            "teacher_return": float(rng.uniform(1, 30)),
            "baseline_return": float(rng.choice([0.0, rng.uniform(-30, 0)])),
            "distill_steps": rng.choice([None, 1500]),
        }
        expected = torch_script.distill_coefficient(**arguments)
        assert jax_script.distill_coefficient(**arguments) == expected
        seen.add("0" if expected == 0 else "1" if expected == 1 else "below 1" if expected < 1 else "above")
    assert seen == {"0", "1", "below 1", "above"}


def test_linear_schedule_is_equal():
    rng = np.random.default_rng(0)
    for _ in range(200):
        start, end = rng.uniform(size=2)
        duration = float(rng.choice([0, rng.uniform(0, 1000)]))
        for step in (int(rng.integers(1500)), rng.integers(1500, size=8)):
            expected = torch_script.linear_schedule(start, end, duration, step)
            np.testing.assert_array_equal(jax_script.linear_schedule(start, end, duration, step), expected)


# ----------------------------------------------------------------------------------------- gradient steps


@in_float32_and_float64
def test_losses_and_every_gradient_of_an_update(torch_pads_like_flax, dtype):
    coefficient, temperature = 0.7, 0.5
    state, learner = make_states()
    batch, jax_batch = make_batch(dtype)
    args = torch_script.Args(temperature=temperature, learning_rate=LEARNING_RATE)
    expected = torch_script.update(args, state, batch, coefficient)
    learner, results = jax_update(learner, jax_batch, coefficient, 0.0, temperature)
    # Like the Q-values that they are made of.
    assert_equal_results(results, expected, {"float32": 1e-5, "float64": 1e-13}[dtype])

    # Adam's first moment, 0 before, is (1 − 0.9) of the gradient now.
    first_moments = jax_weights(learner.optimizer_state[0].mu)
    gradients = {name: parameter.grad for name, parameter in state.student.named_parameters()}
    assert set(first_moments) == set(gradients)
    # Measured, of a tensor's largest: 3e-6 in float32, as a gradient is a sum over up to 84 · 84 places; 2e-5
    # where a rounding has switched a ReLU; 7e-15 in float64.
    tolerance = {"float32": 1e-4, "float64": 1e-12}[dtype]
    for name, gradient in gradients.items():
        assert_close_in_scale(first_moments[name] / (1 - 0.9), gradient, tolerance, name)


@in_float32_and_float64
def test_ten_adam_steps_with_target_updates(torch_pads_like_flax, dtype):
    options = {"target_network_frequency": 3, "tau": 0.5, "learning_rate": LEARNING_RATE}
    args, jax_args = torch_script.Args(**options), jax_script.Args(**options)
    state, learner = make_states()
    before = numpy_weights(state.student)
    for step in range(5, 15):  # the target network moves between 6 and 7, 9 and 10, 12 and 13
        batch, jax_batch = make_batch(dtype, seed=step)
        coefficient = 1 / step
        expected = torch_script.update(args, state, batch, coefficient)
        if step % args.target_network_frequency == 0:
            torch_script.update_target_network(state, args.tau)
        share = jax_script.target_share(jax_args, step, interval=1)
        learner, results = jax_update(learner, jax_batch, coefficient, share, temperature=1.0)
        # Ten times what one step may differ by, as each starts from the differences of those before.
        assert_equal_results(results, expected, {"float32": 1e-4, "float64": 1e-12}[dtype])

    students = jax_weights(learner.student), numpy_weights(state.student)
    targets = jax_weights(learner.target_network), numpy_weights(state.target_network)
    movement = concatenate_differences(students[1], before)
    assert np.abs(movement).max() > 5 * LEARNING_RATE
    for actual, expected in (students, targets):
        difference = concatenate_differences(actual, expected)
        if dtype == "float64":
            # Measured: 3e-10 steps of Adam. That is every parameter, however small its gradient.
            assert np.abs(difference).max() < 1e-7 * LEARNING_RATE
        else:
            # Where a gradient is as small as its rounding, so that its sign is chance, Adam makes a whole
            # step of it. Measured: 4e-5 of the parameters are off by more than a hundredth of a step; all
            # together are off by 9e-5 of the way that they went.
            assert (np.abs(difference) > 0.01 * LEARNING_RATE).mean() < 1e-3
            assert np.linalg.norm(difference) < 1e-3 * np.linalg.norm(movement)


def concatenate_differences(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> np.ndarray:
    assert set(a) == set(b)
    return np.concatenate([(a[name] - b[name]).ravel() for name in a])


def test_a_batch_of_the_replay_buffer_gives_the_same_results(torch_pads_like_flax):
    """Three-step returns, episodes that end in every way, and frames that many stacks share."""
    num_envs, num_steps, n_step, gamma = 2, 40, 3, 0.9
    rng = np.random.default_rng(0)
    frames = np.concatenate([pong(24)[:, -1], blocks(8)[:, -1], noise(8)[:, -1]])

    def draw_observations() -> np.ndarray:
        return frames[rng.integers(len(frames), size=(num_envs, 4))]

    replay = torch_script.ReplayBuffer(50, num_envs, ACTIONS, n_step, gamma, CPU)
    jax_replay = jax_script.ReplayBuffer.create(50, num_envs, ACTIONS, n_step, gamma, jax.devices("cpu")[0])
    observations = draw_observations()
    replay.start(observations)
    jax_replay = jax_replay.start(observations)
    for _ in range(num_steps):
        ends = rng.choice(3, size=num_envs, p=[0.7, 0.15, 0.15])
        rewards = rng.integers(-1, 2, num_envs).astype(np.float32)
        step = StepResult(draw_observations(), rewards, ends == 1, ends == 2, draw_observations(), [])
        actions = rng.integers(ACTIONS, size=num_envs)
        teacher_q_values = rng.normal(size=(num_envs, ACTIONS)).astype(np.float32)
        replay.add(actions, step, teacher_q_values)
        jax_replay = jax_replay.add(actions, step, teacher_q_values)

    slots = replay.draw(64, rng)
    batch = replay.gather(torch.from_numpy(slots))
    jax_batch = jax.jit(jax_script.ReplayBuffer.gather)(jax_replay, slots)
    assert len(set(batch.discounts.tolist())) == n_step
    assert batch.terminations.unique().tolist() == [0, 1]
    for name, expected, actual in zip(batch._fields, batch, jax_batch, strict=True):
        assert expected.dtype == (torch.int64 if name == "actions" else getattr(torch, actual.dtype.name))
        # A power of γ in float32 is good to a few units in the last place; all else is a copy.
        np.testing.assert_allclose(actual, expected, rtol=5e-7 if name in ("rewards", "discounts") else 0)

    state, learner = make_states()
    for start in range(0, 16, BATCH):
        part = torch_script.Batch(*(tensor[start : start + BATCH] for tensor in batch))
        jax_part = jax_script.Batch(
            *(jnp.array(tensor.int() if tensor.dtype == torch.int64 else tensor) for tensor in part)
        )
        expected = torch_script.update(torch_script.Args(learning_rate=LEARNING_RATE), state, part, 1.0)
        learner, results = jax_update(learner, jax_part, 1.0, 0.0, 1.0)
        assert_equal_results(results, expected, 1e-4)


# --------------------------------------------------------------------------------------------------- loops


class Clockwork:
    """Stands in for the networks: the student is the number of gradient steps, the target network follows.

    `log` keeps, of each gradient step, its coefficient and the target network as it was then.
    """

    def __init__(self, platform: str = "cpu"):
        self.device = SimpleNamespace(platform=platform)
        self.offline_step = self.online_step = self.learned_step = self.online_gradient_steps = 0
        self.evaluated_step = 0
        self.recent_returns, self.unread = [], []
        self.student = self.target = 0.0
        self.log, self.scalars = [], []

    def update(self, coefficient: float) -> dict[str, torch.Tensor]:
        self.log.append((coefficient, self.target))
        self.student += 1
        return {name: torch.tensor(self.student) for name in RESULTS}

    def update_target(self, share: float) -> None:
        self.target += share * (self.student - self.target)

    def learn(self, coefficients: list[float], shares: list[float]) -> dict[str, np.ndarray]:
        results = []
        for coefficient, share in zip(coefficients, shares, strict=True):
            self.update_target(share)
            results.append(self.update(coefficient))
        return {name: np.array([result[name] for result in results]) for name in RESULTS}

    def add_scalar(self, *scalar) -> None:
        self.scalars.append(scalar)


@pytest.fixture
def clockwork(monkeypatch):
    monkeypatch.setattr(torch_script, "sample_batch", lambda args, state: None)
    monkeypatch.setattr(
        torch_script, "update", lambda args, state, batch, coefficient: state.update(coefficient)
    )
    monkeypatch.setattr(torch_script, "update_target_network", lambda state, tau: state.update_target(tau))
    monkeypatch.setattr(
        jax_script,
        "learn",
        lambda args, state, coefficients, shares: state.learn(coefficients, shares),
    )
    for script in (torch_script, jax_script):
        monkeypatch.setattr(script, "LOSS_INTERVAL", 6)


def assert_same_clockwork(actual: Clockwork, expected: Clockwork) -> None:
    assert len(actual.log) == len(expected.log) > 5
    # Several target updates at once are the same as one by one, up to rounding.
    np.testing.assert_allclose(actual.log, expected.log, rtol=1e-12)
    assert sorted(actual.scalars) == sorted(expected.scalars)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("frequency", [1, 3, 4, 100])
@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_the_offline_loops_do_the_same_steps(clockwork, platform, frequency, tau):
    options = {"offline_steps": 25, "offline_eval_frequency": 10, "target_network_frequency": frequency}
    states = []
    for script in (torch_script, jax_script):
        state = Clockwork(platform)
        args = script.Args(**options, tau=tau)
        script.train_offline(args, state, state, lambda state=state: state.student, no_checkpoint)
        states.append(state)
    assert_same_clockwork(states[1], states[0])


@pytest.mark.parametrize("num_envs", [1, 3, 8])
@pytest.mark.parametrize("train_frequency", [1, 4, 5])
@pytest.mark.parametrize("frequency", [1, 3, 10, 12])
@pytest.mark.parametrize("learning_starts", [0, 17])
def test_the_online_loops_do_the_same_steps(clockwork, num_envs, train_frequency, frequency, learning_starts):
    options = {
        "num_envs": num_envs,
        "n_step": 3,
        "total_timesteps": 70,
        "train_frequency": train_frequency,
        "target_network_frequency": frequency,
        "learning_starts": learning_starts,
        "offline_steps": 5,
        "tau": 0.3,
    }
    states = []
    for script in (torch_script, jax_script):
        args, state = script.Args(**options), Clockwork()
        while True:
            state.recent_returns = [state.online_step]
            arguments = (args, state, lambda step, returns: 1 / (step + returns[0]))
            if script is torch_script:
                script.learn_online(*arguments, state)
            else:
                script.learn_online(*arguments)
                while state.unread:
                    step, results, index = state.unread.pop(0)
                    for name, value in script.read_losses(results, index, "").items():
                        state.add_scalar(f"losses/{name}", value, args.offline_steps + step)
            if state.online_step >= args.total_timesteps:
                break
            state.online_step += num_envs
        states.append(state)
    assert_same_clockwork(states[1], states[0])
    assert states[0].online_gradient_steps == states[1].online_gradient_steps


# ------------------------------------------------------------------------------------------------- explore


def explore_in_torch(seed: int, epsilon: Any, q_values: np.ndarray) -> np.ndarray:
    return torch_script.explore(np.random.default_rng(seed), epsilon, q_values)


def explore_in_jax(seed: int, epsilon: Any, q_values: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(jax_script.explore)(jax.random.key(seed), epsilon, q_values))


in_both_scripts = pytest.mark.parametrize("explore", [explore_in_torch, explore_in_jax])


@in_both_scripts
def test_greedy_actions_are_the_first_of_the_best(explore):
    q_values = np.random.default_rng(0).integers(-2, 2, (1000, ACTIONS)).astype(np.float32)
    q_values[:3] = [[0] * ACTIONS, [-np.inf, -1, -1, -2, -1, -3], [1, 2, 3, 3, 2, 3]]
    expected = [list(row).index(max(row)) for row in q_values]
    assert expected[:3] == [0, 1, 2]
    assert explore(0, 0.0, q_values).tolist() == expected


@in_both_scripts
@pytest.mark.parametrize("epsilon", [1.0, 0.3])
def test_random_actions_are_uniform_whatever_else_was_drawn(explore, epsilon):
    n, greedy_action = 60_000, 2
    actions = explore(1, epsilon, np.tile(np.eye(ACTIONS, dtype=np.float32)[greedy_action], (n, 1)))
    expected = np.full(ACTIONS, epsilon * n / ACTIONS)
    expected[greedy_action] += (1 - epsilon) * n
    counts = np.bincount(actions, minlength=ACTIONS)
    assert ((counts - expected) ** 2 / expected).sum() < CHI_SQUARE_5_DOF


@in_both_scripts
def test_each_environment_has_its_own_epsilon(explore):
    epsilon = np.tile([0.0, 1.0, 0.25], 20_000)
    actions = explore(2, epsilon, np.tile(np.float32([0, 0, 0, 0, 0, 1]), (len(epsilon), 1)))
    shares = (actions.reshape(-1, 3) != 5).mean(axis=0)
    assert shares[0] == 0
    np.testing.assert_allclose(shares[1:], [5 / 6, 0.25 * 5 / 6], atol=0.012)  # four standard errors


# --------------------------------------------------------------------------------------------------- files


def test_a_student_saved_by_the_torch_script(torch_pads_like_flax, tmp_path):
    state, _ = make_states()
    torch_script.save_student(state.student, tmp_path / "student.cleanrl_model")
    weights = to_flax(read_weights(tmp_path / "student.cleanrl_model"))
    q_function = jax_script.QFunction(unflatten(weights), jax_script.StudentNetwork(ACTIONS))
    q_values = jax_script.compute_q_values(q_function, pong(8))
    expected = torch_script.compute_q_values(state.student, CPU, pong(8))
    assert_close_in_scale(q_values, expected, Q_TOLERANCE)


def test_a_student_saved_by_the_jax_script(torch_pads_like_flax, tmp_path):
    student = to_jax(make_network(torch_script.StudentNetwork))
    jax_script.save_student(student, tmp_path / "student.cleanrl_model")
    weights = to_torch(read_weights(tmp_path / "student.cleanrl_model"))
    network = torch_script.StudentNetwork(ACTIONS)
    network.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    q_values = torch_script.compute_q_values(network, CPU, pong(8))
    expected = jax_script.compute_q_values(student, pong(8))
    assert_close_in_scale(q_values, expected, Q_TOLERANCE)


def test_one_teacher_in_every_format(tmp_path):
    state_dict = {name: tensor.float() for name, tensor in load_file(PONG_TEACHER).items()}
    torch.save(state_dict, tmp_path / "teacher.pt")
    params = unflatten(to_flax({name: tensor.numpy() for name, tensor in state_dict.items()}))
    (tmp_path / "teacher.msgpack").write_bytes(serialization.to_bytes(params))

    q_values, expected = [], []
    for path in (PONG_TEACHER, tmp_path / "teacher.pt", tmp_path / "teacher.msgpack"):
        teacher = jax_script.load_teacher(
            jax_script.Args(teacher_model_path=path), ACTIONS, jax.devices("cpu")[0]
        )
        q_values.append(jax_script.compute_q_values(teacher, pong(8)))
        teacher = torch_script.load_teacher(torch_script.Args(teacher_model_path=path), ACTIONS, CPU)
        expected.append(torch_script.compute_q_values(teacher, CPU, pong(8)))
    for of_one_script in (q_values, expected):
        assert all(np.array_equal(of_one_script[0], other) for other in of_one_script[1:])
    assert_close_in_scale(q_values[0], expected[0], Q_TOLERANCE)
    np.testing.assert_array_equal(q_values[0].argmax(axis=1), expected[0].argmax(axis=1))
    assert len(set(expected[0].argmax(axis=1))) > 1
