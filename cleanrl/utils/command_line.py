"""Reads a training script's command line, and refuses what makes no sense before any work is done."""

import dataclasses
import math
import sys
import typing
from pathlib import Path
from typing import Any, TypeVar

import tyro

from cleanrl.utils.run.checkpoint import newest_unfinished_run, saved_options

LEAST = {
    "seed": 0,
    "num_envs": 1,
    "total_timesteps": 1,
    "buffer_size": 1,
    "n_step": 1,
    "target_network_frequency": 1,
    "batch_size": 1,
    "learning_starts": 0,
    "train_frequency": 1,
    "teacher_eval_episodes": 1,
    "teacher_steps": 1,
    "offline_steps": 0,
    "offline_eval_frequency": 1,
    "eval_episodes": 1,
    "distill_steps": 0,
    "exploration_steps": 0,
    "dense_width": 1,
}
MOST = {"seed": 2**32 - 1}  # what every generator takes
FRACTIONS = ("repeat_action_probability", "gamma", "tau", "start_e", "end_e", "exploration_fraction")
POSITIVE = ("learning_rate", "final_learning_rate", "adam_epsilon", "temperature")
NOT_NEGATIVE = ("distill_weight", "checkpoint_interval")

Args = TypeVar("Args")


def parse_arguments(args_type: type[Args]) -> Args:
    """The command line as an `args_type`; if it names a run to resume, that run's options are the defaults.

    `--resume auto` becomes the newest unfinished run of the experiment and seed, or none if there is none.

    Raises:
        SystemExit: with one line, if that run has no checkpoint that can be used.
    """
    args = tyro.cli(args_type)
    if args.resume is None:
        return args
    run_folder = args.resume
    if args.resume == "auto":
        run_folder = newest_unfinished_run(args.env_id, args.exp_name, args.seed)
        if run_folder is None:
            print("--resume auto: no unfinished run; this is a new one")
            return dataclasses.replace(args, resume=None)
    options = saved_options(Path(run_folder))
    defaults = {}
    for field in dataclasses.fields(args_type):
        if field.name in options:
            value = options[field.name]
            is_path = Path in typing.get_args(field.type) and value is not None
            defaults[field.name] = Path(value) if is_path else value
    args = tyro.cli(args_type, default=args_type(**defaults))
    return dataclasses.replace(args, resume=str(run_folder))


def check_arguments(args: Any) -> None:
    """Checks a script's `Args`; an option that the script does not have, or that is None, is not looked at.

    Raises:
        SystemExit: with one line that names the option, its value and what it must be.
    """
    options = {name: value for name, value in vars(args).items() if value is not None}
    for name, value in options.items():
        if name in LEAST and value < LEAST[name]:
            refuse(name, value, f"must be at least {LEAST[name]}")
        if name in MOST and value > MOST[name]:
            refuse(name, value, f"must be at most {MOST[name]}")
        if name in FRACTIONS and not 0 <= value <= 1:
            refuse(name, value, "must lie between 0 and 1")
        if name in NOT_NEGATIVE and not 0 <= value < math.inf:
            refuse(name, value, "must be a number of at least 0")
        if name in POSITIVE and not 0 < value < math.inf:
            refuse(name, value, "must be a positive number")
    if args.batch_size > args.buffer_size:
        refuse("batch_size", args.batch_size, f"must not exceed --buffer-size {args.buffer_size}")
    if args.buffer_device == "cuda" and not args.cuda:
        refuse("buffer_device", "cuda", "contradicts --no-cuda")
    if options.get("upload_model") and not args.save_model:
        raise SystemExit("error: --upload-model contradicts --no-save-model")
    fewest_steps = options.get("n_step", 1) * args.num_envs
    if options.get("teacher_steps", fewest_steps) < fewest_steps:
        refuse(
            "teacher_steps", args.teacher_steps, f"must be at least --n-step times --num-envs, {fewest_steps}"
        )
    if args.learning_starts >= args.total_timesteps:
        warn(
            f"--learning-starts {args.learning_starts} is not below --total-timesteps "
            f"{args.total_timesteps}: nothing will be learned online"
        )


def refuse(option: str, value: object, demand: str) -> None:
    raise SystemExit(f"error: --{option.replace('_', '-')} {value} {demand}")


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
