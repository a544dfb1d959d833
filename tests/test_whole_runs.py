"""`main` from start to end, with games that take no time: curves, models, uploads, runs that stop early."""

import re
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from both_scripts import DQN_JAX, DQN_TORCH, JAX, SCRIPTS, TORCH, is_qdagger, name_of, read_curves, read_model
from rehearsal import RandomGame, options_of, tiny_args
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cleanrl.utils.games.parallel_envs import WorkerError
from cleanrl.utils.run import training_run
from cleanrl.utils.run.charts import (
    CHARTS,
    DQN_CHARTS,
    EVALUATION_RETURN,
    FINAL_RETURN,
    ONLINE_RETURN,
    TAGS,
)
from cleanrl.utils.run.training_run import TrainingRun

pytestmark = pytest.mark.usefixtures("one_thread")
# What only QDagger plots, beside the curves of its first two phases.
OF_QDAGGER = {"charts/distill_coeff", "losses/loss", "losses/distill_loss"}


def models(folder: Path) -> set[str]:
    return {path.name.removesuffix(".cleanrl_model") for path in folder.rglob("*.cleanrl_model")}


def test_the_curves_of_all_scripts_are_those_of_the_charts_module(train):
    """No script plots another tag, and each tag there is plotted by some script."""
    frequency = {"online_eval_frequency": 32, "eval_frequency": 32}
    runs = {script: train(script, name_of(script), **options_of(script, frequency)) for script in SCRIPTS}
    curves = {script: read_curves(run_folder) for script, run_folder in runs.items()}
    for script, run_folder in runs.items():
        kept = {name_of(script), f"{name_of(script)}-best"}
        assert models(run_folder) == (kept | {f"{name_of(script)}-offline"} if is_qdagger(script) else kept)
    of_dqn = {tag for tag in TAGS if tag not in OF_QDAGGER and not re.match("charts/(teacher|offline)/", tag)}
    assert curves[TORCH].keys() == curves[JAX].keys() == TAGS.keys()
    assert curves[DQN_TORCH].keys() == curves[DQN_JAX].keys() == of_dqn
    assert all(
        np.isfinite(value) for tags in curves.values() for points in tags.values() for _, value in points
    )
    for charts, plotted in [(CHARTS, set(TAGS)), (DQN_CHARTS, of_dqn)]:
        tags = [tag for section in charts.values() for chart in section.values() for tag in chart]
        by_themselves = {EVALUATION_RETURN, FINAL_RETURN, "charts/episodic_length"}
        assert sorted(tags) == sorted(plotted - by_themselves)


@pytest.mark.parametrize("num_envs", [1, 3, 16])
def test_curves_and_models_do_not_depend_on_the_number_of_environments(algorithm, train, num_envs):
    options = {"learning_starts": 10, "total_timesteps": 16, "buffer_size": 10, "batch_size": 4}
    offline_steps = 0
    if is_qdagger(algorithm):
        offline_steps = 16
        options |= {"teacher_steps": 16, "offline_steps": 16, "teacher_eval_episodes": 1}
    # Some other options, which have to work too.
    options |= {1: {"exp_name": "mine"}, 3: {"save_model": False}, 16: {"seed": 2**32 - 1}}[num_envs]
    run_folder = train(algorithm, num_envs=num_envs, eval_episodes=1, **options)
    curves = read_curves(run_folder)
    last_step = offline_steps + -(-16 // num_envs) * num_envs
    assert [step for step, _ in curves["charts/epsilon"]][-1] == last_step
    assert [step for step, _ in curves["losses/td_loss"]] == [offline_steps + 16]
    assert curves["eval/episodic_return"] == [(0, 1.0)]
    assert [value for _, value in curves["eval/avg_episodic_return"]] == [1.0]
    if is_qdagger(algorithm):
        assert curves["charts/teacher/avg_episodic_return"] == [(0, 1.0), (16, 1.0), (last_step, 1.0)]
        assert [step for step, _ in curves["charts/offline/q_loss"]] == [16]
        assert [step for step, _ in curves["charts/offline/avg_episodic_return"]] == [4, 8, 12, 16]
    name = options.get("exp_name", name_of(algorithm))
    expected = {name, f"{name}-offline"} if is_qdagger(algorithm) else {name}
    assert models(run_folder) == (expected if options.get("save_model", True) else set())
    assert not (run_folder / "checkpoints").exists()
    pattern = rf"PongNoFrameskip-v4__{name}__{options.get('seed', 1)}__\d+"
    assert re.fullmatch(pattern, run_folder.name)


def test_the_options_are_a_table_in_tensorboard(algorithm, train):
    events = EventAccumulator(str(train(algorithm)))
    events.Reload()
    (event,) = events.Tensors("hyperparameters/text_summary")
    table = event.tensor_proto.string_val[0].decode()
    assert all(f"|{name}|{value}|" in table for name, value in vars(tiny_args(algorithm)).items())


def test_a_run_without_an_offline_phase(train, monkeypatch):
    monkeypatch.setattr(TORCH, "fill_teacher_replay", mock.Mock(side_effect=AssertionError("for nothing")))
    run_folder = train(TORCH, offline_steps=0)
    assert read_curves(run_folder).keys() == TAGS.keys() - {
        *(tag for tag in TAGS if tag.startswith("charts/offline/")),
        ONLINE_RETURN,
    }
    assert models(run_folder) == {name_of(TORCH)}


@pytest.mark.slow
def test_the_first_game_of_each_evaluation_is_recorded(train):
    run_folder = train(TORCH, short_games=True, capture_video=True, save_model=False)
    folders = {path.parent.relative_to(run_folder) for path in run_folder.rglob("*.mp4")}
    assert folders == {Path("videos", name) for name in ("teacher", "offline-4", "offline-6", "final")}
    events = EventAccumulator(str(run_folder), size_guidance={"images": 0})
    events.Reload()
    shown = {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}
    assert shown == {"videos/teacher": [0], "videos/offline": [4, 6], "videos/final": [6 + 64]}
    (final,) = events.Images("videos/final")
    assert (final.encoded_image_string[:6], final.width, final.height) == (b"GIF89a", 80, 105)


def test_a_finished_run_is_uploaded_with_its_script_its_model_and_a_card(algorithm, train, monkeypatch):
    """What is uploaded, and how: test_upload.py."""
    uploaded = []

    def upload(run_folder: Path) -> None:
        uploaded.append(run_folder.name)
        assert not (run_folder / "checkpoints").exists()
        assert signal.getsignal(signal.SIGUSR1) != signal.SIG_DFL  # it would look like a run to be resumed
        assert name_of(algorithm) in models(run_folder)
        assert (run_folder / f"{name_of(algorithm)}.py").read_bytes() == Path(algorithm.__file__).read_bytes()
        assert "Mean return **1.00 ± " in (run_folder / "README.md").read_text("utf-8")
        assert [value for _, value in read_curves(run_folder)["eval/episodic_return"]] == [1.0, 1.0]

    monkeypatch.setattr(training_run, "upload", upload)
    run_folder = train(algorithm, upload_model=True, hf_entity="alice")
    assert uploaded == [run_folder.name]
    repo_id = f"alice/PongNoFrameskip-v4-{name_of(algorithm)}-seed1"
    assert f"enjoy.py {repo_id}\n" in (run_folder / "README.md").read_text("utf-8")


def test_tracking_starts_before_the_first_event_is_written(train, monkeypatch):
    calls = mock.Mock()
    calls.EventWriter.side_effect = RuntimeError("far enough")
    monkeypatch.setattr(training_run, "Tracker", calls.Tracker)
    monkeypatch.setattr(training_run, "EventWriter", calls.EventWriter)
    options = {"track": True, "wandb_project_name": "project", "wandb_entity": "team"}
    with pytest.raises(RuntimeError, match="far enough"):
        train(TORCH, **options)
    (_, (name, project, entity, tracked), _), (_, (run_folder, mirror), _) = calls.method_calls
    assert (run_folder.name, project, entity) == (name, "project", "team")
    assert mirror is calls.Tracker()
    assert re.fullmatch(rf"PongNoFrameskip-v4__{name_of(TORCH)}__1__\d+", name)
    args = vars(tiny_args(TORCH, **options))
    assert tracked == args | {"teacher_model_path": str(args["teacher_model_path"])}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, None])
@pytest.mark.parametrize("has_learned", [False, True])
def test_a_run_that_stops_early_keeps_what_it_has_learned(
    algorithm, train, monkeypatch, capsys, number, has_learned
):
    """By a signal, or because of a worker of the games."""
    steps, step_async = [], RandomGame.step_async
    last_step = (8 + 6 if is_qdagger(algorithm) else 6) if has_learned else 2

    def stopping_step_async(games: RandomGame, actions: np.ndarray) -> None:
        steps.append(actions)
        if len(steps) == last_step and number:
            signal.raise_signal(number)
        elif len(steps) == last_step:
            raise WorkerError("a worker died")
        step_async(games, actions)

    monkeypatch.setattr(RandomGame, "step_async", stopping_step_async)
    options = {} if is_qdagger(algorithm) else {"save_replay": Path("replay")}
    with pytest.raises(SystemExit) as end:
        train(algorithm, exp_name="mine", **options)
    if number:
        assert end.value.code == 128 + number
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"stopped by {number.name}; ")
    else:
        line = end.value.code
        assert line.startswith("error: a worker died; ")
    assert re.search(r"; resume it with --resume runs/PongNoFrameskip-v4__mine__1__\d+$", line)
    of_phase = {"mine", "mine-offline"} if is_qdagger(algorithm) else {"mine"}
    assert models(Path("runs")) == (of_phase if has_learned else set())
    assert not list(Path("replay").glob("*"))


@pytest.mark.parametrize("is_stopped", [False, True])
def test_the_moving_average_is_what_a_run_ends_with(qdagger, train, monkeypatch, is_stopped):
    """Here it never moves from the 1 that it starts from."""
    play, step_async, played, steps = TrainingRun.play, RandomGame.step_async, {}, []

    def recording_play(run: TrainingRun, name: str, compute_q_values: Callable, *others, **settings):
        played[name] = compute_q_values(np.zeros((1, 4, 84, 84), np.uint8)).max()
        return play(run, name, compute_q_values, *others, **settings)

    def stopping_step_async(games: RandomGame, actions: np.ndarray) -> None:
        steps.append(actions)
        if is_stopped and len(steps) == 14:
            signal.raise_signal(signal.SIGTERM)
        step_async(games, actions)

    monkeypatch.setattr(TrainingRun, "play", recording_play)
    monkeypatch.setattr(RandomGame, "step_async", stopping_step_async)
    with suppress(SystemExit):
        train(qdagger, average_decay=1.0, learning_rate=0.1)
    name = name_of(qdagger)
    (model,) = Path("runs").rglob(f"{name}.cleanrl_model")
    assert list(read_model(qdagger, model).values()) == [1.0]
    assert ("final" in played) != is_stopped
    assert {value for name, value in played.items() if name != "teacher"} == {1.0}
