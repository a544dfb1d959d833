"""cleanrl/enjoy.py: networks of every kind, whole games, and what a user can get wrong."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import flax.serialization
import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import cleanrl.qdagger_dqn_atari_impalacnn as torch_script
import cleanrl.qdagger_dqn_atari_jax_impalacnn as jax_script
from cleanrl import enjoy
from cleanrl.enjoy import Args, find_model, load_player, main, play
from cleanrl.utils.weights.files import read_weights
from cleanrl.utils.weights.layouts import fit_weights, flatten, to_flax, to_torch, unflatten

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
    weights = fit_weights(read_weights(TEACHER), network.state_dict(), "the teacher")
    network.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    return torch_q_values(network)


def write_flax(path: Path, weights: dict[str, np.ndarray]) -> Path:
    path.write_bytes(flax.serialization.to_bytes(unflatten(weights)))
    return path


def test_a_torch_student_of_any_width_is_played(tmp_path):
    student = torch_student()
    torch.save(student.state_dict(), tmp_path / "student")
    q_values, make_env = load_player(tmp_path / "student", PONG)
    np.testing.assert_allclose(q_values(OBSERVATIONS), torch_q_values(student), rtol=1e-5)
    assert make_env is torch_script.make_env


@pytest.mark.parametrize("suffix", ["msgpack", "safetensors"])
def test_a_flax_student_is_played_by_jax(tmp_path, suffix):
    """Its max-pooling pads differently from torch's, so there the same numbers are another function."""
    network = jax_script.StudentNetwork(6, 64)
    shapes = flatten(jax.eval_shape(network.init, jax.random.key(0), OBSERVATIONS))
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(0, 0.1, array.shape).astype(np.float32) for name, array in shapes.items()}
    path = tmp_path / suffix
    if suffix == "msgpack":
        write_flax(path, weights)
    else:
        save_file(weights, path)
    q_values, _ = load_player(path, PONG)
    expected = np.asarray(jax_script.forward(jax_script.QFunction(unflatten(weights), network), OBSERVATIONS))
    np.testing.assert_allclose(q_values(OBSERVATIONS), expected, rtol=1e-4, atol=1e-6)
    in_torch = torch_student()
    in_torch.load_state_dict({name: torch.tensor(array) for name, array in to_torch(weights).items()})
    assert not np.allclose(torch_q_values(in_torch), expected, rtol=1e-2)


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
    q_values, make_env = load_player(path, PONG)
    np.testing.assert_allclose(q_values(OBSERVATIONS), teacher_q_values(), rtol=1e-4, atol=1e-5)
    assert make_env is {"torch": torch_script, "jax": jax_script}[installed].make_env


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_student_of_a_missing_framework_is_refused(tmp_path, monkeypatch, framework):
    weights = {name: tensor.numpy() for name, tensor in torch_student().state_dict().items()}
    path = tmp_path / "student"
    save_file(weights if framework == "torch" else to_flax(weights), path)
    monkeypatch.setitem(sys.modules, framework, None)
    packages = {"torch": "atari", "jax": "jax"}[framework]
    advice = rf"a student of {framework}, .*; pip install -r requirements/requirements-{packages}\.txt$"
    with pytest.raises(SystemExit, match=advice):
        load_player(path, PONG)
    assert (ROOT / "requirements" / f"requirements-{packages}.txt").is_file()


@pytest.fixture
def short_games(monkeypatch):
    monkeypatch.setattr(torch_script, "make_env", partial(torch_script.make_env, max_game_frames=400))


@pytest.mark.slow
def test_whole_games_are_played_recorded_and_reported(tmp_path, short_games, capsys):
    main(Args(model_path=TEACHER, games=2, epsilon=0.5, video_folder=tmp_path))
    lines = capsys.readouterr().out.splitlines()
    returns = [float(line.removeprefix(f"game {game}: return ")) for game, line in enumerate(lines[:2], 1)]
    assert lines[2:] == [f"mean return {np.mean(returns):.2f} over 2 games"]
    videos = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert videos.keys() == {f"{PONG}-game-1.mp4", f"{PONG}-game-2.mp4"}
    assert min(videos.values()) > 10_000

    # The same games, played here.
    q_values, make_env = load_player(TEACHER, PONG)
    for seed, expected in zip(np.random.SeedSequence(1).generate_state(2), returns, strict=True):
        env, rng, total = make_env(PONG), np.random.default_rng(int(seed)), 0.0
        observation, _ = env.reset(seed=int(seed))
        ended = False
        while not ended:
            action = q_values(observation[None])[0].argmax()
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

    assert play(env, q_values, seed=0, epsilon=1.0) >= 0
    assert list(dict.fromkeys(lives)) == [5, 4, 3, 2, 1]
    env.close()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "error: name the model with either --model-path or --hf-repo"),
        ({"model_path": TEACHER, "hf_repo": "a/b"}, "error: name the model with either"),
        ({"model_path": Path("x.safetensors")}, "error: x.safetensors does not name its game; use --env-id"),
        ({"model_path": TEACHER, "env_id": "Pong"}, "error: --env-id Pong is not known"),
        ({"model_path": TEACHER, "games": 0}, "error: --games 0 must be at least 1"),
        ({"model_path": TEACHER, "seed": -1}, "error: --seed -1 must be at least 0"),
        ({"model_path": TEACHER, "epsilon": 2.0}, "error: --epsilon 2.0 must be between 0 and 1"),
        (
            {"model_path": TEACHER, "video_folder": TEACHER / "videos"},
            f"error: --video-folder {TEACHER / 'videos'} cannot be created (Not a directory); name another",
        ),
        ({"hf_repo": f"me/{PONG}"}, f"error: --hf-repo me/{PONG} does not name its file; use --hf-file"),
        ({"model_path": Path(f"no-{PONG}")}, f"error: no-{PONG} does not exist"),
        (
            {"model_path": TEACHER, "env_id": "BreakoutNoFrameskip-v4"},
            f"error: {TEACHER}: the teacher has 6 actions, this game has 4; use a teacher",
        ),
    ],
)
def test_bad_input_is_a_one_line_error(options, line):
    with pytest.raises(SystemExit) as end:
        main(Args(**options))
    assert end.value.code.startswith(line)
    assert "\n" not in end.value.code


@pytest.mark.parametrize(
    ("repo", "options", "expected"),
    [
        (f"me/{PONG}-my-agent-seed12", {}, ("my-agent.cleanrl_model", PONG)),
        (f"sb3/dqn-{PONG}", {}, (f"dqn-{PONG}.zip", PONG)),
        ("me/model", {"hf_file": "a.safetensors", "env_id": PONG}, ("a.safetensors", PONG)),
    ],
)
def test_the_repo_names_its_file_and_its_game(monkeypatch, repo, options, expected):
    monkeypatch.setattr(enjoy, "download", lambda repo_id, filename, advice: Path(repo_id, filename))
    path, env_id = find_model(Args(hf_repo=repo, **options))
    assert (path, env_id) == (Path(repo, expected[0]), expected[1])


def test_hub_errors_name_the_options_of_this_program():
    with pytest.raises(SystemExit) as end:
        find_model(Args(hf_repo=f"a/b/{PONG}", hf_file="x"))
    assert "check --hf-repo; or play a local one with --model-path FILE." in end.value.code
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
    assert "python cleanrl/enjoy.py --model-path cleanrl/teachers/" in " ".join(help_text.stdout.split())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is always a display")
@pytest.mark.parametrize("display", [{}, {"DISPLAY": ":98765"}])
def test_without_a_display_the_error_says_what_to_do(display):
    process = start("-m", "cleanrl.enjoy", "--model-path", str(TEACHER), "--games", "1", **display)
    line = "error: there is no display for a window; write videos with --video-folder FOLDER\n"
    assert (process.returncode, process.stdout, process.stderr) == (1, "", line)
