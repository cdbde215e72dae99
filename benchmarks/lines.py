"""Results as JSON lines that an interruption at any moment leaves readable."""

import json
import sys
from pathlib import Path
from typing import Any


def parse(text: str) -> dict[str, Any] | None:
    """Parse a line; None for one that was cut short."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def read(path: Path) -> list[dict[str, Any]]:
    """Read the results; a line that an interruption cut short is left out."""
    lines = [parse(text) for text in path.read_text().splitlines()] if path.is_file() else []
    if None in lines:
        print(f"A line of {path} is cut short and left out.", file=sys.stderr)
    return [line for line in lines if line is not None]


def need(path: Path, script: str) -> list[dict[str, Any]]:
    """Read results that must be there.

    Raises:
        SystemExit: If there are none.
    """
    lines = read(path)
    if not lines:
        raise SystemExit(f"There are no results at {path}: run `python benchmarks/{script}` first.")
    return lines


def append(path: Path, line: dict[str, Any]) -> None:
    """Append a result, on a line of its own even where the last one was cut short."""
    cut = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(("\n" if cut else "") + json.dumps(line) + "\n")
