"""A local server that speaks enough of the Hub's protocol for the real client, and fails in chosen ways."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
import time
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
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


def run_python(endpoint: str, folder: Path, *arguments: str, **settings: str) -> SimpleNamespace:
    """Runs Python in `folder`, a process of its own, as the client reads its settings when it is imported."""
    folder.mkdir(exist_ok=True)
    is_set_here = re.compile(r"HF_.*|.*_proxy", re.IGNORECASE).fullmatch
    others = {name: value for name, value in os.environ.items() if not is_set_here(name)}
    ours = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    process = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=others | ours | settings,
        capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    return SimpleNamespace(
        status=process.returncode,
        out=process.stdout,
        err=process.stderr,
        elapsed_s=time.monotonic() - started,
    )


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
        if mode == "busy_once" and "/resolve/" in self.path:
            server.mode, mode = "ok", "server_error"
        if server.files is not None and self.path.startswith("/api/models/") and mode not in ERRORS:
            server.requests.append((self.command, self.path, dict(self.headers)))
            if mode == "no_hub":
                self.send_response(200)
                self.send_header("Content-Length", str(len(server.content_of(self.path))))
                self.end_headers()
                self.wfile.write(server.content_of(self.path))
                return
            listed = {"id": "me/model", "sha": COMMIT, "siblings": [{"rfilename": f} for f in server.files]}
            answer = json.dumps(listed).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)
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

        content = server.content_of(self.path)
        etag = f'"{"../../" if mode == "path_as_etag" else ""}{sha256(content).hexdigest()}"'
        commit = "../../main" if mode == "path_as_commit" else COMMIT
        if mode == "redirect" and not self.path.startswith("/cdn/"):
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{server.server_port}/cdn/blob")
            self.send_header("X-Repo-Commit", commit)
            self.send_header("X-Linked-Etag", etag)
            self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return

        requested = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(requested[1]) if requested and mode != "stalled_anew" else 0
        self.send_response(206 if start else 200)
        if mode != "no_hub":
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", etag)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if not (mode == "endless" and with_body):
            self.send_header("Content-Length", str(10**12 if mode == "huge" else len(content) - start))
        self.end_headers()
        if with_body:
            self.send_body(content, start)

    def send_body(self, content: bytes, start: int) -> None:
        server, mode = self.server, self.server.mode
        size = len(content)
        if mode == "altered":
            content = content[:-1] + bytes([content[-1] ^ 1])
        end = size // 2 if mode in ("stalled", "stalled_anew", "truncated") else size
        piece = size // 20 if mode == "slow" else size
        for position in range(start, end, piece):
            self.wfile.write(content[position : min(position + piece, end)])
            self.wfile.flush()
            if mode == "slow":
                server.stopped.wait(server.pause_s)
        while mode == "endless" and not server.stopped.wait(0.01):
            self.wfile.write(content[: 2**16])
        if mode.startswith("stalled"):
            server.stopped.wait()


class HubServer(ThreadingHTTPServer):
    """Serves `content` as every file of every repo, each of which lists `files`, if any are given.

    `mode` may be changed while it runs:

    ok, any of ERRORS, redirect (the file is on another host, as the Hub's large files are), no_hub (a web
    server without the Hub's headers), silent (never answers), slow (the body comes in 20 pieces, `pause_s`
    apart); where only the first half of the body arrives: stalled, stalled_anew (from the start each time),
    truncated; altered (in one bit). Servers that mean harm: path_as_etag, path_as_commit, huge (10^12 bytes,
    it says), endless.
    """

    daemon_threads = True
    handler = Handler

    def __init__(
        self, content: bytes, mode: str = "ok", pause_s: float = 0.2, files: list[str] | None = None
    ):
        super().__init__(("127.0.0.1", 0), self.handler)
        self.files = files
        self.content, self.mode, self.pause_s = content, mode, pause_s
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.stopped = threading.Event()

    def content_of(self, path: str) -> bytes:
        return self.content

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
        """Reports nothing when a client that gave up has closed the connection."""


class UploadHandler(Handler):
    """The upload half: accounts, repos, commits, and large files (LFS) beside them."""

    def do_GET(self):
        if self.path.startswith("/api/whoami"):
            self.take("whoami", self.whoami)
        elif "/tree/" in self.path:
            self.take("tree", self.tree)
        else:
            super().do_GET()

    def do_POST(self):
        self.body = self.rfile.read(int(self.headers["Content-Length"]))
        for end, step in {
            "/api/repos/create": self.create,
            "/api/validate-yaml": lambda: {"errors": [], "warnings": []},
            "/preupload/main": self.preupload,
            "/info/lfs/objects/batch": self.lfs_batch,
            "/commit/main": self.commit,
        }.items():
            if self.path.endswith(end):
                self.take(end, step)
                return
        self.reply(404)

    def do_PUT(self):
        self.body = self.rfile.read(int(self.headers["Content-Length"]))
        self.take("lfs", self.store)

    def take(self, step: str, answer) -> None:
        server = self.server
        server.steps.append(step)
        if server.fails_at and server.fails_at in step:
            if server.mode == "silent":
                server.stopped.wait()
            self.reply(ERRORS[server.mode][0])
        elif self.headers.get("authorization") != f"Bearer {server.token}" and step != "lfs":
            self.reply(401)
        else:
            self.reply(200, answer())

    def reply(self, status: int, answer: object = None) -> None:
        content = json.dumps(answer if status == 200 else {"error": "no"}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def whoami(self):
        return self.server.account

    def create(self):
        wanted = json.loads(self.body)
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        self.server.repos.setdefault(repo_id, {})
        return {"url": f"{self.server.url}/{repo_id}", "id": repo_id}

    def repo_of_path(self) -> str:
        return re.search(r"([\w.-]+/[\w.-]+?)(\.git/|/preupload|/commit|/tree)", self.path)[1]

    def tree(self):
        files = self.server.repos[self.repo_of_path()]
        return [
            {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
            for path, (content, _) in files.items()
        ]

    def preupload(self):
        answers = []
        for file in json.loads(self.body)["files"]:
            try:
                base64.b64decode(file["sample"]).decode()
                is_text = True
            except UnicodeDecodeError:
                is_text = False
            mode = "regular" if is_text and file["size"] < 10_000_000 else "lfs"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        return {"files": answers}

    def lfs_batch(self):
        wanted = json.loads(self.body)["objects"]
        url = self.server.url
        objects = [
            {**file, "actions": {"upload": {"href": f"{url}/lfs/{file['oid']}"}}}
            for file in wanted
            if file["oid"] not in self.server.large_files
        ]
        return {"transfer": "basic", "objects": objects}

    def store(self):
        oid = sha256(self.body).hexdigest()
        assert self.path == f"/lfs/{oid}"
        self.server.large_files[oid] = self.body

    def commit(self):
        server, repo_id = self.server, self.repo_of_path()
        files = server.repos[repo_id]
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"]), "regular"
                case "lfsFile":
                    content = server.large_files[value["oid"]]
                    assert len(content) == value["size"]
                    files[value["path"]] = content, "lfs"
                case "deletedFile":
                    del files[value["path"]]
                case "header":
                    server.commits.append(value["summary"])
        return {"success": True, "commitUrl": f"{server.url}/{repo_id}/commit/{COMMIT}", "commitOid": COMMIT}


class UploadServer(HubServer):
    """Accepts uploads as well. `repos` has files by repo and path: their content, and "regular" or "lfs".

    The step `fails_at`, one of whoami, create, preupload, lfs, commit, fails as `mode` says.
    """

    handler = UploadHandler

    def __init__(self, token: str = "hf_secret"):
        super().__init__(b"")
        self.token = token
        self.account = {
            "type": "user",
            "name": "alice",
            "orgs": [{"name": "lab", "roleInOrg": "write"}, {"name": "museum", "roleInOrg": "read"}],
            "auth": {"type": "access_token", "accessToken": {"displayName": "x", "role": "write"}},
        }
        self.fails_at: str | None = None
        self.repos: dict[str, dict[str, tuple[bytes, str]]] = {}
        self.large_files: dict[str, bytes] = {}
        self.steps: list[str] = []
        self.commits: list[str] = []

    def content_of(self, path: str) -> bytes:
        repo_id, name = re.match(r"/([\w.-]+/[\w.-]+)/resolve/\w+/(.+)", path).groups()
        return self.repos[repo_id][name][0]
