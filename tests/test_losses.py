"""Both scripts' losses and schedules against NumPy in float64, finite differences, and cases by hand."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
import torch

from cleanrl import qdagger_dqn_atari_impalacnn as torch_script
from cleanrl import qdagger_dqn_atari_jax_impalacnn as jax_script

rng = np.random.default_rng(0)
BATCH, ACTIONS = 7, 6
Q_VALUES = rng.normal(size=(BATCH, ACTIONS))
TEACHER_Q_VALUES = rng.normal(size=(BATCH, ACTIONS))
TAKEN = rng.integers(ACTIONS, size=BATCH)
SCRIPTS = {"torch": torch_script, "jax": jax_script}


@dataclass
class Framework:
    """A script and how it takes arrays: floats in `dtype`, which its results must keep."""

    script: ModuleType
    dtype: type[np.floating]

    @property
    def tolerance(self) -> float:
        """Relative: a few dozen roundings of 1e-16, or of 6e-8, on numbers up to 30."""
        return 1e-12 if self.dtype == np.float64 else 1e-5

    def array(self, values: np.ndarray) -> Any:
        values = values if values.dtype == int else values.astype(self.dtype)
        return torch.from_numpy(values) if self.script is torch_script else jnp.asarray(values)

    def numpy(self, result: Any) -> np.ndarray:
        result = np.asarray(result)
        assert result.dtype == self.dtype
        return result

    def check_gradient(self, function: Callable[[Any], Any], at: np.ndarray) -> None:
        """Fails unless the gradient agrees with finite differences."""
        if self.script is torch_script:
            assert torch.autograd.gradcheck(function, self.array(at).requires_grad_())
        else:
            jax.test_util.check_grads(function, (self.array(at),), order=1, modes=["rev"])


@pytest.fixture(params=SCRIPTS)
def script(request) -> ModuleType:
    return SCRIPTS[request.param]


@pytest.fixture(params=[np.float64, np.float32], ids=["float64", "float32"])
def framework(script, request) -> Iterator[Framework]:
    """float32 is what the scripts compute in; float64 shows a formula that is almost right."""
    with jax.enable_x64(request.param == np.float64):
        yield Framework(script, request.param)


@pytest.fixture
def float64_framework(script) -> Iterator[Framework]:
    with jax.enable_x64(True):
        yield Framework(script, np.float64)


def softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x)
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def test_td_targets_are_the_formula(framework):
    rewards, next_q_values = rng.normal(size=BATCH), rng.normal(size=(BATCH, ACTIONS))
    terminations, discounts = np.arange(BATCH) % 2.0, rng.uniform(0.9, 1, BATCH)
    expected = [
        reward if terminated else reward + discount * max(q_values)
        for reward, terminated, discount, q_values in zip(
            rewards, terminations, discounts, next_q_values, strict=True
        )
    ]
    targets = framework.script.td_targets(
        *map(framework.array, (rewards, terminations, discounts, next_q_values))
    )
    tolerance = framework.tolerance
    np.testing.assert_allclose(framework.numpy(targets), expected, rtol=tolerance, atol=tolerance)


def test_td_loss_is_the_formula(framework):
    targets = rng.normal(size=BATCH)
    expected = np.mean([(y - q[a]) ** 2 for y, q, a in zip(targets, Q_VALUES, TAKEN, strict=True)])
    loss = framework.script.td_loss(*map(framework.array, (Q_VALUES, TAKEN, targets)))
    assert framework.numpy(loss) == pytest.approx(expected, rel=framework.tolerance)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_distill_loss_is_the_formula(framework, temperature):
    teacher, student = softmax(TEACHER_Q_VALUES / temperature), softmax(Q_VALUES / temperature)
    expected = np.mean(np.sum(teacher * (np.log(teacher) - np.log(student)), axis=1))
    loss = framework.script.distill_loss(*map(framework.array, (Q_VALUES, TEACHER_Q_VALUES)), temperature)
    assert framework.numpy(loss) == pytest.approx(expected, rel=framework.tolerance)


def test_distill_loss_of_identical_policies_is_zero(framework):
    # Q-values that differ by a constant per state give the same policy.
    shifted = TEACHER_Q_VALUES + rng.normal(size=(BATCH, 1))
    loss = framework.script.distill_loss(*map(framework.array, (shifted, TEACHER_Q_VALUES)), 0.5)
    assert framework.numpy(loss) == pytest.approx(0, abs=framework.tolerance)


def test_distill_loss_survives_a_policy_without_doubt(framework):
    certain = framework.array(np.array([[1000.0, 0.0, -1000.0]]))
    loss = framework.script.distill_loss(framework.array(np.zeros((1, 3))), certain, 0.01)
    assert np.isfinite(framework.numpy(loss))


def test_gradients_agree_with_finite_differences(float64_framework):
    script, array = float64_framework.script, float64_framework.array
    taken, targets, teacher = array(TAKEN), array(rng.normal(size=BATCH)), array(TEACHER_Q_VALUES)
    float64_framework.check_gradient(lambda q: script.td_loss(q, taken, targets), Q_VALUES)
    float64_framework.check_gradient(lambda q: script.distill_loss(q, teacher, 0.3), Q_VALUES)


@pytest.mark.parametrize(
    ("returns", "teacher_return", "baseline_return", "step", "distill_steps", "expected"),
    [
        ([], 20.0, 0.0, 0, None, 1.0),
        ([20.0] * 9, 20.0, 0.0, 500, None, 1.0),  # fewer than 10 games say nothing yet
        ([5.0] * 10, 20.0, 0.0, 500, None, 0.75),
        ([0.0, 10.0] * 5, 20.0, 0.0, 500, None, 0.75),
        ([20.0] * 10, 20.0, 0.0, 500, None, 0.0),
        ([30.0] * 10, 20.0, 0.0, 500, None, 0.0),  # above the teacher
        ([-21.0] * 10, 20.0, 0.0, 500, None, 2.05),  # the published formula overshoots on Pong
        ([-20.7] * 10, 18.0, -20.7, 500, None, 1.0),  # measured from the random player it does not
        ([-1.35] * 10, 18.0, -20.7, 500, None, 0.5),
        ([-10.35] * 10, -5.0, -20.7, 500, None, 1 - 10.35 / 15.7),  # a teacher below 0
        ([5.0] * 10, 20.0, 0.0, 999, 1000, 0.75),
        ([5.0] * 10, 20.0, 0.0, 1000, 1000, 0.0),  # t ≥ t0
        ([], 20.0, 0.0, 1000, 1000, 0.0),
        ([], 20.0, 0.0, 0, 0, 0.0),
    ],
)
def test_distill_coefficient(script, returns, teacher_return, baseline_return, step, distill_steps, expected):
    coefficient = script.distill_coefficient(step, returns, teacher_return, baseline_return, distill_steps)
    assert coefficient == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("teacher_return", "baseline_return", "advice"),
    [(0.0, 0.0, "--return-normalization random"), (-3.0, 0.0, "--return-normalization random"),
     (-20.7, -20.7, "better teacher"), (1.0, 1.7, "better teacher")],
)  # fmt: skip
def test_a_teacher_that_gives_the_coefficient_no_meaning_is_refused(
    script, teacher_return, baseline_return, advice
):
    with pytest.raises(SystemExit, match=advice):
        script.check_teacher_return(teacher_return, baseline_return)


def test_a_teacher_below_zero_is_fine_when_measured_from_the_random_player(script):
    script.check_teacher_return(-5.0, -20.7)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 1.0), (500_000, 0.505), (1_000_000, 0.01), (9_000_000, 0.01)]
)
def test_epsilon_falls_as_published(script, step, expected):
    assert script.linear_schedule(1.0, 0.01, 0.1 * 10_000_000, step) == pytest.approx(expected)


def test_a_schedule_without_duration_is_at_its_end(script):
    np.testing.assert_allclose(script.linear_schedule(1.0, 0.01, 0, np.array([1, 2])), [0.01, 0.01])
