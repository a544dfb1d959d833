"""How every command behaves in a shell: Ctrl-C prints one line, and output that nobody reads is dropped."""

import errno
import os
import signal
import sys
from io import TextIOWrapper
from types import FrameType, TracebackType
from typing import IO, Any

from cleanrl.utils.bounds import shown

GONE = (errno.EPIPE, errno.EIO, errno.EBADF)  # the pipe's reader or the terminal is gone, or it was closed
REFUSED = {  # what the operating system may refuse any program, and what to do
    errno.EACCES: "change its permissions, or name another path",
    errno.EPERM: "change its permissions, or name another path",
    errno.EROFS: "start in a folder that can be written to",
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EMFILE: "allow more open files (`ulimit -n`)",
}


def prepare_command() -> None:
    """From now on Ctrl-C ends the process with one line, as nothing can be lost yet; output that cannot be
    written, as in `… --help | head -1` or on a closed terminal, is dropped: a run continues without it; and
    what the operating system refuses, such as access to a folder, ends the process with one line.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        print("interrupted", file=sys.stderr)
        raise SystemExit(128 + number)

    def explain(kind: type, error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, OSError) and error.errno in REFUSED:
            where = f"{shown(error.filename)}: " if error.filename else ""
            print(f"error: {where}{error.strerror}; {REFUSED[error.errno]}", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, traceback)

    signal.signal(signal.SIGINT, interrupt)
    sys.excepthook = explain
    # By default PyTorch's threads busy-wait so long that they take the cores from the environments' workers.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)


class Output:
    """A text stream whose text is dropped where it cannot be written; `stream` is None if it was closed."""

    def __init__(self, stream: IO[str] | None):
        self.stream = stream or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        if isinstance(self.stream, TextIOWrapper):
            self.stream.reconfigure(errors="backslashreplace")  # λ or − in an old encoding must not end a run

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, action: Any, *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError as error:
            if error.errno in GONE:  # for good: also what is still in its buffer has to go somewhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
