"""What all benchmarks share: arguments, jobs that are not repeated, promises with limits, tables, the machine.

A benchmark is a module, whose docstring is its help. ``jobs(options)`` yields pairs, the fields that tell a line apart
(or a list of them, for several lines) and the function that measures the rest of it; ``KEY`` names all those fields, so
that what is there is not repeated. ``render(lines)`` returns the text that the README or the docs take over, and
``verdicts(lines)`` says which promises are kept. ``OPTIONS`` are its own, with their defaults, and ``QUICK`` what
``--quick`` sets; ``compare(lines)`` says what that found, in place of ``verdicts``. It may lack any of them.
"""

import logging
import platform
import statistics
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich import progress
from rich.console import Console

from benchmarks.base import Line, identity, need, put, read, results

CONSOLE = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
HELP = {
    "data": "names, folders in MVTec's layout, or CLASS:CATEGORY",
    "root": "folder of the data sets given as CLASS:CATEGORY",
    "rounds": "in which what is compared takes turns",
    "seeds": "seeds of the trainings",
}
METRICS = {
    "image_AUROC": "image AUROC",
    "image_AUPR": "image AUPR",
    "image_F1Max": "image F1",
    "pixel_AUROC": "pixel AUROC",
    "pixel_AUPRO": "AUPRO",
    "pixel_F1Max": "pixel F1",
}
"""By anomalib's name, the tables' titles; those of pixels are not there where a data set has no masks."""
Job = tuple[Line | Sequence[Line], Callable[[], Line | Sequence[Line]]]
Verdict = tuple[bool, str]


@dataclass(frozen=True)
class Promise:
    """A figure that is promised, with its limits and how it is written."""

    text: str
    least: float | None = None
    most: float | None = None
    digits: str = ".3f"

    def verdict(self, value: float | None) -> Verdict:
        """Say whether a value keeps the promise; None is one that was never reached."""
        limits = [(word, limit) for word, limit in (("at least", self.least), ("at most", self.most)) if limit]
        held = [
            value is not None and (value >= limit if word == "at least" else value <= limit) for word, limit in limits
        ]
        shown = "never reached" if value is None else f"{value:{self.digits}}"
        words = " and ".join(f"{word} {limit:g}" for word, limit in limits)
        return all(held), f"{self.text}: {shown} ({words}) {'kept' if all(held) else 'MISSED'}"


def parse(name: str, module: Any, arguments: Sequence[str]) -> Namespace:
    """Parse a benchmark's arguments; what is given wins over what ``--quick`` sets."""
    prog = f"python -m benchmarks {name}"
    parser = ArgumentParser(prog=prog, description=module.__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small version that stores nothing")
    parser.add_argument("--render", action="store_true", help="show what was measured, and measure nothing")
    parser.add_argument("--again", action="store_true", help="measure again what is there already")
    parser.add_argument("--output", type=Path, help="where results are and go, in place of the committed ones")
    for option, default in getattr(module, "OPTIONS", {}).items():
        several, first = isinstance(default, tuple), default[0] if isinstance(default, tuple) else default
        kind = Path if first is None else type(first)
        more: dict[str, Any] = {"type": kind, "nargs": "+" if several else None, "help": HELP.get(option)}
        if option not in HELP:
            more |= {"choices": default, "metavar": option.upper(), "help": ", ".join(default)}
        parser.add_argument(f"--{option}", default=default, **({"action": "store_true"} if first is False else more))
    if parser.parse_known_args(arguments)[0].quick:
        parser.set_defaults(**getattr(module, "QUICK", {}))
    return parser.parse_args(arguments)


def run(name: str, arguments: Sequence[str]) -> int:
    """Run a benchmark: measure what is missing, show it all, and say with the exit status if a promise is missed."""
    module = import_module(f"benchmarks.{name}")
    given = parse(name, module, arguments)
    logging.disable(logging.WARNING)
    with TemporaryDirectory() as folder:
        given.output = given.output or (Path(folder) / "quick.json" if given.quick else results(name))
        if hasattr(module, "jobs") and not given.render:
            measure(module.jobs(given), getattr(module, "KEY", ()), given)
        lines = need(name, given.output) if hasattr(module, "jobs") else []
    judge = getattr(module, "compare" if given.quick and hasattr(module, "compare") else "verdicts", lambda _: [])
    verdicts: list[Verdict] = judge(lines)
    text = module.render(lines) if hasattr(module, "render") else "\n".join(words for _, words in verdicts)
    print(text)
    for kept, words in verdicts:
        if words not in text and (given.quick or not kept):
            CONSOLE.print(words)
    return int(not given.render and not all(kept for kept, _ in verdicts))


def measure(jobs: Iterable[Job], key: Sequence[str], given: Namespace) -> None:
    """Do the jobs whose lines are not all there, and store what each gives."""
    for gives, job in jobs:
        gives = [gives] if isinstance(gives, dict) else gives
        known = {identity(line, key) for line in read(given.output)}
        if given.again or not {identity(line, key) for line in gives} <= known:
            named = [value for value in gives[0].values() if isinstance(value, str | int)]
            CONSOLE.print(time.strftime("%H:%M:%S"), *named)
            lines = job()
            lines = [{**gives[0], **lines}] if isinstance(lines, dict) else lines
            put(given.output, [{**line, "machine": machine()} for line in lines], key)


def track(items: Iterable[Any], description: str) -> Iterable[Any]:
    """Show a bar while something is gone through, which disappears afterwards."""
    return progress.track(items, description=description, transient=True, console=CONSOLE)


def machine() -> dict[str, Any]:
    """Name the processor and the threads."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.processor(), "threads": torch.get_num_threads()}


def machine_of(lines: Sequence[Line]) -> str:
    """Name the machine that lines come from."""
    return f"{lines[0]['machine']['cpu']}, {lines[0]['machine']['threads']} threads"


def table(columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table and an empty one; a column is a title and a format of a row's fields.

    A cell whose field a row lacks stays empty.
    """

    def cell(form: str, row: Mapping[str, Any]) -> str:
        try:
            return form.format_map(row)
        except (KeyError, TypeError):
            return ""

    lines = ["| " + " | ".join(cell(form, row) for form in columns.values()) + " |" for row in rows]
    title = "| " + " | ".join(columns) + " |"
    return [title.replace("|  |", "| |"), "|---" * len(columns) + "|", *lines, ""]


def averages(runs: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Write the mean of each metric that the runs have and, of several runs, the standard deviation."""
    result = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        result[name] = f"{statistics.mean(values):.4f}{deviation}"
    return result
