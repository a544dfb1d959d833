"""Asks the Hub through its own client, but waits only while there is progress, and logs nothing."""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants
from huggingface_hub.utils import logging as hub_logging


def silence_limit_s() -> float:
    """How long the Hub may be silent: two tries, and up to 3 s for the client's telemetry."""
    return 5 + 3 * max(constants.HF_HUB_ETAG_TIMEOUT, constants.HF_HUB_DOWNLOAD_TIMEOUT)


def ask_the_hub(
    work: Callable[[], Any], patience_s: float, has_progressed: Callable[[], bool] = lambda: False
) -> Any:
    """Returns or raises what `work` does; TimeoutError once it has made no progress for `patience_s`.

    The client's own limits are no help: it retries a silent server for 6.5 minutes, and forever a body that
    stalls and is restarted each time; it sleeps as long as Retry-After says, and nothing bounds a name lookup
    or an upload. So `work` runs in a thread that can be abandoned.
    """
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = work()
        except Exception as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    with _quiet_client():
        thread.start()
        last_progress = time.monotonic()
        while thread.is_alive():
            thread.join(0.2)
            if has_progressed():
                last_progress = time.monotonic()
            elif thread.is_alive() and time.monotonic() - last_progress > patience_s:
                outcome["error"] = TimeoutError(f"nothing arrived for {patience_s} s")
                break
    if thread.is_alive():
        hub_logging.set_verbosity(logging.CRITICAL)  # it retries until the process ends, and must not log it
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


@contextmanager
def _quiet_client():
    """No warning at each retry, and a partial file that grows as bytes arrive.

    By default the client writes 10 MB at a time, more than a whole teacher, and Xet writes out of order.
    """
    saved = (hub_logging.get_verbosity(), constants.DOWNLOAD_CHUNK_SIZE, constants.HF_HUB_DISABLE_XET)
    hub_logging.set_verbosity(logging.CRITICAL)
    constants.DOWNLOAD_CHUNK_SIZE, constants.HF_HUB_DISABLE_XET = 16 * 1024, True
    try:
        yield
    finally:
        hub_logging.set_verbosity(saved[0])
        constants.DOWNLOAD_CHUNK_SIZE, constants.HF_HUB_DISABLE_XET = saved[1:]


def without_password(text: str) -> str:
    """A text that may contain HF_ENDPOINT, without its user and password."""
    user_and_password, at, _ = urlsplit(constants.ENDPOINT).netloc.rpartition("@")
    return text.replace(user_and_password + at, "") if at else text
