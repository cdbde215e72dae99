"""Figures of a trained model, from the numbers in a diagnosis's JSON. Headless.

Okabe and Ito's colours, line styles and markers are for print and for the colour-blind.
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from anomalib_wtflow.diagnosis.certainty import share_interval

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"
KINDS: dict[str, tuple[str, str, str]] = {
    "normal": (BLUE, "-", "o"),
    "anomalous": (ORANGE, "--", "^"),
    "unlabelled": (GREY, "-.", "s"),
}
SHOWN = {"normal": "good", "anomalous": "defective", "unlabelled": "unlabelled"}
"""Kinds as inspectors call them."""


def new_figure(rows: int, columns: int, width: float, height: float, **kwargs: Any) -> tuple[Figure, Any]:
    """Return a figure of ``width`` x ``height`` inches and its panels."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **kwargs)


def name_of(coupling: str) -> str:
    """Name a coupling, as legends do."""
    return "independent (plain rFM)" if coupling == "independent" else coupling


def _bands(axes: Axes, x: Sequence[float], rows: dict[str, Any], key: str) -> None:
    """Draw each kind's median, and its 5 % and 95 % quantiles around it."""
    for kind, row in rows.items():
        color, style, _ = KINDS[kind]
        axes.plot(x, row[key]["median"], color=color, linestyle=style, linewidth=2, label=kind)
        axes.fill_between(x, row[key]["low"], row[key]["high"], color=color, alpha=0.15, linewidth=0)


def radius_along_the_flow(flow: dict[str, Any]) -> Figure:
    """Radius over time: as scored, and along the ODE of each field; median, and 5 % to 95 % of the positions."""
    count = 1 + len(flow["ode"])
    figure, axes = new_figure(1, count, 3.6 * count, 3.4, sharey=True)
    titles = ["as scored: $x_0$ to $y$", *(f"ODE, {name_of(coupling)}" for coupling in flow["ode"])]
    for panel, title, rows in zip(axes, titles, [flow["scored"], *flow["ode"].values()], strict=True):
        _bands(panel, flow["times"], rows, "radius")
        panel.axhline(1, color=GREY, linewidth=0.8, linestyle=(0, (1, 3)))
        panel.set(title=title, xlabel="time $t$")
        panel.set_ylim(bottom=0)
    axes[0].set(xlabel="share of the way", ylabel=r"radius $\|x\|/\sqrt{C}$")
    axes[0].legend(frameon=False)
    return figure


def centripetal(flow: dict[str, Any]) -> Figure:
    """Centripetal component of each field along its ODE."""
    ode = flow["ode"]
    figure, axes = new_figure(1, len(ode), 4.2 * len(ode), 3.4, sharey=True, squeeze=False)
    for panel, (coupling, rows) in zip(axes[0], ode.items(), strict=True):
        _bands(panel, flow["times"], rows, "centripetal")
        panel.axhline(0, color=GREY, linewidth=0.8)
        panel.set(title=name_of(coupling), xlabel="time $t$")
        panel.legend(frameon=False)
    axes[0, 0].set_ylabel(r"$\langle v, x\rangle / \|x\|^2$" + "\n(below 0: towards the centre)")
    medians = [value for rows in ode.values() for row in rows.values() for value in row["centripetal"]["median"]]
    axes[0, 0].set_ylim(min(-2.2, 1.2 * min(medians)), max(1.0, 1.2 * max(medians)))
    return figure


def field_over_time(field: dict[str, Any]) -> Figure:
    """Norm and local Lipschitz constant of the fields over time."""
    figure, (left, right) = new_figure(1, 2, 8.4, 3.4)
    for coupling, row in field["couplings"].items():
        color, style = (GREY, ":") if coupling == "independent" else (BLUE, "-")
        for axes, key in ((left, "norm"), (right, "lipschitz")):
            axes.plot(field["t"], row[key], color=color, linestyle=style, marker="o", ms=4, label=name_of(coupling))
    right.plot(field["t"], [1 / t for t in field["t"]], color="black", linewidth=0.8, label="$1/t$")
    left.set(xscale="log", xlabel="time $t$", ylabel=r"$\|v\|/\sqrt{C}$", ylim=(0, None))
    right.set(xscale="log", yscale="log", xlabel="time $t$")
    right.set_ylabel(r"local Lipschitz constant $\|\partial v/\partial x\|_2$")
    for axes in (left, right):
        axes.legend(frameon=False)
    return figure


def histogram(scores: dict[str, Any], level: str, unit: str = "") -> Figure:
    """Histogram of the scores of the images or of the pixels (the ``level``), by kind, with the threshold."""
    figure, axes = new_figure(1, 1, 5, 3.4)
    bars = scores[f"{level}_histogram"] or {}
    threshold = scores["threshold" if level == "image" else "pixel_threshold"]
    for kind, (color, style, _) in KINDS.items():
        if kind in bars:
            shape = bars[kind], bars["edges"]
            axes.stairs(*shape, color=color, linestyle=style, linewidth=1.6, label=SHOWN[kind])
            axes.stairs(*shape, color=color, fill=True, alpha=0.2)
    if threshold is not None:
        axes.axvline(threshold, color="black", linewidth=1.2, label="threshold")
    axes.set(title=f"Scores of the {level}s", xlabel=f"anomaly score{unit}", ylabel=f"share of the {level}s of a kind")
    axes.set(xscale="log", yscale="linear" if level == "image" else "log")
    # Scores within a decade have no power of ten to show.
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(framealpha=0.9, edgecolor="none")
    return figure


def called_by_kind(scores: dict[str, Any]) -> Figure:
    """Share of the images of each kind that is called anomalous, with 95 % intervals; what is promised of good ones."""
    kinds, promised = scores["kinds"], scores["promised_rate"]
    figure, axes = new_figure(1, 1, 5, max(3.4, 1.2 + 0.36 * len(kinds)))
    for row, (kind, counts) in enumerate(kinds.items()):
        share, (low, high) = counts["called"] / counts["images"], share_interval(counts["called"], counts["images"])
        color, _, marker = KINDS["normal" if kind == "good" else "unlabelled" if kind == "unlabelled" else "anomalous"]
        axes.barh(row, share, color=color, alpha=0.35)
        axes.errorbar(share, row, xerr=[[share - low], [high - share]], color=color, marker=marker, capsize=3)
    if "good" in kinds and promised is not None:
        axes.plot([promised] * 2, [-0.5, 0.5], color="black", linewidth=2)
        axes.annotate("promised", (promised, 0.5), (4, -2), textcoords="offset points", fontsize=8, va="top")
    labels = [f"{kind}\n{counts['called']} of {counts['images']}" for kind, counts in kinds.items()]
    axes.set_yticks(range(len(kinds)), labels, parse_math=False)
    axes.set(xlim=(0, 1.04), ylim=(len(kinds) - 0.4, -0.6), xlabel="share called anomalous (bar) and its 95 % interval")
    axes.set_title("Called anomalous, by kind")
    return figure
