"""What a run's log says: its progress, and why it failed."""

import os
import re
from pathlib import Path

STARTED = "--- started"  # the beginning of the log's first line of each start
MOST_BYTES, KEPT_BYTES = 10_000_000, 1_000_000  # a log that grows beyond the first is cut to the second
TAIL_BYTES = 16 * 1024  # the end of a log in which its last line is looked for
MOST_CHARACTERS = 500  # of a progress line; in longer ones the search below would take minutes
PROGRESS = re.compile(
    r"(?P<phase>.*?): +(?P<percent>\d+%).*\[[^<]*<(?P<left>[^,]+), *(?P<speed>[^,\]]+)(, (?P<more>.*))?\]$"
)


def shorten(log: Path) -> int:
    """Removes the beginning of a log that has become too large; returns how many bytes.

    The run's process may keep appending to it; what it adds at that moment can be lost.
    """
    size = log.stat().st_size if log.exists() else 0
    if size <= MOST_BYTES:
        return 0
    with log.open("r+b") as file:
        file.seek(size - KEPT_BYTES)
        kept = file.read()
        file.seek(0)
        file.write(kept)
        file.truncate()
    return size - KEPT_BYTES


def last_line(log: Path) -> str:
    """The last line printed; a progress bar overwrites its line with \\r."""
    lines = tail(log)
    return lines[-1] if lines else ""


def tail(log: Path) -> list[str]:
    """The last lines printed since the last start, without empty ones."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    text = text.rpartition(STARTED)[2].partition("\n")[2] if STARTED in text else text
    return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def short_progress(line: str) -> str:
    """A progress line of tqdm without its bar: phase, percentage, speed, time left; other lines unchanged."""
    match = PROGRESS.match(line[:MOST_CHARACTERS])
    if not match:
        return line
    parts = [f"{match['phase']} {match['percent']}", match["speed"].strip(), f"{match['left']} left"]
    return ", ".join(parts + ([match["more"]] if match["more"] else []))


def last_words(log: Path) -> str:
    """Why a run failed, by its own account: its last error, else its last line."""
    lines = tail(log)
    if lines and lines[-1].startswith("╰"):  # tyro draws a box around an error: its first line
        top = max((index for index, line in enumerate(lines) if line.startswith("╭")), default=0)
        return lines[top + 1].strip("│ ")
    errors = [line for line in lines[-20:] if line.startswith("error:")]
    return (errors or lines or [""])[-1]
