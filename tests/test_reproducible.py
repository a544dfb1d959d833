"""The same seed gives the same run, and PyTorch and JAX draw, explore and learn alike."""

import os
from pathlib import Path

import numpy as np
import pytest
from both_scripts import (
    DQN_JAX,
    DQN_TORCH,
    JAX,
    NUM_ACTIONS,
    ROOT,
    TORCH,
    create_state,
    is_qdagger,
    linear_teacher,
    linear_weights,
    name_of,
    network,
    read_curves,
    run_python,
    use_network,
    weights,
)
from rehearsal import RandomGame, rehearse

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
@pytest.mark.parametrize("script", [TORCH, DQN_JAX], ids=name_of)
def test_a_run_with_real_games_has_the_same_bits_each_time(script, train):
    outcomes = []
    for name in ("first", "again"):
        options = {"offline_eval_frequency": 6} if script is TORCH else {"save_replay": Path("replay")}
        run_folder = train(script, name, short_games=True, eval_episodes=1, **options)
        curves = {tag: points for tag, points in read_curves(run_folder).items() if tag != "charts/SPS"}
        replay = {path.name: path.read_bytes() for path in Path("replay").glob("rows-*")}
        model = (run_folder / f"{name_of(script)}.cleanrl_model").read_bytes()
        outcomes.append((curves, model, replay))
    assert outcomes[0] == outcomes[1]
    assert len(outcomes[0][0]["losses/td_loss"]) == 1


def test_the_seed_decides_the_first_network_the_exploration_and_the_batches(script, monkeypatch):
    happened = [rehearse(script, 8, RandomGame, seed=seed) for seed in (1, 1, 2)]
    use_network(monkeypatch, script, "linear")
    starts = [weights(network(create_state(script, script.Args(seed=seed)))) for seed in (1, 1, 2)]
    kernels = [next(array for array in start.values() if array.ndim == 2) for start in starts]
    of_run = [(run.actions, run.teacher_actions, run.points["losses/td_loss"]) for run in happened]
    assert of_run[0] == of_run[1]
    assert np.array_equal(kernels[0], kernels[1])
    assert of_run[0][0] != of_run[2][0]
    assert of_run[0][2] != of_run[2][2]
    assert not is_qdagger(script) or of_run[0][1] != of_run[2][1]
    assert not np.array_equal(kernels[0], kernels[2])


@pytest.mark.parametrize(
    ("scripts", "options"),
    [
        ((TORCH, JAX), {"n_step": 3, "temperature": 0.5, "distill_steps": 150, "tau": 0.5}),
        ((DQN_TORCH, DQN_JAX), {"tau": 0.5}),
    ],
    ids=["qdagger", "dqn"],
)
def test_pytorch_and_jax_draw_the_same_batches_explore_alike_and_plot_the_same_curves(scripts, options):
    """From the same weights, in games of random frames and rewards: each loss depends on what was drawn."""
    rng = np.random.default_rng(0)
    kernels, biases = rng.normal(size=(2, 196, NUM_ACTIONS)) / 8, rng.normal(size=(2, NUM_ACTIONS))
    start, teacher = ((np.float32(kernels[i]), np.float32(biases[i])) for i in range(2))
    in_torch, in_jax = (
        rehearse(
            script,
            3,
            lambda num_envs: RandomGame(num_envs, game_length=7, game_return=3.0),
            linear_teacher(script, *teacher) if is_qdagger(script) else None,
            linear_weights(script, *start),
            target_network_frequency=7,
            **options,
        )
        for script in scripts
    )
    assert in_torch.actions == in_jax.actions
    assert in_torch.teacher_actions == in_jax.teacher_actions
    assert in_torch.epsilon == in_jax.epsilon
    assert in_torch.points.keys() == in_jax.points.keys() >= {"losses/td_loss", "charts/episodic_return"}
    for tag in in_torch.points.keys() - {"charts/SPS"}:
        np.testing.assert_allclose(
            in_torch.points[tag], in_jax.points[tag], rtol=2e-4, atol=1e-5, err_msg=tag
        )


TWO_DEVICES = """
import jax
import pytest
from both_scripts import DQN_JAX, JAX, name_of, use_network
from rehearsal import replace_games, tiny_args

first, second = jax.devices()
patch = pytest.MonkeyPatch()
replace_games(patch)
for script in (JAX, DQN_JAX):
    use_network(patch, script, "linear")
    for place, device in [("first", first), ("second", second)]:
        script.choose_device = lambda args: device
        script.main(tiny_args(script, exp_name=f"{name_of(script)}-{place}", tau=0.5))
"""


@pytest.mark.slow
def test_a_replay_buffer_on_another_device_than_the_learner_gives_the_same_run(tmp_path):
    """The buffer lies on the first CPU here."""
    status, _, errors = run_python(
        tmp_path,
        "-c",
        TWO_DEVICES,
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
        PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    )
    assert status == 0, errors
    for script in (JAX, DQN_JAX):
        runs = [
            next((tmp_path / "runs").glob(f"*__{name_of(script)}-{place}__*"))
            for place in ("first", "second")
        ]
        same, other = map(read_curves, runs)
        assert same.keys() == other.keys() >= {"losses/td_loss"}
        for tag in same.keys() - {"charts/SPS"}:
            np.testing.assert_allclose(same[tag], other[tag], rtol=1e-4, err_msg=tag)
