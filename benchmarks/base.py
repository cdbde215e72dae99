"""Results as JSON lines, and processes of their own; standard library only."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
Line = dict[str, Any]


def results(name: str) -> Path:
    """Return where a benchmark's committed results are."""
    return ROOT / "benchmarks" / "results" / f"{name}.json"


def identity(line: Line, names: Sequence[str]) -> str:
    """Tell what a line measured by some of its fields: two lines with the same identity are repetitions."""
    return json.dumps([line.get(name) for name in names], sort_keys=True)


def read(path: Path) -> list[Line]:
    """Read results, if there are any."""
    return [json.loads(text) for text in path.read_text().splitlines()] if path.is_file() else []


def need(name: str, path: Path | None = None) -> list[Line]:
    """Read results that must be there, or exit."""
    lines = read(path or results(name))
    if not lines:
        raise SystemExit(f"There are no results at {path or results(name)}: run `python -m benchmarks {name}` first.")
    return lines


def put(path: Path, lines: Sequence[Line], names: Sequence[str]) -> None:
    """Store results: in the place of those with the same identity, else behind the others; all of it or nothing."""
    whole = {identity(line, names): line for line in [*read(path), *lines]}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(line) + "\n" for line in whole.values()))
    part.replace(path)


def last_json(command: Sequence[str], cwd: Path | None = None) -> Any:
    """Run a command, and return the JSON on the last line that it prints.

    Raises:
        RuntimeError: If it fails, with what it said.
    """
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=cwd)
    if done.returncode:
        raise RuntimeError(done.stderr or done.stdout)
    return json.loads(done.stdout.splitlines()[-1])


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a benchmark's function in a process of its own; arguments and result go by way of JSON."""
    target = [function.__module__, function.__name__, json.dumps(arguments)]
    return last_json([sys.executable, "-W", "ignore", "-m", "benchmarks.base", *target])


def peak_MiB() -> int:  # noqa: N802
    """Peak memory of this process, on Linux; ``getrusage`` would count what the parent had when it started this one."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1024)


if __name__ == "__main__":
    module, name, given = sys.argv[1:]
    print(json.dumps(getattr(import_module(module), name)(*json.loads(given))))
