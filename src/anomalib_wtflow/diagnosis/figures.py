"""Figures of a trained model, from the numbers in a diagnosis's JSON. Headless."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from anomalib_wtflow.diagnosis.certainty import share_interval
from anomalib_wtflow.diagnosis.style import (
    COUPLING_STYLES,
    GREY,
    KINDS,
    SHOWN,
    band,
    name_of,
    new_figure,
)


def radius_along_the_flow(flow: dict[str, Any]) -> Figure:
    """Radius over time: as scored, and along the ODE of each field; median, and 5 % to 95 % of the positions."""
    couplings = flow["couplings"]
    figure, axes = new_figure(1, 1 + len(couplings), 3.6 * (1 + len(couplings)), 3.4, sharey=True)
    for kind, row in flow["scored"].items():
        color, style, _ = KINDS[kind]
        band(axes[0], row["tau"], row["radius"], kind, color, style)
    axes[0].set(title="as scored: $x_0$ to $y$", xlabel="share of the way", ylabel=r"radius $\|x\|/\sqrt{C}$")
    for panel, coupling in zip(axes[1:], couplings, strict=True):
        for kind, row in flow["ode"][coupling].items():
            color, style, _ = KINDS[kind]
            band(panel, flow["ode_times"], row["radius"], kind, color, style)
        panel.set(title=f"ODE, {name_of(coupling)}", xlabel="time $t$")
    for panel in axes:
        panel.axhline(1, color=GREY, linewidth=0.8, linestyle=(0, (1, 3)))
        panel.set_ylim(bottom=0)
    axes[0].legend(frameon=False)
    return figure


def centripetal(flow: dict[str, Any]) -> Figure:
    """Centripetal component and cosine to the optimal-transport direction along the ODE."""
    couplings = flow["couplings"]
    figure, axes = new_figure(2, len(couplings), 4.2 * len(couplings), 5.6, sharex=True, sharey="row", squeeze=False)
    for column, coupling in enumerate(couplings):
        for kind, row in flow["ode"][coupling].items():
            color, style, _ = KINDS[kind]
            band(axes[0, column], flow["ode_times"], row["centripetal"], kind, color, style)
            band(axes[1, column], flow["ode_times"], row["cosine_to_optimal"], kind, color, style)
        predicted = flow["predicted_start"][coupling]
        if predicted is not None:
            axes[0, column].plot(0, predicted, "k*", markersize=11, clip_on=False, label=f"$-(1+c)$ = {predicted:.2f}")
        axes[0, column].set_title(name_of(coupling))
        axes[1, column].set(xlabel="time $t$", ylim=(-1, 1))
        for row_axes in axes[:, column]:
            row_axes.axhline(0, color=GREY, linewidth=0.8)
        axes[0, column].legend(frameon=False)
    axes[0, 0].set_ylabel(r"$\langle v, x\rangle / \|x\|^2$" + "\n(below 0: towards the centre)")
    axes[1, 0].set_ylabel("cosine of $v$ to the\noptimal-transport direction")
    medians = [v for name in couplings for row in flow["ode"][name].values() for v in row["centripetal"]["median"]]
    axes[0, 0].set_ylim(min(-2.2, 1.2 * min(medians)), max(1.0, 1.2 * max(medians)))
    return figure


def field_over_time(field: dict[str, Any]) -> Figure:
    """Norm and local Lipschitz constant of the fields over time."""
    figure, (left, right) = new_figure(1, 2, 8.4, 3.4)
    for coupling, row in field["couplings"].items():
        color, style, marker = COUPLING_STYLES[coupling]
        for axes, key in ((left, "norm"), (right, "lipschitz")):
            axes.plot(field["t"], row[key], color=color, linestyle=style, marker=marker, ms=4, label=name_of(coupling))
    right.plot(field["t"], [1 / t for t in field["t"]], color="black", linewidth=0.8, label="$1/t$")
    left.set(xscale="log", xlabel="time $t$", ylabel=r"$\|v\|/\sqrt{C}$", ylim=(0, None))
    right.set(
        xscale="log", yscale="log", xlabel="time $t$", ylabel=r"local Lipschitz constant $\|\partial v/\partial x\|_2$"
    )
    for axes in (left, right):
        axes.legend(frameon=False)
    return figure


def histograms(scores: dict[str, Any]) -> Figure:
    """Histograms of the density proxy, by image and by pixel, with the thresholds."""
    figure, panels = new_figure(1, 2, 8.4, 3.4)
    for axes, level in zip(panels, ("image", "pixel"), strict=True):
        _histogram(axes, scores, level)
        auroc = scores[f"{level}_auroc"]
        axes.set_title(f"{level}s" + ("" if auroc is None else f", AUROC {auroc:.4f}"))
        axes.set(xlabel=r"$-\log q$" + (" (mean of the top pixels)" if level == "image" else ""))
    panels[0].legend(frameon=False)
    panels[1].set_yscale("log")
    return figure


def score_histogram(scores: dict[str, Any], several: bool) -> Figure:
    """Histogram of the image scores, good and defective, with the threshold."""
    figure, axes = new_figure(1, 1, 5, 3.4)
    _histogram(axes, scores, "image")
    unit = " (1 = threshold of its product)" if several else ""
    axes.set(title="Scores of the images", xlabel=f"anomaly score{unit}")
    axes.legend(framealpha=0.9, edgecolor="none")
    return figure


def _histogram(axes: Axes, scores: dict[str, Any], level: str) -> None:
    histogram = scores[f"{level}_histogram"] or {}
    threshold = scores["threshold" if level == "image" else "pixel_threshold"]
    for kind, (color, style, _) in KINDS.items():
        if kind in histogram:
            axes.stairs(
                histogram[kind], histogram["edges"], color=color, linestyle=style, linewidth=1.6, label=SHOWN[kind]
            )
            axes.stairs(histogram[kind], histogram["edges"], color=color, fill=True, alpha=0.2)
    if threshold is not None:
        axes.axvline(threshold, color="black", linewidth=1.2, label="threshold")
    axes.set(xscale="log", ylabel=f"share of the {level}s of a kind")
    # Scores within a decade have no power of ten to show.
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def called_by_kind(scores: dict[str, Any]) -> Figure:
    """Share of the images of each kind that is called anomalous, with 95 % intervals; what is promised of good ones."""
    kinds = scores["kinds"]
    figure, axes = new_figure(1, 1, 5, max(3.4, 1.2 + 0.36 * len(kinds)))
    for place, (kind, row) in enumerate(kinds.items()):
        share, (low, high) = row["called"] / row["images"], share_interval(row["called"], row["images"])
        color, _, marker = KINDS["normal" if kind == "good" else "unlabelled" if kind == "unlabelled" else "anomalous"]
        axes.barh(place, share, color=color, alpha=0.35)
        axes.errorbar(share, place, xerr=[[share - low], [high - share]], color=color, marker=marker, capsize=3)
    if "good" in kinds and scores["promised_rate"] is not None:
        axes.plot([scores["promised_rate"]] * 2, [-0.5, 0.5], color="black", linewidth=2)
        axes.annotate(
            "promised", (scores["promised_rate"], 0.5), (4, -2), textcoords="offset points", fontsize=8, va="top"
        )
    labels = [f"{kind}\n{row['called']} of {row['images']}" for kind, row in kinds.items()]
    axes.set_yticks(range(len(kinds)), labels, parse_math=False)
    axes.set(xlim=(0, 1.04), ylim=(len(kinds) - 0.4, -0.6), xlabel="share called anomalous (bar) and its 95 % interval")
    axes.set_title("Called anomalous, by kind")
    return figure


def log_density(numbers: dict[str, Any]) -> Figure:
    """Score by the density proxy against score by the log-density."""
    figure, axes = new_figure(1, 1, 5.2, 3.8)
    for kind, rows in numbers["scores"].items():
        color, _, marker = KINDS[kind]
        axes.scatter(*zip(*rows, strict=True), color=color, marker=marker, s=18, alpha=0.7, label=kind)
    axes.set(xscale="log", xlabel=r"score by the density proxy $-\log q$")
    axes.set_ylabel(f"score by $-\\log p / C$ ({numbers['method']})")
    axes.legend(frameon=False)
    return figure
