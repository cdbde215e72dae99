"""What the plugin adds to the start of programs: `import anomalib_wtflow`, and its share of `anomalib -h`.

Usage:
    python benchmarks/startup.py [--rounds N]     measure; JSON; 1 if a limit is missed
    python benchmarks/startup.py --render         the lines of the README, from the JSON

Each figure is the median over processes of its own. The share is the time in which the import hook loads the plugin,
over that of all the rest of `anomalib -h`, in one process: two processes, with and without the plugin, differ by more
than that on a noisy machine. anomalib may need some of the same modules later, so it is rather too large.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from accuracy import machine
from lines import append, need
from rich.progress import track

RESULTS = Path(__file__).parent / "results" / "startup.json"
IMPORT_MS, HELP_SHARE = 5.0, 0.01
"""Largest cost of the import in milliseconds, and largest share that ``anomalib -h`` is slowed by."""

IMPORT = """
import sys, time
for name in [name for name in sys.modules if name.startswith("anomalib_wtflow")]:
    del sys.modules[name]  # what the .pth file has loaded
start = time.perf_counter()
import anomalib_wtflow, anomalib_wtflow._hook
print((time.perf_counter() - start) * 1000)
assert "torch" not in sys.modules
"""
HELP = """
import sys, time
start = time.perf_counter()
from anomalib_wtflow import _hook
load, seconds = _hook.load_plugin, []
def timed():
    begin = time.perf_counter()
    load()
    seconds.append(time.perf_counter() - begin)
_hook.load_plugin = timed
sys.argv = ["anomalib", "-h"]
try:
    from anomalib.cli.cli import main
    main()
finally:
    (plugin,) = seconds
    assert "anomalib_wtflow.data.synthetic" in sys.modules
    print(plugin, time.perf_counter() - start)
"""


def run(code: str) -> list[float]:
    """Run code in a fresh interpreter; return the numbers on the last line that it printed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.splitlines()[-1].split()]


def measure(rounds: int) -> dict[str, Any]:
    """Measure both, after a round that fills the file system's cache."""
    imports, plugins, shares = [], [], []
    for turn in track(range(rounds + 1), description="Measuring", transient=True):
        (milliseconds,), (plugin, whole) = run(IMPORT), run(HELP)
        if turn:
            imports.append(milliseconds)
            plugins.append(plugin * 1000)
            shares.append(plugin / (whole - plugin))
    low, middle, high = statistics.quantiles(shares, n=4)
    return {
        "import_ms": round(statistics.median(imports), 3),
        "plugin_ms": round(statistics.median(plugins), 1),
        "help_share": round(middle, 5),
        "help_quartiles": [round(low, 5), round(high, 5)],
        "rounds": rounds,
        "machine": machine(),
    }


def verdicts(line: dict[str, Any]) -> list[tuple[bool, str]]:
    """Say what is kept."""
    low, high = line["help_quartiles"]
    kept = [line["import_ms"] < IMPORT_MS, line["help_share"] < HELP_SHARE]
    texts = [
        f"import anomalib_wtflow, before torch: {line['import_ms']:.2f} ms (less than {IMPORT_MS:g})",
        f"anomalib -h, slowed by the plugin: {line['help_share']:.2%} (quartiles {low:.2%} to {high:.2%}; "
        f"{line['plugin_ms']:.0f} ms; less than {HELP_SHARE:.0%})",
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
    results = verdicts(need(given.output, "startup.py")[-1])
    print("\n".join(text for _, text in results))
    return int(not all(kept for kept, _ in results))


if __name__ == "__main__":
    sys.exit(main())
