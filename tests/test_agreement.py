"""The PyTorch script against the JAX script: the same weights and batches must give the same numbers.

Both run on the CPU. In float32 they differ by roundings, one of which may switch a ReLU, and Adam makes as
much of a tiny gradient as of a large one. So gradients and Adam are compared in float64 as well, where
roundings are 5e8 times smaller and nothing else is left.

The networks differ in one thing by design: torch's max-pool pads a row and a column on every side, flax's
SAME only at the end where the size is even. Unless a test says otherwise, torch pools as flax does here.
"""

from functools import cache, partial
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from both_scripts import (
    JAX,
    NUM_ACTIONS,
    PONG_TEACHER,
    TORCH,
    Weights,
    create_state,
    device_of,
    learn,
    network,
    use_network,
    uses_torch,
    weights,
)
from flax import serialization
from safetensors.torch import load_file
from torch.nn import functional as F

from cleanrl.utils.replay.ring import Batch
from cleanrl.utils.weights.files import read_weights, save_weights
from cleanrl.utils.weights.layouts import flatten, to_flax, to_torch, unflatten

BATCH = 4


def same_max_pool2d(x: torch.Tensor) -> torch.Tensor:
    """3×3 with stride 2 and SAME padding: as much as is needed, the odd one at the end."""
    padding = []
    for size in (x.shape[-1], x.shape[-2]):
        total = max((-(-size // 2) - 1) * 2 + 3 - size, 0)
        padding += [total // 2, total - total // 2]
    return F.max_pool2d(F.pad(x, padding, value=-np.inf), 3, 2)


@pytest.fixture
def torch_pads_like_flax(monkeypatch):
    monkeypatch.setattr(TORCH, "StudentNetwork", partial(TORCH.StudentNetwork, pools_as_flax=True))


@pytest.fixture
def dtype(request):
    """Makes a width of floating-point numbers, "float32" or "float64", that of both scripts."""
    torch.set_default_dtype(getattr(torch, request.param))
    with jax.enable_x64(request.param == "float64"):
        yield request.param
    torch.set_default_dtype(torch.float32)


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
    env = TORCH.make_env("PongNoFrameskip-v4")
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    observations = []
    for _ in range(n):
        for _ in range(25):
            observation, _, terminated, _, _ = env.step(rng.integers(NUM_ACTIONS))
            if terminated:
                env.reset()
        observations.append(observation)
    env.close()
    return np.stack(observations)


OBSERVATIONS = {"noise": noise, "blocks": blocks, "pong": pong}


def make_batch(dtype: str, seed: int) -> Batch:
    """Half of it is noise, half are Pong and blocks; with observations in place of their frames' slots."""
    rng = np.random.default_rng(seed)
    half = BATCH // 2

    def draw_observations() -> np.ndarray:
        screens = np.concatenate([pong(24), blocks(8)])[rng.choice(32, size=half, replace=False)]
        return np.concatenate([noise(half, rng.integers(1000)), screens])

    return Batch(
        stacks=draw_observations(),
        actions=rng.integers(NUM_ACTIONS, size=BATCH),
        rewards=rng.integers(-1, 2, BATCH).astype(dtype),
        next_stacks=draw_observations(),
        terminations=rng.permutation(np.arange(BATCH) % 2).astype(dtype),
        discounts=(0.99 ** rng.integers(1, 4, BATCH)).astype(dtype),
        teacher_q_values=rng.normal(size=(BATCH, NUM_ACTIONS), scale=2).astype(dtype),
    )


def make_weights(name: str, seed: int = 1, zero_biases: bool = False) -> Weights:
    """Those of a network as torch initialises it; with biases of 0, as flax does, many activations are 0."""
    torch.manual_seed(seed)
    made = weights(getattr(TORCH, name)(NUM_ACTIONS))
    return {n: 0 * w if zero_biases and n.endswith("bias") else w for n, w in made.items()}


def make_network(script: ModuleType, name: str, of_torch: Weights) -> Any:
    """The script's network with these weights, which are in torch's layout."""
    module = getattr(script, name)(NUM_ACTIONS)
    if not uses_torch(script):
        return JAX.QFunction(jax.tree.map(jnp.array, unflatten(to_flax(of_torch))), module)
    module.load_state_dict({name: torch.from_numpy(array) for name, array in of_torch.items()})
    return module


def q_values_of(name: str, of_torch: Weights, observations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Torch's and JAX's."""
    in_torch, in_jax = (
        script.compute_q_values(make_network(script, name, of_torch), observations) for script in (TORCH, JAX)
    )
    assert in_torch.dtype == in_jax.dtype
    return in_torch, in_jax


LEARNING_RATE = 2**-10  # so large that ten steps change the losses; exact in float32, as the coefficients
OPTIONS = {"learning_rate": LEARNING_RATE, "temperature": 0.5, "average_decay": 0.75}


def make_state(script: ModuleType) -> Any:
    """The same student, average and target network in both scripts, three different ones."""
    student, ema_student, target_network = (
        make_network(script, "StudentNetwork", make_weights("StudentNetwork", seed)) for seed in (1, 3, 2)
    )
    replays = None, None
    if uses_torch(script):
        optimizer = torch.optim.Adam(student.parameters(), lr=LEARNING_RATE)
        for averaged in (ema_student, target_network):
            averaged.requires_grad_(False)
        return script.TrainState(student, ema_student, target_network, optimizer, None, *replays)
    learner = script.Learner(student, ema_student, target_network, optax.adam(LEARNING_RATE).init(student))
    return script.TrainState(jax.device_put(learner, device_of(script)), None, *replays)


def weights_in_torchs_layout(state: Any, role: str = "trained") -> Weights:
    return to_torch(weights(network(state, role)))


def assert_close_in_scale(actual: Any, expected: Any, tolerance: float, name: str = "") -> None:
    """The largest difference is at most this share of the largest number."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    difference = np.abs(actual - expected).max() / np.abs(expected).max()
    assert difference <= tolerance, f"{name}: {difference:.1e}"


def assert_equal_losses(expected: dict[str, float], actual: dict[str, float], tolerance: float) -> None:
    assert actual.keys() == expected.keys() == {"loss", "td_loss", "distill_loss", "q_values"}
    for name in actual:
        # Q-values of both signs cancel in their mean.
        absolute = 0.1 * tolerance if name == "q_values" else 0
        assert actual[name] == pytest.approx(expected[name], rel=tolerance, abs=absolute), name


# ----------------------------------------------------------------------------------------------- networks


# Of the largest. float32 rounds by 6e-8 of a number, and the scripts add up thousands of products, in up to
# 17 layers, in different orders: measured on one machine, up to 2e-6.
Q_TOLERANCE = 1e-5


@pytest.mark.parametrize("kind", OBSERVATIONS)
@pytest.mark.parametrize("zero_biases", [False, True])
@pytest.mark.parametrize("name", ["TeacherNetwork", "StudentNetwork"])
def test_networks_give_the_same_q_values(torch_pads_like_flax, name, zero_biases, kind):
    expected, q_values = q_values_of(name, make_weights(name, zero_biases=zero_biases), OBSERVATIONS[kind](8))
    assert q_values.dtype == np.float32
    assert_close_in_scale(q_values, expected, Q_TOLERANCE)
    # Also in what sets the observations apart, which is a small part of these Q-values.
    assert_close_in_scale(
        q_values - q_values.mean(axis=0), expected - expected.mean(axis=0), 10 * Q_TOLERANCE
    )


def test_without_the_same_padding_the_students_differ():
    expected, q_values = q_values_of("StudentNetwork", make_weights("StudentNetwork"), noise(8))
    assert np.abs(q_values - expected).max() > 1000 * Q_TOLERANCE * np.abs(expected).max()


def test_students_start_with_weights_and_biases_of_the_same_widths():
    """Uniform within ±1 / √fan-in."""
    in_torch = make_weights("StudentNetwork")
    in_jax = to_torch(flatten(JAX.StudentNetwork(NUM_ACTIONS).init(jax.random.key(1), noise(1))))
    assert in_torch.keys() == in_jax.keys()
    for first_weights in in_torch, in_jax:
        biases = []
        for name, weight in first_weights.items():
            if name.endswith("weight"):
                in_widths = weight * np.sqrt(weight[0].size)
                assert np.abs(in_widths).max() <= 1.000001, name
                assert in_widths.std() == pytest.approx(3**-0.5, rel=0.05), name
                biases.append(first_weights[name.replace("weight", "bias")] * np.sqrt(weight[0].size))
                assert np.abs(biases[-1]).max() <= 1.000001, name
        assert np.concatenate(biases).std() == pytest.approx(3**-0.5, rel=0.05)


# Few levels of grey, so that windows are full of ties, and below 0, so that a padding of 0 would win.
POOLED = {
    "noise": lambda rng, shape: rng.normal(size=shape),
    "levels": lambda rng, shape: rng.integers(-3, 0, shape),
    "blocks": lambda rng, shape: np.repeat(np.repeat(rng.integers(-3, 0, shape), 5, 1), 5, 2)[
        :, : shape[1], : shape[2]
    ],
    "constant": lambda rng, shape: np.full(shape, -1),
}
SIZES = [(84, 84), (42, 42), (21, 21), (1, 1), (2, 2), (3, 2), (1, 4)]


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
    pool = jax.jit(partial(pool_with_gradient, JAX.max_pool))
    y, gradient = pool(x, output_gradient)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(gradient, expected_gradient)

    torch_x = torch.tensor(x.transpose(0, 3, 1, 2)).requires_grad_()
    torch_y = same_max_pool2d(torch_x)
    torch_y.backward(torch.tensor(output_gradient.transpose(0, 3, 1, 2)))
    np.testing.assert_array_equal(y, torch_y.detach().numpy().transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(gradient, torch_x.grad.numpy().transpose(0, 2, 3, 1))

    as_torch = F.max_pool2d(torch_x, 3, stride=2, padding=1).detach().numpy().transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(JAX.max_pool(jnp.array(x), as_torch=True), as_torch)


# ------------------------------------------------------------------------------------------------- losses


def torch_losses(temperature: float, q_values: np.ndarray, *others: np.ndarray) -> list[tuple]:
    """TD loss of both kinds and distillation loss, each with its gradient by the Q-values."""
    q_values = torch.tensor(q_values, requires_grad=True)
    actions, teacher_q_values, targets = map(torch.tensor, others)
    losses = (
        TORCH.td_loss(q_values, actions, targets),
        TORCH.td_loss(q_values, actions, targets, "huber"),
        TORCH.distill_loss(q_values, teacher_q_values, temperature),
    )
    return [(loss.item(), torch.autograd.grad(loss, q_values)[0]) for loss in losses]


@jax.jit
def jax_losses(temperature: float, q_values: jax.Array, *others: jax.Array) -> list[tuple]:
    """The same."""
    actions, teacher_q_values, targets = others
    losses = (
        lambda q_values: JAX.td_loss(q_values, actions, targets),
        lambda q_values: JAX.td_loss(q_values, actions, targets, "huber"),
        lambda q_values: JAX.distill_loss(q_values, teacher_q_values, temperature),
    )
    return [jax.value_and_grad(loss)(q_values) for loss in losses]


# Measured: 1.5e-7, a few roundings, as exp and log of either library err by a unit in the last place.
LOSS_TOLERANCE = 1e-6


# The last: of policies without doubt. log π goes down to -3e5, exp of it is 0.
@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 0.3), (1.0, 1.0), (1.0, 3.0), (1000.0, 0.01)])
def test_losses_and_their_gradients_by_the_q_values_are_equal(scale, temperature):
    rng = np.random.default_rng(0)
    q_values, teacher_q_values = rng.normal(size=(2, 32, NUM_ACTIONS), scale=scale).astype(np.float32)
    targets = rng.normal(size=32, scale=scale).astype(np.float32)
    inputs = q_values, rng.integers(NUM_ACTIONS, size=32), teacher_q_values, targets
    expected, actual = torch_losses(temperature, *inputs), jax_losses(temperature, *inputs)
    for (loss, gradient), (expected_loss, expected_gradient) in zip(actual, expected, strict=True):
        assert np.isfinite(expected_loss)
        assert float(loss) == pytest.approx(expected_loss, rel=LOSS_TOLERANCE)
        assert_close_in_scale(gradient, expected_gradient, LOSS_TOLERANCE)


# ----------------------------------------------------------------------------------------- gradient steps


@pytest.mark.parametrize("script", [TORCH, JAX], ids=["torch", "jax"])
@pytest.mark.parametrize(("distill_coeff", "rate"), [(0.0, 1e-4), (1.0, 1e-3), (2.1, 1e-3)])
def test_the_learning_rate_stays_between_its_two_values(monkeypatch, script, distill_coeff, rate):
    """λ is above 1 while games of Pong are lost. Adam's first step is as large as the learning rate."""
    use_network(monkeypatch, script, "linear")
    args = script.Args(learning_rate=1e-3, final_learning_rate=1e-4, buffer_size=100, cuda=False)
    state = create_state(script, args)
    before = weights(network(state))
    learn(script, args, state, [make_batch("float32", 1)], [distill_coeff])
    steps = [np.abs(after - before[name]).max() for name, after in weights(network(state)).items()]
    assert max(steps) == pytest.approx(rate, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"], indirect=True)
def test_gradient_steps_and_target_updates_are_equal(torch_pads_like_flax, dtype):
    """One step; in float64 nine more, over which the roundings of float32 would grow."""
    states = [make_state(script) for script in (TORCH, JAX)]
    before = weights_in_torchs_layout(states[0])

    def learn_in_both(seed: int, distill_coeff: float) -> list[dict[str, float]]:
        batch = make_batch(dtype, seed)
        return [
            learn(script, script.Args(**OPTIONS), state, [batch], [distill_coeff])
            for script, state in zip((TORCH, JAX), states, strict=True)
        ]

    # Like the Q-values that they are made of.
    assert_equal_losses(*learn_in_both(0, 0.75), {"float32": 1e-5, "float64": 1e-13}[dtype])

    # Adam's first moment, 0 before, is (1 − 0.9) of the gradient now.
    first_moments = to_torch(weights(states[1].learner.optimizer_state[0].mu))
    gradients = {name: parameter.grad for name, parameter in states[0].student.named_parameters()}
    assert first_moments.keys() == gradients.keys()
    # Measured, of a tensor's largest: 3e-6 in float32, as a gradient is a sum over up to 84 · 84 places; 2e-5
    # where a rounding has switched a ReLU; 7e-15 in float64.
    tolerance = {"float32": 1e-4, "float64": 1e-12}[dtype]
    for name, gradient in gradients.items():
        assert first_moments[name].dtype == dtype
        assert_close_in_scale(first_moments[name] / (1 - 0.9), gradient, tolerance, name)
    if dtype == "float32":
        return

    for step in range(1, 10):
        assert_equal_losses(*learn_in_both(step, 2**-step), 1e-12)
        if step % 3 == 0:
            for script, state in zip((TORCH, JAX), states, strict=True):
                script.update_target_network(state, tau=0.5)
    movement = concatenate_differences(weights_in_torchs_layout(states[0]), before)
    assert np.abs(movement).max() > 5 * LEARNING_RATE
    for role in ("trained", "target", "ema_student"):
        in_torch, in_jax = (weights_in_torchs_layout(state, role) for state in states)
        # Measured: 3e-10 steps of Adam. That is every parameter, however small its gradient.
        assert np.abs(concatenate_differences(in_torch, in_jax)).max() < 1e-7 * LEARNING_RATE


def concatenate_differences(a: Weights, b: Weights) -> np.ndarray:
    assert a.keys() == b.keys()
    return np.concatenate([(a[name] - b[name]).ravel() for name in a])


# --------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(("writer", "reader"), [(TORCH, JAX), (JAX, TORCH)], ids=["torch-jax", "jax-torch"])
def test_a_student_that_one_script_saved_plays_the_same_in_the_other(
    torch_pads_like_flax, tmp_path, writer, reader
):
    student = make_network(writer, "StudentNetwork", make_weights("StudentNetwork"))
    save_weights(tmp_path / "student.cleanrl_model", student)
    read = to_torch(read_weights(tmp_path / "student.cleanrl_model"))
    q_values = reader.compute_q_values(make_network(reader, "StudentNetwork", read), pong(8))
    assert_close_in_scale(q_values, writer.compute_q_values(student, pong(8)), Q_TOLERANCE)


def test_a_teacher_is_the_same_in_every_format_and_script(tmp_path):
    state_dict = {name: tensor.float() for name, tensor in load_file(PONG_TEACHER).items()}
    torch.save(state_dict, tmp_path / "teacher.pt")
    params = unflatten(to_flax({name: tensor.numpy() for name, tensor in state_dict.items()}))
    (tmp_path / "teacher.msgpack").write_bytes(serialization.to_bytes(params))

    q_values = {TORCH: [], JAX: []}
    for script, of_script in q_values.items():
        for path in (PONG_TEACHER, tmp_path / "teacher.pt", tmp_path / "teacher.msgpack"):
            args = script.Args(teacher_model_path=path)
            teacher = script.load_teacher(args, NUM_ACTIONS, device_of(script))
            of_script.append(script.compute_q_values(teacher, pong(8)))
        assert all(np.array_equal(of_script[0], other) for other in of_script[1:])
    expected, actual = q_values[TORCH][0], q_values[JAX][0]
    assert_close_in_scale(actual, expected, Q_TOLERANCE)
    np.testing.assert_array_equal(actual.argmax(axis=1), expected.argmax(axis=1))
    assert len(set(expected.argmax(axis=1))) > 1
