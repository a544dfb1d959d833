"""What a command line may say: bounds in the types of options, and the options of a run that is resumed.

The options of the training scripts: test_options.py; what else they refuse: test_refusals.py.
"""

import math
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from both_scripts import ROOT, run_python

from cleanrl.dqn_atari import Args as DQNArgs
from cleanrl.qdagger_dqn_atari_impalacnn import Args as QDaggerArgs
from cleanrl.utils import bounds
from cleanrl.utils.bounds import shown
from cleanrl.utils.command_line import check_arguments, check_bounds, describe_options, parse_arguments
from cleanrl.utils.games.atari import check_game
from cleanrl.utils.run.checkpoint import CheckpointWriter
from cleanrl.utils.run.folders import newest_unfinished_run
from cleanrl.utils.run.options import RunOptions

FOLDER = Path("runs/Pong__test__1__100")


@dataclass
class Args(RunOptions):
    exp_name: bounds.Name = "test"

    # game
    env_id: str = "Pong"
    """the game"""
    total_timesteps: bounds.PositiveInt = 100
    """steps to play"""
    teacher_path: Path | None = None
    """a file (default: none)"""


def parse(monkeypatch: pytest.MonkeyPatch, *options: str) -> Args:
    monkeypatch.setattr(sys, "argv", ["script.py", *options])
    return parse_arguments(Args)


@pytest.mark.parametrize("value", ["a\nb", "a\x1b[2J", "\ud800"])
def test_a_text_is_one_line(value):
    with pytest.raises(
        SystemExit, match=r"^error: --wandb-entity [^\n\x1b]+ must be one line of printable characters$"
    ):
        check_bounds(Args(wandb_entity=value))
    check_bounds(Args(wandb_entity="größe é [x]"))


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("t\udcff.safetensors", "must be one line"),
        ("a\n```", "must be one line"),
        ("x" * 5000, "is longer than any path"),
        ("x" * 256, "is longer than any path"),
    ],
)
def test_a_path_is_one_line_and_one_that_a_file_can_have(path, fault):
    with pytest.raises(SystemExit, match=rf"^error: --teacher-path [^\n]+ {fault}"):
        check_bounds(Args(teacher_path=Path(path)))
    check_bounds(Args(teacher_path=Path("nowhere/größe é [x]")))


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def saved_run() -> None:
    """A checkpoint of a run with options that are not the defaults, and one that exists no more."""
    (FOLDER / "checkpoints").mkdir(parents=True)
    options = vars(Args(total_timesteps=7, seed=1)) | {"teacher_path": "a/teacher", "removed": 5}
    CheckpointWriter(FOLDER, None).save("script", options, None, {})


@pytest.mark.parametrize(
    ("kind", "good", "bad", "demand"),
    [
        (bounds.NonNegativeInt, [0, 10**12], [-1], "at least 0"),
        (bounds.NonNegativeInt, [], [10**12 + 1, 2**63, 10**400], "at most 1000000000000"),
        (bounds.PositiveInt, [1], [0, -1], "at least 1"),
        (bounds.Seed, [0, 2**32 - 1], [-1, 2**32], "between 0 and 4294967295"),
        (bounds.Fraction, [0.0, 1.0], [-0.1, 1.5, math.nan, math.inf], "between 0 and 1"),
        (bounds.NonNegativeFloat, [0.0], [-0.1, math.nan], "at least 0"),
        (bounds.NonNegativeFloat, [1e12], [2e12, math.inf], "at most 1000000000000"),
        (bounds.PositiveFloat, [1e-300], [0.0, -1.0, math.nan], "above 0"),
        (bounds.PositiveInt | None, [None, 1], [0], "at least 1"),
    ],
    ids=str,
)
def test_a_value_out_of_its_bounds_is_refused_with_what_it_must_be(kind, good, bad, demand):
    @dataclass
    class Bounded:
        some_option: kind

    for value in good:
        check_bounds(Bounded(value))
    for value in bad:
        with pytest.raises(SystemExit) as end:
            check_bounds(Bounded(value))
        assert end.value.code == f"error: --some-option {shown(value)} must be {demand}"


BAD_NAMES = [
    "",
    "a/b",
    "../../x",
    "..",
    ".",
    ".a",
    "-a",
    "a ",
    "a b",
    "[v2]",
    "a*",
    "a?",
    "a\nb",
    "é",
    "\udcff",
]
BAD_NAMES += ["a" * 101, "x" * 5000]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_names_that_files_should_not_have_are_refused_in_one_short_line(name):
    with pytest.raises(SystemExit) as end:
        check_arguments(QDaggerArgs(exp_name=name))
    assert re.fullmatch(r"error: --exp-name .* must be at most 100 letters, digits, .*", end.value.code)
    assert len(end.value.code) < 300
    assert end.value.code.isprintable()


def test_what_is_no_game_is_said_in_one_short_line():
    for env_id in ("x" * 5000, "a\nb", "\udcff"):
        with pytest.raises(SystemExit, match=r"^error: --env-id .* is not known; ") as end:
            check_game(env_id)
        assert len(end.value.code) < 300
        assert end.value.code.isprintable()


@pytest.mark.parametrize("name", ["a", "qdagger_dqn_atari_impalacnn", "v2.1-b__c", "A" * 100])
def test_names_that_files_can_have_are_taken(name):
    check_arguments(QDaggerArgs(exp_name=name))


def test_a_checkpoints_own_options_are_checked_as_if_they_were_typed(monkeypatch):
    (FOLDER / "checkpoints").mkdir(parents=True)
    options = vars(QDaggerArgs()) | {"exp_name": "../../x"}
    CheckpointWriter(FOLDER, None).save("script", options, None, {})
    monkeypatch.setattr(sys, "argv", ["script.py", "--resume", str(FOLDER)])
    with pytest.raises(SystemExit, match=r"^error: --exp-name \.\./\.\./x must be "):
        check_arguments(parse_arguments(QDaggerArgs))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", "0.1"), ("learning_rate", True), ("learning_rate", None), ("seed", 1.0),
        ("seed", [1]), ("td_loss", "mae"), ("td_loss", ["mse"]), ("cuda", 1), ("env_id", 3),
        ("teacher_model_path", 3), ("final_learning_rate", "x"), ("distill_steps", 0.5),
    ],
)  # fmt: skip
def test_a_checkpoints_options_have_the_types_of_options(name, value, monkeypatch):
    (FOLDER / "checkpoints").mkdir(parents=True)
    options = vars(QDaggerArgs()) | {name: value}
    CheckpointWriter(FOLDER, None).save("script", options, None, {})
    monkeypatch.setattr(sys, "argv", ["script.py", "--resume", str(FOLDER)])
    with pytest.raises(SystemExit, match=rf"^error: --resume .* its checkpoint's {name} is ") as end:
        parse_arguments(QDaggerArgs)
    assert len(end.value.code.splitlines()) == 1


@pytest.mark.parametrize(
    "options",
    [
        {}, {"learning_rate": 1}, {"final_learning_rate": 0.5}, {"teacher_model_path": "x/y"},
        {"distill_steps": 7, "td_loss": "huber"},
    ],
)  # fmt: skip
def test_a_checkpoints_good_options_are_taken(options, monkeypatch):
    (FOLDER / "checkpoints").mkdir(parents=True)
    CheckpointWriter(FOLDER, None).save("script", vars(QDaggerArgs()) | options, None, {})
    monkeypatch.setattr(sys, "argv", ["script.py", "--resume", str(FOLDER)])
    args = parse_arguments(QDaggerArgs)
    for name, value in options.items():
        assert getattr(args, name) == (Path(value) if name == "teacher_model_path" else value)


def test_what_is_only_odd_gets_a_warning(capsys):
    check_arguments(
        QDaggerArgs(total_timesteps=104, learning_starts=100, exploration_steps=8)
    )  # one gradient step
    assert capsys.readouterr().err == ""
    for options, first_step in [
        ({"learning_starts": 104}, 108),
        ({"train_frequency": 200}, 200),
        ({"n_step": 14, "train_frequency": 1, "teacher_steps": 112}, 105),
    ]:
        check_arguments(
            QDaggerArgs(**{"total_timesteps": 104, "learning_starts": 0, "exploration_steps": 8} | options)
        )
        warning = capsys.readouterr().err
        assert warning.startswith("warning: nothing will be learned from the 104 environment steps of ")
        assert warning.endswith(f" the first gradient step would come at step {first_step}\n")
    check_arguments(QDaggerArgs(total_timesteps=1500, learning_starts=0, num_envs=8))
    assert (
        "--total-timesteps 1500 is rounded up to 1504, a multiple of --num-envs 8" in capsys.readouterr().err
    )
    for script_args, warnings in [
        (QDaggerArgs(total_timesteps=5_000_000), 1),  # as long as the offline phase
        (QDaggerArgs(total_timesteps=5_000_000, exploration_steps=8), 0),
        (QDaggerArgs(total_timesteps=5_000_000, exploration_fraction=0.0), 0),  # as wished
        (QDaggerArgs(total_timesteps=5_000_080), 0),
        (DQNArgs(total_timesteps=5_000_000), 0),
    ]:
        check_arguments(script_args)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == warnings
        assert all(line.startswith("warning: the student plays with --end-e 0.01 from its") for line in lines)
    check_arguments(QDaggerArgs(num_envs=8))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("package", ["report", "benchmark", "tune", "hub.publish"])
def test_help_says_how_a_package_is_started(package, tmp_path):
    status, output, errors = run_python(
        tmp_path, "-m", f"cleanrl.utils.{package}", "--help", PYTHONPATH=str(ROOT)
    )
    assert (status, errors) == (0, "")
    assert output.startswith(f"usage: python -m cleanrl.utils.{package} [-h] ")
    assert "default: )" not in output
    assert "default: None" not in output


def test_options_are_described_by_the_comments_and_docstrings_of_the_source():
    described = describe_options(Args)
    assert described["total_timesteps"] == ("game", "steps to play")
    assert described["exp_name"].group == described["seed"].group == "run"
    assert list(described)[:2] == ["exp_name", "seed"]


@dataclass
class UndescribedArgs(RunOptions):
    exp_name: bounds.Name = "test"

    # game
    lives: bounds.PositiveInt = 3
    """of which
    this says more"""
    speed: bounds.PositiveInt = 2


def test_an_option_needs_no_description(monkeypatch):
    described = describe_options(UndescribedArgs)
    assert described["lives"] == described["speed"] == ("game", "")
    assert described["exp_name"].help == describe_options(Args)["exp_name"].help != ""
    monkeypatch.setattr(sys, "argv", ["script.py", "--speed", "5"])
    assert parse_arguments(UndescribedArgs).speed == 5


@dataclass
class SpacedArgs(RunOptions):
    exp_name: bounds.Name = "test"

    # how to play
    games: bounds.PositiveInt = 1
    """games to play"""


def test_a_heading_of_several_words_is_a_group_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", "--help"])
    with pytest.raises(SystemExit):
        parse_arguments(SpacedArgs)
    assert re.search(r"how.to.play options", capsys.readouterr().out)
    monkeypatch.setattr(sys, "argv", ["script.py", "--games", "3"])
    assert parse_arguments(SpacedArgs) == SpacedArgs(games=3)


def test_without_resume_the_options_are_the_defaults_and_those_given(monkeypatch):
    assert parse(monkeypatch, "--seed", "3") == Args(seed=3)


@pytest.mark.parametrize("name", [str(FOLDER), "auto"])
def test_a_resumed_runs_options_are_its_own_and_those_given(monkeypatch, saved_run, name):
    own = {"total_timesteps": 7, "teacher_path": Path("a/teacher"), "resume": str(FOLDER)}
    assert parse(monkeypatch, "--resume", name) == Args(**own)
    given = parse(monkeypatch, "--resume", name, "--total-timesteps", "9", "--track")
    assert given == Args(**{**own, "total_timesteps": 9, "track": True})


def test_resume_auto_without_an_unfinished_run_starts_a_new_one(monkeypatch, saved_run, capsys):
    assert parse(monkeypatch, "--resume", "auto", "--seed", "2") == Args(seed=2)
    said = "--resume auto: no unfinished run of Pong, --exp-name test, --seed 2; starting a new one"
    assert capsys.readouterr().out == f"{said} (unfinished: {FOLDER})\n"
    shutil.rmtree("runs")
    assert parse(monkeypatch, "--resume", "auto", "--seed", "2") == Args(seed=2)
    assert capsys.readouterr().out == f"{said}\n"


def test_resume_auto_takes_the_run_of_this_very_name_that_was_started_last(monkeypatch):
    """Names are no patterns, and start times are numbers."""
    for name in (
        "x__1__9",
        "x__1__100",
        "x__1__20",
        "xy__1__300",
        "x__1__2__400",
        "x__1__soon",
        "x*__1__500",
    ):
        (folder := Path("runs") / f"Pong__{name}" / "checkpoints").mkdir(parents=True)
        CheckpointWriter(folder.parent, None).save("script", vars(Args(exp_name="x")), None, {})
    for exp_name, expected in [("x", "x__1__100"), ("x__1", None), ("?", None), ("x*", "x*__1__500")]:
        found = newest_unfinished_run("Pong", exp_name, 1)
        assert found == (expected and Path("runs") / f"Pong__{expected}")
    assert newest_unfinished_run("Pong", "x__1", 2) == Path("runs/Pong__x__1__2__400")


def test_a_run_that_cannot_be_resumed_is_refused(monkeypatch):
    with pytest.raises(
        SystemExit, match=r"^error: --resume nothing is not a folder; name a run's folder, runs/…$"
    ):
        parse(monkeypatch, "--resume", "nothing")
    for path in ("x" * 5000, "a\nb", "x/" * 3000, "\udcff"):
        with pytest.raises(SystemExit, match=r"^error: --resume .* is not a folder; name a run's") as end:
            parse(monkeypatch, "--resume", path)
        assert end.value.code.isprintable()
        assert len(end.value.code) < 300
