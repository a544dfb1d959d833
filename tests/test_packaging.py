"""pyproject.toml, poetry.lock and requirements/*.txt agree."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
LOCK = tomllib.loads((ROOT / "poetry.lock").read_text("utf-8"))
LOCKED = {(canonicalize_name(p["name"]), p["version"]) for p in LOCK["package"]}
EXTRAS = {
    "atari": ["atari"],
    "jax": ["jax"],
    "jax-cuda": ["jax", "jax-cuda"],
    "track": ["track"],
    "cloud": ["cloud"],
    "report": ["report"],
    "tune": ["report", "tune"],
    "tests": ["atari", "jax", "track", "cloud", "report", "tune", "docs", "tests"],
    "docs": ["docs"],
}
CUDA = re.compile(r"nvidia-|cuda-|triton|jax-cuda")


def pins(name: str) -> list[Requirement]:
    lines = (ROOT / "requirements" / f"requirements-{name}.txt").read_text("utf-8").splitlines()
    return [Requirement(line) for line in lines if not line.startswith(("#", "-c "))]


def environment_of(python: str, sys_platform: str) -> dict[str, str]:
    return default_environment() | {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": sys_platform,
        "platform_system": {"linux": "Linux", "darwin": "Darwin"}[sys_platform],
    }


def versions_on(name: str, python: str, sys_platform: str) -> dict[str, str]:
    """The versions that `pip install -r` installs on one kind of machine, where none may be pinned twice."""
    environment = environment_of(python, sys_platform)
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
        "constraints-cuda.txt",
        *(f"requirements-{name}.txt" for name in EXTRAS),
    }


@pytest.mark.parametrize("name", EXTRAS)
def test_every_pin_is_in_the_lock(name):
    for pin in pins(name):
        assert [s.operator for s in pin.specifier] == ["=="]
        assert (pin.name, str(pin.specifier).removeprefix("==")) in LOCKED


@pytest.mark.parametrize("sys_platform", ["linux", "darwin"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize("name", EXTRAS)
def test_files_hold_what_pyproject_asks_for_and_all_that_those_need(name, python, sys_platform):
    versions = versions_on(name, python, sys_platform)
    asked = PROJECT["dependencies"] + [r for x in EXTRAS[name] for r in PROJECT["optional-dependencies"][x]]
    for requirement in map(Requirement, asked):
        if requirement.marker and not requirement.marker.evaluate(environment_of(python, sys_platform)):
            continue
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier

    for package in LOCK["package"]:
        if versions.get(package["name"]) == package["version"]:
            for dependency, spec in package.get("dependencies", {}).items():
                if isinstance(spec, str) and not (package["name"] == "torch" and CUDA.match(dependency)):
                    assert canonicalize_name(dependency) in versions, f"{package['name']} needs {dependency}"


@pytest.mark.parametrize("name", [name for name in EXTRAS if name != "jax-cuda"])
def test_no_file_forces_a_cuda_build(name):
    assert not [pin.name for pin in pins(name) if CUDA.match(pin.name)]


def test_all_that_torchs_cuda_build_needs_is_constrained_where_torch_is_pinned():
    """To the lock's version, so that two machines with a GPU get the same CUDA."""
    lines = (ROOT / "requirements" / "constraints-cuda.txt").read_text("utf-8").splitlines()
    constrained = {pin.name: str(pin.specifier) for pin in map(Requirement, lines[1:])}
    for package in LOCK["package"]:
        if package["name"] in ("torch", "cuda-toolkit", "cuda-bindings"):
            for dependency in filter(CUDA.match, package["dependencies"]):
                assert (dependency, constrained[dependency].removeprefix("==")) in LOCKED
    assert {
        "cuda-bindings",
        "nvidia-nvjitlink",
        "triton",
    } <= constrained.keys()  # torch takes any, or pins it
    for name in EXTRAS:
        lines = (ROOT / "requirements" / f"requirements-{name}.txt").read_text("utf-8").splitlines()
        assert ("-c constraints-cuda.txt" in lines) == any(pin.name == "torch" for pin in pins(name))


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_jax_cuda_is_jax_and_all_that_its_cuda_plugin_needs(python):
    [plugin] = [p for p in LOCK["package"] if re.fullmatch(r"jax-cuda\d+-plugin", p["name"])]
    jax, jax_cuda = versions_on("jax", python, "linux"), versions_on("jax-cuda", python, "linux")
    cuda = {name: version for name, version in jax_cuda.items() if CUDA.match(name)}
    assert jax_cuda == jax | cuda
    assert cuda.keys() >= {plugin["name"], *plugin["dependencies"]}
    assert any(name.startswith("nvidia-") for name in plugin["dependencies"])
    # jax warns of a plugin of another version, and does not use it
    of_jax = {version for name, version in jax_cuda.items() if re.match(r"jax$|jaxlib$|jax-cuda", name)}
    assert of_jax == {jax["jax"]}
    ranges = {
        Requirement(r).specifier
        for r in PROJECT["optional-dependencies"]["jax"] + PROJECT["optional-dependencies"]["jax-cuda"]
        if re.match(r"jax\W|jax-cuda", r)
    }
    assert len(ranges) == 1
    assert versions_on("jax-cuda", python, "darwin") == versions_on("jax", python, "darwin")


def test_torch_and_jax_share_one_cuda():
    """What torch asks for of CUDA is what requirements-jax-cuda.txt pins: both can be installed together."""
    versions = versions_on("jax-cuda", "3.11", "linux")
    shared = {
        name: re.sub(r"^(?=\d)", "==", spec["version"])
        for package in LOCK["package"]
        if package["name"] in ("torch", "cuda-toolkit")
        for name, spec in package["dependencies"].items()
        if CUDA.match(name) and name in versions
    }
    assert shared.keys() > {"nvidia-cublas", "nvidia-cudnn-cu13"}
    for name, wanted in shared.items():
        assert versions[name] in SpecifierSet(wanted), name


@pytest.mark.parametrize("sys_platform", ["linux", "darwin"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize("name", ["jax", "jax-cuda", "tests"])
def test_files_can_be_installed_together_with_the_one_for_torch(name, python, sys_platform):
    atari, other = versions_on("atari", python, sys_platform), versions_on(name, python, sys_platform)
    assert {n: other[n] for n in atari if n in other} == {n: atari[n] for n in atari if n in other}


@pytest.mark.parametrize("name", ["jax", "jax-cuda"])
def test_the_jax_scripts_need_no_torch(name):
    assert "torch" not in {pin.name for pin in pins(name)}
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
