"""The runs of a benchmark: each command for each game and seed."""

import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cleanrl.utils.bounds import NameRule, shown

RESERVED = ("env_id", "seed", "resume")  # options that the benchmark sets


@dataclass(frozen=True)
class Plan:
    """One run: a command for one game and one seed.

    command: the user's, in words, without the options that the benchmark sets.
    """

    env_id: str
    exp_name: str
    seed: int
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        """Also the start of its folder's name."""
        return f"{self.env_id}__{self.exp_name}__{self.seed}"

    @property
    def identity(self) -> list[str]:
        """The part of the command that determines the result: all but the Python that runs it."""
        return list(self.command[script_index(self.command) or 0 :])

    def words(self, resume: str | None) -> list[str]:
        """The command line that starts the run, or resumes it in the folder `resume`."""
        words = [sys.executable if word in ("python", "python3") else word for word in self.command[:1]]
        words += self.command[1:]
        words += ["--env-id", self.env_id, "--seed", str(self.seed)]
        if option_value(self.command, "exp_name") is None:
            words += ["--exp-name", self.exp_name]
        return words + (["--resume", resume] if resume else [])


def script_index(command: tuple[str, ...]) -> int | None:
    """The position of the script in a command: a file, or a module after -m."""
    for index, word in enumerate(command):
        if word.endswith(".py") or (index > 0 and command[index - 1] == "-m"):
            return index
    return None


def option_value(command: tuple[str, ...], name: str) -> str | None:
    """The value of an option in a command; "" if it has none there, None if the option is missing."""
    for index, word in enumerate(command):
        option, equals, value = word.partition("=")
        if option.startswith("--") and option[2:].replace("-", "_") == name:
            return value if equals else "".join(command[index + 1 : index + 2])
    return None


def split_command(command: str) -> tuple[tuple[str, ...], str]:
    """A command in words, and the name of its experiment: its --exp-name, else the script's name.

    Raises:
        SystemExit: with a one-line error if it cannot be run, or sets an option that the benchmark sets.
    """
    refusal = f"error: --command {shown(command)}:"
    try:
        words = tuple(shlex.split(command))
    except ValueError as error:
        raise SystemExit(f"{refusal} {error}") from None
    if not words:
        raise SystemExit('error: --command is empty; use, say, --command "python cleanrl/dqn_atari.py"')
    for name in RESERVED:
        if option_value(words, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise SystemExit(f"{refusal} the benchmark sets {option}; leave it out")
    if words[0] not in ("python", "python3") and not shutil.which(words[0]):
        raise SystemExit(f"{refusal} there is no program {shown(words[0])}")
    script, exp_name = script_index(words), option_value(words, "exp_name")
    if script is not None and words[script].endswith(".py") and not os.path.isfile(words[script]):
        raise SystemExit(f"{refusal} there is no {shown(words[script])} in {Path.cwd()}")
    if exp_name is None and script is not None:
        exp_name = Path(words[script]).stem if words[script].endswith(".py") else words[script].split(".")[-1]
    if not exp_name:
        raise SystemExit(f"{refusal} name the experiment with --exp-name NAME")
    if not (rule := NameRule()).admit(exp_name):
        raise SystemExit(f"{refusal} --exp-name must be {rule.demand(exp_name)}")
    return words, exp_name


def plan_runs(commands: Sequence[str], env_ids: Sequence[str], seeds: Sequence[int]) -> list[Plan]:
    """Every seed of every game and command; all of a seed's runs come before the next seed's.

    Raises:
        SystemExit: with a one-line error if a command cannot be run, or two commands are the same experiment.
    """
    split = [split_command(command) for command in commands]
    for exp_name, count in Counter(exp_name for _, exp_name in split).items():
        if count > 1:
            raise SystemExit(
                f"error: --command has the experiment {exp_name} {count} times; give each an --exp-name"
            )
    return [
        Plan(env_id, exp_name, seed, words)
        for seed in seeds
        for env_id in env_ids
        for words, exp_name in split
    ]
