"""What a search varies, as it is written on the command line."""

from collections.abc import Sequence

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from cleanrl.utils.bounds import MOST, shown

EXAMPLES = "temperature=0.02:1:log, n-step=1:5 or td-loss=mse,huber"


def parse_space(texts: Sequence[str]) -> dict[str, BaseDistribution]:
    """Distributions by option, of texts such as those in EXAMPLES.

    Raises:
        SystemExit: with a one-line error, if one of them is not such a text.
    """
    space = {}
    for text in texts:
        name, _, values = text.partition("=")
        name = name.removeprefix("--").replace("_", "-")
        try:
            if not name or name in space:
                raise ValueError("each option once")
            space[name] = parse_values(values)
        except ValueError as fault:
            raise SystemExit(
                f"error: --search {shown(text)} ({shown(fault)}); write what varies as {EXAMPLES}"
            ) from None
    if not space:
        raise SystemExit(f"error: --search names nothing; write what varies as {EXAMPLES}")
    return space


def parse_values(text: str) -> BaseDistribution:
    """Raises ValueError if the text says no values."""
    if ":" not in text:
        choices = text.split(",")
        if len(set(choices)) < max(len(choices), 2) or "" in choices:
            raise ValueError("not several values")
        return CategoricalDistribution(choices)
    low, high, *scale = text.split(":")
    if scale not in ([], ["log"]):
        raise ValueError("the scale is log, or left out")
    number = int if low.isdecimal() and high.isdecimal() else float
    if not all(abs(number(end)) <= MOST for end in (low, high)):
        raise ValueError(f"not within {MOST}")
    distribution = IntDistribution if number is int else FloatDistribution
    return distribution(number(low), number(high), log=bool(scale))
