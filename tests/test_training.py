"""Both training scripts: started as users start them, and phase by phase with games that need no time.

Every test that takes `script` runs for PyTorch and for JAX.
"""

import dataclasses
import inspect
import itertools
import os
import re
import select
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from both_scripts import JAX, LOSSES, TORCH, no_checkpoint
from safetensors.numpy import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cleanrl.qdagger_dqn_atari_impalacnn import StudentNetwork
from cleanrl.utils.games.parallel_envs import FinishedGame, StepResult, WorkerError
from cleanrl.utils.run import training_run
from cleanrl.utils.signals import Stopped

ROOT = Path(__file__).resolve().parents[1]
PONG_TEACHER = ROOT / "cleanrl" / "teachers" / "PongNoFrameskip-v4.safetensors"
PONG = ["--env-id", "PongNoFrameskip-v4", "--teacher-model-path", str(PONG_TEACHER)]
BREAKOUT_TEACHER = PONG_TEACHER.with_name("BreakoutNoFrameskip-v4.safetensors")
SMOKE = [
    "--learning-starts", "10", "--total-timesteps", "16", "--buffer-size", "10", "--batch-size", "4",
    "--teacher-steps", "16", "--offline-steps", "16", "--teacher-eval-episodes", "1", "--eval-episodes", "1",
]  # fmt: skip
# JAX compiles for every batch size, buffer size and number of gradient steps at a time (here 2, everywhere).
TINY = {
    "env_id": "PongNoFrameskip-v4",
    "teacher_model_path": PONG_TEACHER,
    "return_normalization": "random",  # a cut-off game of Pong ends below 0, for the teacher as well
    "learning_starts": 16,
    "total_timesteps": 64,
    "train_frequency": 4,
    "buffer_size": 60,
    "batch_size": 8,
    "teacher_steps": 64,
    "offline_steps": 6,
    "offline_eval_frequency": 4,
    "target_network_frequency": 3,
    "teacher_eval_episodes": 2,
    "eval_episodes": 2,
}
OF_A_FRAMEWORK = {"NETWORKS", "KEYS", "SLOT_ARRAYS"}  # names of what a checkpoint holds
OFFLINE_TAGS = {
    "charts/offline/loss",
    "charts/offline/q_loss",
    "charts/offline/distill_loss",
    "charts/offline/avg_episodic_return",
}
TAGS = OFFLINE_TAGS | {
    "charts/teacher/avg_episodic_return",
    "charts/epsilon",
    "charts/distill_coeff",
    "charts/SPS",
    "losses/loss",
    "losses/td_loss",
    "losses/distill_loss",
    "losses/q_values",
    "eval/episodic_return",
}


@pytest.fixture(params=[TORCH, JAX], ids=["torch", "jax"])
def script(request):
    return request.param


def tiny(script, **options):
    return script.module.Args(**TINY | options)


def start(folder: Path, *command: str, **settings: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env=os.environ | settings,
    )  # fmt: skip


def run(folder: Path, *command: str, **settings: str) -> tuple[int, str, str]:
    process = start(folder, *command, **settings)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def only_run(folder: Path) -> Path:
    (run_folder,) = (folder / "runs").iterdir()
    return run_folder


def read_events(run_folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run_folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def read_hyperparameters(run_folder: Path) -> str:
    events = EventAccumulator(str(run_folder))
    events.Reload()
    (event,) = events.Tensors("hyperparameters/text_summary")
    return event.tensor_proto.string_val[0].decode()


def saved_names(folder: Path) -> set[str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != "checkpoints")
    return {path.name for path in files if "tfevents" not in path.name}


@pytest.fixture
def train(script, tmp_path, monkeypatch):
    """Trains within this process, with games cut off after a few frames; returns the run's folder."""
    monkeypatch.setattr(script.module, "evaluate", partial(script.module.evaluate, max_game_frames=300))

    def train_in(name: str, **options) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        script.module.main(tiny(script, **options))
        return only_run(folder)

    return train_in


@pytest.fixture
def scalar_student(script, monkeypatch):
    """For tests of all but the network: JAX compiles it in no time."""
    monkeypatch.setattr(script.module, "StudentNetwork", script.Scalar)


# -------------------------------------------------------------------------------------- one and the same


def test_both_scripts_take_the_same_options():
    assert [TORCH.module.Args().exp_name, JAX.module.Args().exp_name] == [TORCH.path.stem, JAX.path.stem]
    lines = [inspect.getsource(script.module.Args).splitlines() for script in (TORCH, JAX)]
    differing = [(mine.strip(), other.strip()) for mine, other in zip(*lines, strict=True) if mine != other]
    assert differing == [
        (
            '"""let cuDNN use only deterministic algorithms"""',
            '"""let XLA use only deterministic operations on a GPU"""',
        ),
        ('teacher_model_exp_name: str = "dqn_atari"', 'teacher_model_exp_name: str = "dqn_atari_jax"'),
    ]


def test_what_needs_no_framework_is_the_same_text_in_both_scripts():
    """So that what test_environment.py and test_losses.py say of one script holds for the other."""

    def sources(module) -> dict[str, str]:
        wrappers = [
            name
            for name, value in inspect.getmembers(module, inspect.isclass)
            if issubclass(value, gym.Wrapper) and value.__module__ == module.__name__
        ]
        functions = ["make_env", "distill_coefficient", "linear_schedule", "check_teacher_return"]
        functions += ["learning_rate", "online_epsilon"]
        return {name: inspect.getsource(getattr(module, name)) for name in wrappers + functions}

    assert len(sources(TORCH.module)) == 14
    assert sources(TORCH.module) == sources(JAX.module)
    constants = [
        {
            name: value
            for name, value in vars(script.module).items()
            if re.fullmatch("[A-Z_]{3,}", name) and name not in OF_A_FRAMEWORK
        }
        for script in (TORCH, JAX)
    ]
    assert constants[0] == constants[1]


def test_importing_a_script_has_no_effects(script, tmp_path):
    code = f"""
import multiprocessing, os, signal, sys, threading
import {script.module.__name__} as script
assert os.listdir() == []
assert threading.active_count() == 1
assert not multiprocessing.active_children()
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
if "jax" in sys.modules:
    from jax._src import xla_bridge
    assert not xla_bridge.backends_are_initialized()
if "torch" in sys.modules:
    assert not sys.modules["torch"].cuda.is_initialized()
"""
    assert run(tmp_path, "-c", code, PYTHONPATH=str(ROOT)) == (0, "", "")


# ------------------------------------------------------------------------------------- as users start it


def test_the_published_smoke_settings_work_as_a_command_without_the_other_framework(script, tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for name in script.other_frameworks:
        (hidden / f"{name}.py").write_text(f"raise ImportError('no {name} here')")
    command = [str(script.path), *SMOKE, "--teacher-model-path", str(BREAKOUT_TEACHER)]
    status, output, errors = run(tmp_path, *command, PYTHONPATH=str(hidden))
    assert status == 0, errors
    assert "Traceback" not in errors
    run_folder = only_run(tmp_path)
    assert saved_names(run_folder) == {
        f"{script.path.stem}-offline.cleanrl_model",
        f"{script.path.stem}.cleanrl_model",
    }
    student = script.read_student(run_folder / f"{script.path.stem}.cleanrl_model")
    assert {name: array.shape for name, array in student.items()} == published_shapes(script, "student", 4)
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in student.values())
    assert read_events(run_folder).keys() >= TAGS
    assert "|batch_size|4|" in read_hyperparameters(run_folder)
    assert re.search(r"memory: 0\.00 GB of host memory for the replay buffer", output)


@pytest.mark.parametrize(
    ("num_envs", "options"),
    [(1, {"exp_name": "mine", "n_step": 3}), (3, {"save_model": False}), (16, {"seed": 2**32 - 1})],
)
def test_the_published_smoke_settings_work_with_any_number_of_environments(
    script, train, scalar_student, num_envs, options
):
    counts = {"learning_starts": 10, "total_timesteps": 16, "train_frequency": 4, "buffer_size": 10}
    counts |= {"batch_size": 4, "teacher_steps": 16, "offline_steps": 16}
    counts |= {"teacher_eval_episodes": 1, "eval_episodes": 1}
    run_folder = train("smoke", num_envs=num_envs, **counts | options)
    points = read_events(run_folder)
    assert points.keys() >= TAGS
    last_step = 16 + -(-16 // num_envs) * num_envs
    assert [step for step, _ in points["charts/teacher/avg_episodic_return"]] == [0, 16, last_step]
    assert [step for step, _ in points["charts/epsilon"]][-1] == last_step
    assert [step for step, _ in points["losses/loss"]] == [16 + 16]
    assert [step for step, _ in points["eval/episodic_return"]] == [0]
    name = options.get("exp_name", script.path.stem)
    expected = {f"{name}-offline.cleanrl_model", f"{name}.cleanrl_model"}
    assert saved_names(run_folder) == (expected if options.get("save_model", True) else set())


def test_a_run_without_an_offline_phase(script, train, scalar_student):
    run_folder = train("online", offline_steps=0)
    assert read_events(run_folder).keys() & TAGS == TAGS - OFFLINE_TAGS
    assert saved_names(run_folder) == {f"{script.path.stem}.cleanrl_model"}


def test_the_first_game_of_each_evaluation_is_recorded(train, scalar_student):
    run_folder = train("videos", capture_video=True, save_model=False)
    folders = {path.parent.relative_to(run_folder) for path in run_folder.rglob("*.mp4")}
    assert folders == {Path("videos", name) for name in ("teacher", "offline-4", "offline-6", "final")}
    events = EventAccumulator(str(run_folder), size_guidance={"images": 0})
    events.Reload()
    shown = {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}
    assert shown == {"videos/teacher": [0], "videos/offline": [4, 6], "videos/final": [6 + 64]}
    (final,) = events.Images("videos/final")
    assert (final.encoded_image_string[:6], final.width, final.height) == (b"GIF89a", 80, 105)


def test_a_run_is_uploaded_when_it_has_come_to_its_end(script, train, scalar_student, monkeypatch):
    """What it uploads, and how: test_upload.py."""
    uploaded = []

    def upload(run_folder: Path) -> None:
        uploaded.append(run_folder.name)
        assert not (run_folder / "checkpoints").exists()
        assert (run_folder / f"{script.path.stem}.cleanrl_model").exists()
        assert (run_folder / script.path.name).read_bytes() == script.path.read_bytes()
        mean = np.mean([value for _, value in read_events(run_folder)["eval/episodic_return"]])
        assert f"Mean return **{mean:.2f} ± " in (run_folder / "README.md").read_text("utf-8")

    monkeypatch.setattr(training_run, "upload", upload)
    monkeypatch.setattr(training_run, "check_upload", lambda name, entity: f"alice/{name}")
    run_folder = train("uploaded", upload_model=True)
    assert uploaded == [run_folder.name]
    repo_id = f"alice/PongNoFrameskip-v4-{script.path.stem}-seed1"
    assert f"--hf-repo {repo_id}\n" in (run_folder / "README.md").read_text("utf-8")


def test_the_layout_holds_the_curves_of_training_each_once(script):
    tags = [tag for charts in script.module.LAYOUT.values() for chart in charts.values() for tag in chart]
    assert sorted(tags) == sorted((TAGS | {"charts/episodic_return"}) - {"eval/episodic_return"})


def test_tracking_starts_before_the_first_event_is_written(script, train, monkeypatch):
    calls = mock.Mock()
    calls.EventWriter.side_effect = RuntimeError("far enough")
    monkeypatch.setattr(training_run, "check_tracking", mock.Mock())
    monkeypatch.setattr(training_run, "start_tracking", calls.start_tracking)
    monkeypatch.setattr(training_run, "EventWriter", calls.EventWriter)
    with pytest.raises(RuntimeError, match="far enough"):
        train("tracked", track=True, wandb_project_name="project", wandb_entity="team")
    (_, (name, project, entity, options), _), (_, (run_folder, mirror), _) = calls.method_calls
    assert run_folder.name == name
    assert mirror is calls.start_tracking()
    assert re.fullmatch(rf"PongNoFrameskip-v4__{script.path.stem}__1__\d+", name)
    assert (project, entity) == ("project", "team")
    assert options == vars(tiny(script, track=True, wandb_project_name="project", wandb_entity="team"))


def progress_of(process: subprocess.Popen, phase: str, least: int) -> None:
    """Waits until the progress bar of a phase has come so far."""
    errors, deadline = "", time.monotonic() + 180
    while time.monotonic() < deadline:
        if select.select([process.stderr], [], [], 1)[0]:
            chunk = os.read(process.stderr.fileno(), 1 << 16).decode(errors="replace")
            assert chunk, errors
            errors += chunk
            reached = re.findall(rf"{phase}:[^|]*\|[^|]*\| (\d+)/", errors)
            if reached and int(reached[-1]) >= least:
                return
    raise AssertionError(errors)


@pytest.mark.parametrize(
    ("phase", "options", "least", "tag"),
    [
        ("offline", "--offline-steps 1000000 --offline-eval-frequency 1000000", 120, "charts/offline/loss"),
        # The hundredth gradient step answers online step 408.
        ("online", "--offline-steps 2 --total-timesteps 1000000", 480, "losses/loss"),
    ],
)
def test_ctrl_c_leaves_a_saved_student_and_closed_event_files(script, tmp_path, phase, options, least, tag):
    with_short_games = f"""
from functools import partial
import {script.module.__name__} as script
script.evaluate = partial(script.evaluate, max_game_frames=300)
script.main(script.parse_arguments(script.Args))
"""
    options = [*PONG, *SMOKE, "--return-normalization", "random", "--exp-name", "stopped", *options.split()]
    process = start(tmp_path, "-c", with_short_games, *options, PYTHONPATH=str(ROOT))
    progress_of(process, phase, least)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers as well
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    run_folder = only_run(tmp_path)
    assert errors.strip().endswith(f"stopped by SIGINT; go on with --resume runs/{run_folder.name}")
    student = script.read_student(run_folder / "stopped.cleanrl_model")
    assert {name: array.shape for name, array in student.items()} == published_shapes(script, "student")
    assert all(np.isfinite(array).all() for array in student.values())
    assert read_events(run_folder)[tag][0][0] == {"offline": 100, "online": 2 + 408}[phase]


@pytest.mark.parametrize(
    ("phase", "stop", "status", "saved"),
    [
        ("fill_teacher_buffer", Stopped(signal.SIGINT), 130, set()),
        ("train_offline", WorkerError("a worker died"), 1, set()),
        ("train_online", WorkerError("a worker died"), 1, {"mine", "mine-offline"}),
        ("train_online", Stopped(signal.SIGTERM), 143, {"mine", "mine-offline"}),
    ],
)
def test_a_run_that_stops_early_saves_what_it_learned(
    script, train, scalar_student, monkeypatch, capsys, phase, stop, status, saved
):
    monkeypatch.setattr(script.module, "evaluate", mock.Mock(return_value=[1.0]))
    monkeypatch.setattr(script.module, phase, mock.Mock(side_effect=stop))
    with pytest.raises(SystemExit) as exit_:
        train("stopped", exp_name="mine")
    line = capsys.readouterr().err.strip() if isinstance(stop, Stopped) else exit_.value.code
    assert exit_.value.code == (status if isinstance(stop, Stopped) else line)
    has_begun = phase != "fill_teacher_buffer"  # that phase and the games before it are not played here
    advice = r"go on with --resume runs/\S+" if has_begun else "there is no checkpoint"
    assert re.search(rf"{stop}; {advice}$", line)
    assert saved_names(Path("runs")) == {f"{name}.cleanrl_model" for name in saved}


def test_a_student_that_cannot_be_saved_leaves_the_one_before(script, tmp_path, monkeypatch):
    state = script.create_state(tiny(script))
    student = state.student if script is TORCH else state.learner.student
    path = tmp_path / "student.cleanrl_model"
    path.write_bytes(b"good")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", mock.Mock(side_effect=OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            script.module.save_student(student, path)
    assert path.read_bytes() == b"good"
    script.module.save_student(student, path)
    assert saved_names(tmp_path) == {path.name}
    for name, array in script.weights(state).items():
        np.testing.assert_array_equal(script.read_student(path)[name], array)


# ---------------------------------------------------------------------------------------------- nonsense


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """The line with which both scripts refuse a command line, before any work."""
    monkeypatch.chdir(tmp_path)

    def refuse(*options: str) -> str:
        lines = []
        for script in (TORCH, JAX):
            with pytest.raises(SystemExit) as stop:
                script.module.main(tyro.cli(script.module.Args, args=[*PONG, *SMOKE, *options]))
            assert capsys.readouterr().err == ""
            assert not (tmp_path / "runs").exists()
            lines.append(stop.value.code)
        assert lines[0] == lines[1]
        assert re.fullmatch("error: .+", lines[0])
        return lines[0]

    return refuse


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--batch-size 11 --buffer-size 10", ["--batch-size 11", "--buffer-size 10"]),
        ("--seed 4294967296", ["--seed 4294967296", "at most 4294967295"]),
        ("--env-id CartPole-v1", ["CartPole-v1", "not an Atari game"]),
        ("--env-id PnogNoFrameskip-v4", ["PnogNoFrameskip-v4", "PongNoFrameskip-v4"]),
        ("--env-id PooyanNoFrameskip-v4 --return-normalization random", ["random", "PooyanNoFrameskip-v4"]),
        ("--teacher-model-path no.such.file", ["no.such.file", "does not exist"]),
        ("--env-id BreakoutNoFrameskip-v4", [str(PONG_TEACHER), "6 actions", "4"]),
        ("--buffer-size 1000000000 --teacher-steps 1000000000", ["1,000,000,000", "use --buffer-size"]),
        ("--buffer-device cuda --no-cuda", ["--buffer-device cuda", "--no-cuda"]),
    ],
)  # fmt: skip
def test_nonsense_is_refused_in_one_line_before_any_work(refusal, monkeypatch, options, words):
    monkeypatch.setattr("cleanrl.utils.memory.available_host_memory", lambda: 10 * 10**9)
    line = refusal(*options.split())
    assert all(word in line for word in words), line


def write_state_dict(path: Path, **changes) -> None:
    weights = {name: torch.from_numpy(array) for name, array in load_file(PONG_TEACHER).items()}
    torch.save(weights | changes, path)


def write_cut_short(path: Path) -> None:
    write_state_dict(path)
    path.write_bytes(path.read_bytes()[:-1000])


def write_nan(path: Path) -> None:
    weights = load_file(PONG_TEACHER)
    weights[next(iter(weights))] *= np.nan
    save_file(weights, path)


TEACHER_FAULTS = {
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "folder": (Path.mkdir, "is not a file"),
    "text": (lambda path: path.write_text("a teacher"), "neither a torch state dict nor flax msgpack"),
    "safetensors cut short": (lambda path: path.write_bytes(PONG_TEACHER.read_bytes()[:-1000]), "cut short"),
    "torch file cut short": (write_cut_short, "cut short"),
    "flax file cut short": (lambda path: path.write_bytes(b"\x81\xa6params\x81\xa6Conv_0"), "cut short"),
    "another architecture": (lambda path: torch.save(StudentNetwork(6).state_dict(), path), "architecture"),
    "another layer": (partial(write_state_dict, extra=torch.ones(1)), "unexpected 'extra'"),
    "another dtype": (
        partial(write_state_dict, **{"network.9.bias": torch.ones(6, dtype=int)}),
        "floating-point",
    ),
    "NaN": (write_nan, "NaN"),
}


@pytest.mark.parametrize("fault", TEACHER_FAULTS)
def test_a_teacher_that_cannot_be_used_is_refused_in_one_line(refusal, tmp_path, fault):
    write, words = TEACHER_FAULTS[fault]
    write(tmp_path / "teacher")
    line = refusal("--teacher-model-path", "teacher")
    assert line.startswith("error: teacher")
    assert words in line


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "Connection refused"),
        ({"HF_HUB_OFFLINE": "1"}, "unset HF_HUB_OFFLINE"),
    ],
)
def test_a_hub_that_gives_no_teacher_is_one_line(tmp_path, settings, words):
    code = """
import cleanrl.qdagger_dqn_atari_impalacnn, cleanrl.qdagger_dqn_atari_jax_impalacnn
for script in (cleanrl.qdagger_dqn_atari_impalacnn, cleanrl.qdagger_dqn_atari_jax_impalacnn):
    try:
        script.main(script.Args(env_id="PongNoFrameskip-v4", buffer_size=100))
    except SystemExit as stop:
        print(stop)
"""
    status, output, errors = run(
        tmp_path, "-c", code, PYTHONPATH=str(ROOT), HF_HOME=str(tmp_path / "home"), **settings
    )
    assert (status, errors) == (0, "")
    torch_line, jax_line = (line for line in output.splitlines() if line.startswith("error: "))
    assert "dqn_atari.cleanrl_model from cleanrl/PongNoFrameskip-v4-dqn_atari-seed1" in torch_line
    assert jax_line == torch_line.replace("dqn_atari", "dqn_atari_jax")
    assert words in torch_line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("cleanrl/PongNoFrameskip-v4-{0}-seed1", "{0}.cleanrl_model", None)),
        (
            {"teacher_model_exp_name": "x"},
            ("cleanrl/PongNoFrameskip-v4-x-seed1", "x.cleanrl_model", None),
        ),
        (
            {"teacher_policy_hf_repo": "me/mine", "teacher_revision": "v1"},
            ("me/mine", "{0}.cleanrl_model", "v1"),
        ),
        ({"teacher_policy_hf_repo": "sb3/dqn-Pong"}, ("sb3/dqn-Pong", "dqn-Pong.zip", None)),
    ],
)
def test_the_teacher_is_fetched_by_its_published_name(script, monkeypatch, options, expected):
    default_name = {TORCH: "dqn_atari", JAX: "dqn_atari_jax"}[script]
    download = mock.Mock(side_effect=RuntimeError("far enough"))
    monkeypatch.setattr(script.module, "download", download)
    with pytest.raises(RuntimeError, match="far enough"):
        script.module.load_teacher(tiny(script, teacher_model_path=None, **options), 6, None)
    download.assert_called_once_with(*(part and part.format(default_name) for part in expected))


def test_nonsense_ends_the_command_with_status_1_and_one_line(script, tmp_path):
    status, output, errors = run(tmp_path, str(script.path), *PONG, *SMOKE, "--batch-size", "11")
    assert (status, output) == (1, "")
    assert re.fullmatch("error: --batch-size 11 .*\n", errors)


def test_the_buffer_size_that_is_advised_fits_when_the_steps_bound_the_buffer(script, monkeypatch):
    monkeypatch.setattr("cleanrl.utils.memory.available_host_memory", lambda: 10 * 10**9)
    monkeypatch.setattr(script.module, "load_teacher", mock.Mock(side_effect=RuntimeError("far enough")))
    args = tiny(script, buffer_size=10**9, teacher_steps=10**7, buffer_device="cpu")
    with pytest.raises(SystemExit, match="GB more host memory") as stop:
        script.module.main(args)
    advised = int(re.search(r"use --buffer-size (\d+)", str(stop.value)).group(1))
    with pytest.raises(RuntimeError, match="far enough"):
        script.module.main(dataclasses.replace(args, buffer_size=advised))


def test_a_teacher_with_no_meaning_for_the_coefficient_is_refused(train):
    with pytest.raises(SystemExit, match="--return-normalization random"):
        train("negative", return_normalization="none")


def test_help_explains_every_option(script, tmp_path):
    status, output, _ = run(tmp_path, str(script.path), "--help")
    assert status == 0
    for field in dataclasses.fields(script.module.Args):
        assert field.name.replace("_", "-") in output


# ------------------------------------------------------------------------------------------- reproducible


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(script, train):
    runs = [train(name, seed=seed) for name, seed in [("first", 1), ("second", 1), ("other", 2)]]
    students = [script.read_student(run / f"{script.path.stem}.cleanrl_model") for run in runs]
    events = [read_events(run) for run in runs]
    assert all(np.array_equal(students[0][name], students[1][name]) for name in students[0])
    kernels = [name for name, array in students[0].items() if array.ndim > 1]
    assert not any(np.array_equal(students[0][name], students[2][name]) for name in kernels)
    for of_run in events:
        del of_run["charts/SPS"]  # steps per second: time is no result
    assert events[0] == events[1]
    assert events[0] != events[2]


def test_the_seed_decides_the_first_student_the_exploration_and_the_batches(script, monkeypatch):
    seeds = (1, 1, 2)
    students = [script.weights(script.create_state(tiny(script, seed=seed))) for seed in seeds]
    actions = [rehearse(script, 8, seed=seed).actions for seed in seeds]
    monkeypatch.setattr(script.module, "StudentNetwork", script.Scalar)
    td_losses = []
    for seed in seeds:
        args, writer = tiny(script, seed=seed), NoWriter()
        train_offline(script, args, script.create_state(args), writer, lambda: 0.0)
        td_losses.append(writer.scalars["charts/offline/q_loss"])
    same, other = (
        [np.array_equal(students[0][name], students[i][name]) for name in students[0] if "bias" not in name]
        for i in (1, 2)
    )
    assert all(same)
    assert not any(other)
    assert actions[0] == actions[1] != actions[2]
    assert td_losses[0] == td_losses[1] != td_losses[2]


# ------------------------------------------------- when what happens, with games and students of no weight


class NoGame:
    """Stands in for ParallelEnvs: every environment finishes a game every `game_length` steps."""

    action_space = gym.spaces.Discrete(6)

    def __init__(self, num_envs: int, game_length: int = 10**9, game_return: float = 0.0):
        self.num_envs, self.game_length, self.game_return = num_envs, game_length, game_return
        self.observations = np.zeros((num_envs, 4, 84, 84), np.uint8)
        self.steps = 0
        self.actions = []

    def reset(self, seed) -> np.ndarray:
        self.steps = 0
        return self.observations

    def step_async(self, actions: np.ndarray) -> None:
        assert actions.shape == (self.num_envs,)
        self.steps += 1
        self.actions += list(actions)

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


REHEARSAL = {
    "teacher_steps": 48,
    "offline_steps": 50,
    "total_timesteps": 480,
    "learning_starts": 100,
    "train_frequency": 4,
    "target_network_frequency": 40,
    "exploration_fraction": 0.5,
    "buffer_size": 1000,
    "learning_rate": 1e-3,
    "gamma": 0.5,
}


def rehearse(script, num_envs: int, game_length: int = 10**9, game_return: float = 0.0, **options):
    """Runs the three phases with games of nothing and a student that is one number; reports what happened.

    `losses` are of every gradient step online and of every second one offline.
    """
    args = tiny(script, num_envs=num_envs, **REHEARSAL | options)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(script.module, "StudentNetwork", script.Scalar)
        state = script.create_state(args)
        teacher = script.constant_teacher([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
        state.replay = script.create_replay(args.buffer_size, num_envs, args.n_step, args.gamma)
        games = NoGame(num_envs, game_length, game_return)
        writer = NoWriter()

        epsilon = script.record_epsilon(monkeypatch)
        script.module.fill_teacher_buffer(args, state, teacher, games, no_checkpoint)
        filling_epsilon = epsilon.copy()
        assert games.steps * num_envs >= args.teacher_steps > (games.steps - 1) * num_envs

        monkeypatch.setattr(script.module, "LOSS_INTERVAL", 2)
        script.module.train_offline(args, state, writer, lambda: 0.5, no_checkpoint)
        assert state.offline_step == args.offline_steps

        epsilon.clear()
        monkeypatch.setattr(script.module, "LOSS_INTERVAL", 1)
        coefficient = partial(
            script.module.distill_coefficient, teacher_return=20.0, distill_steps=args.distill_steps
        )
        state.replay = script.create_replay(args.buffer_size, num_envs, args.n_step, args.gamma)
        script.module.train_online(args, state, teacher, coefficient, games, writer, no_checkpoint)
        assert games.steps * num_envs >= args.total_timesteps > (games.steps - 1) * num_envs

    points = writer.scalars
    losses = np.array([[value for _, value in points[f"losses/{name}"]] for name in LOSSES])
    return SimpleNamespace(
        points=points,
        filling_epsilon=filling_epsilon,
        epsilon=epsilon,
        actions=games.actions,
        gradient_steps=[step - args.offline_steps for step, _ in points["losses/loss"]],
        coefficients=(losses[0] - losses[1]) / losses[2],
    )


def test_epsilon_falls_while_the_teacher_plays(script):
    epsilon = rehearse(script, 8).filling_epsilon
    np.testing.assert_allclose(epsilon, [1 - 0.99 * step / 48 for step in range(48)])


def test_one_and_eight_environments_learn_explore_and_update_at_the_same_steps(script):
    one, eight = rehearse(script, 1), rehearse(script, 8)
    # 4 divides 104, 108, … 480; the published script learns when step > learning_starts.
    assert one.gradient_steps == eight.gradient_steps == list(range(104, 481, 4))
    for name in LOSSES:
        np.testing.assert_allclose(one.points[f"losses/{name}"], eight.points[f"losses/{name}"], rtol=1e-5)
    np.testing.assert_array_equal(one.epsilon, eight.epsilon)
    expected = [max(0.01, 1 - 0.99 * (50 + step) / 240) for step in range(480)]
    np.testing.assert_allclose(one.epsilon, expected)


def test_the_coefficient_follows_the_finished_games(script):
    # Each of 2 environments finishes a game every 30 steps, so that the tenth ends after 300 steps.
    coefficients = rehearse(script, 2, game_length=30, game_return=5.0).coefficients
    expected = [1.0 if step < 300 else 0.75 for step in range(104, 481, 4)]
    np.testing.assert_allclose(coefficients, expected, atol=1e-5)


def test_distill_steps_end_the_distillation(script):
    happened = rehearse(
        script, 8, distill_steps=206
    )  # between the two gradient steps of one environment step
    expected = [float(step < 206) for step in happened.gradient_steps]
    np.testing.assert_allclose(happened.coefficients, expected, atol=1e-5)


def test_games_are_plotted_after_the_offline_steps(script):
    points = rehearse(script, 2, game_length=100, game_return=7.0).points
    assert points["charts/episodic_return"] == [
        (50 + 199, 7.0),
        (50 + 200, 7.0),
        (50 + 399, 7.0),
        (50 + 400, 7.0),
    ]
    assert points["charts/episodic_length"][0] == (50 + 199, 400.0)


def test_jax_compiles_once_for_each_shape():
    compiled, acting = JAX.module.sample_and_update._cache_size(), JAX.module.act._cache_size()
    # Two gradient steps at a time, in both phases.
    rehearse(JAX, 8, batch_size=5, offline_eval_frequency=50, learning_starts=96)
    assert JAX.module.sample_and_update._cache_size() == compiled + 1
    assert JAX.module.act._cache_size() <= acting + 2  # teacher and student


def td_losses_by_the_rules(args) -> tuple[list[float], list[float]]:
    """The TD loss before each gradient step, offline and online, of a student that is one number.

    The game gives no rewards and never ends. In float64, one step at a time.
    """
    student = target = 1.0
    first_moment = second_moment = 0.0
    gradient_steps = 0

    def adam_step() -> float:
        nonlocal student, first_moment, second_moment, gradient_steps
        difference = student - args.gamma * target
        gradient_steps += 1
        first_moment = 0.9 * first_moment + 0.1 * 2 * difference
        second_moment = 0.999 * second_moment + 0.001 * (2 * difference) ** 2
        corrected = first_moment / (1 - 0.9**gradient_steps)
        scale = (second_moment / (1 - 0.999**gradient_steps)) ** 0.5
        student -= args.learning_rate * corrected / (scale + 1e-8)
        return difference**2

    offline, online = [], []
    for step in range(1, args.offline_steps + 1):
        offline.append(adam_step())
        if step % args.target_network_frequency == 0:
            target += args.tau * (student - target)
    target = student
    for step in range(args.learning_starts + 1, args.total_timesteps + 1):
        if step % args.train_frequency == 0:
            online.append(adam_step())
        if step % args.target_network_frequency == 0:
            target += args.tau * (student - target)
    return offline, online


@pytest.mark.parametrize(
    ("num_envs", "train_frequency", "target_network_frequency", "tau"),
    [
        (1, 4, 10, 1.0),
        (3, 4, 10, 0.5),
        (8, 4, 10, 1.0),
        (1, 3, 7, 0.5),
        (8, 3, 7, 0.5),
        (3, 3, 7, 1.0),
        (8, 2, 1, 0.1),
        (3, 5, 1, 0.0),
    ],
)
def test_every_gradient_step_sees_the_target_network_of_its_step(
    script, num_envs, train_frequency, target_network_frequency, tau
):
    options = {
        "train_frequency": train_frequency,
        "target_network_frequency": target_network_frequency,
        "tau": tau,
        "offline_steps": 45,
        "offline_eval_frequency": 7,
        "learning_starts": 37,
        "total_timesteps": 160,
    }
    points = rehearse(script, num_envs, **options).points
    offline, online = td_losses_by_the_rules(tiny(script, **REHEARSAL | options))
    for step, td_loss in points["charts/offline/q_loss"]:
        assert td_loss == pytest.approx(offline[step - 1], rel=1e-5), step
    assert len(points["charts/offline/q_loss"]) >= 45 // 2
    td_losses = [td_loss for _, td_loss in points["losses/td_loss"]]
    np.testing.assert_allclose(td_losses, online, rtol=1e-5)


def test_both_scripts_draw_the_same_curves():
    options = {"n_step": 3, "tau": 0.5, "temperature": 0.5, "distill_steps": 400, "learning_starts": 0}
    options |= {"target_network_frequency": 7, "total_timesteps": 500, "offline_eval_frequency": 9}
    torch_run, jax_run = (
        rehearse(script, 3, game_length=40, game_return=5.0, **options) for script in (TORCH, JAX)
    )
    assert torch_run.epsilon == jax_run.epsilon
    assert torch_run.points.keys() == jax_run.points.keys()
    assert torch_run.points.keys() > OFFLINE_TAGS | {f"losses/{name}" for name in LOSSES}
    for tag in torch_run.points.keys() - {"charts/SPS"}:
        np.testing.assert_allclose(
            torch_run.points[tag], jax_run.points[tag], rtol=1e-5, atol=1e-6, err_msg=tag
        )


# --------------------------------------------------------------------------------------------- learning


def filled_replay(script, n_step: int = 1):
    rng = np.random.default_rng(0)
    observations = rng.integers(256, size=(13, 8, 4, 84, 84), dtype=np.uint8)
    replay = script.start(script.create_replay(60, num_envs=8, n_step=n_step), observations[0])
    no = np.zeros(8, bool)
    for observation in observations[1:]:
        step = StepResult(observation, rng.choice([-1, 0, 1], 8).astype(np.float32), no, no, observation, [])
        teacher_q_values = rng.normal(size=(8, 6)) + 3 * (np.arange(6) == 2)
        replay = script.add(
            replay, rng.integers(6, size=8), step, np.asarray(teacher_q_values, dtype=np.float32)
        )
    return replay


def train_offline(script, args, state, writer, save_and_evaluate):
    state.replay = filled_replay(script)
    script.module.train_offline(args, state, writer, save_and_evaluate, no_checkpoint)


def some_batch(script, size: int):
    replay = filled_replay(script)
    return script.batch(replay, np.flatnonzero(np.asarray(replay.is_transition))[:size])


def test_offline_learning_brings_the_student_to_its_teacher(script):
    args = tiny(
        script, offline_steps=26, offline_eval_frequency=8, learning_rate=5e-4, temperature=0.5, seed=3
    )
    state = script.create_state(args)
    writer, probe = NoWriter(), some_batch(script, 40)
    before = script.distill_loss(state, probe, 0.5)
    train_offline(script, args, state, writer, lambda: 1.5)
    assert script.distill_loss(state, probe, 0.5) < 0.8 * before
    returns = [(8, 1.5), (16, 1.5), (24, 1.5), (26, 1.5)]
    assert writer.scalars["charts/offline/avg_episodic_return"] == returns
    assert [step for step, _ in writer.scalars["charts/offline/loss"]] == [8, 16, 24, 26]


class SamePoolNetwork(StudentNetwork):
    """The published flax student, whose pools pad as TensorFlow's SAME: more behind than before."""

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        x = observations / 255.0
        for sequence in self.network[:3]:
            x = sequence.conv(x)
            before = x.shape[-1] % 2
            x = torch.nn.functional.pad(x, (before, 1, before, 1), value=-torch.inf)
            x = torch.nn.functional.max_pool2d(x, kernel_size=3, stride=2)
            x = sequence.res_block1(sequence.res_block0(x))
        return self.network[3:](x)


def test_one_update_is_an_adam_step_down_the_sum_of_both_losses(script):
    args = tiny(script, learning_rate=1e-3, temperature=0.7)
    state = script.create_state(args)
    batch = some_batch(script, 8)
    reference = {TORCH: StudentNetwork, JAX: SamePoolNetwork}[script](6)
    weights = script.to_torch(script.weights(state))
    reference.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
    optimizer = torch.optim.Adam(reference.parameters(), lr=1e-3)
    numbers = {name: torch.tensor(np.asarray(value)) for name, value in batch._asdict().items()}
    with torch.no_grad():
        best = reference(numbers["next_observations"]).max(1).values
        targets = numbers["rewards"] + 0.99 * (1 - numbers["terminations"]) * best
    q_values = reference(numbers["observations"])
    taken = q_values[torch.arange(8), numbers["actions"].long()]
    td = torch.nn.functional.mse_loss(taken, targets)
    distill = torch.nn.functional.kl_div(
        (q_values / 0.7).log_softmax(1), (numbers["teacher_q_values"] / 0.7).softmax(1), reduction="batchmean"
    )
    (td + 0.4 * distill).backward()
    optimizer.step()

    losses = script.update(state, batch, 0.4, args)
    assert losses["td_loss"] == pytest.approx(td.item(), rel=1e-4)
    assert losses["distill_loss"] == pytest.approx(distill.item(), rel=1e-4)
    assert losses["loss"] == pytest.approx((td + 0.4 * distill).item(), rel=1e-4)
    assert losses["q_values"] == pytest.approx(taken.mean().item(), rel=1e-4)
    student = script.to_torch(script.weights(state))
    for name, parameter in reference.state_dict().items():
        # Adam's first step is ± the learning rate wherever the gradient is not tiny: compare against that.
        assert (np.abs(student[name] - parameter.numpy()) < 1e-5).mean() > 0.99, name


def test_a_loss_that_turns_nan_stops_the_run_and_says_where(script):
    args = tiny(script, learning_rate=1e30, offline_steps=10, offline_eval_frequency=100)
    state = script.create_state(args)
    step = {TORCH: 10, JAX: 2}[
        script
    ]  # JAX looks at every call of two, PyTorch at every hundredth and the last
    with pytest.raises(
        SystemExit, match=rf"nan at gradient step {step} of the offline phase; .*--learning-rate"
    ):
        train_offline(script, args, state, NoWriter(), lambda: 0.0)


@pytest.mark.parametrize("first_wrong", [1, 2, 5, 8, 10])
def test_the_step_that_is_named_is_the_first_that_was_looked_at(script, monkeypatch, first_wrong):
    script.stub_losses(monkeypatch, lambda step: np.nan if step >= first_wrong else 1.0)
    args = tiny(script, offline_steps=10, offline_eval_frequency=9)
    seen_at = {TORCH: [9, 10], JAX: [2, 4, 6, 8, 9, 10]}[script]
    named = next(step for step in seen_at if step >= first_wrong)
    saved = []
    with pytest.raises(SystemExit, match=f"the loss is nan at gradient step {named} of the offline phase"):
        train_offline(script, args, script.create_state(args), NoWriter(), lambda: saved.append(1) or 0.0)
    assert bool(saved) == (named > 9)


def test_an_online_loss_that_turns_infinite_stops_the_run_and_says_where(script):
    with pytest.raises(SystemExit, match=r"the loss is (inf|nan) at online environment step 108; try"):
        rehearse(script, 8, learning_rate=1e30, offline_steps=0)


@pytest.mark.parametrize("offline_eval_frequency", [2, 6])
def test_a_student_that_turned_nan_is_not_saved_over_a_good_one(script, offline_eval_frequency):
    args = tiny(script, learning_rate=1e30, offline_steps=12, offline_eval_frequency=offline_eval_frequency)
    save_and_evaluate = mock.Mock()
    with pytest.raises(SystemExit, match=r"nan at gradient step \d+ of the offline phase"):
        train_offline(script, args, script.create_state(args), NoWriter(), save_and_evaluate)
    save_and_evaluate.assert_not_called()


def test_target_network_moves_by_tau(script):
    args = tiny(script)
    state, batch = script.create_state(args), some_batch(script, 8)
    shapes = {name: array.shape for name, array in script.weights(state).items()}
    student, target = (
        {name: np.full(shape, x, np.float32) for name, shape in shapes.items()} for x in (3, 1)
    )
    script.set_weights(state, "student", student)
    script.set_weights(state, "target_network", target)
    for tau, expected in [(0.25, 1.5), (0.0, 1.5), (1.0, 3.0)]:
        script.move_target(state, batch, tau, args)
        assert all((array == expected).all() for array in script.weights(state, "target_network").values())
        assert all((array == 3.0).all() for array in script.weights(state).values())


def test_student_and_target_network_start_alike_but_apart(script):
    state = script.create_state(tiny(script))
    student, target = script.weights(state), script.weights(state, "target_network")
    assert all(np.array_equal(student[name], target[name]) for name in student)
    script.set_weights(state, "student", {name: array + 1 for name, array in student.items()})
    assert all(
        np.array_equal(script.weights(state, "target_network")[name], student[name]) for name in student
    )


TWO_DEVICES = """
from functools import partial

import flax.linen as nn
import jax
import numpy as np
from both_scripts import JAX, LOSSES
from test_training import filled_replay, tiny

script = JAX.module


class LinearStudent(nn.Module):
    num_actions: int
    dense_width: int

    @nn.compact
    def __call__(self, observations):
        return nn.Dense(self.num_actions)(observations.reshape(len(observations), -1) / 255.0)


script.StudentNetwork = LinearStudent
learner_device, buffer_device = jax.devices()
args = tiny(JAX, tau=0.5)


def learn(device):
    state = JAX.create_state(args)
    state.replay = jax.device_put(filled_replay(JAX), device)
    losses = []
    for shares in [[0.0, 0.5], [0.75, 0.0], [1.0]]:
        results = script.learn(args, state, [1.0, 0.4][: len(shares)], shares)
        losses += [script.read_losses(results, index, "here") for index in range(len(shares))]
    assert state.device == learner_device
    key = np.asarray(jax.random.key_data(state.sampling_key))
    return losses, JAX.weights(state), JAX.weights(state, "target_network"), key


same, other = learn(learner_device), learn(buffer_device)
assert len(same[0]) == len(other[0]) == 5
for mine, yours in zip(same[0], other[0]):
    np.testing.assert_allclose([mine[name] for name in LOSSES], [yours[name] for name in LOSSES], rtol=1e-5)
for mine, yours in zip(same[1:3], other[1:3]):
    for name in mine:
        np.testing.assert_allclose(mine[name], yours[name], rtol=1e-4, atol=1e-7)
assert (same[3] == other[3]).all()

# The buffer of a whole run always lies on the first CPU here.
script.evaluate = partial(script.evaluate, max_game_frames=300)
for name, device in [("same", jax.devices()[0]), ("other", jax.devices()[1])]:
    script.choose_device = lambda args: device
    script.main(tiny(JAX, exp_name=name))
"""


def test_a_buffer_on_another_device_than_the_learner_gives_the_same_run(tmp_path):
    status, _, errors = run(
        tmp_path,
        "-c",
        TWO_DEVICES,
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
        PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    )
    assert status == 0, errors
    same, other = (read_events(next((tmp_path / "runs").glob(f"*__{name}__*"))) for name in ("same", "other"))
    assert same.keys() == other.keys() >= TAGS
    for tag in same.keys() - {"charts/SPS"}:
        np.testing.assert_allclose(same[tag], other[tag], rtol=1e-4, err_msg=tag)


def test_explore_takes_each_environments_own_epsilon(script):
    q_values = np.eye(6, dtype=np.float32)[[4] * 1000]
    actions = script.explore(np.repeat([0.0, 1.0], 500), q_values)
    assert (actions[:500] == 4).all()
    assert np.bincount(actions[500:], minlength=6).min() > 50
    assert np.mean(script.explore(np.full(1000, 0.5), q_values) == 4) == pytest.approx(
        1 / 2 + 1 / 12, abs=0.05
    )


def published_shapes(script, role: str, num_actions: int = 6) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters; in the table, flax's shapes of the kernels."""
    if role == "teacher":
        layers = [
            ("network.0", "Conv_0", (8, 8, 4, 32)),
            ("network.2", "Conv_1", (4, 4, 32, 64)),
            ("network.4", "Conv_2", (3, 3, 64, 64)),
            ("network.7", "Dense_0", (3136, 512)),
            ("network.9", "Dense_1", (512, num_actions)),
        ]
    else:
        layers = [("network.5", "Dense_0", (3872, 256)), ("network.7", "Dense_1", (256, num_actions))]
        for i, (inputs, outputs) in enumerate([(4, 16), (16, 32), (32, 32)]):
            layers.append((f"network.{i}.conv", f"ConvSequence_{i}/Conv_0", (3, 3, inputs, outputs)))
            for j, k in itertools.product(range(2), range(2)):
                layers.append(
                    (
                        f"network.{i}.res_block{j}.conv{k}",
                        f"ConvSequence_{i}/ResidualBlock_{j}/Conv_{k}",
                        (3, 3, outputs, outputs),
                    )
                )
    shapes = {}
    for torch_name, flax_name, (*size, inputs, outputs) in layers:
        if script is TORCH:
            shapes |= {f"{torch_name}.weight": (outputs, inputs, *size), f"{torch_name}.bias": (outputs,)}
        else:
            kernel = (*size, inputs, outputs)
            shapes |= {f"params/{flax_name}/kernel": kernel, f"params/{flax_name}/bias": (outputs,)}
    return shapes


def test_networks_have_the_published_names_and_shapes(script):
    student = script.weights(script.create_state(tiny(script)))
    assert {name: array.shape for name, array in student.items()} == published_shapes(script, "student")
    assert script.teacher_shapes() == published_shapes(script, "teacher")
