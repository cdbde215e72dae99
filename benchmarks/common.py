"""What all benchmarks share: arguments, jobs that are not repeated, promises with limits, tables, the machine."""

import json
import logging
import platform
import statistics
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich import progress
from rich.console import Console

from benchmarks.base import Line, identity, need, put, read, results

CONSOLE = Console(stderr=True, highlight=False, markup=False)
OPTIONS: dict[str, dict[str, Any]] = {
    "data": {"nargs": "+", "help": "names, folders in MVTec's layout, or CLASS:CATEGORY"},
    "root": {"type": Path, "help": "folder of the data sets given as CLASS:CATEGORY"},
    "models": {"nargs": "+", "metavar": "MODEL"},
    "seeds": {"nargs": "+", "type": int},
    "rounds": {"type": int, "help": "in which what is compared takes turns"},
    "base": {"type": json.loads, "help": "JSON: what differs from WTFlow's defaults"},
}
"""Options that several benchmarks have, each with its own defaults; of models, these are the choices."""
Job = tuple[Line | Sequence[Line], Callable[[], Line | Sequence[Line]]]
"""The fields that tell the lines apart that a job gives, and what measures them."""
Verdict = tuple[bool, str]
"""Whether a promise is kept, and the words that say so."""


@dataclass(frozen=True)
class Promise:
    """A figure that is promised, with its limits and how it is written."""

    text: str
    least: float | None = None
    most: float | None = None
    digits: str = ".3f"

    def verdict(self, value: float | None) -> Verdict:
        """Say whether a value keeps the promise; None is one that was never reached."""
        low, high = (default if limit is None else limit for limit, default in ((self.least, -1e9), (self.most, 1e9)))
        kept = value is not None and low <= value <= high
        limits = [f"{word} {limit:g}" for word, limit in (("at least", self.least), ("at most", self.most)) if limit]
        shown = "never reached" if value is None else f"{value:{self.digits}}"
        return kept, f"{self.text}: {shown} ({' and '.join(limits)}) {'kept' if kept else 'MISSED'}"


@dataclass(frozen=True)
class Benchmark:
    """What differs between benchmarks; the module's docstring is the help.

    Attributes:
        render: Returns the text that the README or the docs take over, from the lines.
        jobs: Yields what there is to measure; None for a benchmark of others' results.
        key: Fields that tell the lines apart: what is there already is not repeated.
        verdicts: Says which promises are kept.
        options: Options out of :data:`OPTIONS`, with defaults.
        arguments: Adds options that no other benchmark has.
        quick: What ``--quick`` sets.
    """

    render: Callable[[list[Line], Namespace], str]
    jobs: Callable[[Namespace], Iterable[Job]] | None
    key: Sequence[str] = ()
    verdicts: Callable[[list[Line], Namespace], list[Verdict]] = lambda *_: []
    options: Mapping[str, Any] = field(default_factory=dict)
    arguments: Callable[[ArgumentParser], Any] = lambda _: None
    quick: Mapping[str, Any] = field(default_factory=dict)


def parse(name: str, text: str | None, benchmark: Benchmark, arguments: Sequence[str]) -> Namespace:
    """Parse a benchmark's arguments; what is given wins over what ``--quick`` sets."""
    prog = f"python -m benchmarks {name}"
    parser = ArgumentParser(prog=prog, description=text, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small version that stores nothing")
    parser.add_argument("--render", action="store_true", help="show what was measured, and measure nothing")
    parser.add_argument("--again", action="store_true", help="measure again what is there already")
    parser.add_argument("--output", type=Path, help="where results are and go, in place of the committed ones")
    for option, default in benchmark.options.items():
        choices = {"choices": default, "help": ", ".join(default)} if option == "models" else {}
        parser.add_argument(f"--{option}", default=default, **OPTIONS[option], **choices)
    benchmark.arguments(parser)
    if parser.parse_known_args(arguments)[0].quick:
        parser.set_defaults(**benchmark.quick)
    return parser.parse_args(arguments)


def run(name: str, arguments: Sequence[str]) -> int:
    """Run a benchmark: measure what is missing, show it all, and say with the exit status if a promise is missed."""
    module = import_module(f"benchmarks.{name}")
    benchmark: Benchmark = module.BENCHMARK
    given = parse(name, module.__doc__, benchmark, arguments)
    logging.disable(logging.WARNING)
    if benchmark.jobs is None:
        print(benchmark.render([], given))
        return 0
    with TemporaryDirectory() as folder:
        given.output = given.output or (Path(folder) / "quick.json" if given.quick else results(name))
        for gives, measure in () if given.render else benchmark.jobs(given):
            gives = [gives] if isinstance(gives, dict) else gives
            known = {identity(line, benchmark.key) for line in read(given.output)}
            if given.again or not {identity(line, benchmark.key) for line in gives} <= known:
                CONSOLE.print(time.strftime("%H:%M:%S"), *(v for v in gives[0].values() if not isinstance(v, dict)))
                lines = measure()
                put(given.output, [lines] if isinstance(lines, dict) else lines, benchmark.key)
        lines = need(name, given.output)
        print(benchmark.render(lines, given))
        missed = [text for kept, text in benchmark.verdicts(lines, given) if not kept]
    print("".join(f"{text}\n" for text in missed), end="", file=sys.stderr)
    return 0 if given.render else int(bool(missed))


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


def spread(values: Sequence[float]) -> str:
    """Write the mean and, of several values, the standard deviation."""
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


def averages(runs: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Write mean and deviation of each metric that the runs have."""
    return {name: spread([run[name] for run in runs]) for name in runs[0]}
