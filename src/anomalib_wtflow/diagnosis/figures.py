"""Figures of a trained model, from the numbers in a diagnosis's JSON. Headless.

Okabe and Ito's colours, line styles and markers are for print and for the colour-blind.
"""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from anomalib_wtflow.diagnosis.certainty import share_interval

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"
KINDS: dict[str, tuple[str, str, str]] = {
    "normal": (BLUE, "-", "o"),
    "anomalous": (ORANGE, "--", "^"),
    "unlabelled": (GREY, "-.", "s"),
}
KIND_NAMES = {"normal": "good", "anomalous": "defective", "unlabelled": "unlabelled"}
"""Kinds as inspectors call them."""


def new_figure(rows: int, columns: int, width: float, height: float, **kwargs: Any) -> tuple[Figure, Any]:
    """Return a figure of ``width`` x ``height`` inches and its panels."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **kwargs)


def name_of(coupling: str) -> str:
    """Name a coupling, as legends do."""
    return "independent (plain rFM)" if coupling == "independent" else coupling


def along_the_flow(flow: dict[str, Any], key: str, label: str, level: float) -> Figure:
    """Draw median and 5 % to 95 % along the scored flow and along each field's ODE.

    ``key`` names what is drawn of the numbers, and ``level`` is where a thin line lies.
    """
    panels = {f"ODE, {name_of(coupling)}": rows for coupling, rows in flow["ode"].items()}
    if key in next(iter(flow["scored"].values())):
        panels = {"as scored: $x_0$ to $y$": flow["scored"], **panels}
    figure, axes = new_figure(1, len(panels), 3.6 * len(panels), 3.4, sharey=True, squeeze=False)
    for panel, (title, rows) in zip(axes[0], panels.items(), strict=True):
        for kind, row in rows.items():
            color, style, _ = KINDS[kind]
            panel.plot(flow["times"], row[key]["median"], color=color, linestyle=style, linewidth=2, label=kind)
            panel.fill_between(flow["times"], row[key]["low"], row[key]["high"], color=color, alpha=0.15, linewidth=0)
        panel.axhline(level, color=GREY, linewidth=0.8, linestyle=(0, (1, 3)))
        panel.set(title=title, xlabel="share of the way")
    axes[0, 0].set_ylabel(label)
    axes[0, 0].legend(frameon=False)
    return figure


def field_over_time(field: dict[str, Any]) -> Figure:
    """Draw norm and local Lipschitz constant of the fields over time."""
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
    """Draw a histogram of image or pixel (``level``) scores, by kind, with the threshold."""
    figure, axes = new_figure(1, 1, 5, 3.4)
    bars = scores[f"{level}_histogram"] or {}
    threshold = scores["threshold" if level == "image" else "pixel_threshold"]
    for kind, (color, style, _) in KINDS.items():
        if kind in bars:
            shape = bars[kind], bars["edges"]
            axes.stairs(*shape, color=color, linestyle=style, linewidth=1.6, label=KIND_NAMES[kind])
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
    """Draw the share of each kind called anomalous, with 95 % intervals and the promise."""
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
