"""The losses and schedules against NumPy in float64, finite differences, and cases worked out by hand."""

import numpy as np
import pytest
import torch

from cleanrl.qdagger_dqn_atari_impalacnn import (
    check_teacher_return,
    distill_coefficient,
    distill_loss,
    linear_schedule,
    td_loss,
    td_targets,
)

rng = np.random.default_rng(0)
BATCH, ACTIONS = 7, 6
Q_VALUES = rng.normal(size=(BATCH, ACTIONS))
TEACHER_Q_VALUES = rng.normal(size=(BATCH, ACTIONS))
TAKEN = rng.integers(ACTIONS, size=BATCH)


def softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x)
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def test_td_targets_are_the_formula():
    rewards, next_q_values = rng.normal(size=BATCH), rng.normal(size=(BATCH, ACTIONS))
    terminations, discounts = rng.integers(2, size=BATCH).astype(float), rng.uniform(0.9, 1, BATCH)
    expected = [
        reward if terminated else reward + discount * max(q_values)
        for reward, terminated, discount, q_values in zip(
            rewards, terminations, discounts, next_q_values, strict=True
        )
    ]
    targets = td_targets(*map(torch.tensor, (rewards, terminations, discounts, next_q_values)))
    assert terminations.min() == 0
    assert terminations.max() == 1
    np.testing.assert_allclose(targets.numpy(), expected, rtol=1e-12)


def test_td_loss_is_the_formula():
    targets = rng.normal(size=BATCH)
    expected = np.mean([(y - q[a]) ** 2 for y, q, a in zip(targets, Q_VALUES, TAKEN, strict=True)])
    loss = td_loss(torch.tensor(Q_VALUES), torch.tensor(TAKEN), torch.tensor(targets))
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_distill_loss_is_the_formula(temperature):
    teacher, student = softmax(TEACHER_Q_VALUES / temperature), softmax(Q_VALUES / temperature)
    expected = np.mean(np.sum(teacher * (np.log(teacher) - np.log(student)), axis=1))
    loss = distill_loss(torch.tensor(Q_VALUES), torch.tensor(TEACHER_Q_VALUES), temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-10)


def test_distill_loss_of_identical_policies_is_zero():
    # Q-values that differ by a constant per state give the same policy.
    shifted = torch.tensor(TEACHER_Q_VALUES + rng.normal(size=(BATCH, 1)))
    assert distill_loss(shifted, torch.tensor(TEACHER_Q_VALUES), 0.5).item() == pytest.approx(0, abs=1e-12)


def test_distill_loss_survives_a_policy_without_doubt():
    certain = torch.tensor([[1000.0, 0.0, -1000.0]])
    assert torch.isfinite(distill_loss(torch.zeros(1, 3), certain, 0.01))


def test_gradients_agree_with_finite_differences():
    q_values = torch.tensor(Q_VALUES, requires_grad=True)
    taken, targets = torch.tensor(TAKEN), torch.tensor(rng.normal(size=BATCH))
    teacher = torch.tensor(TEACHER_Q_VALUES)
    assert torch.autograd.gradcheck(lambda q: td_loss(q, taken, targets), q_values)
    assert torch.autograd.gradcheck(lambda q: distill_loss(q, teacher, 0.3), q_values)


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
def test_distill_coefficient(returns, teacher_return, baseline_return, step, distill_steps, expected):
    coefficient = distill_coefficient(step, returns, teacher_return, baseline_return, distill_steps)
    assert coefficient == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("teacher_return", "baseline_return", "advice"),
    [(0.0, 0.0, "--return-normalization random"), (-3.0, 0.0, "--return-normalization random"),
     (-20.7, -20.7, "better teacher"), (1.0, 1.7, "better teacher")],
)  # fmt: skip
def test_a_teacher_that_gives_the_coefficient_no_meaning_is_refused(teacher_return, baseline_return, advice):
    with pytest.raises(SystemExit, match=advice):
        check_teacher_return(teacher_return, baseline_return)


def test_a_teacher_below_zero_is_fine_when_measured_from_the_random_player():
    check_teacher_return(-5.0, -20.7)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 1.0), (500_000, 0.505), (1_000_000, 0.01), (9_000_000, 0.01)]
)
def test_epsilon_falls_as_published(step, expected):
    assert linear_schedule(1.0, 0.01, 0.1 * 10_000_000, step) == pytest.approx(expected)


def test_a_schedule_without_duration_is_at_its_end():
    np.testing.assert_allclose(linear_schedule(1.0, 0.01, 0, np.array([1, 2])), [0.01, 0.01])
