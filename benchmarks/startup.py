"""What the plugin adds to the start of programs: `import anomalib_wtflow`, and its share of `anomalib -h`.

    python -m benchmarks startup [--rounds N]
    python -m benchmarks startup --quick                     two rounds

Each figure is the median over processes of its own. The share is the time in which the import hook loads the plugin,
over that of all the rest of `anomalib -h`, in one process: two processes, with and without the plugin, differ by more
than that on a noisy machine. anomalib may need some of the same modules later, so it is rather too large.
"""

import statistics
import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial

from benchmarks.base import Line, last_json
from benchmarks.common import Job, Promise, Verdict, track

OPTIONS = {"rounds": 10}
QUICK = {"rounds": 2}
IMPORTED = Promise("import anomalib_wtflow, before torch, milliseconds", most=5, digits=".2f")
HELPED = Promise("share that anomalib -h is slowed by", most=0.01, digits=".4f")

CODE = """
import sys, time
from anomalib_wtflow import _hook
for name in [name for name in sys.modules if name.startswith("anomalib_wtflow")]:
    del sys.modules[name]  # what the .pth file has loaded
start = time.perf_counter()
import anomalib_wtflow._hook
imported = time.perf_counter() - start
assert "torch" not in sys.modules
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
    assert "anomalib_wtflow.data.synthetic" in sys.modules
    print([imported, *seconds, time.perf_counter() - start])
"""


def measure(rounds: int) -> Line:
    """Measure both, after a round that fills the file system's cache."""
    taken = [last_json([sys.executable, "-c", CODE]) for _ in track(range(rounds + 1), "Measuring")][1:]
    imports, plugins, wholes = zip(*taken, strict=True)
    shares = [plugin / (whole - plugin) for plugin, whole in zip(plugins, wholes, strict=True)]
    return {
        "import_ms": round(1000 * statistics.median(imports), 3),
        "plugin_ms": round(1000 * statistics.median(plugins), 1),
        "help_share": round(statistics.median(shares), 5),
        "rounds": rounds,
    }


def verdicts(lines: list[Line]) -> list[Verdict]:
    """Say what is kept."""
    return [IMPORTED.verdict(lines[-1]["import_ms"]), HELPED.verdict(lines[-1]["help_share"])]


def jobs(given: Namespace) -> Iterator[Job]:
    """Plan the only job."""
    yield {}, partial(measure, given.rounds)
