"""--upload-model with the real huggingface_hub client, against a local server that keeps what arrives."""

import dataclasses
import html
import re
import shlex
import shutil
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from hub_server import ROOT, UploadServer, run_python
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cleanrl import dqn_atari, dqn_atari_jax
from cleanrl import qdagger_dqn_atari_impalacnn as qdagger
from cleanrl.utils.command_line import check_arguments, parse_arguments
from cleanrl.utils.hub.card import as_text, command_line, copy_sources

NAME = "PongNoFrameskip-v4-mine-seed3"
TINY = [
    "--env-id", "PongNoFrameskip-v4", "--exp-name", "mine", "--seed", "3", "--total-timesteps", "64",
    "--learning-starts", "16", "--num-envs", "2", "--buffer-size", "40", "--batch-size", "8",
    "--eval-episodes", "3", "--end-e", "1", "--no-cuda", "--capture-video", "--upload-model",
]  # fmt: skip


def run(folder: Path, server: UploadServer, *arguments: str, **settings: str) -> SimpleNamespace:
    return run_python(server.url, folder, *arguments, **{"HF_TOKEN": server.token} | settings)


def upload(folder: Path, server: UploadServer, *options: str, **settings: str) -> SimpleNamespace:
    (run_folder,) = (folder / "runs").iterdir()
    relative = str(run_folder.relative_to(folder))
    return run(folder, server, "-m", "cleanrl.utils.hub.publish", relative, *options, **settings)


@pytest.fixture(scope="module")
def failed(tmp_path_factory) -> SimpleNamespace:
    """A finished run whose upload failed: the server refused the commit."""
    folder = tmp_path_factory.mktemp("failed")
    with UploadServer() as server:
        server.fails_at, server.mode = "commit", "server_error"
        outcome = run(folder, server, str(ROOT / "cleanrl" / "dqn_atari.py"), *TINY)
        (run_folder,) = (folder / "runs").iterdir()
        outcome.folder, outcome.run_folder, outcome.steps = folder, run_folder, server.steps
        return outcome


@pytest.fixture
def server():
    with UploadServer() as server:
        yield server


@pytest.mark.slow
def test_a_failure_at_the_end_loses_nothing_and_says_how_to_repeat_it(failed):
    assert failed.status == 1
    assert "Traceback" not in failed.err
    line = failed.err.splitlines()[-1]
    assert re.match(r"error: cannot upload to the Hub: http://127\.0\.0\.1:\d+ answered with error 503", line)
    assert line.endswith(
        f"upload it later with python -m cleanrl.utils.hub.publish runs/{failed.run_folder.name}"
    )
    assert failed.steps[0] == "whoami"
    files = {path.relative_to(failed.run_folder).as_posix() for path in failed.run_folder.rglob("*")}
    assert files >= {"mine.cleanrl_model", "README.md", "dqn_atari.py", "videos/final/game.mp4"}
    assert "checkpoints" not in files  # the run has finished


@pytest.mark.slow
def test_everything_about_a_model_arrives_unchanged(failed, server, tmp_path):
    """And nothing else that lies in its folder, or that a link there leads to."""
    folder = shutil.copytree(failed.folder, tmp_path / "copy")
    (run_folder,) = (folder / "runs").iterdir()
    private = folder / "private"
    private.mkdir()
    (private / "game.mp4").write_bytes(b"private")
    (private / "key.py").write_bytes(b"private")
    foreign = [
        "mine-offline.cleanrl_model",
        "mine-best.cleanrl_model",
        "notes.py",
        ".hidden.py",
        "videos/a.mp4",
    ]
    foreign += [
        "videos/final/notes.txt",
        "other/README.md",
        "other/events.out.tfevents.1",
        "other/mine.cleanrl_model",
    ]
    for name in foreign:
        (run_folder / name).parent.mkdir(exist_ok=True)
        (run_folder / name).write_bytes(b"not to be published")
    (run_folder / "videos" / "linked").symlink_to(private)
    (run_folder / "videos" / "final" / "linked.mp4").symlink_to(private / "game.mp4")
    (run_folder / "events.out.tfevents.2").symlink_to(private / "key.py")
    outcome = upload(folder, server)
    assert outcome.status == 0, outcome.err
    assert outcome.out.splitlines()[-1] == f"uploaded: {server.url}/alice/{NAME}"
    (files,) = server.repos.values()
    assert list(server.repos) == [f"alice/{NAME}"]
    (events,) = (path.name for path in run_folder.glob("events.*") if not path.is_symlink())
    sources = {"dqn_atari.py": ROOT / "cleanrl" / "dqn_atari.py"}
    sources |= {name: ROOT / name for name in ("pyproject.toml", "poetry.lock")}
    from_run = ("README.md", "mine.cleanrl_model", events, "videos/final/game.mp4")
    sources |= {name: run_folder / name for name in from_run}
    assert files.keys() == sources.keys()
    for name, path in sources.items():
        assert files[name][0] == path.read_bytes()
    large = {name for name, (_, mode) in files.items() if mode == "lfs"}
    assert large == {"mine.cleanrl_model", events, "videos/final/game.mp4"}
    assert tomllib.loads(files["pyproject.toml"][0].decode())["project"]["name"] == "qdagger-atari"


@pytest.mark.slow
def test_the_card_has_the_real_result_and_how_to_get_it_again(failed):
    _, header, text = (failed.run_folder / "README.md").read_text("utf-8").split("---\n", 2)
    events = EventAccumulator(str(failed.run_folder))
    events.Reload()
    returns = [event.value for event in events.Scalars("eval/episodic_return")]
    assert len(returns) == 3
    assert np.std(returns) > 0  # all actions are random
    mean_and_std = f"{np.mean(returns):.2f} +/- {np.std(returns):.2f}"
    (model,) = yaml.safe_load(header)["model-index"]
    (result,) = model["results"]
    assert model["name"] == NAME
    assert result["dataset"]["type"] == "PongNoFrameskip-v4"
    (metric,) = result["metrics"]
    assert (metric["type"], metric["value"]) == ("mean_reward", mean_and_std)
    assert metric["args"] == {"games": 3}
    assert {"PongNoFrameskip-v4", "reinforcement-learning", "dqn"} <= set(yaml.safe_load(header)["tags"])
    assert f"**{mean_and_std.replace('+/-', '±')}** (standard deviation) over the 3 games" in text
    assert f"python cleanrl/enjoy.py alice/{NAME}\n" in text
    shown = [option for option in TINY if option != "--upload-model"]
    (command,) = re.findall(r"python cleanrl/dqn_atari\.py (.*)", text)
    assert sorted(command.split()) == sorted(["1.0" if option == "1" else option for option in shown])
    for option, value in (("exp_name", "mine"), ("gamma", "0.99"), ("hf_entity", "alice")):
        assert f"| `{option}` | {value} |" in text


def test_a_card_shows_options_as_they_are():
    """No markup, neither HTML nor Markdown; the entities are resolved by Python's own reader of HTML."""
    value = "a|b <img src=x onerror=alert(1)> [x](http://y) `*c*` ![i](j) é_ü & \\ 5.0e-04"
    assert html.unescape(as_text(value)) == value
    assert not set("<>|[]()`*!&\\") & set(re.sub("&#[0-9]+;", "", as_text(value)))
    assert as_text(Path("runs/Pong__a-b__1/x.cleanrl_model")) == "runs/Pong__a-b__1/x.cleanrl_model"


@pytest.mark.slow
def test_files_of_an_earlier_run_are_removed_from_the_repo_and_others_stay(failed, server):
    files = {"events.out.tfevents.1": b"old", "videos/final/old.mp4": b"old", "notes.txt": b"mine"}
    server.repos[f"lab/{NAME}"] = {name: (content, "regular") for name, content in files.items()}
    before = (failed.run_folder / "README.md").read_text("utf-8")
    outcome = upload(failed.folder, server, "--hf-entity", "lab")
    assert outcome.status == 0, outcome.err
    files = server.repos[f"lab/{NAME}"]
    assert not files.keys() & {"events.out.tfevents.1", "videos/final/old.mp4"}
    assert files["notes.txt"][0] == b"mine"
    card = files["README.md"][0].decode()
    assert card == before.replace(f"alice/{NAME}", f"lab/{NAME}")
    assert f"enjoy.py lab/{NAME}" in card


@pytest.mark.slow
def test_a_published_model_can_be_played(failed, server):
    uploaded = upload(failed.folder, server, "--hf-entity", "alice")
    assert uploaded.status == 0, uploaded.err
    options = [f"alice/{NAME}", "--games", "1", "--video-folder", "videos"]
    outcome = run(failed.folder, server, "-m", "cleanrl.enjoy", *options)
    assert outcome.status == 0, outcome.err
    game, mean = outcome.out.splitlines()
    episodic_return = float(re.fullmatch(r"game 1: return (\S+)", game)[1])
    assert -21 <= episodic_return < 21
    assert mean.startswith(f"mean return {episodic_return:.2f} over 1 games (std 0.00, ")
    assert (failed.folder / "videos" / "PongNoFrameskip-v4-game-1.mp4").stat().st_size > 10_000


def set_account(**changes):
    return lambda server: server.account.update(changes)


def set_failure(step: str, mode: str):
    return lambda server: vars(server).update(fails_at=step, mode=mode)


READ_TOKEN = {"accessToken": {"displayName": "x", "role": "read"}}
SHORT = {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
# name: (what is wrong with the server, options, settings, what the line must say)
REFUSALS = {
    "no_token": (None, [], {"HF_TOKEN": ""}, "there is no token; run hf auth login, or set HF_TOKEN"),
    "bad_token": (None, [], {"HF_TOKEN": "hf_other"}, r"the Hub refuses the token \(401\); set HF_TOKEN"),
    "read_token": (set_account(auth=READ_TOKEN), [], {}, "the token of alice is read-only; set HF_TOKEN"),
    "foreign": (
        None,
        ["--hf-entity", "else"],
        {},
        "may not write to --hf-entity else; use one of alice, lab",
    ),
    "reader": (None, ["--hf-entity", "museum"], {}, "may not write to --hf-entity museum; use one of"),
    "bad_name": (None, ["--exp-name", "a b"], {}, "PongNoFrameskip-v4-a b-seed3 is not a valid repo name"),
    "no_hub": (set_account(orgs=[{}]), [], {}, "does not answer like the Hub; check HF_ENDPOINT"),
    "no_orgs": (set_account(orgs=None), ["--hf-entity", "lab"], {}, "use one of alice$"),
    "offline": (None, [], {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set; unset it"),
    "down": (set_failure("whoami", "server_error"), [], {}, "answered with error 503; try again later"),
    "silent": (set_failure("whoami", "silent"), [], SHORT, "stopped answering"),
    "refused": (None, [], {"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9: ConnectError"),
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory) -> dict[str, SimpleNamespace]:
    """All of them at once."""
    code = """
import sys
from types import SimpleNamespace
from cleanrl.utils.hub.card import repo_name
from cleanrl.utils.hub.publish import check_upload
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
args = SimpleNamespace(env_id="PongNoFrameskip-v4", exp_name=options.get("--exp-name", "mine"), seed=3)
check_upload(repo_name(args), options.get("--hf-entity"))
"""
    folders = {name: tmp_path_factory.mktemp(name) for name in REFUSALS}

    def refuse(name: str) -> SimpleNamespace:
        change, options, settings, _ = REFUSALS[name]
        with UploadServer() as server:
            if change:
                change(server)
            return run(folders[name], server, "-c", code, *options, **settings)

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(REFUSALS, pool.map(refuse, REFUSALS), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSALS)
def test_what_would_fail_at_the_end_is_a_one_line_error_at_the_start(name, refusals):
    outcome, words = refusals[name], REFUSALS[name][3]
    assert (outcome.status, outcome.out) == (1, "")
    assert re.fullmatch(rf"error: cannot upload to the Hub: .*{words}.*\n", outcome.err), outcome.err
    assert outcome.elapsed_s < 40


FAILURES = {
    "create_refused": (set_failure("create", "gated"), {}, r"the Hub refuses the token \(403\)"),
    "file_refused": (set_failure("lfs", "gated"), {}, r"the Hub refuses the token \(403\)"),
    "token_gone": (None, {"HF_TOKEN": ""}, "there is no token"),
    "silent": (set_failure("preupload", "silent"), SHORT, "stopped answering"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_upload_can_be_repeated(name, failed, server, tmp_path):
    change, settings, words = FAILURES[name]
    run_folder = tmp_path / "runs" / failed.run_folder.name
    run_folder.mkdir(parents=True)
    shutil.copy(failed.run_folder / "README.md", run_folder)
    # A larger file would wait longer for a silent server.
    (run_folder / "mine.cleanrl_model").write_bytes(bytes(range(256)))
    if change:
        change(server)
    outcome = upload(tmp_path, server, **settings)
    assert outcome.status == 1
    assert outcome.elapsed_s < 60
    assert re.fullmatch(
        rf"error: cannot upload to the Hub: .*{words}.*; nothing is lost, upload it later with"
        rf" python -m cleanrl\.utils\.hub\.publish runs/{run_folder.name}\n",
        outcome.err,
    ), outcome.err
    assert not any(server.repos.values())
    server.fails_at = None
    assert upload(tmp_path, server).status == 0
    assert server.repos[f"alice/{NAME}"].keys() == {"README.md", "mine.cleanrl_model"}


def test_other_folders_are_a_one_line_error(tmp_path, server):
    outcome = run(tmp_path, server, "-m", "cleanrl.utils.hub.publish", "nowhere")
    assert (outcome.status, len(outcome.err.splitlines())) == (1, 1)
    assert outcome.err.startswith("error: nowhere cannot be uploaded")
    assert server.steps == []


def test_upload_needs_a_saved_model():
    with pytest.raises(SystemExit, match=r"^error: --upload-model contradicts --no-save-model$"):
        check_arguments(dqn_atari.Args(upload_model=True, save_model=False))


def test_the_command_line_leaves_out_defaults():
    args = dqn_atari_jax.Args(save_model=False, seed=2, save_replay=Path("my replay"), resume="runs/x")
    script = Path("/somewhere/dqn_atari_jax.py")
    expected = "python cleanrl/dqn_atari_jax.py --seed 2 --no-save-model --save-replay 'my replay'"
    assert command_line(args, script) == expected
    assert command_line(dqn_atari_jax.Args(), script) == "python cleanrl/dqn_atari_jax.py"


def test_the_command_line_has_a_presets_options_and_those_that_overrode_it(monkeypatch):
    def read(*words: str) -> Any:
        monkeypatch.setattr(sys, "argv", [qdagger.__file__, *words])
        return parse_arguments(qdagger.Args, qdagger.PRESETS)

    args = read("--preset", "quick", "--learning-rate", "1e-4", "--temperature", "1.0", "--seed", "2")
    assert (args.learning_rate, args.temperature, args.total_timesteps) == (1e-4, 1.0, 40_000)
    _, _, *words = shlex.split(command_line(args, Path(qdagger.__file__)))
    assert read(*words) == dataclasses.replace(args, preset=None)


def test_sources_are_not_copied_through_a_link(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "dqn_atari.py").symlink_to(tmp_path / "precious")
    copy_sources(tmp_path / "run", Path(dqn_atari.__file__))
    assert (tmp_path / "precious").read_text() == "kept"
    assert (tmp_path / "run" / "dqn_atari.py").read_text() == Path(dqn_atari.__file__).read_text()
