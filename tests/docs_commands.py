"""The commands in README and docs, and how each kind of them is tried.

A ```bash block holds commands, one a line; so does a piece of text in backticks that starts with a program.
A block whose title is one of MARKS is only checked, as far as that is possible without running it. The others
run block by block, each in a folder that looks like a checkout, smaller than documented: with the options of
TINY after the documented ones (the last one counts), on Pong, with short evaluation games, against a local
server instead of the Hub. Installations are left to `.ci/run`, which makes one.
"""

import functools
import importlib
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import both_scripts
import tyro
from both_scripts import ROOT
from hub_server import HubServer

from cleanrl import enjoy
from cleanrl.utils.benchmark import __main__ as many_runs
from cleanrl.utils.command_line import check_arguments, parse, parse_arguments
from cleanrl.utils.hub import publish
from cleanrl.utils.tune import __main__ as tune
from cleanrl.utils.tune.space import parse_space
from cleanrl.utils.weights.files import read_weights
from cleanrl.utils.weights.layouts import to_flax, unflatten

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARKS = {"needs a GPU", "needs the network"}
SCRIPTS = {Path(script.__file__).name: script for script in both_scripts.SCRIPTS}
TIMEOUT_S = 300
READING = threading.Lock()  # sys.argv, of which all threads have one

GAME = "PongNoFrameskip-v4"
TEACHER = f"cleanrl/teachers/{GAME}.safetensors"
TINY = [
    "--num-envs", "2", "--buffer-size", "60", "--batch-size", "4",
    "--train-frequency", "2", "--target-network-frequency", "6", "--learning-starts", "10",
    "--total-timesteps", "40", "--eval-episodes", "1", "--no-cuda",
]  # fmt: skip
TINY_TEACHER = [
    "--teacher-steps", "40", "--teacher-eval-episodes", "1", "--return-normalization", "random",
    "--offline-steps", "1", "--offline-eval-frequency", "1",  # more: JAX would compile another program
]  # fmt: skip
TINY_BENCHMARKS = {
    "replay_memory": ["--frames", "1000"],
    "long_run": ["--minutes", "0.1"],
    "checkpoint_cost": ["--frames", "400", "--played-steps", "80", "--steps-in-10-minutes", "80"],
}
SHORT_GAMES = """\
# Python reads this file when it starts: the evaluation's games end after 100 frames.
import functools
import sys

sys.path.insert(0, {root!r})
from cleanrl.utils import evaluation

evaluation.evaluate = functools.partial(evaluation.evaluate, max_game_frames=100)
sys.path.remove({root!r})
"""


# ------------------------------------------------------------------------------------------- reading pages

FENCE = re.compile(
    r"^(?P<fence>`{3,})(?P<info>[^`\n]*)\n(?P<content>.*?)^(?P=fence)$", re.MULTILINE | re.DOTALL
)
TITLE = re.compile(r'bash(?: title="(?P<title>[^"]*)")?')
INLINE = re.compile(r"`([^`]+)`")
PROGRAM = re.compile(r"(\.venv/bin/)?(python3?|pip|poetry|tensorboard|mkdocs|ruff) \S")
OTHER_HOST = re.compile(
    r"""<(script|link|img|iframe|source)\b[^>]*\b(src|href)=["']?(https?:)?//|url\(["']?(https?:)?//"""
)


@dataclass(frozen=True)
class Block:
    """Commands of one block; each is its words, as a shell would see them."""

    page: str
    line: int
    mark: str | None
    commands: tuple[tuple[str, ...], ...]

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def saves_replay(self) -> bool:
        return any("--save-replay" in words for words in self.commands)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def fences(text: str) -> Iterator[tuple[int, str, str]]:
    """Line, info string and content of each fenced block of a page."""
    for match in FENCE.finditer(text):
        yield text.count("\n", 0, match.start()) + 1, match["info"].strip(), match["content"]


def split(line: str) -> Iterator[tuple[str, ...]]:
    """The commands of a line, without the path of the virtual environment or `poetry run`."""
    for command in line.split(" && "):
        words = shlex.split(command, comments=True)
        words = words[2:] if words[:2] == ["poetry", "run"] else words
        if words:
            program = words[0].removeprefix(".venv/bin/")
            yield ("python" if program == "python3" else program, *words[1:])


def read_pages(pages: list[Path]) -> list[Block]:
    """The blocks of all pages, then the commands in their text, a block each."""
    blocks, in_text = [], []
    for page in pages:
        name, text = name_of(page), page.read_text("utf-8")
        for line, info, content in fences(text):
            if title := TITLE.fullmatch(info):
                lines = content.replace("\\\n", " ").splitlines()
                commands = tuple(command for line in lines for command in split(line))
                blocks.append(Block(name, line, title["title"], commands))
        prose = FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)
        for span in INLINE.finditer(prose):
            if PROGRAM.match(code := " ".join(span[1].split())):
                line = prose.count("\n", 0, span.start()) + 1
                in_text.append(Block(name, line, None, tuple(split(code))))
    return blocks + in_text


# -------------------------------------------------------------------------------------------------- places


@dataclass(eq=False)
class Place:
    """A folder that looks like a checkout, for one block.

    Args:
        folder: a new one.
        checkout: a copy of the checkout, to which it has links.
        hubs: servers of a teacher, by the kind of its file.
        sources: places where replays were saved that this block may need.
    """

    folder: Path
    checkout: Path
    hubs: dict[str, HubServer]
    sources: Sequence["Place"] = ()

    def __post_init__(self) -> None:
        self.folder.mkdir()
        for path in self.checkout.iterdir():
            (self.folder / path.name).symlink_to(path)

    def environment(self, hub: str = "torch") -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return clean | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.checkout.parent / "short_games"),
            "HF_ENDPOINT": self.hubs[hub].url,
            "HF_HOME": str(self.folder / "hub"),
            "WANDB_MODE": "offline",
            "NO_MKDOCS_2_WARNING": "1",
        }

    def start(self, *words: str, hub: str = "torch", folder: Path | None = None) -> subprocess.Popen:
        program = sys.executable if words[0] == "python" else words[0]
        return subprocess.Popen(
            [program, *words[1:]],
            cwd=folder or self.folder,
            env=self.environment(hub),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str, hub: str = "torch", folder: Path | None = None) -> str:
        """Runs a command, which must succeed; returns what it printed."""
        process = self.start(*words, hub=hub, folder=folder)
        try:
            output, _ = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()
        assert process.returncode == 0, f"{shlex.join(words)}\nended with {process.returncode}:\n{output}"
        assert "Traceback" not in output, output
        return output

    def serve(self, words: list[str], port: int, path: str, is_answer: Callable[[bytes], bool]) -> None:
        """Runs a command that serves pages until it is stopped, and waits for the right answer."""
        process = self.start(*words)
        deadline = time.monotonic() + TIMEOUT_S
        try:
            while True:
                assert process.poll() is None, f"{shlex.join(words)} ended:\n{process.stdout.read()}"
                assert time.monotonic() < deadline, f"{shlex.join(words)} did not answer"
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=60) as answer:
                        if is_answer(answer.read()):
                            return
                except OSError:
                    pass
                time.sleep(0.2)
        finally:
            process.terminate()
            process.communicate()


def make_checkout(folder: Path) -> Path:
    """A copy of the checkout, so that no command changes it; and beside it the short games."""
    checkout = folder / "checkout"
    for name in ("cleanrl", "docs", "requirements", "tests"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "mkdocs.yml", "pyproject.toml", "poetry.lock", "LICENSE"):
        shutil.copy(ROOT / name, checkout / name)
    (folder / "short_games").mkdir()
    (folder / "short_games" / "sitecustomize.py").write_text(SHORT_GAMES.format(root=str(checkout)))
    return checkout


def start_hubs(stack: ExitStack) -> dict[str, HubServer]:
    """The embedded Pong teacher, as torch, as flax and as Stable-Baselines3 would have saved it."""
    import torch
    from flax.serialization import to_bytes

    weights = read_weights(ROOT / TEACHER)
    names_in_zoo = {f"network.{i}": f"q_net.features_extractor.cnn.{i}" for i in (0, 2, 4)} | {
        "network.7": "q_net.features_extractor.linear.0",
        "network.9": "q_net.q_net.0",
    }

    def saved(state_dict: dict[str, Any]) -> bytes:
        content = io.BytesIO()
        torch.save({name: torch.tensor(array) for name, array in state_dict.items()}, content)
        return content.getvalue()

    zoo = io.BytesIO()
    with zipfile.ZipFile(zoo, "w") as archive:
        parts = {name: name.rpartition(".") for name in weights}
        policy = {f"{names_in_zoo[parts[name][0]]}.{parts[name][2]}": weights[name] for name in weights}
        archive.writestr("policy.pth", saved(policy))
    contents = {"torch": saved(weights), "flax": to_bytes(unflatten(to_flax(weights))), "sb3": zoo.getvalue()}
    files = ["dqn_atari.cleanrl_model", "dqn_atari_jax.cleanrl_model"]
    files_of_zoo = [f"{kind}-PongNoFrameskip-v4.zip" for kind in ("dqn", "ppo")]
    return {
        kind: stack.enter_context(HubServer(content, files=files_of_zoo if kind == "sb3" else files))
        for kind, content in contents.items()
    }


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


# --------------------------------------------------------------------------------------------------- rules


class Rule(NamedTuple):
    """How a kind of command is tried.

    `check` asserts what can be known without running it. `run` runs it in a place; None where that is not
    done, and `why_not` says why.
    """

    pattern: str
    check: Callable[[list[str]], Any]
    run: Callable[[list[str], Place], Any] | None
    why_not: str = ""


def anything(words: list[str]) -> None:
    """Nothing can be known without running it."""


def as_it_is(words: list[str], place: Place) -> None:
    place.run(*words)


def read_options(args_type: type, options: Sequence[str]) -> Any:
    """As the program itself reads its command line."""
    with READING, mock.patch.object(sys, "argv", ["program", *options]):
        return parse(args_type)


def run_ruff(words: list[str], place: Place) -> None:
    place.run(*words, folder=place.checkout)  # it follows no links


def check_pip(words: list[str]) -> None:
    options = words[2:]
    assert options[::2] == ["-r"] * (len(options) // 2), "install from the pinned files"
    for file in options[1::2]:
        assert (ROOT / file).is_file()


def check_poetry(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for option, value in zip(words[2::2], words[3::2], strict=True):
        assert option == "-E"
        assert set(value.split()) <= extras.keys()


def tiny_training(words: Sequence[str]) -> list[str]:
    """The options to put after those of a training script."""
    options = [*TINY, *TINY_TEACHER] if "qdagger" in words[1] else list(TINY)
    if "--teacher-model-path" in words or "quick" in words:  # which preset has an embedded teacher
        options += ["--teacher-model-path", TEACHER]
    return options


def tiny_options(words: Sequence[str]) -> list[str]:
    """A training script's options, and those to put after them."""
    return [*words[2:], "--env-id", GAME, *tiny_training(words)]


def read_args(words: Sequence[str], options: list[str]) -> Any:
    script = SCRIPTS[Path(words[1]).name]
    with READING, mock.patch.object(sys, "argv", ["script.py", *options]):
        return parse_arguments(script.Args, getattr(script, "PRESETS", None))


def check_script(words: list[str]) -> None:
    args = read_args(words, words[2:])
    check_arguments(args)
    teacher = getattr(args, "teacher_model_path", None)
    if teacher and "cleanrl" in teacher.parts:
        assert (ROOT / teacher).is_file()


def run_script(words: list[str], place: Place) -> None:
    options = tiny_options(words)
    args = read_args(words, options)
    needs_hub = "qdagger" in words[1] and not args.teacher_model_path
    hub = "torch"
    if needs_hub:
        repo = args.teacher_policy_hf_repo or f"cleanrl/{args.env_id}-{args.teacher_model_exp_name}-seed1"
        hub = "sb3" if repo.startswith("sb3/") else "flax" if "jax" in words[1] else "torch"
    replay = getattr(args, "teacher_replay_path", None)
    if replay and not (place.folder / replay).exists():
        [made] = [source.folder / replay for source in place.sources if (source.folder / replay).is_dir()]
        (place.folder / replay).symlink_to(made)
    runs_before = set(place.folder.glob("runs/*"))
    output = place.run(*words[:2], *options, hub=hub)
    [run_folder] = set(place.folder.glob("runs/*")) - runs_before
    assert f"run: runs/{run_folder.name}" in output
    assert "mean return" in output
    assert list(run_folder.glob("events.out.tfevents.*"))
    assert (run_folder / f"{args.exp_name}.cleanrl_model").exists() == args.save_model
    assert not (run_folder / "checkpoints").exists()  # it has finished
    if needs_hub:
        requested = {path for _, path, _ in place.hubs[hub].requests}
        published = re.fullmatch(r"cleanrl/.*NoFrameskip-v4-(.+)-seed\d+", repo)
        usual = f"{published[1] if published else args.teacher_model_exp_name}.cleanrl_model"
        file = f"{repo.partition('/')[2]}.zip" if hub == "sb3" else usual
        assert f"/{repo}/resolve/main/{args.teacher_hf_file or file}" in requested
    if getattr(args, "save_replay", None):
        assert (place.folder / args.save_replay / "manifest.json").exists()


def training_commands(words: list[str]) -> dict[int, list[str]]:
    """Of a benchmark: which of its words are training commands, and their words."""
    found, is_command = {}, False
    for index, word in enumerate(words):
        if word.startswith("--"):
            is_command = word == "--command"
        elif is_command:
            [training] = split(word)
            found[index] = list(training)
    return found


def check_many_runs(words: list[str]) -> None:
    read_options(many_runs.Args, words[3:])
    commands = training_commands(words)
    assert commands
    for training in commands.values():
        check_script(training)


def run_many_runs(words: list[str], place: Place) -> None:
    tiny = list(words)
    for index, training in training_commands(words).items():
        tiny[index] = shlex.join([*training, *tiny_training(training)])
    where = ["--ray-address", "local"] if "--ray-address" in words else []
    place.run(*tiny, "--env-ids", GAME, "--num-seeds", "1", *where)
    assert list(place.folder.glob("runs/*/*.cleanrl_model"))


def check_tuning(words: list[str]) -> None:
    args = read_options(tune.Args, words[3:])
    [training] = split(args.command)
    values = [
        (name, text.partition("=")[2])
        for name, text in zip(parse_space(args.search), args.search, strict=True)
    ]
    options = [word for name, text in values for word in (f"--{name}", re.split("[:,]", text)[0])]
    check_script([*training, *options])


def run_tuning(words: list[str], place: Place) -> None:
    ((index, training),) = training_commands(words).items()
    words[index] = shlex.join([*training, *tiny_training(training)])
    place.run(*words, "--env-id", GAME, "--trials", "1", "--workers", "1")
    assert list(place.folder.glob("runs/tune/*.png"))


def run_report(words: list[str], place: Place) -> None:
    """Of the documented runs, or where these are a user's own, of those in docs/results."""
    if not (place.folder / "runs").exists():
        (place.folder / "runs").symlink_to(place.checkout / "docs" / "results")
    place.run(*words, "--bootstrap-samples", "50")
    output = words[words.index("--output") + 1] if "--output" in words else "report"
    assert (place.folder / output / "report.html").stat().st_size


def check_enjoy(words: list[str]) -> None:
    read_options(enjoy.Args, words[3:] if words[1] == "-m" else words[2:])


def run_enjoy(words: list[str], place: Place) -> None:
    if "--json" in words:
        place.run(*words, "--games", "2")
        result = json.loads((place.folder / words[words.index("--json") + 1]).read_text())
        assert len(result["returns"]) == 2
    else:
        place.run(*words, "--games", "1", "--video-folder", "played")
        assert list(place.folder.glob("played/*.mp4"))


def run_tensorboard(words: list[str], place: Place) -> None:
    [option, log_folder] = words[1:]
    assert option == "--logdir"
    top = place.folder / log_folder
    runs = {path.parent.relative_to(top).as_posix() for path in top.rglob("events.out.tfevents.*")}
    port = free_port()
    place.serve(
        [*words, "--host", "127.0.0.1", "--port", str(port)],
        port, "data/runs", lambda answer: set(json.loads(answer)) == runs,
    )  # fmt: skip


def run_mkdocs_build(words: list[str], place: Place) -> None:
    place.run(*words)
    pages = list((place.folder / "site").rglob("*.html"))
    assert len(pages) > len(PAGES)
    for path in [*pages, *(place.folder / "site").rglob("*.css")]:
        assert not OTHER_HOST.search(path.read_text("utf-8")), f"{path} loads something from another host"


def run_mkdocs_serve(words: list[str], place: Place) -> None:
    port = free_port()
    title = b"<title>QDagger on Atari</title>"
    place.serve([*words, "--dev-addr", f"127.0.0.1:{port}"], port, "", lambda answer: title in answer)


def check_publish(words: list[str]) -> None:
    tyro.cli(publish.Args, args=words[3:])


def check_benchmark(words: list[str]) -> None:
    """Reads its options without calling its main."""
    module = importlib.import_module(Path(words[1]).stem)

    @functools.wraps(module.main)
    def main(*args: Any, **keywords: Any) -> None:
        pass

    tyro.cli(main, args=words[2:])


def run_benchmark(words: list[str], place: Place) -> None:
    place.run(*words, *TINY_BENCHMARKS[Path(words[1]).stem])


def run_kill_storm(words: list[str], place: Place) -> None:
    output = place.run(*words, "--kills", "1", "--seed", "0")
    assert output.endswith("verdict: nothing was lost\n")


def check_pytest(words: list[str]) -> None:
    options = iter(words[3:])
    for word in options:
        if word == "-m":
            assert next(options) in ("slow", "not slow")
        else:
            assert word.startswith("-") or (ROOT / word).exists()


RULES = [
    Rule(r"python -m venv \S+", anything, lambda words, place: place.run(*words, "--without-pip")),
    Rule(r"pip install (-r \S+ ?)+", check_pip, None, "an installation is what .ci/run makes"),
    Rule(r"poetry install( -E .+)*", check_poetry, None, "an installation is what .ci/run makes"),
    Rule(r"python -m pytest\b.*", check_pytest, None, "it is these tests"),
    Rule(r"python (-m cleanrl\.enjoy|cleanrl/enjoy\.py)\b.*", check_enjoy, run_enjoy),
    Rule(r"python cleanrl/\w+\.py\b.*", check_script, run_script),
    Rule(r"python -m cleanrl\.utils\.benchmark\b.*", check_many_runs, run_many_runs),
    Rule(r"python -m cleanrl\.utils\.tune\b.*", check_tuning, run_tuning),
    Rule(r"python -m cleanrl\.utils\.report\b.*", anything, run_report),
    Rule(r"sbatch docs/examples/slurm\.sh", anything, None, "tests/test_slurm.py tries it"),
    Rule(r"python -m cleanrl\.utils\.hub\.publish\b.*", check_publish, None, "it needs a finished run"),
    Rule(r"tensorboard .*", anything, run_tensorboard),
    Rule(r"mkdocs serve", anything, run_mkdocs_serve),
    Rule(r"mkdocs build --strict", anything, run_mkdocs_build),
    Rule(r"ruff (check|format --check)", anything, run_ruff),
    Rule(r"python requirements/export\.py( --check)?", anything, as_it_is),
    Rule(r"python docs/\w+\.py", anything, as_it_is),
    Rule(r"python tests/benchmarks/(speed|scaling)\.py\b.*", check_benchmark, None, "it takes minutes"),
    Rule(r"python tests/benchmarks/(checkpoint_cost|long_run|replay_memory)\.py.*", anything, run_benchmark),
    Rule(r"python tests/kill_storm\.py\b.*", anything, run_kill_storm),
    Rule(r"python tests/gpu_check\.py\b.*", anything, None, "tests/test_gpu_check.py tries it"),
    Rule(r"python tests/benchmarks/jax_for_h100\.py", anything, None, "it needs 3 GB of CUDA packages"),
]


def rule_for(words: tuple[str, ...]) -> Rule:
    """Raises LookupError for a command that nothing here knows how to try."""
    for rule in RULES:
        if re.fullmatch(rule.pattern, shlex.join(words)):
            return rule
    raise LookupError(shlex.join(words))


def what_is_tried(words: tuple[str, ...]) -> tuple[str, ...]:
    """The same for two commands if trying one of them is enough: for runs that differ in numbers or names."""
    if words[0] == "python" and Path(words[1]).name in SCRIPTS:
        with suppress(SystemExit):  # an option that it does not have: the check says so
            options = vars(read_args(words, tiny_options(words))) | {"exp_name": ""}
            is_number = {name: type(value) in (int, float) for name, value in options.items()}
            return (words[1], *(f"{name} {options[name]}" for name in options if not is_number[name]))
    return words


def to_run(blocks: list[Block]) -> list[Block]:
    """What remains to be run if everything is tried once; first the blocks that others need."""
    left, tried = [], set()
    for block in blocks:
        commands = []
        for words in block.commands if block.mark is None else ():
            with suppress(LookupError):  # another test says so
                if rule_for(words).run and what_is_tried(words) not in tried:
                    tried.add(what_is_tried(words))
                    commands.append(words)
        if commands:
            left.append(replace(block, commands=tuple(commands)))
    return sorted(left, key=lambda block: not block.saves_replay)


def run_block(block: Block, place: Place) -> None:
    for words in block.commands:
        rule_for(words).run(list(words), place)
