"""Commands in a shell: Ctrl-C, and output that nobody reads or that cannot be written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from both_scripts import ROOT, run_python, start_python

COMMANDS = ["cleanrl/qdagger_dqn_atari_impalacnn.py", "cleanrl/dqn_atari_jax.py", "cleanrl/enjoy.py"]
COMMANDS += ["-m cleanrl.utils.report", "-m cleanrl.utils.benchmark"]
PROGRAM = """
import sys
from cleanrl.utils.shell import prepare_command
prepare_command()
for number in range(20_000):
    print(number)
    print("and", number, file=sys.stderr)
print("is a terminal:", sys.stdout.isatty(), flush=True)
open("worked", "w").close()
raise SystemExit(3)
"""


def test_before_there_is_anything_to_lose_ctrl_c_is_one_line():
    program = """
import signal
from cleanrl.utils.shell import prepare_command
prepare_command()
signal.raise_signal(signal.SIGINT)
"""
    assert run_python(Path(), "-c", program) == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    "redirection",
    [
        "| head -1",
        "2>&1 | head -1",
        ">&-",
        "2>&-",
        ">&- 2>&-",
        ">/dev/full",
        "2>/dev/full",
        ">/dev/full 2>&1",
    ],
)
def test_output_without_a_reader_or_a_place_is_dropped(tmp_path, redirection):
    (tmp_path / "program.py").write_text(PROGRAM)
    line = f"'{sys.executable}' program.py {redirection}; echo status ${{PIPESTATUS[0]}} >&3"
    command = ["bash", "-c", f"exec 3>status; {line}"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
    )
    assert (tmp_path / "status").read_text() == "status 3\n"
    assert (tmp_path / "worked").exists()
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr


@pytest.mark.parametrize(
    ("encoding", "minus"), [("utf-8", "−1"), ("latin-1", "\\u22121"), ("ascii", "\\u22121")]
)
def test_what_an_encoding_lacks_is_escaped(encoding, minus, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    program = "from cleanrl.utils.shell import prepare_command; prepare_command(); print('−1')"
    assert run_python(Path(), "-c", program) == (0, f"{minus}\n", "")


REFUSALS = {
    "PermissionError(13, 'Permission denied', 'runs')": (
        "error: runs: Permission denied; change its permissions, or name another path\n"
    ),
    "OSError(28, 'No space left on device')": "error: No space left on device; free some space\n",
    "OSError(30, 'Read-only file system', 'x')": (
        "error: x: Read-only file system; start in a folder that can be written to\n"
    ),
    "OSError(24, 'Too many open files', 'x')": (
        "error: x: Too many open files; allow more open files (`ulimit -n`)\n"
    ),
}


@pytest.mark.parametrize("error", REFUSALS)
def test_what_the_machine_refuses_is_one_line_wherever_it_is_met(error):
    program = f"from cleanrl.utils.shell import prepare_command; prepare_command(); raise {error}"
    assert run_python(Path(), "-c", program) == (1, "", REFUSALS[error])


@pytest.mark.parametrize("error", ["ValueError('x')", "FileNotFoundError(2, 'No such file', 'x')"])
def test_a_fault_of_the_program_keeps_its_traceback(error):
    program = f"from cleanrl.utils.shell import prepare_command; prepare_command(); raise {error}"
    status, output, errors = run_python(Path(), "-c", program)
    assert (status, output) == (1, "")
    assert errors.startswith("Traceback (most recent call last):")


def test_a_folder_of_another_user_is_one_line(tmp_path):
    (tmp_path / "runs").mkdir(mode=0)
    # Root is refused, too, once it has given up its privileges.
    prefix = ["setpriv", "--bounding-set=-all"] if os.geteuid() == 0 else []
    script = [sys.executable, str(ROOT / COMMANDS[0]), "--env-id", "PongNoFrameskip-v4", "--resume", "auto"]
    done = subprocess.run([*prefix, *script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "error: runs: Permission denied; change its permissions, or name another path\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_beginning_of_the_help_is_enough(tmp_path, command):
    process = start_python(ROOT, *command.split(), "--help")
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0
