"""Types of options, with the bounds of their values."""

import math
from typing import Annotated, NamedTuple


class Bounds(NamedTuple):
    """What an option's value must be: beside it, in its type, so that `check_arguments` cannot miss it."""

    least: float
    most: float = math.inf
    includes_least: bool = True

    def admit(self, value: float) -> bool:
        is_enough = value >= self.least if self.includes_least else value > self.least
        return is_enough and value <= self.most and not math.isinf(value)

    def __str__(self) -> str:
        """What follows "must be"."""
        if self.most < math.inf:
            return f"between {self.least} and {self.most}"
        return f"at least {self.least}" if self.includes_least else f"above {self.least}"


NonNegativeInt = Annotated[int, Bounds(0)]
PositiveInt = Annotated[int, Bounds(1)]
Seed = Annotated[int, Bounds(0, 2**32 - 1)]  # what every generator takes
Fraction = Annotated[float, Bounds(0, 1)]
NonNegativeFloat = Annotated[float, Bounds(0)]
PositiveFloat = Annotated[float, Bounds(0, includes_least=False)]
