"""cleanrl/enjoy.py: networks of every kind, whole games, and what a user can get wrong."""

import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest import mock

import flax.serialization
import gymnasium as gym
import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import cleanrl
import cleanrl.qdagger_dqn_atari_impalacnn as torch_script
import cleanrl.qdagger_dqn_atari_jax_impalacnn as jax_script
from cleanrl import enjoy
from cleanrl.enjoy import Args, Player, find_agent, main, play
from cleanrl.utils.evaluation import acting_values, evaluate
from cleanrl.utils.games.parallel_envs import WorkerError
from cleanrl.utils.run.summary import summary
from cleanrl.utils.weights.agents import read_agent
from cleanrl.utils.weights.files import read_weights
from cleanrl.utils.weights.layouts import to_flax, to_torch, unflatten

ROOT = Path(__file__).resolve().parents[1]
PONG = "PongNoFrameskip-v4"
TEACHER = ROOT / "cleanrl" / "teachers" / f"{PONG}.safetensors"
OBSERVATIONS = np.random.default_rng(0).integers(0, 255, (4, 4, 84, 84), np.uint8)


def torch_student(dense_width: int = 64) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch_script.StudentNetwork(6, dense_width)


def torch_q_values(network: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return network(torch.from_numpy(OBSERVATIONS)).numpy()


def teacher_q_values() -> np.ndarray:
    network = torch_script.TeacherNetwork(6)
    weights = read_agent(TEACHER, 6).fit(network.state_dict())
    network.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    return torch_q_values(network)


def write_flax(path: Path, weights: dict[str, np.ndarray]) -> Path:
    path.write_bytes(flax.serialization.to_bytes(unflatten(weights)))
    return path


def load_player(path: Path, **options: object) -> Player:
    return enjoy.load_player(Args(str(path), **options), path, PONG)


def test_a_student_of_any_width_is_played(tmp_path):
    """Every kind of agent: test_teacher_kinds.py."""
    student = torch_student()
    torch.save(student.state_dict(), tmp_path / "student")
    player = load_player(tmp_path / "student")
    np.testing.assert_allclose(player.q_values(OBSERVATIONS), torch_q_values(student), rtol=1e-5)
    assert player.make_env.func is torch_script.make_env


def test_a_width_is_believed_only_of_a_layer_that_fits_the_network(tmp_path):
    """Of this one, 4 MB in the file, the network would take 15 GB."""
    weights = torch_student().state_dict() | {"network.5.weight": torch.zeros(10**6, 1)}
    torch.save(weights, tmp_path / "student")
    with pytest.raises(SystemExit, match=r"network.5.weight is \(1000000, 1\), not \(256, 3872\)"):
        load_player(tmp_path / "student")


@pytest.mark.parametrize("layout", ["torch", "flax"])
@pytest.mark.parametrize("installed", ["torch", "jax"])
def test_a_teacher_is_played_by_what_is_installed(tmp_path, monkeypatch, layout, installed):
    weights = read_weights(TEACHER)
    path = tmp_path / "teacher"
    if layout == "torch":
        save_file(to_torch(weights), path)
    else:
        write_flax(path, to_flax(weights))
    monkeypatch.setitem(sys.modules, "jax" if installed == "torch" else "torch", None)
    player = load_player(path)
    np.testing.assert_allclose(player.q_values(OBSERVATIONS), teacher_q_values(), rtol=1e-4, atol=1e-5)
    assert player.make_env.func is {"torch": torch_script, "jax": jax_script}[installed].make_env


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_an_agent_of_a_copied_scripts_own_network_is_played_by_the_copy(tmp_path, monkeypatch, framework):
    original = {"torch": torch_script, "jax": jax_script}[framework]
    source = Path(original.__file__).read_text()
    changes = {
        "ConvSequence(32, 32,": "ConvSequence(32, 16,",
        "3872, dense_width": "11 * 11 * 16, dense_width",
    }
    if framework == "jax":
        changes = {"in (16, 32, 32)": "in (16, 32, 16)"}
    narrower = source
    for before, after in changes.items():
        assert before in source
        narrower = narrower.replace(before, after)
    (tmp_path / "my_qdagger.py").write_text(narrower)
    monkeypatch.setattr(enjoy, "__file__", str(tmp_path / "enjoy.py"))
    monkeypatch.setattr(cleanrl, "__path__", [*cleanrl.__path__, str(tmp_path)])
    script = importlib.import_module("cleanrl.my_qdagger")
    try:
        path = tmp_path / "agent"
        if framework == "torch":
            network = script.StudentNetwork(6, dense_width=512)
            torch.save(network.state_dict(), path)
            expected = network(torch.tensor(OBSERVATIONS)).detach().numpy()
        else:
            network = script.StudentNetwork(6, dense_width=512)
            params = network.init(jax.random.key(0), OBSERVATIONS)
            path.write_bytes(flax.serialization.to_bytes(params))
            expected = network.apply(params, OBSERVATIONS)
        player = load_player(path, script="my_qdagger")
        np.testing.assert_allclose(player.q_values(OBSERVATIONS), expected, rtol=1e-4, atol=1e-5)
        assert player.make_env.func is script.make_env
        monkeypatch.undo()
        with pytest.raises(SystemExit, match="the architecture differs"):
            load_player(path)
    finally:
        del sys.modules["cleanrl.my_qdagger"], cleanrl.my_qdagger


@pytest.mark.parametrize("name", ["qdagger_dqn_atari_impalacnn", "my_qdagger"])
def test_a_runs_last_lines_name_the_copy_that_plays_it(monkeypatch, name):
    module = ModuleType(name)
    module.__file__ = f"/cleanrl/{name}.py"
    monkeypatch.setitem(sys.modules, name, module)
    args = type("Args", (torch_script.Args,), {"__module__": name})()
    lines = summary(args, Path("runs/x"), 1, {"final": 1.0})
    option = " --script my_qdagger" if name == "my_qdagger" else ""
    assert f"watch it play: python cleanrl/enjoy.py runs/x{option}\n" in lines


def actor_critic(path: Path) -> Path:
    """Whose policy takes actions 0 and 5 with probabilities 1/4 and 3/4, whatever it sees."""
    weights = {name: np.zeros_like(array) for name, array in to_torch(read_weights(TEACHER)).items()}
    for name, array in (
        ("actor", weights.pop("network.9.weight")),
        ("critic", np.zeros((1, 512), np.float32)),
    ):
        weights[f"{name}.weight"] = array
    weights |= {"actor.bias": weights.pop("network.9.bias"), "critic.bias": np.zeros(1, np.float32)}
    weights["actor.bias"][:] = [0, -100, -100, -100, -100, np.log(3)]
    save_file(weights, path)
    return path


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1 / 4, 3 / 4]),
        ({"acts": "sample", "temperature": 0.1}, [1 / 4, 3 / 4]),
        ({"acts": "argmax"}, [0, 1]),
    ],
)
def test_a_policy_is_sampled(options, expected, tmp_path):
    player = load_player(actor_critic(tmp_path / "agent"), **options)
    actions = []

    class Env:
        action_space = gym.spaces.Discrete(6)

        def reset(self, seed=None):
            return OBSERVATIONS[0], ({} if seed else {"episode": {"r": 1.0}})

        def step(self, action):
            actions.append(int(action))
            return OBSERVATIONS[0], 1.0, len(actions) == 1000, False, {}

    assert play(Env(), player, seed=1, epsilon=0.0) == 1.0
    shares = np.bincount(actions, minlength=6) / len(actions)
    assert set(actions) <= {0, 5}
    np.testing.assert_allclose(shares[[0, 5]], expected, atol=0.05)


@pytest.fixture
def short_games(monkeypatch):
    monkeypatch.setattr(torch_script, "make_env", partial(torch_script.make_env, max_game_frames=400))


@pytest.mark.slow
def test_whole_games_are_played_recorded_and_reported(tmp_path, short_games, capsys):
    main(Args(str(TEACHER), games=2, epsilon=0.5, video_folder=tmp_path))
    lines = capsys.readouterr().out.splitlines()
    returns = [float(line.removeprefix(f"game {game}: return ")) for game, line in enumerate(lines[:2], 1)]
    [summary] = lines[2:]
    assert summary.startswith(f"mean return {np.mean(returns):.2f} over 2 games (std {np.std(returns):.2f},")
    videos = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert videos.keys() == {f"{PONG}-game-1.mp4", f"{PONG}-game-2.mp4"}
    assert min(videos.values()) > 10_000

    # The same games, played here.
    player = load_player(TEACHER)
    for seed, expected in zip(np.random.SeedSequence(1).generate_state(2), returns, strict=True):
        env, rng, total = player.make_env(), np.random.default_rng(int(seed)), 0.0
        observation, _ = env.reset(seed=int(seed))
        ended = False
        while not ended:
            action = player.q_values(observation[None])[0].argmax()
            if rng.random() < 0.5:
                action = rng.integers(6)
            observation, reward, terminated, truncated, _ = env.step(action)
            total += reward  # one point at a time, so its sign is the reward itself
            ended = terminated or truncated
        assert total == expected


def test_a_game_with_lives_is_played_until_it_is_over():
    env = torch_script.make_env("BreakoutNoFrameskip-v4")
    lives = []

    def q_values(observations: np.ndarray) -> np.ndarray:
        lives.append(env.unwrapped.ale.lives())
        return np.ones((1, 4))

    assert play(env, Player(q_values, 0.0, torch_script.make_env), seed=0, epsilon=1.0) >= 0
    assert list(dict.fromkeys(lives)) == [5, 4, 3, 2, 1]
    env.close()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"json": Path("x"), "video_folder": Path("y")},
            "error: --json and --video-folder cannot be combined",
        ),
        ({"agent": "x.safetensors"}, "error: x.safetensors does not exist; check the path"),
        ({"agent": f"runs/{PONG}"}, f"error: runs/{PONG} does not exist; check the path"),
        ({"agent": "me/agent"}, "error: me/agent does not name its game; use --env-id"),
        ({"env_id": "Pong"}, "error: --env-id Pong is not known"),
        ({"games": 0}, "error: --games 0 must be between 1 and 100000"),
        ({"games": 10**9}, "error: --games 1000000000 must be between 1 and 100000"),
        ({"seed": -1}, "error: --seed -1 must be at least 0"),
        ({"temperature": 0.0}, "error: --temperature 0.0 must be above 0"),
        ({"script": "none"}, "error: --script none is not in cleanrl/"),
        ({"script": "dqn_atari"}, "error: --script dqn_atari is not a copy of a QDagger script"),
        ({"script": "../x"}, "error: --script ../x must be at most 100 letters"),
        ({"epsilon": 2.0}, "error: --epsilon 2.0 must be between 0 and 1"),
        (
            {"video_folder": TEACHER / "videos"},
            f"error: --video-folder {TEACHER / 'videos'} cannot be created (Not a directory); name another",
        ),
        ({"agent": f"no-{PONG}"}, f"error: no-{PONG} does not exist"),
        ({"agent": f"{PONG}{'x' * 5000}"}, f"error: {PONG}xxx"),
        ({"agent": f"me/{'x' * 5000}"}, "error: me/xxx"),
        ({"json": TEACHER / "x.json"}, f"error: --json {TEACHER / 'x.json'} cannot be created ("),
        ({"json": TEACHER}, f"error: --json {TEACHER} is the agent's own file; name another"),
        ({"json": TEACHER.parent}, f"error: --json {TEACHER.parent} is not a file; name another"),
        ({"json": Path("/dev/null")}, "error: --json /dev/null is not a file; name another"),
        (
            {"json": Path("x" * 250)},
            f"error: --json {'x' * 100}… (250 characters) cannot be created (File name",
        ),
        ({"video_folder": Path("/proc")}, "error: --video-folder /proc cannot be created ("),
        ({"agent": f"runs/{PONG}__x"}, f"error: runs/{PONG}__x does not exist"),
        (
            {"agent": str(TEACHER.parent), "env_id": PONG},
            f"error: {TEACHER.parent} is not a folder of a run with one saved model; name the file itself",
        ),
        (
            {"env_id": "BreakoutNoFrameskip-v4"},
            f"error: {TEACHER} holds weights of DQN with 6 actions; this game has 4 actions: use an agent",
        ),
    ],
)
def test_bad_input_is_a_one_line_error(options, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(enjoy, "evaluate", mock.Mock(side_effect=AssertionError("it plays already")))
    with pytest.raises(SystemExit) as end:
        main(Args(**{"agent": str(TEACHER)} | options))
    assert end.value.code.startswith(line)
    assert "\n" not in end.value.code
    assert list(tmp_path.iterdir()) == []


def test_results_that_cannot_be_written_are_printed(tmp_path, monkeypatch, capsys):
    path = tmp_path / "x.json"
    monkeypatch.setattr(enjoy, "evaluate", lambda *_, **__: path.mkdir() or [1.0, 3.0])
    with pytest.raises(
        SystemExit, match=r"x.json cannot be written to \(Is a directory\); its content is above$"
    ):
        main(Args(str(TEACHER), json=path))
    assert json.loads(capsys.readouterr().out)["returns"] == [1.0, 3.0]


@pytest.mark.parametrize(
    ("repo", "options", "expected"),
    [
        (f"me/{PONG}-my-agent-seed12", {}, ("my-agent.cleanrl_model", PONG)),
        (f"sb3/dqn-{PONG}", {"hf_file": "x.zip"}, ("x.zip", PONG)),
        ("me/model", {"hf_file": "a.safetensors", "env_id": PONG}, ("a.safetensors", PONG)),
    ],
)
def test_the_repo_names_its_file_and_its_game(monkeypatch, repo, options, expected):
    monkeypatch.setattr(enjoy, "download", lambda repo_id, file, revision, advice: Path(repo_id, file))
    path, env_id = find_agent(Args(repo, **options))
    assert (path, env_id) == (Path(repo, expected[0]), expected[1])


def test_the_file_is_looked_for_and_downloaded_at_the_revision(monkeypatch):
    asked = []

    def find_file(repo_id: str, revision: str, advice: str) -> str:
        asked.append(("find", repo_id, revision))
        return "agent.zip"

    def download(repo_id: str, file: str, revision: str, advice: str) -> Path:
        asked.append((file, repo_id, revision))
        return Path(file)

    monkeypatch.setattr(enjoy, "find_file", find_file)
    monkeypatch.setattr(enjoy, "download", download)
    repo = f"me/{PONG}"
    find_agent(Args(repo, hf_revision="v1"))
    assert asked == [("find", repo, "v1"), ("agent.zip", repo, "v1")]


def test_a_runs_folder_has_its_agent_and_its_game(tmp_path):
    folder = tmp_path / f"{PONG}__mine__1__1700000000"
    folder.mkdir()
    for name in ("mine.cleanrl_model", "mine-offline.cleanrl_model", "mine-best.cleanrl_model", "README.md"):
        (folder / name).touch()
    assert find_agent(Args(str(folder))) == (folder / "mine.cleanrl_model", PONG)
    (folder / "other.cleanrl_model").touch()
    with pytest.raises(SystemExit, match="one saved model; name the file itself"):
        find_agent(Args(str(folder)))


def test_the_random_player_takes_each_action_as_often(tmp_path, monkeypatch):
    args = Args("random", env_id=PONG, json=tmp_path / "random.json", games=2)
    assert find_agent(args) == (None, PONG)
    with pytest.raises(SystemExit, match="random does not name its game"):
        find_agent(Args("random"))
    q_values, temperature, _ = enjoy.load_player(args, None, PONG)
    values = acting_values(np.random.default_rng(0), q_values(np.zeros((6000, 4, 84, 84))), temperature)
    assert np.bincount(values.argmax(axis=1), minlength=6) == pytest.approx(np.full(6, 1000), abs=150)
    monkeypatch.setattr(enjoy, "evaluate", partial(evaluate, max_game_frames=400))
    main(args)
    assert json.loads(args.json.read_text())["sha256"] is None


@pytest.mark.slow
def test_an_agent_is_measured_as_the_scripts_do_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(enjoy, "evaluate", partial(evaluate, max_game_frames=400))
    path = tmp_path / "results" / "pong.json"
    main(Args(str(TEACHER), games=18, seed=5, epsilon=0.3, repeat_action_probability=0.25, json=path))
    result = json.loads(path.read_text())
    make_env = partial(torch_script.make_env, PONG, 0.25)
    returns = evaluate(make_env, load_player(TEACHER).q_values, 18, 5, 0.3, max_game_frames=400)
    assert result.pop("returns") == returns
    assert len(set(returns)) > 1
    assert result == {
        "agent": str(TEACHER),
        "sha256": hashlib.sha256(TEACHER.read_bytes()).hexdigest(),
        "env_id": PONG,
        "repeat_action_probability": 0.25,
        "games": 18,
        "seed": 5,
        "epsilon": 0.3,
        "sampling_temperature": 0.0,
        "mean": pytest.approx(np.mean(returns)),
        "std": pytest.approx(np.std(returns)),
        "median": np.median(returns),
    }
    assert f"mean return {np.mean(returns):.2f} over 18 games" in capsys.readouterr().out


def test_a_failing_environment_or_disk_is_one_line(tmp_path, monkeypatch):
    for fault in (WorkerError("environment worker 0 died"), OSError(28, "No space left on device")):
        monkeypatch.setattr(enjoy, "evaluate", mock.Mock(side_effect=fault))
        with pytest.raises(SystemExit, match=rf"^error: .*({re.escape(fault.args[-1])})"):
            main(Args(str(TEACHER), json=tmp_path / "x.json"))


def test_hub_errors_name_the_options_of_this_program():
    with pytest.raises(SystemExit) as end:
        find_agent(Args(f"-a/{PONG}", hf_file="x"))
    expected = "check the repository; or name a file or a run's folder on this machine."
    assert end.value.code.endswith(expected)
    assert "teacher" not in end.value.code


def start(*words: str, folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    hidden = {"DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER", "PYTHONPATH"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | variables
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("is_installed", [False, True])
def test_it_starts_from_any_folder(is_installed, tmp_path):
    words = ["-m", "cleanrl.enjoy"] if is_installed else [str(ROOT / "cleanrl" / "enjoy.py")]
    variables = {"PYTHONPATH": str(ROOT)} if is_installed else {}
    help_text = start(*words, "--help", folder=tmp_path, **variables)
    assert (help_text.returncode, help_text.stderr) == (0, "")
    assert "python cleanrl/enjoy.py cleanrl/teachers/" in " ".join(help_text.stdout.split())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is always a display")
@pytest.mark.parametrize("display", [{}, {"DISPLAY": ":98765"}])
def test_without_a_display_the_error_says_what_to_do(display):
    process = start("-m", "cleanrl.enjoy", str(TEACHER), "--games", "1", **display)
    line = "error: there is no display for a window; use --video-folder FOLDER or --json FILE\n"
    assert (process.returncode, process.stdout, process.stderr) == (1, "", line)
