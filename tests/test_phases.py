"""When things happen: gradient steps, target updates, ε, λ, points of curves. Games take no time here.

What needs no framework is the same text in PyTorch and JAX (test_same_text.py), and tested in PyTorch.
"""

import time
from contextlib import ExitStack
from functools import partial

import jax
import numpy as np
import pytest
from both_scripts import (
    DQN_JAX,
    JAX,
    NUM_ACTIONS,
    TORCH,
    is_qdagger,
    linear_teacher,
    linear_weights,
    name_of,
)
from rehearsal import NoGame, NoRun, RandomGame, rehearsal_args, rehearse, td_losses_by_the_rules

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("num_envs", "steps_per_call", "options"),
    [
        (1, None, {}),
        (8, None, {}),
        (3, 4, {"train_frequency": 3, "target_network_frequency": 7, "tau": 0.5, "learning_starts": 37}),
        (8, 4, {"train_frequency": 2, "target_network_frequency": 10, "tau": 0.5}),
        (8, 4, {"train_frequency": 3, "target_network_frequency": 7, "learning_starts": 0}),
        (8, None, {"train_frequency": 5, "target_network_frequency": 1, "tau": 0.1, "total_timesteps": 203}),
    ],
)
def test_gradient_steps_and_target_updates_come_when_the_rules_say(script, num_envs, steps_per_call, options):
    make_games = partial(NoGame, reward=0.25)
    happened = rehearse(
        script, num_envs, make_games, loss_interval=3, steps_per_call=steps_per_call, **options
    )
    offline, online = td_losses_by_the_rules(rehearsal_args(script, num_envs, **options), reward=0.25)
    assert happened.state.gradient_steps == len(offline) + len(online)
    points = happened.points["losses/td_loss"]
    every_third = [
        point for i, point in enumerate(online, len(offline) + 1) if i % 3 == 0 or point == online[-1]
    ]
    assert [step for step, _ in points] == [step for step, _ in every_third]
    np.testing.assert_allclose(points, every_third, rtol=1e-4)
    if is_qdagger(script):
        points = happened.points["charts/offline/q_loss"]
        assert [step for step, _ in points] == [*range(3, len(offline) + 1, 3)]
        np.testing.assert_allclose([loss for _, loss in points], offline[2::3], rtol=1e-4)


@pytest.mark.parametrize("most", [1, 3])
def test_no_more_gradient_steps_than_agreed_are_done_in_one_call(algorithm, monkeypatch, most):
    learn, before_and_after = algorithm.learn, []

    def recording_learn(args, state, *others):
        before = state.gradient_steps
        losses = learn(args, state, *others)
        before_and_after.append((before, state.gradient_steps))
        return losses

    monkeypatch.setattr(algorithm, "learn", recording_learn)
    rehearse(algorithm, 32, steps_per_call=most, loss_interval=100)  # 8 gradient steps are due at once
    assert max(after - before for before, after in before_and_after) == most


def test_rewards_of_n_steps_reach_the_loss():
    happened = rehearse(TORCH, 8, partial(NoGame, reward=0.25), n_step=3)
    offline, online = td_losses_by_the_rules(rehearsal_args(TORCH, 8, n_step=3), reward=0.25)
    np.testing.assert_allclose(happened.values("charts/offline/q_loss"), offline, rtol=1e-4)
    np.testing.assert_allclose(happened.points["losses/td_loss"], online, rtol=1e-4)


@pytest.mark.parametrize("num_envs", [1, 8])
def test_epsilon_and_the_gradient_steps_do_not_depend_on_the_number_of_environments(algorithm, num_envs):
    happened = rehearse(algorithm, num_envs)
    before = 30 if is_qdagger(algorithm) else 0  # ε has been falling since the offline phase began
    expected = [max(0.01, 1 - 0.99 * (before + step) / 120) for step in range(240)]
    np.testing.assert_allclose(happened.epsilon, expected)
    assert happened.points["charts/epsilon"] == [(before + 240, pytest.approx(0.01))]
    # The published scripts learn in every fourth step that is above learning_starts.
    steps = [step - before for step, _ in happened.points["losses/td_loss"]]
    assert steps == [step for step in range(241) if step > 50 and step % 4 == 0]


def test_the_offline_loss_is_the_td_loss_and_the_weighted_distillation_loss():
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(196, 6)).astype(np.float32), rng.normal(size=6).astype(np.float32)
    teacher = linear_teacher(TORCH, kernel / 8, bias)
    start = linear_weights(TORCH, 0 * kernel, 0 * bias)
    happened = rehearse(TORCH, 8, RandomGame, teacher=teacher, start=start, distill_weight=3.0)
    names = ("loss", "q_loss", "distill_loss")
    loss, td_loss, distill_loss = [happened.values(f"charts/offline/{name}") for name in names]
    np.testing.assert_allclose(loss, td_loss + 3 * distill_loss, rtol=1e-5)
    assert distill_loss.min() > 0


def test_epsilon_falls_from_start_to_end_while_the_teacher_plays():
    happened = rehearse(TORCH, 8, start_e=0.9, end_e=0.3)
    np.testing.assert_allclose(happened.teacher_epsilon, [0.9 - 0.6 * step / 48 for step in range(48)])


def test_epsilon_falls_within_exploration_steps_of_the_online_phase():
    happened = rehearse(TORCH, 8, exploration_steps=80)
    np.testing.assert_allclose(happened.epsilon, [max(0.01, 1 - 0.99 * step / 80) for step in range(240)])


def test_actions_are_random_with_epsilon_and_else_the_networks_best(algorithm):
    greedy = rehearse(algorithm, 8, start_e=0.0, end_e=0.0)
    assert set(np.ravel(greedy.actions)) == {0}  # all are as good: the first
    assert not is_qdagger(algorithm) or set(np.ravel(greedy.teacher_actions)) == {5}
    random = rehearse(algorithm, 8, start_e=1.0, end_e=1.0)
    assert np.bincount(np.ravel(random.actions), minlength=6).min() > 20
    assert not is_qdagger(algorithm) or len(set(np.ravel(random.teacher_actions))) == 6


@pytest.mark.parametrize("script", [TORCH, JAX], ids=["torch", "jax"])
def test_a_teacher_that_samples_plays_and_is_measured_so(script):
    """Actions 0 and 5 with probabilities 1/4 and 3/4; what is stored are its Q-values themselves."""
    preferences = np.array([0, -100, -100, -100, -100, np.log(3)], np.float32)
    teacher = linear_teacher(script, np.zeros((196, 6), np.float32), preferences, sampling_temperature=1.0)
    happened = rehearse(script, 8, teacher=teacher, teacher_steps=2000, start_e=0.0, end_e=0.0)
    actions = np.ravel(happened.teacher_actions)
    assert set(actions) == {0, 5}
    assert np.mean(actions == 5) == pytest.approx(3 / 4, abs=0.04)
    stored = happened.state.teacher_replay.columns["teacher_q_values"]
    is_used = np.flatnonzero(stored.any(axis=1))
    assert len(is_used) > 1000
    np.testing.assert_allclose(stored[is_used], np.tile(preferences, (len(is_used), 1)), rtol=1e-6)

    run = NoRun(NoGame)
    script.evaluate_teacher(rehearsal_args(script, 8), happened.state, teacher, run)
    assert run.played_temperatures == [1.0]


@pytest.mark.parametrize("script", [TORCH, JAX], ids=["torch", "jax"])
def test_the_moving_average_plays_is_evaluated_and_saved(script):
    """Here it never moves: it prefers action 0 as at the start, and the student soon its teacher's, 5."""
    start = linear_weights(script, np.zeros((196, 6), np.float32), np.eye(6, dtype=np.float32)[0] / 4)
    options = {"start_e": 0.0, "end_e": 0.0, "learning_rate": 0.1, "online_eval_frequency": 100}
    still = rehearse(script, 8, start=start, average_decay=1.0, **options)
    moved = rehearse(script, 8, start=start, **options)
    for happened, action in ((still, 0), (moved, 5)):
        assert set(np.ravel(happened.actions[5:])) == {action}
    assert len(still.run.played) == len(moved.run.played) > 4
    assert set(still.run.played_q_values) == {0.25}
    assert not set(moved.run.played_q_values) & {0.25}
    for _, saved in still.run.saved:
        assert all(np.array_equal(saved[name], start[name]) for name in start)


def test_each_environment_explores_with_its_own_epsilon():
    q_values = np.eye(6, dtype=np.float32)[[4] * 1000]
    actions = TORCH.epsilon_greedy(np.random.default_rng(0), np.repeat([0.0, 1.0], 500), q_values)
    assert (actions[:500] == 4).all()
    assert np.bincount(actions[500:], minlength=6).min() > 50
    half = TORCH.epsilon_greedy(np.random.default_rng(0), np.full(1000, 0.5), q_values)
    assert np.mean(half == 4) == pytest.approx(1 / 2 + 1 / 12, abs=0.05)


def test_the_phases_play_different_games():
    seeds = [tuple(seed) for which in (1, 2) for seed in rehearse(TORCH, 8, seed=which).run.seeds]
    assert len(seeds) == len(set(seeds)) == 4


def test_the_coefficient_follows_the_finished_games():
    # Each of 2 environments finishes a game every 15 steps: the tenth game ends after 150 steps.
    games = partial(NoGame, game_length=15, game_return=4.5)  # and 5.5: 5 on average, a quarter of G_T
    happened = rehearse(TORCH, 2, games)
    expected = [1.0 if step < 150 else 0.75 for step in range(52, 241, 4)]
    np.testing.assert_allclose(happened.coefficients(), expected, atol=1e-5)
    assert happened.points["charts/distill_coeff"] == [(30 + 240, pytest.approx(0.75))]


def test_a_resumed_run_keeps_the_returns_of_its_recent_games():
    state = rehearse(TORCH, 2, partial(NoGame, game_length=15, game_return=4.5)).state
    zeros = np.zeros((197, NUM_ACTIONS), np.float32)
    teacher = linear_teacher(TORCH, zeros[1:], zeros[0])
    resumed = NoRun(NoGame)  # in which no game ends
    TORCH.train_online(rehearsal_args(TORCH, 2, total_timesteps=280), state, teacher, resumed)
    assert resumed.points["charts/distill_coeff"] == [(30 + 280, pytest.approx(0.75))]


def test_distill_steps_end_the_distillation():
    # Between two gradient steps of the same environment step.
    happened = rehearse(TORCH, 8, distill_steps=206)
    expected = [float(step < 206) for step in range(52, 241, 4)]
    np.testing.assert_allclose(happened.coefficients(), expected, atol=1e-5)


def test_games_are_plotted_at_the_step_of_their_environment(algorithm):
    happened = rehearse(algorithm, 3, partial(NoGame, game_length=40, game_return=7.0))
    before = 30 if is_qdagger(algorithm) else 0
    expected = [(before + 120 * game - 3 + i + 1, 7.0 + i) for game in (1, 2) for i in range(3)]
    assert happened.points["charts/episodic_return"] == expected
    assert happened.points["charts/episodic_length"] == [(step, 160.0) for step, _ in expected]
    if is_qdagger(algorithm):
        assert happened.state.recent_returns == [7.0, 8.0, 9.0] * 2


def test_the_student_is_evaluated_and_saved_while_it_learns_offline():
    happened = rehearse(TORCH, 8, offline_eval_frequency=13, steps_per_call=10, loss_interval=100)
    steps = (13, 26, 30)
    assert happened.run.played == [f"offline-{step}" for step in steps]
    assert happened.points["charts/offline/avg_episodic_return"] == [(step, 0.5) for step in steps]
    assert [suffix for suffix, _ in happened.run.saved] == ["-offline"] * 3
    numbers = [weights.popitem()[1].item() for _, weights in happened.run.saved]
    assert 1.0 > numbers[0] > numbers[1] > numbers[2]
    assert happened.run.played_q_values == numbers  # the student plays, not its target network


def test_the_network_is_evaluated_online_as_often_as_it_is_said(algorithm):
    """With 3 environments the first steps at or after which 50 are over are 51, 102, 153 and 204."""
    name = "online_eval_frequency" if is_qdagger(algorithm) else "eval_frequency"
    never = rehearse(algorithm, 3)
    assert not any(played.startswith("online") for played in never.run.played)
    happened = rehearse(algorithm, 3, **{name: 50})
    before = 30 if is_qdagger(algorithm) else 0
    steps = [before + step for step in (51, 102, 153, 204)]
    assert [played for played in happened.run.played if "offline" not in played] == [
        f"online-{step}" for step in steps
    ]
    assert happened.points["charts/online/avg_episodic_return"] == [(step, 0.5) for step in steps]
    assert happened.run.candidates == [0.5] * 4
    assert happened.points["losses/td_loss"] == never.points["losses/td_loss"]  # it changes nothing else
    assert happened.actions == never.actions


def test_evaluations_have_as_many_games_as_their_options_say(algorithm):
    frequency = "online_eval_frequency" if is_qdagger(algorithm) else "eval_frequency"
    options = {"eval_episodes": 4, frequency: 100}
    if not is_qdagger(algorithm):
        assert set(rehearse(algorithm, 8, **options).run.num_games) == {4}
        return
    options |= {"teacher_eval_episodes": 3}
    happened = rehearse(algorithm, 8, **options)
    assert {name.partition("-")[0] for name in happened.run.played} == {"offline", "online"}
    assert set(happened.run.num_games) == {4}
    run = NoRun(NoGame)
    teacher = linear_teacher(algorithm, np.zeros((196, NUM_ACTIONS), np.float32), np.zeros(NUM_ACTIONS))
    algorithm.evaluate_teacher(rehearsal_args(algorithm, 8, **options), happened.state, teacher, run)
    assert run.num_games == [3]


def test_a_checkpoint_can_be_made_before_every_step_and_call(algorithm):
    happened = rehearse(algorithm, 8, loss_interval=100)
    steps = 240 // 8 + (48 // 8 + 30 if is_qdagger(algorithm) else 0)
    assert happened.run.checkpoints >= steps


def test_points_come_every_thousand_environment_steps_and_at_the_end(algorithm):
    happened = rehearse(algorithm, 3, total_timesteps=2100, learning_starts=2090)
    before = 30 if is_qdagger(algorithm) else 0
    assert [step - before for step, _ in happened.points["charts/SPS"]] == [1002, 2001, 2100]
    assert [step - before for step, _ in happened.points["charts/epsilon"]] == [1002, 2001, 2100]


def test_sps_are_the_steps_of_training_by_its_seconds(algorithm, monkeypatch):
    """Those of the evaluations do not count."""
    play = NoRun.play

    def slow_play(run: NoRun, name: str, *others, **settings):
        time.sleep(name.startswith("online"))
        return play(run, name, *others, **settings)

    monkeypatch.setattr(NoRun, "play", slow_play)
    frequency = "online_eval_frequency" if is_qdagger(algorithm) else "eval_frequency"
    started = time.monotonic()
    happened = rehearse(algorithm, 8, **{frequency: 100})  # two evaluations
    seconds = happened.state.online_seconds if is_qdagger(algorithm) else happened.state.seconds
    assert 0 < seconds < time.monotonic() - started - 1.9
    assert happened.points["charts/SPS"][-1][1] == pytest.approx(240 / seconds)


@pytest.mark.parametrize("script", [JAX, DQN_JAX], ids=name_of)
def test_jax_compiles_nothing_more_once_every_shape_has_come(script):
    with ExitStack() as second_half:

        class Games(NoGame):
            def step_async(self, actions: np.ndarray) -> None:
                super().step_async(actions)
                if self.steps == 15:
                    second_half.enter_context(jax.no_tracing())  # from here on it is an error

        happened = rehearse(script, 8, Games, loss_interval=100, tau=0.25)
    assert len(happened.actions) == 30


class ImprovingGame(NoGame):
    """Its games return 1, 2, 3, …"""

    def step_wait(self):
        step = super().step_wait()
        number = float(self.steps // self.game_length)
        return step._replace(finished_games=[g._replace(episodic_return=number) for g in step.finished_games])


def test_only_the_last_ten_games_count():
    happened = rehearse(TORCH, 1, partial(ImprovingGame, game_length=12))
    assert happened.state.recent_returns == list(range(11, 21))
    assert happened.points["charts/distill_coeff"] == [(30 + 240, pytest.approx(1 - 15.5 / 20))]
