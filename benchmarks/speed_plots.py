"""Plots of the README's section on speed, from the JSON lines of `latency.py` and `training.py`.

Usage: python benchmarks/speed_plots.py [--output FOLDER]
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from ablation_plots import NAMES, save
from latency import RESULTS as LATENCY
from lines import need

from training import RESULTS as TRAINING

FOLDER = Path(__file__).parents[1] / "docs" / "images" / "speed"
RUNTIMES = ("torch", "onnxruntime", "OpenVINO f32", "OpenVINO INT8")
COLOURS = {"WTFlow": "#c1432e", "FastFlow": "#2f6f8f", "Patchcore": "#7f8fa6", "Padim": "#a08c5b"}


def colour(model: str) -> str:
    """Colour of a model; the backbone is grey."""
    return COLOURS.get(model.split()[0], "#c9ced6")


def plot_latency(lines: list[dict[str, Any]], output: Path) -> None:
    """Median latency of one image, with quartiles; a panel a runtime, on one logarithmic axis."""
    panels = {
        runtime: [line for line in lines if line.get("runtime") == runtime and line["batch"] == 1]
        for runtime in RUNTIMES
    }
    heights = [len(rows) + 1 for rows in panels.values()]
    figure, axes = plt.subplots(len(panels), 1, figsize=(8, 0.3 * sum(heights) + 1), sharex=True, height_ratios=heights)
    for axis, (runtime, rows) in zip(axes, panels.items(), strict=True):
        rows = sorted(rows, key=lambda line: -line["ms_an_image"])
        middles = [line["ms_an_image"] for line in rows]
        errors = [
            [middle - line["quartiles_ms"][0] for middle, line in zip(middles, rows, strict=True)],
            [line["quartiles_ms"][1] - middle for middle, line in zip(middles, rows, strict=True)],
        ]
        names = [line["model"] for line in rows]
        axis.hlines(range(len(rows)), 0, middles, color="#e3e6ea", zorder=0)
        colours = [colour(name) for name in names]
        axis.errorbar(middles, range(len(rows)), xerr=errors, fmt="none", ecolor="#444444", capsize=2, zorder=1)
        axis.scatter(middles, range(len(rows)), color=colours, zorder=2)
        axis.set_yticks(range(len(rows)), names)
        axis.set_ylim(-0.6, len(rows) - 0.4)
        for position, (middle, line) in enumerate(zip(middles, rows, strict=True)):
            axis.text(line["quartiles_ms"][1] * 1.12, position, f"{middle:.1f}", va="center", fontsize=8)
        axis.set_xscale("log")
        axis.set_title(runtime, loc="left", fontsize=10)
        axis.tick_params(labelsize=8)
    axes[-1].set_xlim(right=axes[-1].get_xlim()[1] * 1.3)
    axes[-1].set_xlabel("milliseconds for one image of 256 x 256 (median, quartiles)")
    save(figure, output / "latency.png")


def plot_training(lines: list[dict[str, Any]], output: Path) -> None:
    """Image AUROC against the seconds of training, for the flows; a panel a data set."""
    sets = list(dict.fromkeys(line["data"] for line in lines))
    figure, axes = plt.subplots(1, len(sets), figsize=(5 * len(sets), 3.6), squeeze=False)
    for axis, data in zip(axes[0], sets, strict=True):
        for line in lines:
            if line["data"] == data and line["curve"]:
                _, seconds, values = zip(*line["curve"], strict=True)
                axis.plot(seconds, values, marker=".", label=line["model"], color=colour(line["model"]))
        axis.set_xscale("log")
        axis.set_title(NAMES.get(data, data), loc="left", fontsize=10)
        axis.set_xlabel("seconds from the start of the fit")
    axes[0][0].set_ylabel("image AUROC")
    axes[0][0].legend(frameon=False)
    save(figure, output / "training.png")


def main() -> int:
    """Draw both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    plot_latency(need(LATENCY, "latency.py"), given.output)
    plot_training(need(TRAINING, "training.py"), given.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
