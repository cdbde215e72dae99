"""The plots of the README and docs/ablation.md, drawn anew from the results of the other benchmarks.

    python -m benchmarks plots

Mean ranks of the ablation's factors and the start time, the latency of one image, AUROC against seconds of training,
what more products cost.
"""

from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.ablation import mean_ranks, of_factor
from benchmarks.base import ROOT, Line, need
from benchmarks.common import METRICS
from benchmarks.datasets import REAL

FOLDER = ROOT / "docs" / "images"
SHOWN = {"image_AUROC": "image AUROC", "pixel_AUROC": "pixel AUROC", "pixel_AUPRO": "AUPRO (30 %)"}
NAMES = {"mvtec_bottle": "bottles", "magnetic_tile": "magnetic tiles"}
BEST, OTHER = "#c1432e", "#7f8fa6"
RUNTIMES = ("torch", "onnxruntime", "OpenVINO f32", "OpenVINO INT8")
COLOURS = {"WTFlow": "#c1432e", "FastFlow": "#2f6f8f", "Patchcore": "#7f8fa6", "Padim": "#a08c5b"}


def colour(model: str) -> str:
    """Colour of a model; the backbone is grey."""
    return COLOURS.get(model.split()[0], "#c9ced6")


def plot_ranks(lines: list[Line]) -> Figure:
    """Bars of the mean ranks, a panel a factor; the best is coloured."""
    ranked = {name: mean_ranks(of_factor(lines, name)) for name in dict.fromkeys(line["factor"] for line in lines)}
    factors = {
        name: dict(sorted(ranks.items(), key=lambda item: -item[1])) for name, ranks in ranked.items() if len(ranks) > 1
    }
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
    figure.supxlabel(f"mean rank over {len(METRICS)} metrics and {len(REAL)} sets (1 is best)", fontsize=9)
    return figure


def control_of(lines: list[Line], one: Line) -> dict[str, float]:
    """Return the best of whitened features without a flow, on the layers of a line, by metric."""
    same = ("strides", "side", "pool", "standardise", "layers", "pool_size")
    whitened = [
        line["metrics"]
        for line in lines
        if line["data"] == one["data"]
        and line["setting"]["start_time"] is None
        and line["setting"]["normalization"] == "whitening"
        and all(line["setting"].get(name) == one["setting"].get(name) for name in same)
    ]
    return {metric: max(values[metric] for values in whitened) for metric in SHOWN} if whitened else {}


def plot_start_times(lines: list[Line]) -> Figure:
    """Metrics against the start time of one Euler step, for the setting that it was varied around."""
    figure, axes = plt.subplots(len(REAL), len(SHOWN), figsize=(11, 5.2), sharex=True)
    start = [line for line in of_factor(lines, "start") if line["setting"]["steps"] == 1]
    for row, data in zip(axes, REAL, strict=True):
        here = sorted((r for r in start if r["data"] == data), key=lambda r: r["setting"]["start_time"])
        control = control_of(lines, here[0])
        for axis, (metric, title) in zip(row, SHOWN.items(), strict=True):
            times = [line["setting"]["start_time"] for line in here]
            axis.plot(times, [line["metrics"][metric] for line in here], "o-", color=BEST, label="flow")
            if control:
                axis.axhline(control[metric], color=OTHER, ls="--", label="whitened, no flow (best ridge)")
            axis.set_title(f"{NAMES[data]}: {title}", fontsize=9)
            axis.tick_params(labelsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("start time", fontsize=9)
    axes[0, 0].legend(fontsize=8, frameon=False)
    return figure


def plot_runtime(axis: Axes, rows: list[Line]) -> None:
    """Median latency of the models in one runtime, with quartiles."""
    rows = sorted(rows, key=lambda line: -line["ms_an_image"])
    middles, names = [line["ms_an_image"] for line in rows], [line["model"] for line in rows]
    quartiles = [line["quartiles_ms"] for line in rows]
    errors: list[Any] = [
        [middle - low for middle, (low, _) in zip(middles, quartiles, strict=True)],
        [high - middle for middle, (_, high) in zip(middles, quartiles, strict=True)],
    ]
    places = range(len(rows))
    axis.hlines(places, 0, middles, color="#e3e6ea", zorder=0)
    axis.errorbar(middles, places, xerr=errors, fmt="none", ecolor="#444444", capsize=2, zorder=1)
    axis.scatter(middles, places, color=[colour(name) for name in names], zorder=2)
    axis.set_yticks(places, names)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    for place, middle, (_, high) in zip(places, middles, quartiles, strict=True):
        axis.text(high * 1.12, place, f"{middle:.1f}", va="center", fontsize=8)
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


def plot_training(lines: list[Line]) -> Figure:
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
    return figure


def plot_growth(lines: list[Line]) -> Figure:
    """Mean AUROC, size of what is learnt, and seconds of training, against the number of drawn products."""
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.0))
    growth = [line for line in lines if line["part"] == "growth"]
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
    ablation = need("ablation")
    figures = {
        "ablation/ranks.png": plot_ranks(ablation),
        "ablation/start_time.png": plot_start_times(ablation),
        "speed/latency.png": plot_latency(need("latency")),
        "speed/training.png": plot_training(need("training")),
        "products-growth.png": plot_growth(need("products")),
    }
    for name, figure in figures.items():
        for axis in figure.axes:
            axis.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        figure.savefig(FOLDER / name, dpi=100)
    return "\n".join(str(FOLDER / name) for name in figures)
