"""What README and docs say of the command line is true."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import tyro

from cleanrl.qdagger_dqn_atari_impalacnn import Args

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPT_COMMAND = re.compile(r"python cleanrl/qdagger_dqn_atari_impalacnn\.py(.*)")
COMMANDS = sorted({options for page in PAGES for options in SCRIPT_COMMAND.findall(page.read_text("utf-8"))})


@pytest.mark.parametrize("options", COMMANDS)
def test_commands_in_the_docs_are_accepted(options):
    args = tyro.cli(Args, args=shlex.split(options))
    if args.teacher_model_path:
        assert (ROOT / args.teacher_model_path).is_file()


@pytest.mark.parametrize("field", dataclasses.fields(Args), ids=lambda field: field.name)
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
