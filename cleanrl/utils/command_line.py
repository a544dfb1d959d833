"""Reads a program's command line, explains it, and refuses what makes no sense before any work is done."""

import dataclasses
import errno
import inspect
import re
import shlex
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn, TypeVar

import tyro

from cleanrl.utils.bounds import Bounds, NameRule, has_kind, shown
from cleanrl.utils.games.atari import check_game
from cleanrl.utils.run.checkpoint import saved_options
from cleanrl.utils.run.folders import newest_unfinished_run, unfinished_runs

Args = TypeVar("Args")


class Option(NamedTuple):
    """What the source of a dataclass says of a field: the comment that heads it, and its docstring."""

    group: str
    help: str


def describe_options(args_type: type) -> dict[str, Option]:
    """The options of a dataclass by name, in order."""
    found: dict[str, Option] = {}
    for base in reversed(args_type.__mro__[:-1]):
        group, name = "options", ""
        for line in inspect.getsource(base).splitlines():
            if heading := re.fullmatch(r"    # (.+)", line):
                group = heading[1]
            elif field := re.match(r"    (\w+): ", line):
                name = field[1]
                found.setdefault(name, Option(group, ""))
            elif text := re.fullmatch(r'    """(.+)"""', line):
                found[name] = Option(group, text[1])
    return {field.name: found[field.name] for field in dataclasses.fields(args_type)}


def parse(args_type: type[Args], default: Args | None = None, words: Sequence[str] | None = None) -> Args:
    """Words, or the command line, as an `args_type`.

    --help shows its module's docstring and the options in groups.
    """
    types = typing.get_type_hints(args_type, include_extras=True)
    options = describe_options(args_type)
    groups: dict[str, list[tuple]] = {}
    for field in dataclasses.fields(args_type):
        value = getattr(default, field.name) if default else field.default
        settings = tyro.conf.arg(
            help=options[field.name].help,
            help_behavior_hint="" if value in (None, ()) else None,  # the text says what it means, not "None"
        )
        typed_field = field.name, Annotated[types[field.name], settings], dataclasses.field(default=value)
        groups.setdefault(options[field.name].group, []).append(typed_field)
    members = []
    for title, fields in groups.items():
        group = dataclasses.make_dataclass(title, fields)
        needs_a_value = any(field[2].default is dataclasses.MISSING for field in fields)
        name = title.replace(" ", "_")
        members.append(
            (name, group) if needs_a_value else (name, group, dataclasses.field(default_factory=group))
        )
    grouped_type = tyro.conf.OmitArgPrefixes[dataclasses.make_dataclass("Options", members)]
    spec = sys.modules["__main__"].__spec__  # None if it was started as a file
    package = spec.name.removesuffix(".__main__") if spec else ""
    program = f"python -m {package}" if package.startswith("cleanrl.") else None
    description = sys.modules[args_type.__module__].__doc__
    grouped = tyro.cli(grouped_type, prog=program, args=words, description=description)
    values = {name: value for group in vars(grouped).values() for name, value in vars(group).items()}
    return args_type(**values)


def read_arguments(args_type: type[Args], presets: Mapping[str, str] | None = None) -> Args:
    """A training script's options, once they and the services they ask for have been checked.

    With --upload-model, `hf_entity` becomes the token's user, unless it is given.

    Args:
        args_type: the script's options.
        presets: the options that each --preset stands for, as on a command line.

    Raises:
        SystemExit: with a one-line error, if a check fails.
    """
    args = check_arguments(parse_arguments(args_type, presets))
    # Imported only where needed: it takes half a second.
    if args.track:
        from cleanrl.utils.run.tracking import check_tracking

        check_tracking(args.wandb_project_name)
    if args.upload_model:
        from cleanrl.utils.hub.card import repo_name
        from cleanrl.utils.hub.publish import check_upload

        args.hf_entity, _, _ = check_upload(repo_name(args), args.hf_entity).partition("/")
    return args


def parse_arguments(args_type: type[Args], presets: Mapping[str, str] | None = None) -> Args:
    """A training script's options: those on the command line override its preset's, or the resumed run's.

    `--resume auto` becomes the newest unfinished run of the experiment and seed, or none if there is none.

    Raises:
        SystemExit: with a one-line error, if that run has no usable checkpoint.
    """
    args = parse(args_type)
    if preset := getattr(args, "preset", None):
        args = parse(args_type, words=[*shlex.split(presets[preset]), *sys.argv[1:]])
    if args.resume is None:
        return args
    run_folder = args.resume
    if args.resume == "auto":
        run_folder = newest_unfinished_run(args.env_id, args.exp_name, args.seed)
        if run_folder is None:
            name = f"{args.env_id}, --exp-name {args.exp_name}, --seed {args.seed}"
            others = ", ".join(shown(run) for run in unfinished_runs()[-5:])
            print(
                f"--resume auto: no unfinished run of {name}; starting a new one"
                + (f" (unfinished: {others})" if others else "")
            )
            return dataclasses.replace(args, resume=None)
    options = saved_options(Path(run_folder))
    defaults = {}
    for name, kind in typing.get_type_hints(args_type, include_extras=True).items():
        if name in options:
            value = options[name]
            if not has_kind(value, kind):
                raise SystemExit(
                    f"error: --resume {shown(run_folder)}: its checkpoint's {name} is {shown(value)}, which"
                    " is not a valid value; start again without --resume"
                )
            defaults[name] = Path(value) if Path in typing.get_args(kind) and value is not None else value
    args = parse(args_type, default=args_type(**defaults))
    return dataclasses.replace(args, resume=str(run_folder))


def check_bounds(args: Any) -> None:
    """Checks every option that has a value: texts and paths are one line, others within bounds.

    Raises:
        SystemExit: with a one-line error that names the option, its value and what it must be.
    """
    for name, kind in typing.get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, name)
        for part in (kind, *typing.get_args(kind)):  # the option's type, or one of an optional's
            for bounds in getattr(part, "__metadata__", ()):
                if isinstance(bounds, Bounds | NameRule) and value is not None and not bounds.admit(value):
                    refuse(name, value, f"must be {bounds.demand(value)}")
        for text in value if isinstance(value, list | tuple) else [value]:
            # It becomes part of lines, of TensorBoard's page and of a card.
            if isinstance(text, str | Path) and not str(text).isprintable():
                refuse(name, text, "must be one line of printable characters")
            if isinstance(text, Path) and is_too_long(text):
                refuse(name, text, "is longer than any path")


def is_too_long(path: Path) -> bool:
    try:
        path.stat()
    except OSError as error:
        return error.errno == errno.ENAMETOOLONG
    return False


def check_arguments(args: Args) -> Args:
    """Returns a training script's options if they make sense, each by itself and together.

    Raises:
        SystemExit: with a one-line error that names the option, its value and what it must be.
    """
    check_game(args.env_id)
    check_bounds(args)
    if args.tau == 0:
        refuse("tau", args.tau, "must be above 0, or the target network never changes")
    if getattr(args, "average_decay", 0) == 1:
        refuse("average_decay", args.average_decay, "must be below 1, or the average never changes")
    if args.batch_size > args.buffer_size:
        refuse("batch_size", args.batch_size, f"must not exceed --buffer-size {args.buffer_size}")
    if args.buffer_device == "cuda" and not args.cuda:
        refuse("buffer_device", "cuda", "contradicts --no-cuda")
    if args.upload_model and not args.save_model:
        raise SystemExit("error: --upload-model contradicts --no-save-model")
    fewest_steps = getattr(args, "n_step", 1) * args.num_envs
    if getattr(args, "teacher_steps", fewest_steps) < fewest_steps:
        refuse(
            "teacher_steps", args.teacher_steps, f"must be at least --n-step times --num-envs, {fewest_steps}"
        )
    for option in ("total_timesteps", "teacher_steps"):
        steps = getattr(args, option, 0)
        if steps % args.num_envs:
            rounded = steps + -steps % args.num_envs
            name = option.replace("_", "-")
            warn(f"--{name} {steps} is rounded up to {rounded}, a multiple of --num-envs {args.num_envs}")
    steps_before = max(args.learning_starts, fewest_steps - args.num_envs)
    first_step = steps_before + args.train_frequency - steps_before % args.train_frequency
    if first_step > args.total_timesteps:
        warn(
            f"nothing will be learned from the {args.total_timesteps} environment steps of --total-timesteps:"
            f" with --learning-starts {args.learning_starts} and --train-frequency {args.train_frequency} the"
            f" first gradient step would come at step {first_step}"
        )
    exploration_steps = args.exploration_fraction * args.total_timesteps
    if 0 < exploration_steps <= getattr(args, "offline_steps", 0) and args.exploration_steps is None:
        warn(
            f"the student plays with --end-e {args.end_e} from its first step on: --exploration-fraction"
            f" {args.exploration_fraction} of --total-timesteps {args.total_timesteps} is over within the"
            f" {args.offline_steps} steps of the offline phase; use --exploration-steps for more exploration"
        )
    return args


def refuse(option: str, value: object, demand: str) -> NoReturn:
    raise SystemExit(f"error: --{option.replace('_', '-')} {shown(value)} {demand}")


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
