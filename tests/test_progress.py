"""cleanrl/utils/progress.py: a bar on a terminal, and lines elsewhere."""

import os
import pty
import re
import subprocess
import sys
import termios

from both_scripts import ROOT

from cleanrl.utils import progress
from cleanrl.utils.benchmark.logs import short_progress
from cleanrl.utils.progress import ProgressBar


def test_a_log_gets_a_line_at_the_start_the_end_and_each_interval(capsys):
    """A clock that the test moves: 100 updates, one a second."""
    now = [0.0]
    with ProgressBar("offline", 0, 100, "updates") as bar:
        bar._time, bar.last_print_t, bar.start_t = (lambda: now[0]), 0.0, 0.0
        for _ in range(100):
            now[0] += 1
            bar.update()
    log = capsys.readouterr().err
    lines = log.splitlines()
    assert [re.search(r"(\d+)/100", line)[1] for line in lines] == ["0", "30", "60", "90", "100"]
    assert re.fullmatch(r"offline:  30% 30/100 \[00:30<01:10,  1\.00 updates/s\]", lines[1])
    assert "\r" not in log
    assert "\x1b" not in log


def test_a_line_has_the_newest_values(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.0)
    with ProgressBar("online", 10, 40, "steps") as bar:
        bar.show("return", -20.0)
        bar.show("λ", 1.0)
        bar.show("return", 3.5)
        bar.update(10)
        line = capsys.readouterr().err.splitlines()[-1]
        assert re.fullmatch(r"online 50%, .*, return=3\.5, λ=1", short_progress(line))
        bar.update(21)  # as 3 environments may
        assert " 100% 41/41 " in capsys.readouterr().err.splitlines()[-1]


def test_a_bar_within_another_one_moves_no_cursor(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.0)
    with (
        ProgressBar("offline", 0, 10, "updates") as outer,
        ProgressBar("offline evaluation", 0, 2, "games", passing=True) as inner,
    ):
        inner.reach(100, 0)
        inner.reach(1500, 2)
        outer.update(10)
    log = capsys.readouterr().err
    assert "\x1b" not in log
    assert re.search(r"^offline evaluation: 100% 2/2 \[.* games/s, steps=1500\]$", log, re.MULTILINE)


def test_on_a_terminal_a_bar_overwrites_itself():
    code = """
from cleanrl.utils.progress import ProgressBar
with ProgressBar("offline", 0, 10, "updates") as bar:
    for _ in range(10):
        bar.update()
"""
    here, there = pty.openpty()
    termios.tcsetwinsize(there, (24, 80))
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=there, env=os.environ | {"TQDM_DISABLE": ""}
    )
    assert process.wait(timeout=60) == 0
    os.close(there)
    shown = os.read(here, 1 << 16).decode()
    os.close(here)
    assert "\r" in shown
    assert "offline: 100%|" in shown
    assert "█" in shown
