"""Types of options, with the bounds of their values."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

MOST = 10**12  # no count, size or time of a run is larger
MOST_DENSE_WIDTH = 4096  # units; more would take gigabytes, or come from a hostile file


class Bounds(NamedTuple):
    """The bounds of an option's value, kept in its type, so that `check_bounds` cannot miss them."""

    least: float
    most: float = MOST
    includes_least: bool = True

    def admit(self, value: float) -> bool:
        is_enough = value >= self.least if self.includes_least else value > self.least
        return is_enough and value <= self.most

    def demand(self, value: float) -> str:
        """What follows "must be", of a value that is not admitted."""
        if self.most < MOST:
            return f"between {self.least} and {self.most}"
        if value > self.most:
            return f"at most {self.most}"
        return f"at least {self.least}" if self.includes_least else f"above {self.least}"


class NameRule(NamedTuple):
    """A name that becomes part of files', folders' and repositories' names."""

    most_characters: int = 100

    def admit(self, name: str) -> bool:
        is_short = len(name) <= self.most_characters
        return is_short and re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", name) is not None

    def demand(self, name: str) -> str:
        """What follows "must be", of a name that is not admitted."""
        characters = "letters, digits, dots, hyphens and underscores, the first and last a letter or digit"
        return f"at most {self.most_characters} {characters}"


def printable(text: str) -> str:
    """A text without the control characters that could move a terminal's cursor."""
    return text if text.isprintable() else ascii(text)[1:-1]


def shown(value: object) -> str:
    """User input as part of a message: without control characters, and not too long."""
    text = printable(str(value))
    return text if len(text) <= 120 else f"{text[:100]}… ({len(text)} characters)"


def has_kind(value: Any, kind: Any) -> bool:
    """Whether a value from JSON may be one of an option, or a dataclass's field, of that type."""
    parts = get_args(kind)
    if get_origin(kind) is Annotated:
        return has_kind(value, parts[0])
    if get_origin(kind) is Literal:
        return value in parts
    if get_origin(kind) is list:
        return isinstance(value, list) and all(has_kind(item, parts[0]) for item in value)
    if parts:  # of a union
        return any(has_kind(value, part) for part in parts)
    return type(value) in {float: (int, float), Path: (str,)}.get(kind, (kind,))


Name = Annotated[str, NameRule()]
NonNegativeInt = Annotated[int, Bounds(0)]
PositiveInt = Annotated[int, Bounds(1)]
Seed = Annotated[int, Bounds(0, 2**32 - 1)]  # what every generator takes
Fraction = Annotated[float, Bounds(0, 1)]
NonNegativeFloat = Annotated[float, Bounds(0)]
PositiveFloat = Annotated[float, Bounds(0, includes_least=False)]
