"""Bars on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.progress import track

SECONDS = 5.0
"""Least time between two lines of one stage."""


class Progress:
    """What is being done, to standard error: bars on a terminal, plain lines where there is none, or nothing.

    Args:
        wanted: Whether to say anything.
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.console = Console(stderr=True, highlight=False)
        self.shown = wanted and self.console.is_terminal

    def __call__(self, items: Iterable, description: str, total: int | None = None) -> Iterable:
        """Iterate over the items under a bar, or with a line at the start and at most every five seconds."""
        if self.shown:
            return track(items, description, total=total, transient=True, console=self.console)
        self.say(description if total is None else f"{description} ({total})")
        return self._counted(items, description, total)

    def _counted(self, items: Iterable, description: str, total: int | None) -> Iterator:
        said = time.monotonic()
        for count, item in enumerate(items):
            if count and time.monotonic() - said >= SECONDS:
                self.say(f"{description}: {count}" + ("" if total is None else f" of {total}"))
                said = time.monotonic()
            yield item

    def say(self, text: str) -> None:
        """Write a line, where there is no terminal for bars."""
        if self.wanted and not self.shown:
            self.console.print(text, soft_wrap=True, markup=False)
