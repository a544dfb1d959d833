"""Scripts and helpers stay short; no module imports a training script, and no helpers import in a circle."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MOST_LINES = {
    "qdagger_dqn_atari_impalacnn": 725,
    "qdagger_dqn_atari_jax_impalacnn": 760,
    "dqn_atari": 450,
    "dqn_atari_jax": 480,
}
MOST_LINES_OF_A_HELPER = 320
MOST_CHARACTERS = 110
SCRIPTS = {f"cleanrl.{name}" for name in MOST_LINES}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / "cleanrl").rglob("*.py"))}
HELPERS = {name: path for name, path in MODULES.items() if name.startswith("cleanrl.utils")}


def imported_names(name: str) -> Iterator[str]:
    """What a module imports, wherever it does so, with the names that it takes from there."""
    path = MODULES[name]
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join([*above, source]).rstrip(".")
            yield from (f"{source}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (value.value for value in node.args if isinstance(value, ast.Constant))


def imports(name: str) -> set[str]:
    """Which of our modules a module imports."""
    found = {
        imported if imported in MODULES else imported.rpartition(".")[0] for imported in imported_names(name)
    }
    return found & MODULES.keys()


@pytest.mark.parametrize("name", MOST_LINES)
def test_a_script_can_be_read_in_one_go(name):
    lines = MODULES[f"cleanrl.{name}"].read_text("utf-8").splitlines()
    assert len(lines) <= MOST_LINES[name]
    assert max(map(len, lines)) <= MOST_CHARACTERS


def test_no_helper_module_is_long():
    lengths = {name: path.read_text("utf-8").count("\n") for name, path in HELPERS.items()}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES_OF_A_HELPER} == {}


def test_nothing_imports_a_training_script():
    assert "cleanrl.utils.replay.ring" in imports("cleanrl.dqn_atari")  # as this test reads them
    assert {name: imports(name) & SCRIPTS for name in MODULES if imports(name) & SCRIPTS} == {}


def test_imports_form_no_circle():
    graphlib.TopologicalSorter({name: imports(name) for name in HELPERS}).prepare()  # or CycleError
