"""Writes a report of finished runs: tables, learning curves, QDagger beside DQN, figures over all games.

    python -m cleanrl.utils.report runs/ --output report

The report is a folder with PNG files, report.md, and report.html, a self-contained page. docs/report.md
defines every number.
"""

import importlib.util
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from cleanrl.utils.bounds import NonNegativeInt, PositiveInt, printable, shown
from cleanrl.utils.command_line import check_bounds, parse, refuse
from cleanrl.utils.report.pages import count
from cleanrl.utils.report.runs import find_runs
from cleanrl.utils.shell import prepare_command

REPORT_FILES = re.compile(r"report\.(html|md)|over-all-games\.png|(curves|comparison)-.+\.png")
REQUIREMENTS = "requirements/requirements-report.txt"


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """folders of runs, or folders above them"""

    # report
    output: Path = Path("report")
    """folder for the report: a new one, or that of an older report, which is replaced"""
    include_unfinished: bool = False
    """also use unfinished runs"""
    last_games: PositiveInt = 10
    """games at the end of training whose mean return is shown; also the window of the curves' mean"""
    bootstrap_samples: PositiveInt = 2000
    """resamples for each interval"""
    bootstrap_seed: NonNegativeInt = 1
    """seed of the resampling"""


def check_arguments(args: Args) -> None:
    """Raises SystemExit with a one-line error that says what to do."""
    check_bounds(args)
    if not args.runs:
        raise SystemExit(
            "error: name at least one folder of runs, as in: python -m cleanrl.utils.report runs/"
        )
    for package in ("matplotlib", "scipy"):
        if not importlib.util.find_spec(package):
            raise SystemExit(f"error: a report needs {package}: pip install -r {REQUIREMENTS}")
    check_output(args.output)


def check_output(folder: Path) -> None:
    """Raises SystemExit with a one-line error if the folder contains anything but a report."""
    try:
        if folder.is_dir():
            files = (path for path in folder.iterdir() if path.is_file() and not path.is_symlink())
            ours = {path for path in files if REPORT_FILES.fullmatch(path.name)}
            others = sorted(shown(path.name) for path in {*folder.iterdir()} - ours)
            if others:
                refuse("output", folder, f"contains {others[0]}, not part of a report; name another folder")
        elif folder.exists():
            refuse("output", folder, "is a file; name a folder")
    except OSError as error:
        refuse("output", folder, f"cannot be read ({error.strerror}); name another folder")


def main(args: Args) -> None:
    check_arguments(args)
    found = find_runs(args.runs, args.include_unfinished)
    for folder, reason in found.left_out:
        print(f"left out: {printable(f'{folder}: {reason}')}", file=sys.stderr)
    for note in found.notes:
        print(f"note: {printable(note)}", file=sys.stderr)
    if not found.runs:
        names = ", ".join(map(shown, args.runs))
        reason = f"{len(found.left_out)} left out" if found.left_out else "there are none"
        raise SystemExit(f"error: no usable runs in {names}: {reason}")

    from cleanrl.utils.report.content import write_report  # needs the packages checked above

    try:
        output = args.output.resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".report-", dir=output.parent) as work:
            new = Path(work) / "new"
            new.mkdir()
            write_report(new, found, args)
            check_output(args.output)  # again: reading many runs takes minutes
            if output.exists():
                output.rename(Path(work) / "old")
            new.rename(output)
    except OSError as error:
        refuse("output", args.output, f"cannot be written ({error.strerror or error})")
    runs = count(len(found.runs), "run")
    print(f"report: {shown(args.output / 'report.html')}, of {runs}; {len(found.left_out)} left out")


if __name__ == "__main__":
    prepare_command()
    main(parse(Args))
