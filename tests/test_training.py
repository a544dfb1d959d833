"""The PyTorch script as a whole: started as users start it, and its phases with a game that needs no time."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cleanrl.qdagger_dqn_atari_impalacnn as script
from cleanrl.utils.parallel_envs import FinishedGame, StepResult

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "cleanrl" / "qdagger_dqn_atari_impalacnn.py"
PONG_TEACHER = ROOT / "cleanrl" / "teachers" / "PongNoFrameskip-v4.safetensors"
PONG = ["--env-id", "PongNoFrameskip-v4", "--teacher-model-path", str(PONG_TEACHER)]
SMOKE = [
    *("--learning-starts", "10", "--total-timesteps", "16", "--buffer-size", "10", "--batch-size", "4"),
    *(
        "--teacher-steps",
        "16",
        "--offline-steps",
        "16",
        "--teacher-eval-episodes",
        "1",
        "--eval-episodes",
        "1",
    ),
]
TINY = script.Args(
    env_id="PongNoFrameskip-v4",
    teacher_model_path=PONG_TEACHER,
    return_normalization="random",  # a cut-off game of Pong ends below 0, for the teacher as well
    learning_starts=16,
    total_timesteps=64,
    train_frequency=8,
    buffer_size=60,
    batch_size=4,
    teacher_steps=64,
    offline_steps=6,
    offline_eval_frequency=4,
    target_network_frequency=3,
    teacher_eval_episodes=2,
    eval_episodes=2,
)
TAGS = {
    "charts/teacher/avg_episodic_return",
    "charts/offline/loss",
    "charts/offline/q_loss",
    "charts/offline/distill_loss",
    "charts/offline/avg_episodic_return",
    "charts/epsilon",
    "charts/distill_coeff",
    "charts/SPS",
    "losses/loss",
    "losses/td_loss",
    "losses/distill_loss",
    "losses/q_values",
    "eval/episodic_return",
}


def start(folder: Path, *options: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *options], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip


def run(folder: Path, *options: str) -> tuple[int, str, str]:
    process = start(folder, *options)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def only_run(folder: Path) -> Path:
    (run_folder,) = (folder / "runs").iterdir()
    return run_folder


def read_events(run_folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run_folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def read_student(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Trains within this process, with games cut off after a few frames; returns the run's folder."""
    monkeypatch.setattr(script, "evaluate", partial(script.evaluate, max_game_frames=300))

    def train_in(name: str, **options) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        script.main(dataclasses.replace(TINY, **options))
        return only_run(folder)

    return train_in


# ------------------------------------------------------------------------------------- as users start it


def test_the_published_smoke_settings_work_as_a_command(tmp_path):
    status, output, errors = run(tmp_path, *PONG, *SMOKE)
    assert status == 0, errors
    assert "Traceback" not in errors
    student = read_student(only_run(tmp_path) / f"{SCRIPT.stem}.cleanrl_model")
    network = script.StudentNetwork(num_actions=6)
    network.load_state_dict(student)
    assert read_events(only_run(tmp_path)).keys() >= TAGS
    assert re.search(r"memory: 0\.00 GB of host memory for the replay buffer", output)


@pytest.mark.parametrize(("num_envs", "save_model"), [(1, True), (3, False), (16, True)])
def test_the_published_smoke_settings_work_with_any_number_of_environments(train, num_envs, save_model):
    run_folder = train(
        "smoke",
        num_envs=num_envs,
        save_model=save_model,
        learning_starts=10,
        total_timesteps=16,
        train_frequency=4,
        buffer_size=10,
        batch_size=4,
        teacher_steps=16,
        offline_steps=16,
        teacher_eval_episodes=1,
        eval_episodes=1,
    )
    assert read_events(run_folder).keys() >= TAGS
    names = {path.name for path in run_folder.glob("*.cleanrl_model")}
    expected = {f"{SCRIPT.stem}-offline.cleanrl_model", f"{SCRIPT.stem}.cleanrl_model"}
    assert names == (expected if save_model else set())


def test_ctrl_c_leaves_a_saved_student_and_closed_event_files(tmp_path):
    options = [*PONG, *SMOKE, "--offline-steps", "1000000", "--offline-eval-frequency", "1000000"]
    process = start(tmp_path, *options)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        time.sleep(1)
        folders = list((tmp_path / "runs").glob("*"))
        if folders and len(read_events(folders[0]).get("charts/offline/loss", [])) >= 2:
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers as well
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "interrupted" in errors
    run_folder = only_run(tmp_path)
    assert read_student(run_folder / f"{SCRIPT.stem}.cleanrl_model").keys()
    assert read_events(run_folder)["charts/offline/loss"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--batch-size 11 --buffer-size 10", ["--batch-size 11", "--buffer-size 10"]),
        ("--env-id CartPole-v1", ["CartPole-v1", "not an Atari game"]),
        ("--env-id PnogNoFrameskip-v4", ["PnogNoFrameskip-v4", "PongNoFrameskip-v4"]),
        ("--env-id PooyanNoFrameskip-v4 --return-normalization random", ["random", "PooyanNoFrameskip-v4"]),
        ("--teacher-model-path no.such.file", ["no.such.file", "does not exist"]),
        ("--env-id BreakoutNoFrameskip-v4", [str(PONG_TEACHER), "6 actions", "4"]),
        ("--buffer-size 1000000000 --teacher-steps 1000000000", ["1,000,000,000", "use --buffer-size"]),
    ],
)  # fmt: skip
def test_nonsense_is_refused_in_one_line_before_any_work(tmp_path, options, words):
    status, _, errors = run(tmp_path, *PONG, *SMOKE, *options.split())
    assert status == 1
    assert len(errors.strip().splitlines()) == 1, errors
    assert all(word in errors for word in words), errors
    assert not (tmp_path / "runs").exists()


def test_the_buffer_size_that_is_advised_fits_when_the_steps_bound_the_buffer(monkeypatch):
    monkeypatch.setattr("cleanrl.utils.memory.available_host_memory", lambda: 10 * 10**9)

    def past_the_check(*_):
        raise InterruptedError

    monkeypatch.setattr(script, "load_teacher", past_the_check)
    args = dataclasses.replace(TINY, buffer_size=10**9, teacher_steps=10**7, cuda=False)
    with pytest.raises(SystemExit, match="GB more host memory") as stop:
        script.main(args)
    advised = int(re.search(r"use --buffer-size (\d+)", str(stop.value)).group(1))
    with pytest.raises(InterruptedError):
        script.main(dataclasses.replace(args, buffer_size=advised))


def test_a_teacher_with_no_meaning_for_the_coefficient_is_refused(train):
    with pytest.raises(SystemExit, match="--return-normalization random"):
        train("negative", return_normalization="none")


def test_help_explains_every_option(tmp_path):
    status, output, _ = run(tmp_path, "--help")
    assert status == 0
    for field in dataclasses.fields(script.Args):
        assert field.name.replace("_", "-") in output


# ------------------------------------------------------------------------------------------- reproducible


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(train):
    runs = [train(name, seed=seed) for name, seed in [("first", 1), ("second", 1), ("other", 2)]]
    students = [read_student(run / f"{SCRIPT.stem}.cleanrl_model") for run in runs]
    events = [read_events(run) for run in runs]
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[0])
    assert not all(torch.equal(students[0][name], students[2][name]) for name in students[0])
    for of_run in events:
        del of_run["charts/SPS"]  # steps per second: time is no result
    assert events[0] == events[1]
    assert events[0] != events[2]


# ---------------------------------------------------------------------- counts, with a game without a game


class NoGame:
    """Stands in for ParallelEnvs: every environment finishes a game every `game_length` steps."""

    action_space = gym.spaces.Discrete(6)

    def __init__(self, num_envs: int, game_length: int = 10**9, game_return: float = 0.0):
        self.num_envs, self.game_length, self.game_return = num_envs, game_length, game_return
        self.observations = np.zeros((num_envs, 4, 84, 84), np.uint8)
        self.steps = 0

    def reset(self, seed) -> np.ndarray:
        return self.observations

    def step_async(self, actions: np.ndarray) -> None:
        self.steps += 1

    def step_wait(self) -> StepResult:
        games = []
        if self.steps % self.game_length == 0:
            games = [FinishedGame(i, self.game_return, 4 * self.game_length) for i in range(self.num_envs)]
        no, zero = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, np.float32)
        return StepResult(self.observations, zero, no, no, self.observations, games)


class NoWriter:
    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, value, step):
        self.scalars.setdefault(tag, []).append((step, float(value)))


@pytest.fixture
def play_online(monkeypatch):
    """Runs the online phase without games or gradients and reports what it would have done when."""

    def play(num_envs: int, game_length: int = 10**9, game_return: float = 0.0, **options) -> dict:
        counts = {"offline_steps": 50, "total_timesteps": 480, "learning_starts": 100, "train_frequency": 4}
        counts |= {"target_network_frequency": 40, "exploration_fraction": 0.5, "buffer_size": 1000}
        args = dataclasses.replace(TINY, num_envs=num_envs, **counts, **options)
        state = script.create_train_state(args, 6, torch.device("cpu"))
        happened = {"gradient steps": [], "target updates": [], "epsilon": [], "coefficients": []}
        zero = {name: torch.zeros(()) for name in ("loss", "td_loss", "distill_loss", "q_values")}

        def update(state, batch, distill_coeff, temperature):
            happened["gradient steps"].append(state.learned_step)
            happened["coefficients"].append(distill_coeff)
            assert temperature == args.temperature
            return zero

        def explore(rng, epsilon, q_values):
            happened["epsilon"] += list(epsilon)
            return np.zeros(num_envs, np.int64)

        def update_target_network(state, tau):
            happened["target updates"].append((state.learned_step, tau))

        def no_q_values(network, device, observations):
            return np.zeros((len(observations), 6), np.float32)

        for stub in (update, explore, update_target_network):
            monkeypatch.setattr(script, stub.__name__, stub)
        monkeypatch.setattr(script, "compute_q_values", no_q_values)
        coefficient = partial(
            script.distill_coefficient, teacher_return=20.0, distill_steps=args.distill_steps
        )
        replay = script.ReplayBuffer(args.buffer_size, num_envs, 6, args.n_step, 0.99, torch.device("cpu"))
        happened["writer"] = NoWriter()
        games = NoGame(num_envs, game_length, game_return)
        script.train_online(args, state, None, coefficient, games, replay, happened["writer"])
        assert games.steps * num_envs == args.total_timesteps
        return happened

    return play


def test_one_and_eight_environments_learn_explore_and_update_at_the_same_steps(play_online):
    one, eight = play_online(1), play_online(8)
    # 4 divides 104, 108, … 480; the published script learns when step > learning_starts.
    assert one["gradient steps"] == eight["gradient steps"] == list(range(104, 481, 4))
    assert one["target updates"] == eight["target updates"]
    assert one["target updates"] == [(0, 1.0)] + [(step, 1.0) for step in range(120, 481, 40)]
    np.testing.assert_array_equal(one["epsilon"], eight["epsilon"])
    expected = [max(0.01, 1 - 0.99 * (50 + step) / 240) for step in range(480)]
    np.testing.assert_allclose(one["epsilon"], expected)


def test_the_coefficient_follows_the_finished_games(play_online):
    # Each of 2 environments finishes a game every 30 steps, so that the tenth ends after 300 steps.
    coefficients = play_online(2, game_length=30, game_return=5.0)["coefficients"]
    steps = range(104, 481, 4)
    assert coefficients == [1.0 if step < 300 else 0.75 for step in steps]


def test_distill_steps_end_the_distillation(play_online):
    happened = play_online(2, distill_steps=200)
    assert happened["coefficients"] == [float(step < 200) for step in happened["gradient steps"]]


def test_games_are_plotted_after_the_offline_steps(play_online):
    points = play_online(2, game_length=100, game_return=7.0)["writer"].scalars
    assert points["charts/episodic_return"] == [
        (50 + 199, 7.0),
        (50 + 200, 7.0),
        (50 + 399, 7.0),
        (50 + 400, 7.0),
    ]
    assert points["charts/episodic_length"][0] == (50 + 199, 400.0)


# --------------------------------------------------------------------------------------------- learning


def filled_replay(num_actions: int = 6) -> script.ReplayBuffer:
    rng = np.random.default_rng(0)
    replay = script.ReplayBuffer(64, 1, num_actions, 1, 0.99, torch.device("cpu"))
    observations = rng.integers(256, size=(66, 1, 4, 84, 84), dtype=np.uint8)
    replay.start(observations[0])
    no = np.zeros(1, bool)
    for observation in observations[1:]:
        step = StepResult(observation, rng.choice([-1, 0, 1], 1).astype(np.float32), no, no, observation, [])
        teacher_q_values = rng.normal(size=(1, num_actions)) + 3 * (np.arange(num_actions) == 2)
        replay.add(rng.integers(num_actions, size=1), step, teacher_q_values.astype(np.float32))
    return replay


def test_offline_learning_brings_the_student_to_its_teacher():
    args = dataclasses.replace(TINY, offline_steps=25, learning_rate=5e-4, batch_size=8, temperature=0.5)
    state = script.create_train_state(args, 6, torch.device("cpu"))
    replay, writer = filled_replay(), NoWriter()
    probe = replay.gather(torch.arange(40))

    def disagreement() -> float:
        with torch.no_grad():
            return script.distill_loss(state.student(probe.observations), probe.teacher_q_values, 0.5).item()

    before = disagreement()
    script.train_offline(args, state, replay, writer, lambda: 1.5)
    assert disagreement() < 0.8 * before
    assert [step for step, _ in writer.scalars["charts/offline/avg_episodic_return"]] == [
        4,
        8,
        12,
        16,
        20,
        24,
        25,
    ]
    assert writer.scalars["charts/offline/avg_episodic_return"][0][1] == 1.5


def test_one_update_is_an_adam_step_down_the_sum_of_both_losses():
    args = dataclasses.replace(TINY, learning_rate=1e-3)
    state = script.create_train_state(args, 6, torch.device("cpu"))
    batch = filled_replay().gather(torch.arange(8))
    reference = script.StudentNetwork(6)
    reference.load_state_dict(state.student.state_dict())
    optimizer = torch.optim.Adam(reference.parameters(), lr=1e-3)
    with torch.no_grad():
        targets = (
            batch.rewards + 0.99 * (1 - batch.terminations) * reference(batch.next_observations).max(1).values
        )
    q_values = reference(batch.observations)
    td = torch.nn.functional.mse_loss(q_values[torch.arange(8), batch.actions], targets)
    distill = torch.nn.functional.kl_div(
        (q_values / 0.7).log_softmax(1), (batch.teacher_q_values / 0.7).softmax(1), reduction="batchmean"
    )
    (td + 0.4 * distill).backward()
    optimizer.step()

    losses = script.update(state, batch, 0.4, temperature=0.7)
    assert losses["td_loss"].item() == pytest.approx(td.item(), rel=1e-4)
    assert losses["distill_loss"].item() == pytest.approx(distill.item(), rel=1e-4)
    assert losses["loss"].item() == pytest.approx((td + 0.4 * distill).item(), rel=1e-4)
    for name, parameter in reference.named_parameters():
        # Adam's first step is ± the learning rate wherever the gradient is not tiny: compare against that.
        difference = (dict(state.student.named_parameters())[name] - parameter).abs()
        assert (difference < 1e-5).float().mean() > 0.99, name


def test_a_loss_that_turns_nan_stops_the_run_and_says_where():
    args = dataclasses.replace(TINY, learning_rate=1e30, offline_steps=10, offline_eval_frequency=100)
    state = script.create_train_state(args, 6, torch.device("cpu"))
    with pytest.raises(SystemExit, match=r"nan at gradient step 10 of the offline phase; .*--learning-rate"):
        script.train_offline(args, state, filled_replay(), NoWriter(), lambda: 0.0)


def test_a_student_that_turned_nan_is_not_saved_over_a_good_one():
    args = dataclasses.replace(TINY, learning_rate=1e30, offline_steps=10, offline_eval_frequency=5)
    state = script.create_train_state(args, 6, torch.device("cpu"))

    def save_and_evaluate():
        raise AssertionError("saved")

    with pytest.raises(SystemExit, match="nan at gradient step 5 of the offline phase"):
        script.train_offline(args, state, filled_replay(), NoWriter(), save_and_evaluate)


def test_target_network_moves_by_tau():
    state = script.create_train_state(TINY, 6, torch.device("cpu"))
    with torch.no_grad():
        for parameter in state.student.parameters():
            parameter.fill_(3.0)
        for parameter in state.target_network.parameters():
            parameter.fill_(1.0)
    script.update_target_network(state, 0.25)
    assert all((parameter == 1.5).all() for parameter in state.target_network.parameters())
    script.update_target_network(state, 1.0)
    assert all((parameter == 3.0).all() for parameter in state.target_network.parameters())


def test_explore_takes_each_environments_own_epsilon():
    q_values = np.eye(6)[[4] * 1000]
    actions = script.explore(np.random.default_rng(0), np.repeat([0.0, 1.0], 500), q_values)
    assert (actions[:500] == 4).all()
    assert np.bincount(actions[500:], minlength=6).min() > 50


def test_networks_have_the_published_names_and_shapes():
    shapes = {name: tuple(value.shape) for name, value in script.StudentNetwork(6).state_dict().items()}
    assert shapes["network.5.weight"] == (256, 3872)
    assert shapes["network.7.weight"] == (6, 256)
    for sequence, (inputs, outputs) in enumerate([(4, 16), (16, 32), (32, 32)]):
        assert shapes.pop(f"network.{sequence}.conv.weight") == (outputs, inputs, 3, 3)
        for block in (0, 1):
            for conv in (0, 1):
                name = f"network.{sequence}.res_block{block}.conv{conv}.weight"
                assert shapes.pop(name) == (outputs, outputs, 3, 3)
    weights = [name for name in shapes if name.endswith(".weight")]
    assert weights == ["network.5.weight", "network.7.weight"]
    teacher = {name: tuple(value.shape) for name, value in script.TeacherNetwork(6).state_dict().items()}
    assert teacher["network.0.weight"] == (32, 4, 8, 8)
    assert teacher["network.7.weight"] == (512, 3136)
    assert teacher["network.9.weight"] == (6, 512)
