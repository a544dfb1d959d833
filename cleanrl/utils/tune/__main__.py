"""Searches for good hyperparameters of a training script, with Optuna.

    python -m cleanrl.utils.tune --env-id PongNoFrameskip-v4 --study pong --trials 20 --workers 2 \\
        --command "python cleanrl/qdagger_dqn_atari_impalacnn.py --preset quick" \\
        --search temperature=0.02:1:log distill-weight=0.3:10:log learning-rate=1e-4:2e-3:log

Each trial is a run, scored by its final evaluation and pruned by its offline ones. Started again, the search
resumes, including its interrupted runs. See docs/tuning.md.
"""

import importlib.util
import shlex
import sys
from dataclasses import dataclass
from typing import Annotated

from cleanrl.utils.benchmark.plan import option_value, split_command
from cleanrl.utils.bounds import (
    NameRule,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Seed,
    printable,
    shown,
)
from cleanrl.utils.command_line import check_bounds, parse
from cleanrl.utils.games.atari import check_game
from cleanrl.utils.shell import prepare_command


@dataclass
class Args:
    # search
    command: str
    """the training script with the options that stay the same, in quotes"""
    env_id: str
    """the game, as {Game}NoFrameskip-v4"""
    search: tuple[str, ...]
    """what varies, as temperature=0.02:1:log (a range), n-step=1:5 (of whole numbers), td-loss=mse,huber"""
    study: Annotated[str, NameRule(90)] = "study"
    """name of the search, which is kept in runs/tune/{study}.db"""
    trials: PositiveInt = 20
    """runs in all, including pruned ones and those of earlier starts"""
    workers: PositiveInt = 1
    """runs at a time"""
    warm_up_trials: NonNegativeInt = 5
    """trials that must finish before others are pruned"""
    seed: Seed = 1
    """seed of every run, and of the search"""
    grace_period: NonNegativeFloat = 120.0
    """seconds a stopped run has for its last checkpoint before it is killed"""


def main(args: Args) -> int:
    """Searches, prints the table and draws the picture; returns the exit status."""
    check_bounds(args)
    check_game(args.env_id)
    for package in ("optuna", "matplotlib"):
        if not importlib.util.find_spec(package):
            raise SystemExit(
                f"error: a search needs {package}: pip install -r requirements/requirements-tune.txt"
            )
    command, _ = split_command(args.command)
    if option_value(command, "exp_name") is not None:
        raise SystemExit(f"error: --command {shown(args.command)}: the search sets --exp-name; leave it out")

    from cleanrl.utils.tune.results import draw, table
    from cleanrl.utils.tune.space import parse_space
    from cleanrl.utils.tune.trials import RECORDS, Search, locked, open_study, run_trials, using

    space = parse_space(args.search)
    for name in space.keys() & {"env-id", "exp-name", "resume", "seed"}:
        raise SystemExit(f"error: --search {name}: the search sets --{name}; leave it out")
    same = {"command": list(command), "env_id": args.env_id, "seed": args.seed, "search": sorted(args.search)}
    path = RECORDS / f"{args.study}.db"
    with locked(path), using(path):
        study = open_study(path, args.study, args.seed, args.warm_up_trials)
        search = Search(study, command, args.env_id, args.seed, space)
        for name, value in same.items():
            before = study.user_attrs.get(name, value)
            if search.num_trials() and before != value:  # else only failed runs, as of a mistyped option
                shown_before = shown(shlex.join(map(str, before)) if isinstance(before, list) else before)
                raise SystemExit(
                    f"error: the study {args.study} was started with another {name}, {shown_before}; give"
                    " this one its own --study"
                )
            study.set_user_attr(name, value)
        status = run_trials(search, args.trials, args.workers, args.grace_period)
        print("\n".join(map(printable, table(study))))
        draw(study, space, RECORDS / f"{args.study}.png")
        print(f"picture: {RECORDS / args.study}.png")
        return status


if __name__ == "__main__":
    prepare_command()
    sys.exit(main(parse(Args)))
