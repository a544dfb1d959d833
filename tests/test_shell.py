"""Commands in a shell: Ctrl-C, and output that nobody reads or that cannot be written."""

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


@pytest.mark.parametrize("command", COMMANDS)
def test_the_beginning_of_the_help_is_enough(tmp_path, command):
    process = start_python(ROOT, *command.split(), "--help")
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0
