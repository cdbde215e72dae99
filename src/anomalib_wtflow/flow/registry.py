"""Look-up of the method's interchangeable parts by name."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

from anomalib_wtflow.errors import WTFlowError

_Entry = TypeVar("_Entry")


def lookup(table: Mapping[str, _Entry], kind: str, name: str) -> _Entry:
    """Return ``table[name]``, ``kind`` being what the names are, as "coupling".

    Raises:
        WTFlowError: If the name is unknown; the message lists the valid ones.
    """
    if name in table:
        return table[name]
    close = get_close_matches(str(name), table, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    msg = f"Unknown {kind} '{name}': {hint}choose one of {', '.join(table)}."
    raise WTFlowError(msg)
