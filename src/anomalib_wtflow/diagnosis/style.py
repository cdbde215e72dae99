"""What the figures share: Okabe and Ito's colours, line styles and markers, for print and for the colour-blind."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#555555"
KINDS: dict[str, tuple[str, str, str]] = {
    "normal": (BLUE, "-", "o"),
    "anomalous": (ORANGE, "--", "^"),
    "unlabelled": (GREY, "-.", "s"),
}
SHOWN = {"normal": "good", "anomalous": "defective", "unlabelled": "unlabelled"}
"""Kinds as inspectors call them."""
COUPLING_STYLES: dict[str, tuple[str, str, str]] = {
    "independent": (GREY, ":", "o"),
    "optimal": (GREEN, "-.", "s"),
    "worst": (PURPLE, "--", "v"),
    "worst_of_two": (BLUE, "-", "^"),
    "antipodal": (ORANGE, (0, (5, 1)), "D"),  # type: ignore[dict-item]
}


def new_figure(rows: int, columns: int, width: float, height: float, **kwargs: Any) -> tuple[Figure, Any]:
    """Return a figure of ``width`` x ``height`` inches and its panels."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **kwargs)


def name_of(coupling: str) -> str:
    """Name a coupling, as legends do."""
    return "independent (plain rFM)" if coupling == "independent" else coupling


def band(axes: Axes, x: Sequence[float], series: dict[str, list[float]], label: str, color: str, style: Any) -> None:
    """Draw a series' median, and its 5 % and 95 % quantiles around it."""
    axes.plot(x, series["median"], color=color, linestyle=style, linewidth=2, label=label)
    axes.fill_between(x, series["low"], series["high"], color=color, alpha=0.15, linewidth=0)
