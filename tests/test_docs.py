"""What README and docs say of the command line is true."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import tyro

from cleanrl import dqn_atari, dqn_atari_jax, qdagger_dqn_atari_impalacnn, qdagger_dqn_atari_jax_impalacnn

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {
    Path(script.__file__).name: script
    for script in (dqn_atari, dqn_atari_jax, qdagger_dqn_atari_impalacnn, qdagger_dqn_atari_jax_impalacnn)
}
OPTIONS = [
    (page, script, field)
    for page, script in (("qdagger.md", qdagger_dqn_atari_impalacnn), ("dqn.md", dqn_atari))
    for field in dataclasses.fields(script.Args)
]
SCRIPT_COMMAND = re.compile(r"python cleanrl/(\w+\.py)(.*)")
COMMANDS = sorted({command for page in PAGES for command in SCRIPT_COMMAND.findall(page.read_text("utf-8"))})


def test_every_script_has_commands():
    assert {name for name, _ in COMMANDS} == SCRIPTS.keys()


@pytest.mark.parametrize(("name", "options"), COMMANDS)
def test_commands_in_the_docs_are_accepted(name, options):
    args = tyro.cli(SCRIPTS[name].Args, args=shlex.split(options))
    teacher = getattr(args, "teacher_model_path", None)
    if teacher and teacher.parts[0] == "cleanrl":
        assert (ROOT / teacher).is_file()


@pytest.mark.parametrize(
    ("page", "script", "field"), OPTIONS, ids=[f"{page}-{field.name}" for page, _, field in OPTIONS]
)
def test_every_option_stands_in_the_docs_with_its_default(page, script, field):
    text = (ROOT / "docs" / page).read_text("utf-8")
    (row,) = re.findall(rf"^\| `--{field.name.replace('_', '-')}[ `].*$", text, re.MULTILINE)
    default = row.split(" | ")[1].replace("_", "")
    if field.name == "exp_name":
        assert field.default == Path(script.__file__).stem
    elif field.default is None:
        assert default == "–"
    elif isinstance(field.default, float):
        assert float(default) == field.default
    else:
        assert default == str(field.default).replace("_", "")
