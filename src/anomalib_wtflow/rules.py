"""What the value of a setting must be."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """What a value must be: a test, and the words for "choose …" in the error."""

    holds: Callable[[Any], bool]
    advice: str
    names: tuple[str, ...] = ()


def one_of(table: Mapping[str, Any]) -> Rule:
    """Return the rule for one of the names of a table."""
    return Rule(lambda value: isinstance(value, str) and value in table, "", tuple(table))


def number(what: str, interval: str) -> Rule:
    """Return the rule for a number in an interval, written ``[low, high)``."""
    low, high = (float(text) for text in interval[1:-1].split(","))

    def holds(value: Any) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        above = value > low or (interval[0] == "[" and value == low)
        return above and (value < high or (interval[-1] == "]" and value == high))

    return Rule(holds, f"{what} in {interval}")


def whole(least: int, step: int = 1, what: str = "a whole number") -> Rule:
    """Return the rule for ``least``, ``least + step``, …."""

    def holds(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least and (value - least) % step == 0

    return Rule(holds, f"{what} of at least {least}")


def optional(rule: Rule) -> Rule:
    """Return the rule for None, or what another rule allows."""
    return Rule(lambda value: value is None or rule.holds(value), rule.advice, rule.names)


def is_size(value: Any) -> bool:
    """Return whether a value is an image size: None, a side, or a height and a width."""
    if value is None or whole(1).holds(value):
        return True
    return isinstance(value, tuple | list) and len(value) == 2 and all(whole(1).holds(side) for side in value)


def is_names(value: Any) -> bool:
    """Return whether a value is None or a list of names."""
    if value is None:
        return True
    return isinstance(value, tuple | list) and len(value) > 0 and all(isinstance(name, str) for name in value)


TEXT = Rule(lambda value: isinstance(value, str), "a name")
SWITCH = Rule(lambda value: isinstance(value, bool), "true or false")
FILE = Rule(lambda value: value is None or isinstance(value, str | Path), "the path of a file")
RATIO = number("a share", "(0, 1)")._replace(advice="a share between 0 and 1, such as 0.05")
