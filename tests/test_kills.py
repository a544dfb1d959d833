"""A run that is killed or stopped, at any instant and in any way, ends as an uninterrupted one does."""

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from exact_kills import Server
from resume_runs import KILLED, SCRIPTS, Command, differences, outcome, the_run, tiny_options

pytestmark = pytest.mark.slow

KILLS = 8  # of each of the two scripts that are killed at exact instants
TORCH_SCRIPTS = [script for script in SCRIPTS if "jax" not in script]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# --------------------------------------------------------------------------- runs killed at exact instants


@pytest.fixture(scope="module", params=TORCH_SCRIPTS)
def server(request) -> Iterator[Server]:
    with Server(request.param) as server:
        yield server


@pytest.fixture(scope="module")
def uninterrupted(server, tmp_path_factory) -> tuple[dict[str, Any], int]:
    """The outcome of a run without checkpoints, and the instants of one with."""
    folder = tmp_path_factory.mktemp(server.script)
    status, _, output = server.run(folder / "without", "--checkpoint-interval", "0")
    assert status == 0, output
    status, instants, output = server.run(folder / "with")
    assert status == 0, output
    expected = outcome(folder / "without")
    assert differences(expected, outcome(folder / "with")) == []
    return expected, instants


def resume(server: Server, folder: Path, expected: dict[str, Any]) -> None:
    """Resumes a killed run, unless it had finished or had no checkpoint yet, and compares the outcome."""
    if list(folder.glob("runs/*/checkpoints/checkpoint-*.json")):
        status, _, output = server.run(folder, "--resume", "auto")
        assert status == 0, output
    assert differences(expected, outcome(folder)) == []


def test_a_run_that_is_killed_again_and_again_ends_the_same(server, uninterrupted):
    expected, instants = uninterrupted
    rng, kills, folder = random.Random(0), 0, Path("0")
    while kills < KILLS:
        kill_at = int(instants * rng.random() ** 2)  # half of them in its first quarter
        status, _, output = server.run(folder, "--resume", "auto", kill_at=kill_at)
        assert status in (0, KILLED), output
        kills += status == KILLED
        if status == 0:
            assert differences(expected, outcome(folder)) == []
            folder = Path(str(kills))
    if status == KILLED and list(folder.glob("runs/*/checkpoints/checkpoint-*.json")):
        resume(server, folder, expected)


@pytest.mark.parametrize("back", [1, 20, 45, 70])
def test_a_run_that_is_killed_as_it_finishes_loses_nothing(server, uninterrupted, back):
    expected, instants = uninterrupted
    assert server.run(Path("run"), kill_at=instants - back)[0] == KILLED
    resume(server, Path("run"), expected)


def test_a_run_whose_disk_is_full_for_a_while_loses_nothing(server, uninterrupted):
    expected, instants = uninterrupted
    full = (instants // 3, instants // 3 + 30)
    status, seen, output = server.run(Path("run"), full_disk=full)
    assert status == 0, output
    assert "warning: no checkpoint could be written (No space left on device)" in output
    assert "cannot be written to (No space left on device): will try again" in output  # its curves
    assert seen > full[1] + 100
    assert differences(expected, outcome(Path("run"))) == []
    for folder, kill_at in ((Path("while full"), full[1] - 4), (Path("after"), full[1] + 60)):
        assert server.run(folder, full_disk=full, kill_at=kill_at)[0] == KILLED
        resume(server, folder, expected)


# ---------------------------------------------------------------------------------------- a whole command


def test_a_command_that_is_stopped_and_then_loses_a_worker_ends_the_same():
    script = "dqn_atari_jax"
    calm = Command(Path("calm"), script, *tiny_options(script), "--checkpoint-interval", "0")
    assert calm.end() == 0, calm.output

    stopped = Command(Path(), script, *tiny_options(script), "--checkpoint-interval", "0.001")
    assert stopped.wait_for_checkpoints(8)
    start = time.monotonic()
    assert stopped.end(signal.SIGTERM) == 128 + signal.SIGTERM
    assert time.monotonic() - start < 30
    run_folder = the_run(Path())
    assert stopped.output.splitlines()[-1] == f"stopped by SIGTERM; resume it with --resume {run_folder}"

    failed = Command(Path(), script, "--resume", str(run_folder))  # with the run's other options
    assert failed.wait_for_checkpoints(8)
    failed.workers()[0].kill()
    assert failed.end() == 1
    last = failed.output.splitlines()[-1]
    assert last.startswith("error: environment worker")
    assert last.endswith(f"resume it with --resume {run_folder}")
    assert "Traceback" not in failed.output

    final = Command(Path(), script, *tiny_options(script), "--resume", "auto")
    assert final.end() == 0, final.output
    assert the_run(Path()) == run_folder
    assert differences(outcome(Path("calm")), outcome(Path())) == []
