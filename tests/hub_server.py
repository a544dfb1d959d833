"""A local server that speaks enough of the Hub's protocol for the real client, and fails in chosen ways."""

import re
import threading
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# What the Hub answers instead of the file: status and X-Error-Code
ERRORS = {
    "unauthorized": (401, None),
    "gated": (403, "GatedRepo"),
    "no_repo": (404, "RepoNotFound"),
    "no_file": (404, "EntryNotFound"),
    "no_revision": (404, "RevisionNotFound"),
    "server_error": (503, None),
    "retry_after": (429, None),
}


class HubServer(ThreadingHTTPServer):
    """Serves `content` as every file of every repo. `mode` may be changed while it runs:

    ok, any of ERRORS, redirect (the file is on another host, as large files of the Hub are), no_hub (a web
    server without the Hub's headers), silent (never answers), slow (the body comes in 20 pieces, `pause_s`
    apart), and with only the first half of the body arriving: stalled, stalled_anew (each time from the start
    again), truncated.
    """

    daemon_threads = True

    def __init__(self, content: bytes, mode: str = "ok", pause_s: float = 0.2):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.mode, self.pause_s = content, mode, pause_s
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.stopped = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):
        """Nothing to report where a client that gave up has closed the connection."""


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def log_message(self, *_):
        pass

    def answer(self, with_body: bool) -> None:
        server, mode = self.server, self.server.mode
        if "/resolve/" in self.path or self.path.startswith("/cdn/"):
            server.requests.append((self.command, self.path, dict(self.headers)))
        if mode == "silent":
            server.stopped.wait()
            return
        if mode in ERRORS or self.path.startswith("/api/"):  # the client's telemetry
            status, code = ERRORS.get(mode, (404, None))
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            if mode == "retry_after":
                self.send_header("Retry-After", "3600")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return

        etag = f'"{sha256(server.content).hexdigest()}"'
        if mode == "redirect" and not self.path.startswith("/cdn/"):
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{server.server_port}/cdn/blob")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("X-Linked-Etag", etag)
            self.send_header("X-Linked-Size", str(len(server.content)))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return

        requested = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(requested[1]) if requested and mode != "stalled_anew" else 0
        self.send_response(206 if start else 200)
        if mode != "no_hub":
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", etag)
        if start:
            self.send_header(
                "Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}"
            )
        self.send_header("Content-Length", str(len(server.content) - start))
        self.end_headers()
        if with_body:
            self.send_body(start)

    def send_body(self, start: int) -> None:
        server, mode = self.server, self.server.mode
        size = len(server.content)
        end = size // 2 if mode in ("stalled", "stalled_anew", "truncated") else size
        piece = size // 20 if mode == "slow" else size
        for position in range(start, end, piece):
            self.wfile.write(server.content[position : min(position + piece, end)])
            self.wfile.flush()
            if mode == "slow":
                server.stopped.wait(server.pause_s)
        if mode.startswith("stalled"):
            server.stopped.wait()
