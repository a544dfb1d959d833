"""The options of the four scripts: defaults, bounds and --help. That they are the same: test_same_text.py."""

import dataclasses
import math
import re
import sys
import typing

import pytest
from both_scripts import ROOT, is_qdagger, name_of, run_python

from cleanrl import dqn_atari, qdagger_dqn_atari_impalacnn, qdagger_dqn_atari_jax_impalacnn
from cleanrl.utils.command_line import check_arguments, describe_options, parse_arguments
from cleanrl.utils.run.options import MAY_CHANGE

PUBLISHED = {
    "seed": 1,
    "torch_deterministic": True,
    "cuda": True,
    "track": False,
    "capture_video": False,
    "upload_model": False,
    "env_id": "BreakoutNoFrameskip-v4",
    "total_timesteps": 10_000_000,
    "learning_rate": 1e-4,
    "buffer_size": 1_000_000,
    "gamma": 0.99,
    "tau": 1.0,
    "target_network_frequency": 1000,
    "batch_size": 32,
    "start_e": 1.0,
    "end_e": 0.01,
    "exploration_fraction": 0.10,
    "learning_starts": 80_000,
    "train_frequency": 4,
}
PUBLISHED_OF_QDAGGER = {
    "teacher_policy_hf_repo": None,
    "teacher_eval_episodes": 10,
    "teacher_steps": 500_000,
    "offline_steps": 500_000,
    "temperature": 1.0,
}


def test_the_defaults_are_the_published_ones(script, capsys):
    args = script.Args()
    expected = PUBLISHED | (PUBLISHED_OF_QDAGGER if is_qdagger(script) else {})
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.exp_name == name_of(script)
    assert args.save_model  # or there would be nothing to show for ten million steps
    if is_qdagger(script):
        assert args.teacher_model_exp_name == ("dqn_atari_jax" if "jax" in name_of(script) else "dqn_atari")
    check_arguments(args)
    assert capsys.readouterr().err == ""


def test_an_option_that_qdagger_and_dqn_share_has_the_same_default():
    dqn, qdagger = vars(dqn_atari.Args()), vars(qdagger_dqn_atari_impalacnn.Args())
    assert dqn.keys() - qdagger.keys() == {"save_replay", "eval_frequency"}
    shared = dqn.keys() & qdagger.keys() - {"exp_name"}
    assert {name: dqn[name] for name in shared} == {name: qdagger[name] for name in shared}


@pytest.mark.parametrize("script", [qdagger_dqn_atari_impalacnn, qdagger_dqn_atari_jax_impalacnn])
def test_a_preset_gives_other_defaults_and_an_option_beside_it_wins(script, monkeypatch):
    def parsed(*words: str) -> dict[str, object]:
        monkeypatch.setattr(sys, "argv", ["script.py", *words])
        return vars(parse_arguments(script.Args, script.PRESETS))

    of_preset = typing.get_args(typing.get_args(typing.get_type_hints(script.Args)["preset"])[0])
    assert set(of_preset) == set(script.PRESETS)
    paper = parsed("--preset", "paper")
    # What ../docs/qdagger.md lists, and nothing else.
    assert {name: value for name, value in paper.items() if value != vars(script.Args())[name]} == {
        "preset": "paper", "n_step": 3, "temperature": 0.1, "distill_weight": 3.0, "distill_steps": 1_500_000,
        "offline_steps": 1_000_000, "learning_starts": 20_000, "target_network_frequency": 8000,
        "td_loss": "huber", "adam_epsilon": 1.5e-4, "final_learning_rate": 1e-5, "exploration_steps": 50_000,
        "repeat_action_probability": 0.25, "return_normalization": "random", "dense_width": 512,
        "total_timesteps": 2_500_000,
    }  # fmt: skip
    for words in (("--preset", "paper", "--n-step", "2"), ("--n-step", "2", "--preset", "paper")):
        assert parsed(*words) == paper | {"n_step": 2}
    quick = parsed("--preset", "quick")
    assert quick["teacher_model_path"].is_file()
    page = (ROOT / "docs" / "qdagger.md").read_text("utf-8")
    (listed,) = re.findall(r"```text\n(--env-id .*?)```", page, re.S)
    assert parsed(*listed.split()) == quick | {"preset": None, "teacher_model_path": None}
    # The runs in ../docs/results.md had these.
    assert {name: value for name, value in quick.items() if value != vars(script.Args())[name]} == {
        "preset": "quick", "env_id": "PongNoFrameskip-v4", "teacher_model_path": quick["teacher_model_path"],
        "teacher_steps": 15_000, "teacher_eval_episodes": 5, "offline_steps": 2000,
        "offline_eval_frequency": 1000, "total_timesteps": 40_000, "learning_starts": 3000,
        "train_frequency": 28, "start_e": 0.3, "exploration_steps": 20_000, "learning_rate": 5e-4,
        "final_learning_rate": 1e-4, "average_decay": 0.995, "n_step": 3, "temperature": 0.1,
        "return_normalization": "random",
    }  # fmt: skip
    assert parsed("--preset", "quick", "--seed", "3") == quick | {"seed": 3}


def test_every_number_has_bounds(script):
    """What no number can be is refused with the option's name, so a new option without bounds fails here."""
    checked = set()
    for field in dataclasses.fields(script.Args):
        kind = typing.get_type_hints(script.Args)[field.name]
        kinds = {kind, *typing.get_args(kind)}
        values = [-1] if int in kinds else [-1.0, math.nan, math.inf] if float in kinds else []
        for value in values:
            option = f"--{field.name.replace('_', '-')} {value}"
            with pytest.raises(
                SystemExit, match=f"^error: {option} must be (at least|at most|above|between) [^\n]*$"
            ):
                check_arguments(dataclasses.replace(script.Args(), **{field.name: value}))
            checked.add(field.name)
    assert checked >= {"seed", "num_envs", "learning_rate", "checkpoint_interval"}
    assert not is_qdagger(script) or checked >= {"distill_steps", "final_learning_rate"}  # None by default


@pytest.fixture
def help_text(script, monkeypatch, capsys) -> str:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "argv", [script.__file__, "--help"])
    with pytest.raises(SystemExit) as end:
        script.read_arguments(script.Args)
    assert end.value.code == 0
    return capsys.readouterr().out


def letters(text: str) -> str:
    """Without frames, spaces and line breaks, which come in the middle of "50,000"."""
    return re.sub(r"[│╭╮╰╯─|+\s]|-{3,}", "", text)


def panels(text: str) -> dict[str, str]:
    """What --help says under each heading, in order."""
    description, *parts = re.split(r"^\W+((?:\w+ )?options) \W+$", text, flags=re.MULTILINE)
    return {"description": description} | dict(zip(parts[::2], parts[1::2], strict=True))


def test_help_begins_with_what_the_script_does_and_how_it_is_started(script, help_text):
    description = panels(help_text)["description"]
    assert letters(script.__doc__) in letters(description)
    assert re.search(rf"^ +python cleanrl/{name_of(script)}\.py --env-id", description, re.MULTILINE)


def test_help_groups_the_options_as_the_source_does(script, help_text):
    qdagger = is_qdagger(script)
    learning = ["student", "distillation"] if qdagger else ["learning"]
    groups = panels(help_text)
    in_order = ("run", "environment", *(["teacher"] if qdagger else []), *learning)
    headings = [f"{group} options" for group in in_order]
    assert list(groups) == ["description", "options", *headings]
    for name, group in [
        ("resume", "run"),
        ("num-envs", "environment"),
        ("batch-size", learning[0]),
        *([("teacher-steps", "teacher"), ("temperature", "distillation")] if qdagger else []),
    ]:
        assert f"--{name} " in groups[f"{group} options"]


def test_help_explains_every_option_and_its_default(script, help_text):
    text = letters(help_text)
    assert "default:None" not in text
    for field in dataclasses.fields(script.Args):
        option = f"--{field.name.replace('_', '-')}"
        default = "" if field.default is None else f" (default: {field.default})"
        explanation = letters(describe_options(script.Args)[field.name].help + default)
        assert re.search(rf"{option},?\S{{0,30}}{re.escape(explanation)}", text), option


def test_no_option_of_the_algorithm_may_change_when_a_run_is_resumed(script):
    algorithm = {name for name, option in describe_options(script.Args).items() if option.group != "run"}
    where_things_are = {
        name for name in algorithm if re.match("teacher_(policy|hf|revision|model_path|replay_path)", name)
    }
    assert MAY_CHANGE & algorithm <= {"total_timesteps", "save_replay"} | where_things_are


def test_every_script_refuses_a_name_that_files_should_not_have(script):
    """Which names these are: test_command_line.py."""
    with pytest.raises(SystemExit, match=r"^error: --exp-name a/b must be at most 100 letters, "):
        check_arguments(script.Args(exp_name="a/b"))


@pytest.mark.parametrize("words", ["--help", "--batch-size 0", "--env-id X", "--bogus", "--resume nowhere"])
def test_options_are_answered_without_importing_a_framework(script, words, tmp_path):
    """Which takes seconds."""
    code = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    assert not {"torch", "jax", "flax", "cv2", "tensorboard"} & sys.modules.keys()
    print("status", stop.code if isinstance(stop.code, int) else 1)
"""
    status, output, _ = run_python(tmp_path, "-c", code, script.__file__, *words.split())
    assert status == 0
    assert output.endswith({"--help": "status 0\n", "--bogus": "status 2\n"}.get(words, "status 1\n"))


def test_the_options_that_may_change_are_those_that_the_page_names():
    page = (ROOT / "docs" / "resuming.md").read_text("utf-8")
    text = re.search(r"Only these may be given a new value:(.*?)\n- `--resume auto`", page, re.S)[1]
    named = {name.replace("-", "_") for name in re.findall(r"`--([\w-]+)`", text)}
    assert "those of Weights & Biases, and where the teacher and its replay are" in " ".join(text.split())
    named |= {"track", "wandb_project_name", "wandb_entity", "resume"}
    named |= {
        "teacher_policy_hf_repo",
        "teacher_hf_file",
        "teacher_revision",
        "teacher_model_path",
        "teacher_replay_path",
    }
    assert named == MAY_CHANGE
