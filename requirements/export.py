"""Writes requirements-*.txt from poetry.lock:  python requirements/export.py [--check]

Each file pins what `dependencies` and some extras of pyproject.toml need, in the lock's versions. The lock
holds the CUDA build of torch. What only that build needs stands in constraints-cuda.txt, which the files
with torch include: a constraint pins a package if torch asks for it, as its CUDA build does; a requirement
would force gigabytes of CUDA onto a machine without a GPU. Only requirements-jax-cuda.txt is for machines
with one: jax itself needs no CUDA, its plugin asks for it by name.
"""

import itertools
import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).resolve().parent
EXTRAS_OF_FILE = {
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
CUDA_BUILD = re.compile(r"nvidia-|cuda-|triton$")
CONSTRAINTS = "constraints-cuda.txt"
HEADER = """\
# Pins the dependencies of pyproject.toml and of its extras: {extras}.
# Made from poetry.lock by `python requirements/export.py`. To change a pin, run `poetry lock` first.
"""

PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
LINUX = {"os_name": "posix", "sys_platform": "linux", "platform_system": "Linux"}
MACOS = {"os_name": "posix", "sys_platform": "darwin", "platform_system": "Darwin"}
WINDOWS = {"os_name": "nt", "sys_platform": "win32", "platform_system": "Windows"}
MACHINES = [
    LINUX | {"platform_machine": "x86_64"},
    LINUX | {"platform_machine": "aarch64"},
    MACOS | {"platform_machine": "arm64"},
    WINDOWS | {"platform_machine": "AMD64"},
]
CPYTHON = {"implementation_name": "cpython", "platform_python_implementation": "CPython"}
# Where the files have to work. A marker true on all of these need not be written, one true on none excludes.
ENVIRONMENTS = [
    machine | CPYTHON | {"python_version": python, "python_full_version": f"{python}.0"}
    for python, machine in itertools.product(PYTHONS, MACHINES)
]


def environments(marker: str, extras: Iterable[str]) -> list[dict]:
    """The ENVIRONMENTS on which a marker is true when those extras are asked for."""
    if not marker:
        return ENVIRONMENTS
    parsed = Marker(marker)
    return [e for e in ENVIRONMENTS if any(parsed.evaluate(e | {"extra": x}) for x in ["", *extras])]


def without_extras(marker: str) -> str:
    """What a marker leaves to ask of the machine when the extras it names are asked for."""
    conditions = marker.split(" and ")
    if "extra" in marker and " or " in marker:
        raise SystemExit(f"export.py cannot take the extra out of the marker {marker}")
    return " and ".join(c for c in conditions if not c.startswith("extra "))


def python_bounds(pythons: set[str]) -> str:
    """The marker of a run of PYTHONS, '' for all of them."""
    first, end = PYTHONS.index(min(pythons)), PYTHONS.index(max(pythons)) + 1
    bounds = [f'python_version >= "{PYTHONS[first]}"'] if first else []
    bounds += [f'python_version < "{PYTHONS[end]}"'] if end < len(PYTHONS) else []
    return " and ".join(bounds)


def ways_to_packages(packages: dict[str, list[dict]], roots: list[str]) -> dict[str, set[frozenset[str]]]:
    """Package that the roots need -> the ways that lead to it: on each way, all of its markers must hold."""
    ways: dict[str, set[frozenset[str]]] = {}
    visited = set()
    to_visit = [
        (r.name, frozenset(r.extras), frozenset([str(r.marker)] if r.marker else []))
        for r in map(Requirement, roots)
    ]
    while to_visit:
        name, extras, way = to_visit.pop()
        name = canonicalize_name(name)
        if (name, extras, way) in visited:
            continue
        visited.add((name, extras, way))
        ways.setdefault(name, set()).add(way)
        edges = [
            (dependency, spec if isinstance(spec, dict) else {})
            for package in packages.get(name, [])
            for dependency, specs in package.get("dependencies", {}).items()
            for spec in (specs if isinstance(specs, list) else [specs])
            if not (name == "torch" and CUDA_BUILD.match(dependency))
        ]
        for dependency, spec in edges:
            marker = spec.get("markers", "")
            where = environments(marker, extras)
            if not where:
                continue
            always = len(where) == len(ENVIRONMENTS)
            way_there = way if always else way | {without_extras(marker)}
            to_visit.append((dependency, frozenset(spec.get("extras", ())), way_there))
    return {name: {w for w in found if not any(v < w for v in found)} for name, found in ways.items()}


def constraints(lock: dict) -> str:
    """The text of CONSTRAINTS."""
    lines = [f"{p['name']}=={p['version']}\n" for p in lock["package"] if CUDA_BUILD.match(p["name"])]
    header = "# What PyTorch's CUDA build needs. Made from poetry.lock by `python requirements/export.py`.\n"
    return header + "".join(sorted(lines))


def requirements(pyproject: dict, lock: dict, extras: list[str]) -> str:
    """The text of one file."""
    packages: dict[str, list[dict]] = {}
    for package in lock["package"]:
        packages.setdefault(package["name"], []).append(package)
    project = pyproject["project"]
    roots = project["dependencies"] + [r for x in extras for r in project["optional-dependencies"][x]]

    lines = []
    for name, ways in ways_to_packages(packages, roots).items():
        for package in packages.get(name, []):  # not in the lock: needed by no supported Python
            if len(packages[name]) > 1:  # one version for some Pythons, another for the others
                pythons = {e["python_version"] for e in environments(package["markers"], extras)}
                ways_here = {way | {python_bounds(pythons)} - {""} for way in ways}
            else:
                ways_here = ways
            alternatives = {
                " and ".join(sorted(f"({marker})" if " or " in marker else marker for marker in way))
                for way in ways_here
            }
            marker = "" if "" in alternatives else " ; " + " or ".join(sorted(alternatives))
            lines.append(f"{name}=={package['version']}{marker}\n")
    header = HEADER.format(extras=", ".join(extras))
    if any(line.startswith("torch==") for line in lines):
        header += f"-c {CONSTRAINTS}\n"
    return header + "".join(sorted(lines))


def main(arguments: list[str]) -> None:
    if arguments not in ([], ["--check"]):
        raise SystemExit(__doc__)
    pyproject = tomllib.loads((HERE.parent / "pyproject.toml").read_text("utf-8"))
    lock = tomllib.loads((HERE.parent / "poetry.lock").read_text("utf-8"))
    texts = {
        f"requirements-{name}.txt": requirements(pyproject, lock, extras)
        for name, extras in EXTRAS_OF_FILE.items()
    }
    stale = []
    for name, text in (texts | {CONSTRAINTS: constraints(lock)}).items():
        path = HERE / name
        if not arguments:
            path.write_text(text, "utf-8")
        elif not path.exists() or path.read_text("utf-8") != text:
            stale.append(path.name)
    if stale:
        raise SystemExit(f"not what poetry.lock says: {', '.join(stale)}. Run: python requirements/export.py")


if __name__ == "__main__":
    main(sys.argv[1:])
