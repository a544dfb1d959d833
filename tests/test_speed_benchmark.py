"""The tables of the benchmarks are what was measured, and the baseline does the same work as the script."""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import baseline
import programs
import speed
from both_scripts import JAX, PONG_TEACHER, TORCH, name_of, use_network

CPU = torch.device("cpu")

MEASUREMENTS = [
    *(speed.Measurement("fill", "baseline", value) for value in (100.0, 300.0, 200.0)),
    *(speed.Measurement("fill", "torch", value) for value in (800.0, 600.0, 100.0)),
    *(speed.Measurement("fill", "jax", value) for value in (100.0, 900.0, 100.0)),
    speed.Measurement("offline", "baseline", 2.0),
    speed.Measurement("offline", "torch", 5.0),
    speed.Measurement("offline", "jax", 1.0),
    speed.Measurement("online", "baseline", 8.0),
    speed.Measurement("online", "torch", 24.0),
    speed.Measurement("online", "jax", 16.0),
    speed.Measurement("evaluation", "baseline", 3.0),
    speed.Measurement("evaluation", "torch", 12.0),
    speed.Measurement("evaluation", "jax", 6.0),
    speed.Measurement("memory", "baseline", 56.0),
    speed.Measurement("memory", "torch", 7.0),
    speed.Measurement("memory", "jax", 14.0),
]
LIMITS = {"flops_per_s": 100e9, "frames_per_s": 8_000.0}
UPDATE_FLOPS = {"baseline": 15 * 10**9, "torch": 10 * 10**9, "jax": 10 * 10**9}


@pytest.fixture
def table():
    return speed.summarize(MEASUREMENTS, LIMITS, UPDATE_FLOPS, speed.measures(game_frames=4_000))


@pytest.mark.parametrize(
    ("measure", "program", "expected"),
    [
        ("fill", "baseline", (200, 1, 0.1)),  # 200 · 4 / 8,000
        ("fill", "torch", (600, 3, 0.3)),
        ("fill", "jax", (100, 0.5, 0.05)),
        ("offline", "baseline", (2, 1, 0.3)),  # 2 · 15e9 / 100e9
        ("offline", "torch", (5, 2.5, 0.5)),
        ("online", "baseline", (8, 1, 0.3)),  # 8 / 4 · 15e9 / 100e9
        ("online", "torch", (24, 3, 0.6)),
        ("evaluation", "baseline", (3, 1, 0.025)),  # 3 · 4,000 / 60 / 8,000
        ("evaluation", "torch", (12, 4, 0.1)),
        ("memory", "torch", (7, 8, None)),  # less is better
    ],
)
def test_medians_ratios_and_shares(table, measure, program, expected):
    assert table[measure][program] == pytest.approx(expected)


def test_the_table_has_the_measures_that_were_made(table):
    markdown = speed.to_markdown(table, speed.measures(game_frames=4_000)).splitlines()
    assert markdown[0] == "| | baseline | PyTorch | JAX |"
    assert markdown[2] == "| fill, steps/s | 200, 10% | 600, **3×**, 30% | 100, **0.5×**, 5% |"
    assert markdown[-1] == "| memory, GB | 56 | 7, **8×** | 14, **4×** |"
    assert len(markdown) == 2 + 5


def test_the_json_holds_every_measurement_and_the_machine(table, tmp_path):
    machine = speed.describe_machine("cpu")
    amounts = speed.AMOUNTS["quick"]
    speed.write_json(tmp_path / "speed.json", machine, amounts, MEASUREMENTS, LIMITS, UPDATE_FLOPS, table)
    written = json.loads((tmp_path / "speed.json").read_text())
    assert [speed.Measurement(**entry) for entry in written["measurements"]] == MEASUREMENTS
    assert written["summary"]["offline"]["torch"] == {"median": 5.0, "ratio": 2.5, "share": 0.5}
    assert written["machine"]["packages"]["torch"] == torch.__version__


@pytest.fixture(scope="module")
def pong():
    args = TORCH.Args(env_id="PongNoFrameskip-v4", teacher_model_path=PONG_TEACHER, buffer_size=500)
    return baseline.Baseline(args, CPU)


def test_the_baseline_plays_the_usual_game(pong):
    observation, _ = pong.env.reset(seed=0)
    rewards = set()
    for _ in range(150):
        assert observation.shape == (4, 84, 84)
        assert observation.dtype == np.uint8
        observation, reward, *_ = pong.env.step(0)
        rewards.add(float(reward))
    assert rewards == {0.0, -1.0}
    assert not (observation[2] == observation[3]).all()  # the ball moves: four frames, no copies


def test_rewards_are_clipped():
    env = baseline.make_env("SeaquestNoFrameskip-v4")  # 20 points a hit
    env.action_space.seed(0)
    env.reset(seed=0)
    rewards = {float(env.step(env.action_space.sample())[1]) for _ in range(300)}
    assert rewards == {0.0, 1.0}


def test_the_baseline_updates_like_the_script(pong):
    """Same batch, weights and settings: so what is timed is the same work."""
    pong.fill(40)
    assert pong.replay.pos == 40
    # Forty steps bring few rewards and ends of episodes: here are some.
    rewards, dones = torch.linspace(-1, 1, 32)[:, None], torch.arange(32)[:, None] % 3 // 2.0
    batch = pong.replay.sample(32)._replace(rewards=rewards, dones=dones)
    state = TORCH.create_train_state(pong.args, pong.num_actions, CPU)
    state.student.load_state_dict(pong.student.state_dict())
    with torch.no_grad():
        pong.target_network.network[-1].weight.mul_(
            100
        )  # another network than the student, whose Q-values matter
    state.target_network.load_state_dict(pong.target_network.state_dict())
    frames = torch.cat([batch.observations, batch.next_observations]).view(-1, 84, 84)
    stacks = np.arange(len(frames)).reshape(2, 32, 4)
    script_batch = TORCH.Batch(
        stacks=stacks[0],
        actions=batch.actions[:, 0].numpy(),
        rewards=batch.rewards[:, 0].numpy(),
        next_stacks=stacks[1],
        terminations=batch.dones[:, 0].numpy(),
        discounts=np.full(32, pong.args.gamma, np.float32),
        teacher_q_values=pong.teacher(batch.observations).numpy(),
    )
    script_update = partial(TORCH.update, pong.args, state, frames, script_batch, np.array(0.5, np.float32))
    for _ in range(2):  # the second on what the first has changed
        expected = script_update()
        for name, loss in pong.update(batch, distill_coeff=0.5).items():
            torch.testing.assert_close(loss, expected[name], rtol=1e-4, atol=1e-6)

    # The baseline's has the teacher's forward pass as well, a multiplication and an addition per weight.
    convolutions = 20 * 20 * 32 * 4 * 8 * 8 + 9 * 9 * 64 * 32 * 4 * 4 + 7 * 7 * 64 * 64 * 3 * 3
    teacher_flops = 2 * (convolutions + 3136 * 512 + 512 * 6)
    own_flops = programs.count_flops(script_update)
    assert programs.count_flops(lambda: pong.update(batch, 0.5)) == own_flops + 32 * teacher_flops


def test_stacked_observations_take_56_kilobytes(pong):
    # Two stacks of four frames, action int64, and three float32: reward, done, timeout.
    assert baseline.replay_bytes(1_000, pong.env) == 1_000 * (2 * 4 * 84 * 84 + 8 + 3 * 4)


@pytest.mark.slow
@pytest.mark.parametrize(("phases_of", "script"), [(programs.TorchPhases, TORCH), (programs.JaxPhases, JAX)])
def test_requests_reach_the_phases(phases_of, script, tmp_path, monkeypatch):
    use_network(monkeypatch, script, "linear")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(programs, "WARM_UP_STEPS", {"cpu": {"fill": 8, "offline": 1, "online": 8}})
    monkeypatch.setattr(programs, "BUFFER_SIZE", 200)
    monkeypatch.setattr(programs, "FULL_BUFFER_SIZE", 1_000)
    monkeypatch.setattr(programs, "ADDS", 10)
    monkeypatch.setattr(programs, "SAMPLES", 10)
    with phases_of(name_of(script), "cpu", num_envs=2) as phases:
        requests = programs.Requests(phases, "cpu")
        for phase, steps in (("fill", 8), ("offline", 2), ("online", 8)):
            assert requests.answer(phase, steps) > 0
        assert phases.state.offline_step == 1 + 2
        assert phases.state.online_step == 8 + 8
        assert phases.state.gradient_steps == (1 + 2) + (8 + 8) / 4
        assert requests.answer("evaluate", 2, 100) > 0
        assert requests.answer("time_replay", 200).keys() == {"add_us", "sample_us"}
        frames_alone = 1_000 * 84 * 84
        assert frames_alone < requests.answer("replay_bytes") < 1.02 * frames_alone
