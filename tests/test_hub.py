"""cleanrl/utils/hub/download.py with the real huggingface_hub client, against a local server."""

import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import COMMIT, ROOT, HubServer, run_python

REPO, FILE = "cleanrl/PongNoFrameskip-v4-dqn_atari-seed1", "dqn_atari.cleanrl_model"
CONTENT = bytes(range(256)) * 8192  # 2 MB
SHORT_TIMEOUTS = {"HF_HUB_ETAG_TIMEOUT": "2", "HF_HUB_DOWNLOAD_TIMEOUT": "2"}


def run_download(endpoint: str, home: Path, *arguments: str, **settings: str) -> SimpleNamespace:
    code = (
        "import sys; from cleanrl.utils.hub.download import download; print(download(*sys.argv[1:]), end='')"
    )
    return run_python(endpoint, home, "-c", code, *(arguments or (REPO, FILE)), **settings)


def refused_url() -> str:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


# name: (the server's mode or an endpoint without a server, arguments, settings, what the line must say)
FAILURES = {
    "unauthorized": ("unauthorized", (), {}, "set HF_TOKEN"),
    "gated": ("gated", (), {}, "gated; accept its terms"),
    "no_repo": ("no_repo", (), {}, "no such repo; check --teacher-policy-hf-repo"),
    "no_file": ("no_file", (), {}, "no such file; check"),
    "no_revision": ("no_revision", (REPO, FILE, "v9"), {}, "at revision v9: the repo has no such revision"),
    "server_error": ("server_error", (), {}, "error 503; try again later"),
    "retry_after": ("retry_after", (), {}, "error 429; try again later"),
    "no_hub": (
        "no_hub",
        (),
        {},
        "does not answer like the Hub (the file has no usable ETag or commit); check HF_ENDPOINT",
    ),
    "silent": ("silent", (), SHORT_TIMEOUTS, "stopped answering"),
    "stalled": ("stalled", (), SHORT_TIMEOUTS, "stopped answering (nothing arrived for 11 s)"),
    "stalled_anew": ("stalled_anew", (), SHORT_TIMEOUTS, "stopped answering (nothing arrived for 11 s)"),
    "truncated": ("truncated", (), {}, "check the connection"),
    "altered": ("altered", (), {}, "it was damaged on its way or in the cache (its SHA-256 is another)"),
    "path_as_etag": ("path_as_etag", (), {}, "the file has no usable ETag or commit); check HF_ENDPOINT"),
    "path_as_commit": ("path_as_commit", (), {}, "the file has no usable ETag or commit); check HF_ENDPOINT"),
    "huge": ("huge", (), {}, "its size is 1000000000000); check HF_ENDPOINT"),
    "endless": ("endless", (), {}, "the file has more than the 2097152 bytes it was said to have"),
    "revision_outside": (
        "ok",
        (REPO, FILE, "../../x"),
        {},
        "the repo has no such revision",
    ),
    "refused": (refused_url(), (), {}, "Connection refused"),
    "no_name": ("http://hub.invalid", (), {}, "http://hub.invalid"),
    "offline": ("ok", (), {"HF_HUB_OFFLINE": "1"}, "unset HF_HUB_OFFLINE"),
    "bad_id": ("ok", ("a/b/c", FILE), {}, "not a repo id"),
    "bad_id_characters": ("ok", ("../my repo", FILE), {}, "not a repo id"),
    "empty_id": ("ok", ("", FILE), {}, "not a repo id"),
    "outside_the_cache": ("ok", (REPO, "../../stolen"), {}, "check the name of the file"),
    "cache_is_a_file": ("ok", (), {"HF_HUB_CACHE": str(Path(__file__))}, "check the cache folder"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, SimpleNamespace]:
    """All failures at once: most of them wait."""
    homes = tmp_path_factory.mktemp("homes")

    def run(name: str) -> SimpleNamespace:
        mode, arguments, settings, _ = FAILURES[name]
        with nullcontext(SimpleNamespace(url=mode)) if "://" in mode else HubServer(CONTENT, mode) as server:
            return run_download(server.url, homes / name, *arguments, **settings)

    with ThreadPoolExecutor(6) as pool:
        return dict(zip(FAILURES, pool.map(run, FAILURES), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_a_one_line_error(name, outcomes):
    _, arguments, _, expected = FAILURES[name]
    outcome = outcomes[name]
    assert (outcome.status, outcome.out) == (1, "")
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert "Traceback" not in outcome.err
    repo, file = (arguments or (REPO, FILE))[:2]
    assert f"error: cannot download {file} from {repo}" in outcome.err
    assert expected in outcome.err
    assert "train a DQN teacher yourself or pass a local one with --teacher-model-path FILE" in outcome.err
    assert outcome.elapsed_s < 30


@pytest.mark.parametrize(
    "endpoint", ["nonsense", "", "http://", "http://u:secret@[bad", "http://x:99999", "u:secret@127.0.0.1:1"]
)
def test_an_endpoint_that_is_no_address_is_refused_in_a_line_that_does_not_show_it(endpoint, tmp_path):
    outcome = run_download(endpoint, tmp_path)
    line = "error: HF_ENDPOINT is not an address like https://huggingface.co; correct or unset it\n"
    assert (outcome.status, outcome.out, outcome.err) == (1, "", line)


@pytest.mark.parametrize("value", ["abc", "1.5", "-5", "0"])
@pytest.mark.parametrize("name", ["HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"])
def test_a_time_limit_that_is_no_number_of_seconds_is_refused(name, value, tmp_path):
    outcome = run_download("http://127.0.0.1:9", tmp_path, **{name: value})
    line = f"error: {name} is not a whole number of seconds; correct or unset it\n"
    assert (outcome.status, outcome.out, outcome.err) == (1, "", line)


@pytest.mark.parametrize("endpoint", ["http://alice:secret@hub.invalid", None])
def test_a_password_in_the_endpoint_is_not_shown(endpoint, tmp_path):
    with HubServer(CONTENT, "server_error") as server:
        outcome = run_download(endpoint or server.url.replace("//", "//alice:secret@"), tmp_path)
    assert outcome.status == 1
    assert "secret" not in outcome.err
    assert ("http://hub.invalid" if endpoint else server.url) in outcome.err


@pytest.mark.parametrize("mode", ["ok", "redirect", "busy_once"])
def test_good_download(mode, tmp_path):
    with HubServer(CONTENT, mode) as server:
        outcome = run_download(server.url, tmp_path, HF_TOKEN="hf_secret")
    assert (outcome.status, outcome.err) == (0, "")
    assert Path(outcome.out).read_bytes() == CONTENT
    assert tmp_path in Path(outcome.out).parents
    hub_requests = [(path, headers) for _, path, headers in server.requests if not path.startswith("/cdn/")]
    assert {path for path, _ in hub_requests} == {f"/{REPO}/resolve/main/{FILE}"}
    assert {headers.get("authorization") for _, headers in hub_requests} == {"Bearer hf_secret"}
    cdn_requests = [headers for _, path, headers in server.requests if path.startswith("/cdn/")]
    assert bool(cdn_requests) == (mode == "redirect")
    assert not any("authorization" in headers for headers in cdn_requests)


@pytest.mark.parametrize("revision", ["v1.0", COMMIT])
def test_pinned_revision_is_requested(revision, tmp_path):
    with HubServer(CONTENT) as server:
        outcome = run_download(server.url, tmp_path, REPO, FILE, revision)
    assert outcome.status == 0
    assert {path for _, path, _ in server.requests} == {f"/{REPO}/resolve/{revision}/{FILE}"}


@pytest.mark.slow
def test_cached_file_is_used_when_the_hub_fails(tmp_path):
    with HubServer(CONTENT) as server:
        first = run_download(server.url, tmp_path)
        requests = len(server.requests)
        assert run_download(server.url, tmp_path).out == first.out
        assert {method for method, _, _ in server.requests[requests:]} == {"HEAD"}
        offline = run_download(server.url, tmp_path, HF_HUB_OFFLINE="1")
        assert len(server.requests) == requests + 2
        server.mode = "no_file"  # not a failure of the Hub: the file was withdrawn
        assert "no such file" in run_download(server.url, tmp_path).err
        server.mode = "server_error"
        failing = run_download(server.url, tmp_path)
        server.mode = "silent"
        silent = run_download(server.url, tmp_path, **SHORT_TIMEOUTS)
    gone = run_download(server.url, tmp_path)
    for outcome in (offline, failing, silent, gone):
        assert (outcome.status, outcome.out, outcome.err) == (0, first.out, "")
        assert outcome.elapsed_s < 30


def test_a_file_that_was_damaged_in_the_cache_is_downloaded_again(tmp_path):
    with HubServer(CONTENT) as server:
        path = Path(run_download(server.url, tmp_path).out)
        path.resolve().write_bytes(CONTENT[:-1] + b"?")
        damaged = run_download(server.url, tmp_path, HF_HUB_OFFLINE="1")
        again = run_download(server.url, tmp_path)
    assert (damaged.status, damaged.out) == (1, "")
    assert "(its SHA-256 is another); try again" in damaged.err
    assert (again.status, again.err) == (0, "")
    assert Path(again.out).read_bytes() == CONTENT


@pytest.mark.slow
def test_slow_download_continues_while_it_makes_progress(tmp_path):
    """In two processes: runs started together share the cache, and the client lets one of them download."""
    timeouts = {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    with HubServer(CONTENT, "slow", pause_s=0.5) as server, ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run_download, server.url, tmp_path, **timeouts) for _ in range(2)]
        outcomes = [run.result() for run in runs]
    for outcome in outcomes:
        assert (outcome.status, outcome.err) == (0, "")
        assert Path(outcome.out).read_bytes() == CONTENT
        assert outcome.elapsed_s > 9  # a download without progress is given up after 8 s
    assert [method for method, _, _ in server.requests].count("GET") == 1


# --------------------------------------------------------------------------------------------- listing


ZOO = "sb3/ppo-PongNoFrameskip-v4"
ZOO_FILES = [  # of the zoo's repositories, as they are
    ".gitattributes", "README.md", "args.yml", "config.yml", "env_kwargs.yml",
    "ppo-PongNoFrameskip-v4.zip", "ppo-PongNoFrameskip-v4/policy.pth", "replay.mp4", "results.json",
    "train_eval_metrics.zip",
]  # fmt: skip


def find(endpoint: str, home: Path, *arguments: str, **settings: str) -> SimpleNamespace:
    code = "import sys; from cleanrl.utils.hub.download import find_file; print(find_file(*sys.argv[1:]))"
    return run_python(endpoint, home, "-c", code, *arguments, **settings)


@pytest.mark.parametrize(
    ("repo", "files", "expected"),
    [
        (ZOO, ZOO_FILES, "ppo-PongNoFrameskip-v4.zip"),
        ("alice/ppo-PongNoFrameskip-v4", ZOO_FILES, "ppo-PongNoFrameskip-v4.zip"),
        ("alice/pong", ["README.md", "mine.cleanrl_model", "logs/x.pt"], "mine.cleanrl_model"),
        ("alice/pong", ["a.safetensors", "dqn_atari.cleanrl_model"], "dqn_atari.cleanrl_model"),
        ("alice/pong", ["x.safetensors", "x.py"], "x.safetensors"),
    ],
)
def test_a_file_is_found_by_what_the_repo_lists(repo, files, expected, tmp_path):
    with HubServer(CONTENT, files=files) as server:
        outcome = find(server.url, tmp_path, repo)
    assert (outcome.status, outcome.out, outcome.err) == (0, f"{expected}\n", "")
    assert [path for _, path, _ in server.requests] == [f"/api/models/{repo}"]


def test_a_list_that_is_not_the_hubs_is_a_one_line_error(tmp_path):
    with HubServer(CONTENT, "no_hub", files=["a.zip"]) as server:
        outcome = find(server.url, tmp_path, "alice/pong")
    assert (outcome.status, outcome.out) == (1, "")
    assert "does not answer like the Hub (" in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_a_published_name_needs_no_list(tmp_path):
    outcome = find(refused_url(), tmp_path, "cleanrl/PongNoFrameskip-v4-c51_atari-seed1")
    assert (outcome.status, outcome.out) == (0, "c51_atari.cleanrl_model\n")


def test_the_list_is_that_of_the_revision(tmp_path):
    with HubServer(CONTENT, files=["a.zip"]) as server:
        assert find(server.url, tmp_path, "alice/pong", "v2").out == "a.zip\n"
    assert [path for _, path, _ in server.requests] == ["/api/models/alice/pong/revision/v2"]


@pytest.mark.parametrize(
    ("files", "found"),
    [(["a.zip", "b.pth", "c.txt"], "(a.zip, b.pth)"), (["README.md", "x/a.zip"], "(none)")],
)
def test_an_ambiguous_repo_is_one_line(files, found, tmp_path):
    with HubServer(CONTENT, files=files) as server:
        outcome = find(server.url, tmp_path, "alice/pong")
    fault = f"alice/pong does not have exactly one file of weights {found}"
    expected = (1, "", f"error: {fault}; name it with --teacher-hf-file.\n")
    assert (outcome.status, outcome.out, outcome.err) == expected


@pytest.mark.slow
def test_without_the_hub_the_list_is_the_caches(tmp_path):
    with HubServer(CONTENT, files=ZOO_FILES) as server:
        assert run_download(server.url, tmp_path, ZOO, "ppo-PongNoFrameskip-v4.zip").status == 0
        server.mode = "server_error"
        failing = find(server.url, tmp_path, ZOO)
        never_seen = find(server.url, tmp_path, "sb3/a2c-PongNoFrameskip-v4")
    offline = find(server.url, tmp_path, ZOO, HF_HUB_OFFLINE="1")
    for outcome in (failing, offline):
        assert (outcome.status, outcome.out, outcome.err) == (0, "ppo-PongNoFrameskip-v4.zip\n", "")
    assert never_seen.status == 1
    assert "error: cannot list the files of sb3/a2c-PongNoFrameskip-v4: " in never_seen.err
    assert "error 503; try again later" in never_seen.err
    assert len(never_seen.err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("no_repo", "no such repo; check --teacher-policy-hf-repo"),
        ("gated", "gated; accept its terms"),
        ("no_revision", "no such revision"),
        ("silent", "stopped answering"),
    ],
)
def test_a_list_that_cannot_be_had_is_one_line(mode, words, tmp_path):
    with HubServer(CONTENT, mode, files=[]) as server:
        outcome = find(server.url, tmp_path, ZOO, **SHORT_TIMEOUTS)
    assert (outcome.status, outcome.out) == (1, "")
    assert len(outcome.err.splitlines()) == 1
    assert words in outcome.err
    assert outcome.elapsed_s < 30


def test_import_needs_no_framework():
    code = "import sys, cleanrl.utils.hub.download, cleanrl.utils.weights.files; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not re.search(r"\b(torch|jax|flax)\b", modules.stdout)
