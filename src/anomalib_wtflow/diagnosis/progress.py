"""Bars on a terminal, a line for each stage elsewhere."""

from collections.abc import Iterable

from rich.console import Console
from rich.progress import track


class Progress:
    """What is being done: bars on a terminal, a plain line to standard error where there is none, or nothing.

    Args:
        wanted: Whether to say anything.
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.shown = wanted and Console().is_terminal

    def __call__(self, items: Iterable, description: str, total: int | None = None) -> Iterable:
        """Iterate over the items under a bar."""
        self.say(description if total is None else f"{description} ({total})")
        return track(items, description=description, total=total, transient=True, disable=not self.shown)

    def say(self, text: str) -> None:
        """Write a line, where there is no terminal for bars."""
        if self.wanted and not self.shown:
            Console(stderr=True, highlight=False).print(text)
