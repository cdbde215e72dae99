"""Plots of docs/ablation.md from the ablation's JSON lines: mean ranks of each factor, and the start time.

Usage: python benchmarks/ablation_plots.py [--results FILE] [--output FOLDER]
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from ablation import METRICS, RESULTS, SETS, base_of, mean_ranks, of_factor, results
from matplotlib.figure import Figure

FOLDER = Path(__file__).parents[1] / "docs" / "images" / "ablation"
SHOWN = {"image_AUROC": "image AUROC", "pixel_AUROC": "pixel AUROC", "pixel_AUPRO": "AUPRO (30 %)"}
NAMES = {"mvtec_bottle": "bottles", "magnetic_tile": "magnetic tiles"}
BEST, OTHER = "#c1432e", "#7f8fa6"


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, without the upper and the right border of its panels, and close it."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def plot_ranks(lines: list[dict[str, Any]], output: Path) -> None:
    """Bars of the mean ranks, a panel a factor; the best is coloured."""
    factors = {}
    for factor in dict.fromkeys(line["factor"] for line in lines):
        ranks = mean_ranks(of_factor(lines, factor, base_of(lines, factor)))
        if len(ranks) > 1:
            factors[factor] = dict(sorted(ranks.items(), key=lambda item: -item[1]))
    columns = 2
    rows = -(-len(factors) // columns)
    heights = [max(len(r) for r in list(factors.values())[i * columns : (i + 1) * columns]) for i in range(rows)]
    figure, axes = plt.subplots(
        rows, columns, figsize=(13, 0.24 * sum(heights) + 0.75 * rows), height_ratios=[h + 1 for h in heights]
    )
    for axis, (factor, ranks) in zip(axes.flat, factors.items(), strict=False):
        best = min(ranks.values())
        labels = [name.replace('"', "") for name in ranks]
        axis.barh(labels, list(ranks.values()), color=[BEST if rank == best else OTHER for rank in ranks.values()])
        axis.set_title(factor, loc="left", fontsize=10)
        axis.tick_params(labelsize=7)
        axis.set_xlim(left=1)
    for axis in axes.flat[len(factors) :]:
        axis.set_axis_off()
    figure.supxlabel(f"mean rank over {len(METRICS)} metrics and {len(SETS)} sets (1 is best)", fontsize=9)
    save(figure, output / "ranks.png")


def plot_start_times(lines: list[dict[str, Any]], factor: str, output: Path) -> None:
    """Metrics against the start time of one Euler step, for the setting that a factor was varied around."""
    figure, axes = plt.subplots(len(SETS), len(SHOWN), figsize=(11, 5.2), sharex=True)
    for row, data in zip(axes, SETS, strict=True):
        here = [line for line in of_factor(lines, factor, base_of(lines, factor)) if line["data"] == data]
        here = sorted((r for r in here if r["setting"]["steps"] == 1), key=lambda r: r["setting"]["start_time"])
        whitened = [
            line["metrics"]
            for line in lines
            if line["data"] == data
            and line["setting"]["start_time"] is None
            and line["setting"]["normalization"] == "whitening"
            and all(line["setting"][k] == here[0]["setting"][k] for k in ("strides", "side", "pool", "standardise"))
        ]
        for axis, (metric, title) in zip(row, SHOWN.items(), strict=True):
            times = [line["setting"]["start_time"] for line in here]
            axis.plot(times, [line["metrics"][metric] for line in here], "o-", color=BEST, label="flow")
            if whitened:
                control = max(values[metric] for values in whitened)
                axis.axhline(control, color=OTHER, ls="--", label="whitened, no flow (best ridge)")
            axis.set_title(f"{NAMES[data]}: {title}", fontsize=9)
            axis.tick_params(labelsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("start time", fontsize=9)
    axes[0, 0].legend(fontsize=8, frameon=False)
    save(figure, output / "start_time.png")


def main() -> int:
    """Draw both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=FOLDER)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    lines = results(given.results)
    plot_ranks(lines, given.output)
    plot_start_times(lines, "start", given.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
