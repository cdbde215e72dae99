"""What the plugin adds to the start of programs: `import anomalib_wtflow`, and `anomalib -h` with and without it.

Usage:
    python benchmarks/startup.py [--rounds N]     measure; JSON; 1 if a limit is missed
    python benchmarks/startup.py --render         the lines of the README, from the JSON

Each figure comes from processes of their own that take turns. "Without" means that the process drops the import hook
before it starts anomalib; the median over the rounds of the ratio within a round is reported.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from accuracy import machine
from lines import append, read
from rich.progress import track

RESULTS = Path(__file__).parent / "results" / "startup.json"
IMPORT_MS, HELP_SHARE = 5.0, 0.01
"""Largest cost of the import in milliseconds, and largest share that ``anomalib -h`` is slowed by."""

IMPORT = """
import sys, time
for name in [name for name in sys.modules if name.startswith("anomalib_wtflow")]:
    del sys.modules[name]  # what the .pth file has loaded
start = time.perf_counter()
import anomalib_wtflow
print((time.perf_counter() - start) * 1000)
assert "torch" not in sys.modules
"""
WITH = """
import sys
sys.argv = ["anomalib", "-h"]
from anomalib.cli.cli import main
main()
"""
WITHOUT = (
    """
import sys
from anomalib_wtflow import _hook
sys.meta_path = [finder for finder in sys.meta_path if not _hook.is_ours(finder)]
"""
    + WITH
)


def run(code: str) -> tuple[float, str]:
    """Run code in a fresh interpreter; return its seconds and what it printed."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return time.perf_counter() - start, done.stdout


def measure(rounds: int) -> dict[str, Any]:
    """Measure both."""
    imports, seconds = [], {"with": [], "without": []}
    for turn in track(range(rounds + 1), description="Measuring", transient=True):
        pair = {"import": run(IMPORT), "without": run(WITHOUT), "with": run(WITH)}
        if turn:  # the first one fills the file system's cache
            imports.append(float(pair["import"][1]))
            for name, values in seconds.items():
                values.append(pair[name][0])
    shares = [a / b - 1 for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    low, middle, high = statistics.quantiles(shares, n=4)
    return {
        "import_ms": round(statistics.median(imports), 3),
        "help_seconds": {name: round(statistics.median(values), 3) for name, values in seconds.items()},
        "help_slowed_by": round(middle, 4),
        "help_quartiles": [round(low, 4), round(high, 4)],
        "rounds": rounds,
        "machine": machine(),
    }


def verdicts(line: dict[str, Any]) -> list[tuple[bool, str]]:
    """Say what is kept."""
    low, high = line["help_quartiles"]
    seconds = line["help_seconds"]
    kept = [line["import_ms"] < IMPORT_MS, line["help_slowed_by"] < HELP_SHARE]
    texts = [
        f"import anomalib_wtflow, before torch: {line['import_ms']:.2f} ms (less than {IMPORT_MS:g})",
        f"anomalib -h: {seconds['with']:.2f} s with the plugin, {seconds['without']:.2f} s without, slower by "
        f"{line['help_slowed_by']:+.1%} (quartiles {low:+.1%} to {high:+.1%}; less than {HELP_SHARE:.0%})",
    ]
    return [(ok, f"{text}: {'kept' if ok else 'MISSED'}") for ok, text in zip(kept, texts, strict=True)]


def main() -> int:
    """Measure and render; the exit status says whether a limit was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--render", action="store_true")
    given = parser.parse_args()
    if not given.render:
        line = measure(given.rounds)
        given.output.unlink(missing_ok=True)
        append(given.output, line)
    results = verdicts(read(given.output)[-1])
    print("\n".join(text for _, text in results))
    return int(not all(kept for kept, _ in results))


if __name__ == "__main__":
    sys.exit(main())
