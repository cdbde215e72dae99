"""The plots of the docs, drawn anew from the results of the other benchmarks.

    python -m benchmarks plots

The latency of one image, and what more products cost.
"""

from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.base import ROOT, Line, need

FOLDER = ROOT / "docs" / "images"
RUNTIMES = ("torch", "onnxruntime", "OpenVINO f32", "OpenVINO INT8")
COLOURS = {"WTFlow": "#c1432e", "FastFlow": "#2f6f8f", "Patchcore": "#7f8fa6", "Padim": "#a08c5b"}


def colour(model: str) -> str:
    """Colour of a model; the backbone is grey."""
    return COLOURS.get(model.split()[0], "#c9ced6")


def plot_runtime(axis: Axes, rows: list[Line]) -> None:
    """Median latency of the models in one runtime, with quartiles."""
    rows = sorted(rows, key=lambda line: -line["ms_an_image"])
    middles, names = [line["ms_an_image"] for line in rows], [line["model"] for line in rows]
    quartiles = [line["quartiles_ms"] for line in rows]
    errors: list[Any] = [
        [middle - low for middle, (low, _) in zip(middles, quartiles, strict=True)],
        [high - middle for middle, (_, high) in zip(middles, quartiles, strict=True)],
    ]
    heights = range(len(rows))
    axis.hlines(heights, 0, middles, color="#e3e6ea", zorder=0)
    axis.errorbar(middles, heights, xerr=errors, fmt="none", ecolor="#444444", capsize=2, zorder=1)
    axis.scatter(middles, heights, color=[colour(name) for name in names], zorder=2)
    axis.set_yticks(heights, names)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    for height, middle, (_, high) in zip(heights, middles, quartiles, strict=True):
        axis.text(high * 1.12, height, f"{middle:.1f}", va="center", fontsize=8)
    axis.set_xscale("log")
    axis.tick_params(labelsize=8)


def plot_latency(lines: list[Line]) -> Figure:
    """Latency of one image; a panel a runtime, on one logarithmic axis."""
    panels = {name: [r for r in lines if r.get("runtime") == name and r["batch"] == 1] for name in RUNTIMES}
    heights = [len(rows) + 1 for rows in panels.values()]
    figure, axes = plt.subplots(len(panels), 1, figsize=(8, 0.3 * sum(heights) + 1), sharex=True, height_ratios=heights)
    for axis, (runtime, rows) in zip(axes, panels.items(), strict=True):
        plot_runtime(axis, rows)
        axis.set_title(runtime, loc="left", fontsize=10)
    axes[-1].set_xlim(right=axes[-1].get_xlim()[1] * 1.3)
    axes[-1].set_xlabel("milliseconds for one image of 256 x 256 (median, quartiles)")
    return figure


def plot_growth(lines: list[Line]) -> Figure:
    """Mean AUROC, size of what is learnt, and seconds of training, against the number of drawn products."""
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.0))
    growth = [line for line in lines if line["part"] == "products"]
    ticks = sorted({line["count"] for line in growth})
    for model in dict.fromkeys(line["model"] for line in growth):
        own = sorted((line for line in growth if line["model"] == model), key=lambda line: line["count"])
        counts = [line["count"] for line in own]
        shown = (
            [line["image_AUROC"] for line in own],
            [line["bytes"] / 1e6 for line in own],
            [line["fit_seconds"] for line in own],
        )
        for axis, values in zip(axes, shown, strict=True):
            axis.plot(counts, values, marker="o", color=colour(model), label=model)
    for axis, title in zip(axes, ("mean image AUROC", "MB without the backbone", "seconds of training"), strict=True):
        axis.set(xscale="log", xlabel="products", title=title)
        axis.set_xticks(ticks, [str(count) for count in ticks])
    axes[0].set_ylim(0.5, 1.02)
    for axis in axes[1:]:
        axis.set_ylim(0, 1.2 * axis.get_ylim()[1])
    axes[0].legend(frameon=False)
    return figure


def render(lines: list[Line]) -> str:
    """Draw all, and say where they are."""
    del lines
    figures = {
        "speed/latency.png": plot_latency(need("latency")),
        "products-growth.png": plot_growth(need("growth")),
    }
    for name, figure in figures.items():
        for axis in figure.axes:
            axis.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        figure.savefig(FOLDER / name, dpi=100)
    return "\n".join(str(FOLDER / name) for name in figures)
