"""Finds runs, and reads what is to be reported of them."""

import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from cleanrl.utils.bounds import shown
from cleanrl.utils.report.events import COUNT, OPTIONS, Curve, UnusableError, read_curves
from cleanrl.utils.run.charts import EPISODIC_RETURN, EPSILON, EVALUATION_RETURN, OFFLINE_RETURN
from cleanrl.utils.run.folders import event_files, is_finished, is_folder
from cleanrl.utils.run.options import MAY_CHANGE

RUN_NAME = re.compile(r"(?P<env_id>.+?)__(?P<exp_name>.+)__(?P<seed>\d+)__(?P<start_time>\d+)")
STEP_TAGS = (OFFLINE_RETURN, EPISODIC_RETURN, EPSILON)  # plotted over steps; ε up to a run's very last
MOST_GAME_BYTES = 100  # of its name
HARMLESS = (MAY_CHANGE - {"total_timesteps"}) | {"seed"}  # may differ between seeds of an experiment


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
        except Exception as fault:  # whatever is in its files must not cost the report of the others
            is_known = isinstance(fault, UnusableError)
            found.left_out.append((folder, str(fault) if is_known else f"cannot be read ({fault!r})"))
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
        if not is_folder(path):
            raise SystemExit(f"error: {shown(path)} is not a folder; name a run's folder or one above it")
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
    if not name[0].isprintable() or len(name["env_id"].encode()) > MOST_GAME_BYTES:
        raise UnusableError("its name has control characters, or its game's is too long to name a plot")
    unfinished = None
    if not is_finished(folder):
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
        offline_steps = count_of(options, "offline_steps") if is_qdagger else 0
        teacher_steps = teacher_steps_played(options) if is_qdagger else 0
        teacher_games = count_of(options, "teacher_eval_episodes", "0")
        games_to_play = count_of(options, "eval_episodes", "1")
    except (ValueError, ZeroDivisionError) as fault:
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


def count_of(options: dict[str, str], name: str, default: str = "missing") -> int:
    """Raises ValueError if it is none."""
    text = options.get(name, default)
    if not COUNT.admit(count := int(text)):
        raise ValueError(f"{name} is {shown(text)}")
    return count


def teacher_steps_played(options: dict[str, str]) -> int:
    if options.get("teacher_replay_path", "None") != "None":
        return 0
    num_envs = count_of(options, "num_envs", "1")
    return math.ceil(count_of(options, "teacher_steps") / num_envs) * num_envs


def differing_options(runs: Iterable[RunResults]) -> list[str]:
    """A line for each experiment and game whose runs were started with different options."""
    groups = defaultdict(list)
    for run in runs:
        groups[run.exp_name, run.game].append(run)
    notes = []
    for (experiment, game), of_group in groups.items():
        if len({run.is_qdagger for run in of_group}) > 1:
            notes.append(f"the runs of {experiment} on {game} are of different algorithms")
        differing = []
        for name in sorted(set.intersection(*(set(run.options) for run in of_group)) - HARMLESS):
            values = sorted({run.options[name] for run in of_group})
            if len(values) > 1:
                differing.append(f"--{name.replace('_', '-')} ({', '.join(map(shown, values))})")
        if differing:
            notes.append(f"the runs of {experiment} on {game} differ in {', '.join(differing)}")
    return notes
