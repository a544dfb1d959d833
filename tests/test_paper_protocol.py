"""Every option of the paper's protocol does what it says, in both scripts."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tyro
from both_scripts import JAX, TORCH
from test_training import filled_replay, rehearse, some_batch, tiny

PAGE = (
    (Path(__file__).resolve().parents[1] / "docs" / "qdagger.md").read_text("utf-8").replace("\\\n", "")
)  # long commands go over several lines
RATE = 1e-3


@pytest.fixture(params=[TORCH, JAX], ids=["torch", "jax"])
def script(request):
    return request.param


@pytest.fixture
def scalar_student(script, monkeypatch):
    """A student that is one number, 1, its Q-value of everything."""
    monkeypatch.setattr(script.module, "StudentNetwork", script.Scalar)


def change_by_one_update(script, distill_coeff: float, **options) -> float:
    """How far Adam's first step moves that number."""
    args = tiny(script, learning_rate=RATE, **options)
    state = script.create_state(args)
    before = script.weights(state)["number" if script is TORCH else "params/number"].item()
    script.update(state, some_batch(script, 8), distill_coeff, args)
    return script.weights(state)["number" if script is TORCH else "params/number"].item() - before


@pytest.mark.parametrize("distill_coeff", [1.0, 0.25, 0.0])
def test_the_learning_rate_follows_the_coefficient(script, scalar_student, distill_coeff):
    # Adam's first step is the learning rate.
    change = change_by_one_update(script, distill_coeff, final_learning_rate=RATE / 10)
    assert abs(change) == pytest.approx(RATE * (0.1 + 0.9 * distill_coeff), rel=1e-2)
    assert abs(change_by_one_update(script, distill_coeff)) == pytest.approx(RATE, rel=1e-2)


def test_adams_epsilon(script, scalar_student):
    batch = some_batch(script, 8)
    targets = np.asarray(batch.rewards) + 0.99 * (1 - np.asarray(batch.terminations))
    gradient = np.mean(2 * (1 - targets))  # of the TD loss; the distillation has none: all actions are equal
    assert abs(gradient) > 0.01
    change = change_by_one_update(script, 0.0, adam_epsilon=0.5)
    assert change == pytest.approx(-RATE * gradient / (abs(gradient) + 0.5), rel=1e-3)


def test_the_huber_loss(script, scalar_student):
    batch = some_batch(script, 32)
    errors = np.asarray(batch.rewards) + 0.99 * (1 - np.asarray(batch.terminations)) - 1.0
    assert (np.abs(errors) > 1).any()
    assert (np.abs(errors) < 1).any()
    huber = np.where(np.abs(errors) <= 1, errors**2 / 2, np.abs(errors) - 0.5)
    for name, expected in [("huber", huber), ("mse", errors**2)]:
        args = tiny(script, td_loss=name)
        losses = script.update(script.create_state(args), batch, 1.0, args)
        assert losses["td_loss"] == pytest.approx(expected.mean(), rel=1e-5)


def test_the_weight_of_the_distillation_is_a_factor_beside_the_coefficient(script, scalar_student):
    args = tiny(script, distill_weight=3.0)
    losses = script.update(script.create_state(args), some_batch(script, 8), 0.5, args)
    assert losses["distill_loss"] > 0.01
    expected = losses["td_loss"] + 0.5 * 3.0 * losses["distill_loss"]
    assert losses["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_width_of_the_dense_layer(script):
    state = script.create_state(tiny(script, dense_width=512))
    weights = script.to_torch(script.weights(state))
    assert weights["network.5.weight"].shape == (512, 3872)
    assert weights["network.7.weight"].shape == (6, 512)


def test_epsilon_falls_within_exploration_steps_of_the_online_phase(script):
    happened = rehearse(script, 8, exploration_steps=80)
    expected = [max(0.01, 1 - 0.99 * step / 80) for step in range(480)]
    np.testing.assert_allclose(happened.epsilon, expected)


@pytest.mark.parametrize("n_step", [1, 3])
def test_rewards_of_n_steps_reach_the_loss(script, scalar_student, n_step):
    """The second transition of every environment: its TD error, from the rewards of the stream."""
    args = tiny(script, n_step=n_step)
    replay = filled_replay(script, n_step)
    slots = np.arange(8) * (len(replay.frames) // 8) + 1
    rewards = np.array([np.asarray(replay.rewards)[slots + k] for k in range(n_step)])
    targets = sum(0.99**k * rewards[k] for k in range(n_step)) + 0.99**n_step
    losses = script.update(script.create_state(args), script.batch(replay, slots), 0.0, args)
    assert losses["td_loss"] == pytest.approx(np.mean((targets - 1) ** 2), rel=1e-5)


def test_target_network_frequency_and_learning_starts(script):
    often, seldom = (rehearse(script, 8, target_network_frequency=n) for n in (8, 400))
    assert often.points["losses/td_loss"] != seldom.points["losses/td_loss"]
    assert rehearse(script, 8, learning_starts=200).gradient_steps[0] == 204


def test_the_documented_command_sets_every_row_of_the_papers_settings():
    (command,) = re.findall(r"python cleanrl/qdagger_dqn_atari_impalacnn\.py (.*--td-loss huber.*)", PAGE)
    args = tyro.cli(TORCH.module.Args, args=shlex.split(command))
    assert (args.n_step, args.temperature, args.distill_weight, args.distill_steps) == (
        3,
        0.1,
        3.0,
        1_500_000,
    )
    assert (args.offline_steps, args.learning_starts) == (1_000_000, 20_000)
    assert (args.target_network_frequency, args.td_loss, args.adam_epsilon) == (8000, "huber", 1.5e-4)
    assert (args.learning_rate, args.final_learning_rate) == (1e-4, 1e-5)
    assert (args.end_e, args.exploration_steps, args.repeat_action_probability) == (0.01, 50_000, 0.25)
    assert (args.return_normalization, args.dense_width) == ("random", 512)
