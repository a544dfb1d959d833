"""Finds runs and reads their results from the event files, with TensorBoard's own record reader."""

import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.errors import DataLossError, OutOfRangeError
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New
from tensorboard.util.tensor_util import make_ndarray
from tqdm import tqdm

from cleanrl.utils.run.charts import (
    EPISODIC_RETURN,
    EPSILON,
    EVALUATION_RETURN,
    OFFLINE_RETURN,
    TEACHER_RETURN,
)
from cleanrl.utils.run.folders import event_files
from cleanrl.utils.run.options import MAY_CHANGE

RUN_NAME = re.compile(r"(?P<env_id>.+?)__(?P<exp_name>.+)__(?P<seed>\d+)__(?P<start_time>\d+)")
TAGS = (TEACHER_RETURN, OFFLINE_RETURN, EPISODIC_RETURN, EPSILON, EVALUATION_RETURN)
STEP_TAGS = (OFFLINE_RETURN, EPISODIC_RETURN, EPSILON)  # plotted over steps; ε up to a run's very last
OPTIONS = "hyperparameters/text_summary"
OPTION_ROW = re.compile(r"^\|(\w+)\|(.*)\|$", re.MULTILINE)
HARMLESS = (MAY_CHANGE - {"total_timesteps"}) | {"seed"}  # may differ between seeds of an experiment


class UnusableError(Exception):
    """A run cannot be used; the message says why."""


class Curve(NamedTuple):
    steps: np.ndarray
    """int64 (n,), ascending"""
    values: np.ndarray
    """float64 (n,)"""


NO_POINTS = Curve(np.empty(0, np.int64), np.empty(0))


@dataclass
class RunResults:
    """A run as its event files describe it."""

    folder: Path
    env_id: str
    exp_name: str
    seed: int
    start_time: int
    options: dict[str, str]
    is_qdagger: bool
    offline_steps: int
    """gradient steps before the first online point of a curve"""
    teacher_steps: int
    """environment steps the teacher played in this run; 0 if it learned from a saved replay"""
    teacher_games: int
    """games over which the teacher's return was measured; 0 without a teacher"""
    curves: dict[str, Curve]
    """by tag, all of TAGS, over the plotted step"""
    unfinished: str | None
    """why the run counts as unfinished, if it does"""
    faults: list[str]
    """of its event files, where it can still be used"""

    @property
    def game(self) -> str:
        return self.env_id.removesuffix("NoFrameskip-v4")

    @property
    def last_step(self) -> int:
        """The last plotted step of its curves."""
        steps = [self.curves[tag].steps[-1] for tag in STEP_TAGS if self.has(tag)]
        return int(max(steps, default=0))

    @property
    def online_steps(self) -> int:
        """Environment steps of the online phase."""
        return max(self.last_step - self.offline_steps, 0)

    def has(self, tag: str) -> bool:
        return len(self.curves[tag].steps) > 0


@dataclass
class Found:
    """The runs under some folders."""

    runs: list[RunResults] = field(default_factory=list)
    """those to use, one for each game, experiment and seed, in this order"""
    left_out: list[tuple[Path, str]] = field(default_factory=list)
    """the other folders, and why"""
    notes: list[str] = field(default_factory=list)
    """what readers must know about the runs used"""


def find_runs(paths: Iterable[Path], include_unfinished: bool) -> Found:
    """Reads all runs in and under some folders.

    Of several runs of one game, experiment and seed, the newest finished one counts; if none is finished and
    with `include_unfinished`, the newest.

    Raises:
        SystemExit: with a one-line error if a path is not a folder.
    """
    found, readable = Found(), defaultdict(list)
    for folder in tqdm(find_run_folders(paths), desc="reading", unit=" runs", leave=False, disable=None):
        try:
            run = read_run(folder, include_unfinished)
        except UnusableError as fault:
            found.left_out.append((folder, str(fault)))
        else:
            readable[run.env_id, run.exp_name, run.seed].append(run)
    for _, runs in sorted(readable.items()):
        runs.sort(key=lambda run: (run.unfinished is None, run.start_time), reverse=True)
        found.runs.append(runs[0])
        found.left_out += [
            (run.folder, f"same game, experiment and seed as {runs[0].folder}, which is used")
            for run in runs[1:]
        ]
    found.left_out.sort()
    for run in found.runs:
        found.notes += [f"{run.folder}: {fault}" for fault in [run.unfinished, *run.faults] if fault]
    found.notes += differing_options(found.runs)
    return found


def find_run_folders(paths: Iterable[Path]) -> list[Path]:
    """The folders in and under `paths` that are named like a run or contain event files.

    Raises:
        SystemExit: with a one-line error if a path is not a folder.
    """
    folders: dict[Path, Path] = {}  # by real path, as there may be two ways to one folder
    for path in paths:
        if not path.is_dir():
            raise SystemExit(f"error: {path} is not a folder; name a run's, or one above it")
        seen = set()
        for name, subfolders, _ in os.walk(path, followlinks=True):
            folder, real_path = Path(name), Path(name).resolve()
            is_run = RUN_NAME.fullmatch(real_path.name) is not None
            if is_run or event_files(folder):
                folders.setdefault(real_path, folder)
            if is_run or real_path in seen:  # links may form a circle
                subfolders.clear()
            seen.add(real_path)
    return sorted(folders.values())


def read_run(folder: Path, include_unfinished: bool) -> RunResults:
    """Reads a run's event files.

    Raises:
        UnusableError: they are missing, empty or damaged; or the run is unfinished and must be finished.
    """
    name = RUN_NAME.fullmatch(folder.resolve().name)
    if not name:
        raise UnusableError("not named like a run, {env_id}__{exp_name}__{seed}__{unix time}")
    unfinished = None
    if (folder / "checkpoints").exists():
        unfinished = "unfinished: it still has checkpoints"
        if not include_unfinished:
            raise UnusableError(unfinished)
    paths, faults = event_files(folder), []
    options, curves = read_curves(paths, faults)
    if not options and not any(len(curve.steps) for curve in curves.values()):
        raise UnusableError("empty: " + ("nothing in its event files" if paths else "no event files"))
    if not options:
        raise UnusableError(f"its event files lack the run's options ({OPTIONS})")
    is_qdagger = "offline_steps" in options
    try:
        offline_steps = int(options["offline_steps"]) if is_qdagger else 0
        teacher_steps = teacher_steps_played(options) if is_qdagger else 0
        teacher_games = int(options.get("teacher_eval_episodes", 0))
        games_to_play = int(options.get("eval_episodes", 1))
    except (KeyError, ValueError, ZeroDivisionError) as fault:
        raise UnusableError(f"damaged: its options are invalid ({fault})") from None
    games_played = len(curves[EVALUATION_RETURN].steps)
    if games_played < games_to_play and not unfinished:
        unfinished = f"unfinished: it has {games_played} of the {games_to_play} games of its final evaluation"
        if not include_unfinished:
            raise UnusableError(unfinished)
    return RunResults(
        folder=folder,
        env_id=name["env_id"],
        exp_name=name["exp_name"],
        seed=int(name["seed"]),
        start_time=int(name["start_time"]),
        options=options,
        is_qdagger=is_qdagger,
        offline_steps=offline_steps,
        teacher_steps=teacher_steps,
        teacher_games=teacher_games,
        curves=curves,
        unfinished=unfinished,
        faults=faults,
    )


def teacher_steps_played(options: dict[str, str]) -> int:
    if options.get("teacher_replay_path", "None") != "None":
        return 0
    num_envs = int(options.get("num_envs", 1))
    return math.ceil(int(options["teacher_steps"]) / num_envs) * num_envs


def read_curves(paths: Iterable[Path], faults: list[str]) -> tuple[dict[str, str], dict[str, Curve]]:
    """A run's options and curves, from its event files; a resumed run has several.

    Args:
        paths: the files.
        faults: gets a line for each truncated file.

    Raises:
        UnusableError: a file cannot be read or is damaged.
    """
    options: dict[str, str] = {}
    points: dict[str, list[tuple[int, float]]] = {tag: [] for tag in TAGS}
    for path in paths:
        for event in read_events(path, faults):
            for value in event.summary.value:
                if value.tag in points:
                    is_simple = value.HasField("simple_value")  # unlike those of TensorFlow's newer writers
                    try:
                        number = value.simple_value if is_simple else float(make_ndarray(value.tensor).item())
                    except (TypeError, ValueError):
                        raise UnusableError(
                            f"damaged: {value.tag} is no number at step {event.step}"
                        ) from None
                    if not math.isfinite(number):
                        raise UnusableError(f"damaged: {value.tag} is {number} at step {event.step}")
                    points[value.tag].append((event.step, number))
                elif value.tag == OPTIONS:
                    for text in value.tensor.string_val:
                        rows = OPTION_ROW.findall(text.decode(errors="replace"))
                        options |= dict(rows[1:])  # below the table's header
    curves = {}
    for tag, of_tag in points.items():
        of_tag.sort(key=lambda point: point[0])
        steps, values = zip(*of_tag, strict=True) if of_tag else NO_POINTS
        curves[tag] = Curve(np.array(steps, np.int64), np.array(values, np.float64))
    return options, curves


def read_events(path: Path, faults: list[str]) -> Iterator[Event]:
    """The events of a file. One that ends within a record, as after a power failure, is read up to there.

    TensorBoard itself silently stops at a damaged record and so hides everything after it.
    """
    try:
        reader = PyRecordReader_New(str(path))
        while True:
            reader.GetNext()
            yield Event.FromString(reader.record())
    except OutOfRangeError:
        return
    except DataLossError as error:
        if "truncated" not in error.message:
            raise UnusableError(f"damaged: a checksum in {path.name} is wrong") from None
        faults.append(f"{path.name} is truncated; its last record is lost")
    except (DecodeError, OverflowError, MemoryError):
        raise UnusableError(f"damaged: a record in {path.name} is not an event") from None
    except OSError as error:
        raise UnusableError(f"{path.name} cannot be read ({error.strerror})") from None


def differing_options(runs: Iterable[RunResults]) -> list[str]:
    """A line for each experiment and game whose runs were started with different options."""
    groups = defaultdict(list)
    for run in runs:
        groups[run.exp_name, run.game].append(run.options)
    notes = []
    for (experiment, game), options in groups.items():
        differing = []
        for name in sorted(set.intersection(*map(set, options)) - HARMLESS):
            values = sorted({of_run[name] for of_run in options})
            if len(values) > 1:
                differing.append(f"--{name.replace('_', '-')} ({', '.join(values)})")
        if differing:
            notes.append(f"the runs of {experiment} on {game} differ in {', '.join(differing)}")
    return notes
