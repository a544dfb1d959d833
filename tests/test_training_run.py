"""A training run: when it makes checkpoints, how it ends, what it refuses to resume, and its curves."""

import errno
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from both_scripts import read_curves, run_python
from exact_kills import EnvsInThisProcess
from rehearsal import RandomGame
from replays import NUM_ACTIONS, Stream, fill, make_replay
from torch import nn

from cleanrl.dqn_atari import make_env
from cleanrl.utils import progress
from cleanrl.utils.games.parallel_envs import FinishedGame, WorkerError
from cleanrl.utils.replay.frames_torch import TorchFrames
from cleanrl.utils.replay.ring import ReplayBuffer
from cleanrl.utils.run import training_run
from cleanrl.utils.run.checkpoint import newest_checkpoint
from cleanrl.utils.run.folders import manifests
from cleanrl.utils.run.options import RunOptions
from cleanrl.utils.run.training_run import TrainingRun
from cleanrl.utils.signals import Stopped
from cleanrl.utils.storage import FileEntry, read_manifest, read_tree, write_manifest, write_tree

LOSS = "losses/td_loss"


@dataclass
class Args(RunOptions):
    exp_name: str = "test"
    checkpoint_interval: float = 1e-9
    env_id: str = "Pong"
    repeat_action_probability: float = 0.0
    learning_rate: float = 0.1
    total_timesteps: int = 100
    num_envs: int = 2
    save_replay: Path | None = None


@dataclass
class State:
    network: nn.Module = field(default_factory=lambda: nn.Linear(2, 1))
    replay: ReplayBuffer = field(default_factory=lambda: make_replay(TorchFrames, 10, 2))
    step: int = 0
    gradient_steps: int = 0


def start(script: str = "script.py", state: Any = None, **options: Any) -> TrainingRun:
    return TrainingRun(Args(**options), Path(script), state or State(), make_env, model="network")


class Killed(Exception):
    pass


@contextmanager
def killed_run(**options: Any) -> Iterator[TrainingRun]:
    """A run that is not finished at the end of the block."""
    with suppress(Killed), start(**options) as run:
        yield run
        raise Killed


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def unfinished() -> Path:
    """The folder of a run with a checkpoint at step 5."""
    with killed_run() as run:
        run.state.step = 5
        run.checkpoint()
    return run.folder


def exit_code(run: TrainingRun, *actions: Callable[[], None]) -> str | int:
    """With which a run ends that does these things; Python prints a text and exits with 1."""

    def act() -> None:
        with run:
            for action in actions:
                action()

    with pytest.raises(SystemExit) as end:
        act()
    return end.value.code


def saved_step(folder: Path) -> int:
    return newest_checkpoint(folder).read_state()["state"]["step"]


def refusal(**options: Any) -> str:
    """The line with which a run is refused."""
    with pytest.raises(SystemExit) as end:
        start(**options)
    assert end.value.code.startswith("error: ")
    assert "\n" not in end.value.code
    return end.value.code


# ----------------------------------------------------------------------------------------- checkpoints


def test_the_first_checkpoint_is_made_at_once_and_the_next_after_the_interval():
    for interval, expected in ((1e6, 1), (0.01, 2)):
        with killed_run(checkpoint_interval=interval) as run:
            for run.state.step in (1, 2):
                run.checkpoint()
                time.sleep(0.02)
        assert saved_step(run.folder) == expected


def test_without_an_interval_a_checkpoint_is_made_only_when_the_run_is_stopped():
    with killed_run(checkpoint_interval=0) as run:
        run.checkpoint()
        assert manifests(run.folder) == []
        signal.raise_signal(signal.SIGTERM)
        run.state.step = 3
        with pytest.raises(Stopped):
            run.checkpoint()
    assert saved_step(run.folder) == 3


def test_a_resumed_run_is_where_the_checkpoint_was_made():
    frames = torch.arange(2 * 84 * 84).reshape(2, 1, 84, 84).to(torch.uint8).numpy()
    observations = frames.repeat(4, axis=1)
    with killed_run() as run:
        run.state.replay.start(observations)
        run.state.step = 7
        run.checkpoint()
        run.state.step = 8
    resumed = start(resume=str(run.folder)).state
    assert resumed.step == 7
    assert torch.equal(resumed.network.weight, run.state.network.weight)
    slots = run.state.replay.num_slots * torch.arange(2).numpy()
    assert (resumed.replay.observations(slots) == run.state.replay.observations(slots)).all()


def test_games_continue_where_they_stood_and_others_start_anew(monkeypatch):
    def play(envs: EnvsInThisProcess) -> np.ndarray:
        for _ in range(8):
            envs.step_async(np.array([2]))
            envs.step_wait()
        return envs.observations

    monkeypatch.setattr(training_run, "ParallelEnvs", EnvsInThisProcess)
    pong = {"env_id": "PongNoFrameskip-v4", "repeat_action_probability": 0.5, "num_envs": 1}
    with killed_run(**pong) as run, run.open_envs(1, seed=(1, 2)) as envs:
        play(envs)
        run.checkpoint()
        expected = play(envs)
    with killed_run(**pong, resume=str(run.folder)) as run:
        with run.open_envs(1, seed=(1, 2)) as envs:
            assert (play(envs) == expected).all()
        run.checkpoint()
    with killed_run(**pong, resume=str(run.folder)) as run:
        with run.open_envs(1, seed=(1, 2)) as envs:
            assert (envs.observations == expected).all()
        with run.open_envs(1, seed=(1, 3)) as envs:
            assert not (envs.observations == expected).all()


def test_a_state_that_cannot_be_saved_ends_the_run_before_it_has_a_folder():
    with pytest.raises(TypeError, match=r"^Longer\.added cannot be saved"):
        start(state=make_dataclass("Longer", ["added"])({1, 2}))
    assert not Path("runs").exists()


# ----------------------------------------------------------------------------------------- how it ends


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint_the_model_a_line_and_its_status(capsys, number):
    before = signal.getsignal(number)
    run = start(checkpoint_interval=1e6)

    def learn() -> None:  # what has begun when the signal comes
        signal.raise_signal(number)
        run.state.step, run.state.gradient_steps = 4, 2

    assert exit_code(run, run.checkpoint, learn, run.checkpoint) == 128 + number
    assert capsys.readouterr().err == f"stopped by {number.name}; resume it with --resume {run.folder}\n"
    assert saved_step(run.folder) == 4
    assert torch.load(run.folder / "test.cleanrl_model").keys() == {"weight", "bias"}
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (
            WorkerError("environment worker 7 died (exit code 1); out of memory?"),
            "error: environment worker 7 died (exit code 1); out of memory?",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "error: [Errno 28] No space left on device"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nOf the GPU"),
            "error: CUDA out of memory. Tried to allocate 2 GiB; close other programs, or use "
            "--buffer-device cpu or a smaller --buffer-size or --batch-size",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_run_that_fails_says_how_to_resume_it(fault, line):
    def fail() -> None:
        raise fault

    run = start()
    assert exit_code(run, fail) == f"{line}; there is no checkpoint"
    assert not list(run.folder.glob("*.cleanrl_model"))  # nothing was learned
    run = start()
    assert exit_code(run, run.checkpoint, fail) == f"{line}; resume it with --resume {run.folder}"


def test_the_end_says_what_came_of_it_also_after_a_resumption(capsys, monkeypatch):
    evaluations = iter([[19.0, 20.0], [-3.0, 4.0], [15.0, 16.0]])

    temperatures = []

    def evaluate(*_: Any, after_step: Callable[[int, int], None], **settings: Any) -> list[float]:
        temperatures.append(settings["sampling_temperature"])
        after_step(400, 0)
        after_step(800, 2)
        return next(evaluations)

    monkeypatch.setattr(training_run, "evaluate", evaluate)
    monkeypatch.setattr(Args, "end_e", 0.0, raising=False)
    with killed_run() as run:
        run.play("teacher", np.zeros, 2, 0, sampling_temperature=0.5)
        run.play("offline-10", np.zeros, 2, 10)
        run.checkpoint()
    assert "offline evaluation: 100% 2/2 [" in capsys.readouterr().err
    with start(resume=str(run.folder)) as resumed:
        resumed.save_model(resumed.state.network)
        resumed.finish(resumed.play("final", np.zeros, 2, 20))
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "final evaluation: mean return 15.50 over 2 games (teacher 19.50, offline 0.50)",
        f"model: {run.folder}/test.cleanrl_model",
        f"watch it play: python cleanrl/enjoy.py {run.folder}",
        "curves: tensorboard --logdir runs",
    ]
    assert temperatures == [0.5, 0.0, 0.0]
    with start(save_model=False) as unsaved:
        unsaved.finish([1.0])
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "final evaluation: mean return 1.00 over 1 games",
        "curves: tensorboard --logdir runs",
    ]


def test_the_best_network_of_the_evaluations_is_kept(monkeypatch, capsys):
    """Also beyond a resumption; without an evaluation online there is none but the last."""
    monkeypatch.setattr(Args, "end_e", 0.0, raising=False)
    saved = []
    monkeypatch.setattr(training_run, "save_weights", lambda path, network: saved.append(path.name))
    with killed_run() as run:
        for mean_return in (3.0, 7.0, 7.0, 5.0):
            run.keep_if_best(mean_return)
        run.checkpoint()
    assert saved == ["test-best.cleanrl_model"] * 2
    with start(resume=str(run.folder)) as resumed:
        resumed.keep_if_best(6.0)
        resumed.finish([7.0, 6.0])
    assert len(saved) == 2
    assert "(best 7.00)\n" in (said := capsys.readouterr().out)
    assert f"best: {run.folder}/test-best.cleanrl_model\n" in said
    with start() as another:
        another.keep_if_best(-3.0)
        another.finish([-2.0])
    assert len(saved) == 4
    with start() as without:
        without.finish([9.0])
    assert len(saved) == 4


def test_the_progress_bar_shows_the_newest_return_and_coefficient(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.0)
    with start() as run, run.progress("online", 0, 10, "steps") as bar:
        for game_return, coefficient in ((-21.0, 1.0), (-19.0, 0.75)):
            run.plot_game(FinishedGame(0, game_return, 1000), step=1)
            run.plot({"charts/distill_coeff": coefficient}, step=1)
        run.plot({}, step=1)  # which reads what was plotted before
        bar.update(5)
        assert capsys.readouterr().err.splitlines()[-1].endswith("return=-19, λ=0.75]")


def test_a_finished_run_has_its_results_and_no_checkpoints(capsys):
    with start() as run:
        run.checkpoint()
        run.save_model(run.state.network, "-offline")
        run.finish([1.0, 4.0])
    assert "final evaluation: mean return 2.50 over 2 games" in capsys.readouterr().out
    assert read_curves(run.folder)["eval/episodic_return"] == [(0, 1.0), (1, 4.0)]
    events, model = sorted(run.folder.iterdir())
    assert events.name.startswith("events.out.tfevents.")
    assert model.name == "test-offline.cleanrl_model"
    assert refusal(resume=str(run.folder)).endswith("has no checkpoint: it has finished, or never started")


def test_no_model_is_saved_if_none_is_to_be():
    with killed_run(save_model=False) as run:
        run.save_model(run.state.network)
    assert not list(run.folder.glob("*.cleanrl_model"))


# ------------------------------------------------------------------------------------ what is refused


def test_another_scripts_run_is_refused(unfinished):
    line = f"error: --resume {unfinished} is a run of script.py, not of other.py"
    assert refusal(script="other.py", resume=str(unfinished)) == line


@pytest.mark.parametrize(
    ("option", "value"), [("env_id", "Breakout"), ("learning_rate", 0.2), ("seed", 2), ("exp_name", "x")]
)
def test_an_option_that_makes_it_another_run_is_refused_by_name(unfinished, option, value):
    line = refusal(resume=str(unfinished), **{option: value})
    name, before = option.replace("_", "-"), getattr(Args, option)
    assert line.startswith(f"error: --{name} is {value}, but {unfinished} has {before}; leave the option out")


def test_an_option_that_may_change_is_taken(unfinished):
    changed = {"total_timesteps": 200, "checkpoint_interval": 1e-8, "save_replay": Path("replay")}
    with killed_run(resume=str(unfinished), **changed) as run:
        run.checkpoint()
    options = newest_checkpoint(unfinished).options
    assert (options["total_timesteps"], options["save_replay"]) == (200, "replay")


def test_a_checkpoint_of_another_version_of_the_script_is_refused(unfinished, capsys):
    longer = make_dataclass("State", [("added", int, 0)], bases=(State,))
    assert refusal(state=longer(), resume=str(unfinished)) == (
        f"error: no checkpoint of {unfinished} can be used; restore its files, finish the run with the"
        " version that started it, or start without --resume"
    )
    assert capsys.readouterr().err == (
        f"warning: checkpoint-000001 of {unfinished} cannot be used: it is of another version of the script,"
        " whose state differs in added\n"
    )


Content = dict[str, Any]


def the_state(change: Callable[[Content], Any]) -> Callable[[Content, Content, Content], Any]:
    return lambda saved, rows, manifest: change(saved["state"])


def the_rows(change: Callable[[Content], Any]) -> Callable[[Content, Content, Content], Any]:
    return lambda saved, rows, manifest: change(rows)


def the_replay(**changes: Any) -> Callable[[Content, Content, Content], Any]:
    return lambda saved, rows, manifest: manifest["replays"]["replay"].update(changes)


def halved(rows: Content) -> None:
    for name, values in rows.items():
        rows[name] = values[::2]


GAME = {"env": {}, "observation": np.zeros((4, 84, 84), np.uint8)}
FAULTS = {
    "a counter is a text": the_state(lambda state: state.update(step="5")),
    "a counter is NaN": the_state(lambda state: state.update(step=float("nan"))),
    "a counter is negative": the_state(lambda state: state.update(step=-1)),
    "a counter is too large": the_state(lambda state: state.update(step=10**30)),
    "a counter is missing": the_state(lambda state: state.pop("step")),
    "a weight is missing": the_state(lambda state: state["network"].pop("weight")),
    "a weight has another shape": the_state(lambda state: state["network"].update(weight=np.zeros((1, 3)))),
    "a weight is NaN": the_state(lambda state: state["network"]["weight"].fill(np.nan)),
    "there are no games": lambda saved, rows, manifest: saved.pop("games"),
    "the games are a number": lambda saved, rows, manifest: saved.update(games=3),
    "a game is missing": lambda saved, rows, manifest: saved.update(games=([1], [GAME])),
    "a game has no observation": lambda saved, rows, manifest: saved.update(games=([1], [GAME, {"env": {}}])),
    "a return is too large": lambda saved, rows, manifest: saved.update(mean_returns={"best": 10**400}),
    "a return is a text": lambda saved, rows, manifest: saved.update(mean_returns={"best": "3"}),
    "half of the rows are missing": the_rows(halved),
    "a row is there twice": the_rows(lambda rows: rows["positions"].__setitem__(1, rows["positions"][0])),
    "a row is beyond the head": the_rows(lambda rows: rows["positions"].__setitem__(0, 99)),
    "a row is of no ring": the_rows(lambda rows: rows["envs"].__setitem__(0, 2)),
    "an action is none": the_rows(lambda rows: rows["actions"].fill(200)),
    "a stack is too deep": the_rows(lambda rows: rows["stack_depths"].fill(9)),
    "a reward is too large": the_rows(lambda rows: rows["rewards"].fill(3e38)),
    "a reward is NaN": the_rows(lambda rows: rows["rewards"].fill(np.nan)),
    "a Q-value is infinite": the_rows(lambda rows: rows["teacher_q_values"].fill(np.inf)),
    "there are no Q-values": the_rows(lambda rows: rows.pop("teacher_q_values")),
    "frames have another shape": the_rows(lambda rows: rows.update(frames=rows["frames"][:, :80])),
    "the heads are beyond the rows": the_replay(heads=[90, 90]),
    "the heads are of other environments": the_replay(heads=[4], oldest=[0]),
    "the heads are texts": the_replay(heads=["x", "y"]),
    "the heads are huge": the_replay(heads=[10**400, 4]),
    "the rows would take all memory": the_replay(heads=[10**11, 10**11]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_whose_content_no_run_has_gives_way_to_the_one_before(fault, capsys):
    """Its checksums are right. Without one before, the run is refused."""
    stream = Stream(2, 8, 0.0)
    replay = ReplayBuffer(
        20, 2, lambda slots: TorchFrames(slots, "cpu"), NUM_ACTIONS, num_actions=NUM_ACTIONS
    )
    with killed_run(state=State(replay=replay)) as run:
        for index in fill(replay, stream):
            if index in (3, 7):
                run.state.step = index
                run.checkpoint()
                time.sleep(1e-6)
    newest, before = manifests(run.folder)
    manifest, folder = read_manifest(newest), newest.parent
    saved = read_tree(folder, FileEntry(*manifest["state"]))
    last_file = manifest["replays"]["replay"]["files"][-1]
    rows = read_tree(folder, FileEntry(last_file["name"], last_file["sha256"]))
    FAULTS[fault](saved, rows, manifest)
    manifest["state"] = write_tree(folder / manifest["state"][0], saved)
    last_file["sha256"] = write_tree(folder / last_file["name"], rows).sha256
    write_manifest(newest, manifest)

    def new_state() -> State:
        return State(
            replay=ReplayBuffer(
                20, 2, lambda slots: TorchFrames(slots, "cpu"), NUM_ACTIONS, num_actions=NUM_ACTIONS
            )
        )

    alone = shutil.copytree(run.folder, "alone")
    (Path(alone) / "checkpoints" / before.name).unlink()
    assert "no checkpoint of alone can be used; restore its files" in refusal(
        state=new_state(), resume="alone"
    )
    with killed_run(state=new_state(), resume=str(run.folder)) as resumed:
        assert resumed.state.step == 3
        assert (resumed.state.replay.heads == 4).all()
    warning = f"warning: checkpoint-000002 of {run.folder} cannot be used: "
    assert warning in capsys.readouterr().err


def test_a_run_is_resumed_with_the_same_teacher_wherever_it_is_from():
    def started(teacher: Any, **options: Any) -> TrainingRun:
        return TrainingRun(Args(**options), Path("script.py"), State(), make_env, "network", teacher=teacher)

    teacher, other = nn.Linear(2, 3), nn.Linear(2, 3)
    with suppress(Killed), started(teacher) as run:
        run.checkpoint()
        raise Killed
    with pytest.raises(
        SystemExit, match=r"^error: --resume [^\n]*: its teacher had other weights; name that teacher"
    ):
        started(other, resume=str(run.folder))
    other.load_state_dict(teacher.state_dict())
    with started(other, resume=str(run.folder)):
        pass


def test_a_buffer_of_a_checkpoint_that_gives_way_is_empty_again():
    replay = make_replay(TorchFrames, 20, 2)
    with killed_run(state=State(replay=replay)) as run:
        run.checkpoint()
        for _ in fill(replay, Stream(2, 8, 0.0)):
            pass
        time.sleep(1e-6)
        run.checkpoint()
    newest, _ = manifests(run.folder)
    manifest, folder = read_manifest(newest), newest.parent
    (file,) = manifest["replays"]["replay"]["files"]
    rows = read_tree(folder, FileEntry(file["name"], file["sha256"]))
    rows["rewards"].fill(np.nan)
    file["sha256"] = write_tree(folder / file["name"], rows).sha256
    write_manifest(newest, manifest)
    with killed_run(state=State(replay=make_replay(TorchFrames, 20, 2)), resume=str(run.folder)) as resumed:
        assert resumed.state.replay.frames is None
        assert resumed.state.replay.heads.tolist() == [0, 0]


def test_a_checkpoint_of_another_network_is_refused(unfinished, capsys):
    wider = State(network=nn.Linear(3, 1))
    assert "finish the run with the version" in refusal(state=wider, resume=str(unfinished))
    assert capsys.readouterr().err.endswith("whose state differs in network\n")


@pytest.mark.parametrize(
    ("folder", "fault"), [("empty", "has no checkpoint"), ("nothing", "is not a folder")]
)
def test_a_folder_without_a_run_is_refused_and_left_alone(folder, fault):
    Path("empty").mkdir()
    assert refusal(resume=folder).startswith(f"error: --resume {folder} {fault}")
    assert list(Path().rglob("*")) == [Path("empty")]


def test_a_run_is_locked_against_other_processes_until_it_ends(unfinished):
    program = "from pathlib import Path; from cleanrl.utils.run.folders import lock_run; lock_run(Path({!r}))"
    lock = unfinished / "checkpoints" / "lock"
    line = (
        f"error: another process is running {unfinished}; wait until it has ended or, if it was killed on"
        f" another machine, delete {lock}"
    )
    with killed_run(resume=str(unfinished)):
        other = run_python(Path(), "-c", program.format(str(unfinished)))
        assert other == (1, "", f"{line}\n")
        assert refusal(resume=str(unfinished)) == line
    assert start(resume=str(unfinished)).state.step == 5


def test_a_folder_that_cannot_be_written_to_is_refused(unfinished):
    (unfinished / "checkpoints" / "lock").unlink(missing_ok=True)
    (unfinished / "checkpoints" / "lock").mkdir()
    assert " cannot be written to (Is a directory); " in refusal(resume=str(unfinished))
    for path in (unfinished / "checkpoints").iterdir():
        path.rmdir() if path.is_dir() else path.unlink()
    unfinished.rename("elsewhere")
    Path("runs").rmdir()
    Path("runs").touch()
    assert " cannot be written to (Not a directory); start in another folder" in refusal()


# ---------------------------------------------------------------------------------------------- curves


def test_values_of_both_frameworks_are_plotted_in_their_order():
    with start() as run:
        for step, value in enumerate([1.0, torch.tensor(2.0), jnp.float32(3.0)]):
            run.plot({LOSS: value, "charts/epsilon": step}, 10 * step)
    curves = read_curves(run.folder)
    assert curves[LOSS] == [(0, 1.0), (10, 2.0), (20, 3.0)]
    assert curves["charts/epsilon"] == [(0, 0.0), (10, 1.0), (20, 2.0)]


def test_a_metric_of_ones_own_is_plotted():
    with start() as run:
        run.plot({"losses/new": 1.0, LOSS: 2.0}, 0)
    curves = read_curves(run.folder)
    assert (curves["losses/new"], curves[LOSS]) == ([(0, 1.0)], [(0, 2.0)])


@pytest.mark.parametrize("loss", [float("inf"), torch.tensor(torch.nan)])
def test_a_loss_that_is_not_finite_ends_the_run_before_a_checkpoint_or_model_is_written(loss):
    with killed_run() as run:
        run.plot({LOSS: 1.0}, 100)
        run.checkpoint()
        for write in (run.checkpoint, lambda: run.save_model(run.state.network), lambda: run.plot({}, 300)):
            run.state.step = 9
            run.plot({LOSS: loss, "losses/q_values": loss}, 200)
            with pytest.raises(SystemExit, match=r"^error: losses/td_loss is (inf|nan) at step 200; try "):
                write()
    assert saved_step(run.folder) == 0
    assert not list(run.folder.glob("*.cleanrl_model"))


def test_a_resumed_runs_curves_have_each_point_once(capsys):
    with killed_run() as run:
        run.plot({LOSS: 1.0}, 1)
        run.checkpoint()
        run.plot({LOSS: 2.0}, 2)
        run.plot({LOSS: 3.0}, 3)
    assert read_curves(run.folder)[LOSS] == [(1, 1.0), (2, 2.0)]
    for value in (4.0, 5.0):
        with killed_run(resume=str(run.folder)) as resumed:
            resumed.plot({LOSS: value}, 2)
            if value == 5.0:
                resumed.checkpoint()
            resumed.plot({LOSS: 6.0}, 3)
            resumed.plot({LOSS: 6.0}, 4)
    start(resume=str(run.folder))
    assert read_curves(run.folder)[LOSS] == [(1, 1.0), (2, 5.0)]
    assert capsys.readouterr().err == ""


def test_curves_that_are_lost_are_missed(unfinished, capsys):
    for path in unfinished.glob("events.*"):
        os.truncate(path, 10)
    start(resume=str(unfinished))
    assert f"warning: {path} lacks some of the run's curves" in capsys.readouterr().err


def test_while_the_curves_do_not_fit_on_the_disk_there_is_no_checkpoint_that_lacks_them(monkeypatch, capsys):
    fsync = os.fsync

    def full_for_events(descriptor: int) -> None:
        if "events." in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with killed_run() as run:
        run.checkpoint()
        run.state.step = 1
        run.plot({LOSS: 1.0}, 1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full_for_events)
            run.checkpoint()
        assert "No space left on device" in capsys.readouterr().err
    resumed = start(resume=str(run.folder))
    assert resumed.state.step == len(read_curves(run.folder).get(LOSS, [])) == 0


def test_every_evaluation_plays_the_same_games_with_the_runs_options(monkeypatch):
    calls = []

    def evaluate(make_env, q_values, episodes, **settings):
        calls.append((make_env.args, episodes, settings["seed"], settings["epsilon"]))
        return [1.0] * episodes

    monkeypatch.setattr(training_run, "evaluate", evaluate)
    monkeypatch.setattr(Args, "end_e", 0.03, raising=False)
    with killed_run(seed=7, repeat_action_probability=0.25) as run:
        run.play("teacher", np.zeros, 5, 0)
        run.play("offline-10", np.zeros, 3, 10)
    game = ("Pong", 0.25)
    assert calls == [(game, 5, (7, 0), 0.03), (game, 3, (7, 0), 0.03)]


def test_a_full_disk_when_a_stopped_run_saves_its_model_is_one_line(monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    run = start()
    run.state.gradient_steps = 1
    monkeypatch.setattr(training_run, "save_weights", fail)
    line = exit_code(run, lambda: signal.raise_signal(signal.SIGTERM), run.checkpoint)
    assert line == f"error: [Errno 28] No space left on device; resume it with --resume {run.folder}"


@pytest.mark.parametrize("save_model", [False, True])
def test_a_model_that_is_not_saved_is_no_artifact(monkeypatch, save_model):
    tracker = mock.Mock()
    monkeypatch.setattr(training_run, "Tracker", tracker)
    with start(track=True, save_model=save_model) as run:
        run.finish([1.0])
    model = run.folder / "test.cleanrl_model" if save_model else None
    assert tracker().finish.call_args == mock.call([1.0], model)


def test_the_final_mean_is_plotted_at_the_gradient_steps():
    with start() as run:
        run.state.gradient_steps = 17
        run.finish([1.0, 4.0])
    assert read_curves(run.folder)["eval/avg_episodic_return"] == [(17, 2.5)]


def test_the_environments_of_training_have_the_runs_options(monkeypatch):
    made = []

    def make(env_fns: list) -> RandomGame:
        made.extend(env_fn.args for env_fn in env_fns)
        return RandomGame(len(env_fns))

    monkeypatch.setattr(training_run, "ParallelEnvs", make)
    with killed_run(repeat_action_probability=0.25) as run, run.open_envs(2, seed=(1, 2)):
        pass
    assert made == [("Pong", 0.25)] * 2
