"""Progress of long work: a bar on a terminal, and in a file or pipe a line now and then."""

import sys
from typing import TextIO

from tqdm import tqdm

LOG_INTERVAL_S = 30.0  # between two lines, where there is no terminal


class _Lines:
    """A stream that writes each state of a bar as a new line, where tqdm would overwrite the last."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            self.stream.write(f"{line}\n")

    def flush(self) -> None:
        self.stream.flush()


class ProgressBar(tqdm):
    """Progress of a loop over `total` units, `done` of them before.

    A `passing` bar vanishes from a terminal at its end; it may be within another.
    """

    def __init__(self, name: str, done: int, total: int, unit: str, passing: bool = False):
        settings = {"leave": not passing}
        if not sys.stderr.isatty():
            settings = {
                "file": _Lines(sys.stderr),
                "mininterval": LOG_INTERVAL_S,
                "maxinterval": LOG_INTERVAL_S,
                "miniters": 0,
                "position": 0,  # not below another one, which would move the cursor
                "bar_format": "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt}"
                " [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
            }
        super().__init__(total=total, initial=done, desc=name, unit=f" {unit}", **settings)
        self._shown: dict[str, float] = {}

    def update(self, n: float = 1) -> bool | None:
        self.total = max(self.total, self.n + n)  # with several environments, the last step may go beyond
        return super().update(n)

    def reach(self, num_steps: int, num_games: int) -> None:
        """Shows how many environment steps and games of an evaluation are done."""
        self.show("steps", num_steps)
        self.update(num_games - self.n)

    def show(self, name: str, value: float) -> None:
        """Shows the newest value of something, from the next update on."""
        self._shown[name] = value
        self.set_postfix(self._shown, refresh=False)
