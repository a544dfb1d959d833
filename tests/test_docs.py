"""What README and docs say of the command line is true."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import tyro

import cleanrl.qdagger_dqn_atari_impalacnn as torch_script
import cleanrl.qdagger_dqn_atari_jax_impalacnn as jax_script

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {Path(script.__file__).name: script for script in (torch_script, jax_script)}
SCRIPT_COMMAND = re.compile(r"python cleanrl/(\w+\.py)(.*)")
COMMANDS = sorted({command for page in PAGES for command in SCRIPT_COMMAND.findall(page.read_text("utf-8"))})


def test_both_scripts_have_commands():
    assert {name for name, _ in COMMANDS} == SCRIPTS.keys()


@pytest.mark.parametrize(("name", "options"), COMMANDS)
def test_commands_in_the_docs_are_accepted(name, options):
    args = tyro.cli(SCRIPTS[name].Args, args=shlex.split(options))
    if args.teacher_model_path:
        assert (ROOT / args.teacher_model_path).is_file()


@pytest.mark.parametrize("field", dataclasses.fields(torch_script.Args), ids=lambda field: field.name)
def test_every_option_stands_in_the_docs_with_its_default(field):
    page = (ROOT / "docs" / "qdagger.md").read_text("utf-8")
    (row,) = re.findall(rf"^\| `--{field.name.replace('_', '-')}[ `].*$", page, re.MULTILINE)
    default = row.split(" | ")[1].replace("_", "")
    if field.name == "exp_name":
        assert field.default == "qdagger_dqn_atari_impalacnn"
    elif field.default is None:
        assert default == "–"
    elif isinstance(field.default, float):
        assert float(default) == field.default
    else:
        assert default == str(field.default).replace("_", "")
