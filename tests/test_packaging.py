"""pyproject.toml, poetry.lock and requirements/*.txt say the same."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
LOCK = tomllib.loads((ROOT / "poetry.lock").read_text("utf-8"))
LOCKED = {(canonicalize_name(p["name"]), p["version"]) for p in LOCK["package"]}
EXTRAS = {
    "atari": ["atari"],
    "jax": ["jax"],
    "track": ["track"],
    "tests": ["atari", "tests"],
    "docs": ["docs"],
}


def pins(name: str) -> list[Requirement]:
    lines = (ROOT / "requirements" / f"requirements-{name}.txt").read_text("utf-8").splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def versions_on(name: str, python: str, sys_platform: str) -> dict[str, str]:
    """What `pip install -r` pins on one kind of machine; a package pinned twice there is an error."""
    environment = default_environment() | {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": sys_platform,
        "platform_system": {"linux": "Linux", "darwin": "Darwin"}[sys_platform],
    }
    versions: dict[str, str] = {}
    for pin in pins(name):
        if pin.marker is None or pin.marker.evaluate(environment):
            assert pin.name not in versions, f"requirements-{name}.txt pins {pin.name} twice on {python}"
            versions[pin.name] = str(pin.specifier).removeprefix("==")
    return versions


def test_requirements_are_up_to_date():
    script = ROOT / "requirements" / "export.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_every_requirements_file_is_covered():
    assert {p.name for p in (ROOT / "requirements").glob("*.txt")} == {
        f"requirements-{name}.txt" for name in EXTRAS
    }


@pytest.mark.parametrize("name", EXTRAS)
def test_every_pin_is_in_the_lock(name):
    for pin in pins(name):
        assert [s.operator for s in pin.specifier] == ["=="]
        assert (pin.name, str(pin.specifier).removeprefix("==")) in LOCKED


@pytest.mark.parametrize("sys_platform", ["linux", "darwin"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("name", EXTRAS)
def test_files_hold_what_pyproject_asks_for_and_all_that_those_need(name, python, sys_platform):
    versions = versions_on(name, python, sys_platform)
    asked = PROJECT["dependencies"] + [r for x in EXTRAS[name] for r in PROJECT["optional-dependencies"][x]]
    for requirement in map(Requirement, asked):
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier

    for package in LOCK["package"]:
        if versions.get(package["name"]) == package["version"]:
            for dependency, spec in package.get("dependencies", {}).items():
                if isinstance(spec, str) and not re.match(r"nvidia-|cuda-|triton", dependency):
                    assert canonicalize_name(dependency) in versions, f"{package['name']} needs {dependency}"


@pytest.mark.parametrize("name", EXTRAS)
def test_no_file_forces_a_cuda_build(name):
    assert not [pin.name for pin in pins(name) if re.match(r"nvidia-|cuda-|triton", pin.name)]


def test_the_jax_scripts_need_no_torch():
    assert "torch" not in {pin.name for pin in pins("jax")}
    assert "torch" in {pin.name for pin in pins("atari")}


def test_no_package_stands_in_two_extras():
    """Poetry would lock a second version of what those have in common (see pyproject.toml)."""
    names = [
        canonicalize_name(Requirement(r).name)
        for requirements in [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
        for r in requirements
    ]
    assert len(names) == len(set(names))


def test_the_lock_names_no_index():
    assert not [p["name"] for p in LOCK["package"] if "source" in p]
