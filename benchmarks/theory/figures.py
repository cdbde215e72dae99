"""Figures of the small experiments on drawn data. Headless."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from anomalib_wtflow.diagnosis.figures import BLUE, GREY, KINDS, ORANGE, name_of, new_figure

GREEN, PURPLE, SKY = "#009E73", "#CC79A7", "#56B4E9"
COUPLING_STYLES: dict[str, tuple[str, Any, str]] = {
    "independent": (GREY, ":", "o"),
    "optimal": (GREEN, "-.", "s"),
    "worst": (PURPLE, "--", "v"),
    "worst_of_two": (BLUE, "-", "^"),
    "antipodal": (ORANGE, (0, (5, 1)), "D"),
}


def plot_trajectories(numbers: dict[str, Any]) -> Figure:
    """Coupled pairs above, flow of normal and anomalous points below, a column a coupling."""
    figure, axes = new_figure(2, len(numbers), 3.4 * len(numbers), 6.2, sharex=True, sharey=True)
    for (upper, lower), (coupling, row) in zip(axes.T, numbers.items(), strict=True):
        data, noise = (np.asarray(points) for points in row["pairs"])
        for start, end in zip(data, noise, strict=True):
            upper.plot(*zip(start, end, strict=True), color=GREY, linewidth=0.5)
        upper.plot(*noise.T, "x", color="black", ms=4, label="noise")
        upper.plot(*data.T, "o", color=BLUE, ms=4, label="data")
        upper.set_title(name_of(coupling))
        for kind in ("normal", "anomalous"):
            color, style, marker = KINDS[kind]
            path = np.asarray(row[f"{kind}_path"])
            for k in range(path.shape[1]):
                lower.plot(*path[:, k].T, color=color, linestyle=style, linewidth=0.7)
            lower.plot(*path[0].T, marker, color=color, ms=4, label=f"{kind}: start")
            lower.plot(
                *np.asarray(row[f"{kind}_end"]).T, marker, mfc="white", mec=color, ms=5, label=f"{kind}: after one step"
            )
        lower.plot(0, 0, "k+", ms=10)
        lower.set_title(f"AUROC of one step: {row['auroc']:.3f}", fontsize=10)
        for panel in (upper, lower):
            panel.set(aspect="equal", xlim=(-5, 5), ylim=(-4.2, 4.2))
    axes[0, 0].legend(frameon=False, fontsize=8, loc="upper left")
    axes[1, 0].legend(frameon=False, fontsize=7, loc="lower right")
    axes[0, 0].set_ylabel("which noise goes with which data")
    axes[1, 0].set_ylabel("where the learnt flow carries points")
    return figure


def plot_well_and_escape(numbers: dict[str, Any]) -> Figure:
    """Radius after one step (upper row) and AUROC (lower row), a column a data set; a dot a seed."""
    figure, axes = new_figure(2, len(numbers), 4.4 * len(numbers), 5.6, sharex=True, squeeze=False)
    for (upper, lower), (data, row) in zip(axes.T, numbers.items(), strict=True):
        couplings = [name for name in row if not name.startswith("control")]
        for index, coupling in enumerate(couplings):
            for kind, offset in (("normal", -0.12), ("anomalous", 0.12)):
                color, _, marker = KINDS[kind]
                values = row[coupling][f"{kind}_radius"]
                label = kind if index == 0 else None
                upper.plot([index + offset] * len(values), values, marker, color=color, mfc="none", label=label)
            for key, marker, color, offset in (("auroc", "s", GREEN, -0.12), ("late_auroc", "D", PURPLE, 0.12)):
                values = row[coupling][key]
                label = {"auroc": "from $t_s$ = 0", "late_auroc": "from $t_s$ = 0.3"}[key] if index == 0 else None
                lower.plot([index + offset] * len(values), values, marker, color=color, mfc="none", label=label)
        upper.axhline(1, color=GREY, linewidth=0.8, linestyle=(0, (1, 3)))
        lower.axhline(np.mean(row["control"]), color="black", linewidth=1, linestyle="--", label="no flow")
        lower.axhline(
            np.mean(row["control_whitened"]), color="black", linewidth=1, linestyle=":", label="no flow, whitened"
        )
        upper.set_title({"arc": "arc, D = 2", "subspace": "subspace, D = 128"}.get(data, data))
        upper.set_ylim(bottom=0)
        lower.set(ylim=(-0.03, 1.03), xticks=range(len(couplings)))
        lower.set_xticklabels([name.replace("_", "_\n", 1) for name in couplings], fontsize=8)
    axes[0, 0].set_ylabel(r"mean radius after one step")
    axes[1, 0].set_ylabel("AUROC")
    axes[0, 0].legend(frameon=False)
    axes[1, 0].legend(frameon=False, fontsize=8, loc="lower left")
    return figure


def plot_centripetal(numbers: dict[str, Any]) -> Figure:
    """Centripetal component at t = 0 against the dimension, measured (markers) and predicted (lines)."""
    figure, axes = new_figure(1, 1, 6.0, 3.8)
    for coupling, (color, style, marker) in COUPLING_STYLES.items():
        if coupling in numbers:
            row = numbers[coupling]
            axes.plot(numbers["D"], row["mean"], marker, color=color, label=name_of(coupling), mfc="none")
            if row["predicted"]:
                axes.plot(numbers["D"], row["predicted"], color=color, linestyle=style)
    bound = np.asarray(numbers["bound"])
    axes.fill_between(numbers["D"], -1 - bound, -1 + bound, color=GREY, alpha=0.15, linewidth=0)
    axes.set(xscale="log", xlabel="dimension $D$", ylim=(-2.2, 0.1))
    axes.set_ylabel(r"$E\langle u_0, x_0\rangle / \|x_0\|^2$ at $t = 0$")
    axes.legend(frameon=False, fontsize=8)
    return figure


def plot_lipschitz(numbers: dict[str, Any]) -> Figure:
    """Lipschitz constant of exact fields against time."""
    figure, axes = new_figure(1, 1, 6.4, 3.8)
    styles = zip(
        (BLUE, SKY, ORANGE, GREEN, PURPLE), ("-", "--", ":", "-.", (0, (5, 1))), (3.6, 1.8, 2, 1.8, 1.8), strict=True
    )
    for (case, row), (color, style, width) in zip(numbers.items(), styles, strict=True):
        label = f"{case}: $t^{{{row['exponent']:.2f}}}$"
        axes.plot(row["t"], row["lipschitz"], color=color, linestyle=style, linewidth=width, label=label)
    axes.set(xscale="log", yscale="log", xlabel="time $t$", ylabel="Lipschitz constant on the paths")
    axes.legend(frameon=False, fontsize=8, title="exponent for $t < 0.03$", title_fontsize=8)
    return figure


def plot_trivial_field(numbers: dict[str, Any]) -> Figure:
    """How much two data sets' exact fields differ, against the dimension."""
    figure, axes = new_figure(1, 1, 6.0, 3.8)
    for case, color, style, marker, label in (
        ("inside", BLUE, "-", "o", "data inside the shell (radius fixed)"),
        ("shell", ORANGE, "--", "^", r"data on the shell (radius $\sqrt{D}$)"),
    ):
        row = numbers[case]
        text = f"{label}: $D^{{{row['exponent']:.2f}}}$"
        axes.plot(numbers["D"], row["ratio"], color=color, linestyle=style, marker=marker, label=text)
    axes.set(xscale="log", yscale="log", xlabel="dimension $D$", ylabel=r"$E\|u_A - u_B\| \,/\, E\|u_A\|$")
    axes.legend(frameon=False, fontsize=9)
    return figure
