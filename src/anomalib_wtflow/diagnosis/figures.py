"""Figures of a diagnosis, from the numbers in its JSON. Headless; readable in print and for the colour-blind.

Kinds and couplings differ by colour (Okabe and Ito's) and by line style or marker.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

BLUE, ORANGE, GREEN, PURPLE, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#555555"
KINDS: dict[str, tuple[str, str, str]] = {
    "normal": (BLUE, "-", "o"),
    "anomalous": (ORANGE, "--", "^"),
    "unlabelled": (GREY, "-.", "s"),
}
COUPLING_STYLES: dict[str, tuple[str, str, str]] = {
    "independent": (GREY, ":", "o"),
    "optimal": (GREEN, "-.", "s"),
    "optimal_image": (GREEN, "--", "D"),
    "worst": (PURPLE, "--", "v"),
    "worst_image": (PURPLE, "-.", "<"),
    "worst_local": (PURPLE, ":", ">"),
    "worst_of_two": (BLUE, "-", "^"),
    "antipodal": (ORANGE, (0, (5, 1)), "D"),  # type: ignore[dict-item]
}


def _figure(rows: int, columns: int, width: float, height: float, **kwargs: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **kwargs)


def _name(coupling: str) -> str:
    return "independent (plain rFM)" if coupling == "independent" else coupling


def _band(axes: Axes, x: Sequence[float], series: dict[str, list[float]], label: str, color: str, style: Any) -> None:
    axes.plot(x, series["median"], color=color, linestyle=style, linewidth=2, label=label)
    axes.fill_between(x, series["low"], series["high"], color=color, alpha=0.15, linewidth=0)


# A trained model -----------------------------------------------------------------------------------------------------


def radius_along_the_flow(flow: dict[str, Any]) -> Figure:
    """Radius over time: as scored, and along the ODE of each field; median, and 5 % to 95 % of the positions."""
    couplings = flow["couplings"]
    figure, axes = _figure(1, 1 + len(couplings), 3.6 * (1 + len(couplings)), 3.4, sharey=True)
    for kind, row in flow["scored"].items():
        color, style, _ = KINDS[kind]
        _band(axes[0], row["tau"], row["radius"], kind, color, style)
    axes[0].set(title="as scored: $x_0$ to $y$", xlabel="share of the way", ylabel=r"radius $\|x\|/\sqrt{C}$")
    for panel, coupling in zip(axes[1:], couplings, strict=True):
        for kind, row in flow["ode"][coupling].items():
            color, style, _ = KINDS[kind]
            _band(panel, flow["ode_times"], row["radius"], kind, color, style)
        panel.set(title=f"ODE, {_name(coupling)}", xlabel="time $t$")
    for panel in axes:
        panel.axhline(1, color=GREY, linewidth=0.8, linestyle=(0, (1, 3)))
        panel.set_ylim(bottom=0)
    axes[0].legend(frameon=False)
    return figure


def centripetal(flow: dict[str, Any]) -> Figure:
    """Centripetal component and cosine to the optimal-transport direction along the ODE."""
    couplings = flow["couplings"]
    figure, axes = _figure(2, len(couplings), 4.2 * len(couplings), 5.6, sharex=True, sharey="row", squeeze=False)
    for column, coupling in enumerate(couplings):
        for kind, row in flow["ode"][coupling].items():
            color, style, _ = KINDS[kind]
            _band(axes[0, column], flow["ode_times"], row["centripetal"], kind, color, style)
            _band(axes[1, column], flow["ode_times"], row["cosine_to_optimal"], kind, color, style)
        predicted = flow["predicted_start"][coupling]
        if predicted is not None:
            axes[0, column].plot(0, predicted, "k*", markersize=11, clip_on=False, label=f"$-(1+c)$ = {predicted:.2f}")
        axes[0, column].set_title(_name(coupling))
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
    figure, (left, right) = _figure(1, 2, 8.4, 3.4)
    for coupling, row in field["couplings"].items():
        color, style, marker = COUPLING_STYLES[coupling]
        for axes, key in ((left, "norm"), (right, "lipschitz")):
            axes.plot(field["t"], row[key], color=color, linestyle=style, marker=marker, ms=4, label=_name(coupling))
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
    figure, panels = _figure(1, 2, 8.4, 3.4)
    for axes, level, threshold in zip(panels, ("image", "pixel"), ("threshold", "pixel_threshold"), strict=True):
        histogram = scores[f"{level}_histogram"] or {}
        for kind, (color, style, _) in KINDS.items():
            if kind in histogram:
                axes.stairs(
                    histogram[kind], histogram["edges"], color=color, linestyle=style, linewidth=1.6, label=kind
                )
                axes.stairs(histogram[kind], histogram["edges"], color=color, fill=True, alpha=0.2)
        if scores[threshold] is not None:
            axes.axvline(scores[threshold], color="black", linewidth=1.2, label="threshold")
        auroc = scores[f"{level}_auroc"]
        axes.set_title(f"{level}s" + ("" if auroc is None else f", AUROC {auroc:.4f}"))
        axes.set(xscale="log", xlabel=r"$-\log q$" + (" (mean of the top pixels)" if level == "image" else ""))
        axes.set_ylabel(f"share of the {level}s of a kind")
    panels[0].legend(frameon=False)
    panels[1].set_yscale("log")
    return figure


def gallery(images: Sequence[Any], threshold: float | None) -> Figure:
    """Image, ground truth, anomaly map to twice the pixel threshold, and predicted mask, a row an image."""
    figure, axes = _figure(len(images), 4, 7.4, 1.95 * len(images) + 0.3, squeeze=False)
    top = max(float(image.anomaly_map.max()) for image in images)
    scale = 2 * threshold if threshold else top
    for row, image in zip(axes, images, strict=True):
        height, width = image.anomaly_map.shape
        with Image.open(image.path) as picture:
            shown = np.asarray(picture.convert("RGB").resize((width, height)))
        row[0].imshow(shown)
        if image.mask is None:
            row[1].imshow(np.ones((height, width)), cmap="gray", vmin=0, vmax=1)
            row[1].text(0.5, 0.5, "no mask", ha="center", va="center", transform=row[1].transAxes)
        else:
            row[1].imshow(image.mask, cmap="gray", vmin=0, vmax=1)
        heat = row[2].imshow(image.anomaly_map, cmap="cividis", vmin=0, vmax=scale)
        row[3].imshow(shown)
        if image.called_mask is not None and image.called_mask.any():
            # A frame of zeros, so that a mask that reaches the edge, or is everywhere, has an outline there too.
            framed = np.pad(image.called_mask.numpy().astype(float), 1)
            x, y = np.arange(-1, width + 1), np.arange(-1, height + 1)
            row[3].contour(x, y, framed, [0.5], colors="black", linewidths=3.2)
            row[3].contour(x, y, framed, [0.5], colors="#F0E442", linewidths=1.6)
            row[3].set(xlim=(-1.5, width + 0.5), ylim=(height + 0.5, -1.5))
        for cell in row:
            cell.set(xticks=[], yticks=[])
        row[0].set_ylabel(_verdict(image), fontsize=8, parse_math=False)  # a file name may hold a $
    for cell, title in zip(axes[0], ("image", "ground truth", "anomaly map", "predicted mask"), strict=True):
        cell.set_title(title, fontsize=10)
    figure.colorbar(heat, ax=axes, location="bottom", shrink=0.4, aspect=30, label=r"anomaly map ($-\log q$)", pad=0.01)
    return figure


def _verdict(image: Any) -> str:
    names = {(False, True): "FALSE ALARM", (True, False): "MISS", (True, True): "found", (False, False): "passed"}
    verdict = names.get((image.anomalous, image.called), "unlabelled" if image.anomalous is None else "no threshold")
    place = "/".join(image.path.replace("\\", "/").split("/")[-2:])
    return f"{verdict}\n{place[-24:]}\nscore {image.score:.3g}"


def log_density(numbers: dict[str, Any]) -> Figure:
    """Score by the density proxy against score by the log-density."""
    figure, axes = _figure(1, 1, 5.2, 3.8)
    for kind, rows in numbers["scores"].items():
        color, _, marker = KINDS[kind]
        axes.scatter(*zip(*rows, strict=True), color=color, marker=marker, s=18, alpha=0.7, label=kind)
    axes.set(xscale="log", xlabel=r"score by the density proxy $-\log q$")
    axes.set_ylabel(f"score by $-\\log p / C$ ({numbers['method']})")
    axes.legend(frameon=False)
    return figure


# Drawn data ----------------------------------------------------------------------------------------------------------


def toy_trajectories(numbers: dict[str, Any]) -> Figure:
    """Coupled pairs above, flow of normal and anomalous points below, a column a coupling."""
    figure, axes = _figure(2, len(numbers), 3.4 * len(numbers), 6.2, sharex=True, sharey=True)
    for (upper, lower), (coupling, row) in zip(axes.T, numbers.items(), strict=True):
        data, noise = (np.asarray(points) for points in row["pairs"])
        for start, end in zip(data, noise, strict=True):
            upper.plot(*zip(start, end, strict=True), color=GREY, linewidth=0.5)
        upper.plot(*noise.T, "x", color="black", ms=4, label="noise")
        upper.plot(*data.T, "o", color=BLUE, ms=4, label="data")
        upper.set_title(_name(coupling))
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


def toy_well_and_escape(numbers: dict[str, Any]) -> Figure:
    """Radius after one step (upper row) and AUROC (lower row), a column a data set; a dot a seed."""
    figure, axes = _figure(2, len(numbers), 4.4 * len(numbers), 5.6, sharex=True, squeeze=False)
    for (upper, lower), (data, row) in zip(axes.T, numbers.items(), strict=True):
        couplings = [name for name in row if not name.startswith("control")]
        for index, coupling in enumerate(couplings):
            for kind, offset in (("normal", -0.12), ("anomalous", 0.12)):
                color, _, marker = KINDS[kind]
                values = row[coupling][f"{kind}_radius"]
                label = kind if index == 0 else None
                upper.plot([index + offset] * len(values), values, marker, color=color, mfc="none", label=label)
            for key, marker, color, offset in (("auroc", "s", GREEN, -0.12), ("auroc_start_0.3", "D", PURPLE, 0.12)):
                values = row[coupling][key]
                label = {"auroc": "from $t_s$ = 0", "auroc_start_0.3": "from $t_s$ = 0.3"}[key] if index == 0 else None
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


def toy_centripetal(numbers: dict[str, Any]) -> Figure:
    """Centripetal component at t = 0 against the dimension, measured (markers) and predicted (lines)."""
    figure, axes = _figure(1, 1, 6.0, 3.8)
    for coupling, (color, style, marker) in COUPLING_STYLES.items():
        if coupling in numbers:
            row = numbers[coupling]
            axes.plot(numbers["D"], row["mean"], marker, color=color, label=_name(coupling), mfc="none")
            if row["predicted"]:
                axes.plot(numbers["D"], row["predicted"], color=color, linestyle=style)
    bound = np.asarray(numbers["bound"])
    axes.fill_between(numbers["D"], -1 - bound, -1 + bound, color=GREY, alpha=0.15, linewidth=0)
    axes.set(xscale="log", xlabel="dimension $D$", ylim=(-2.2, 0.1))
    axes.set_ylabel(r"$E\langle u_0, x_0\rangle / \|x_0\|^2$ at $t = 0$")
    axes.legend(frameon=False, fontsize=8)
    return figure


def toy_lipschitz(numbers: dict[str, Any]) -> Figure:
    """Lipschitz constant of exact fields against time."""
    figure, axes = _figure(1, 1, 6.4, 3.8)
    styles = zip(
        (BLUE, SKY, ORANGE, GREEN, PURPLE), ("-", "--", ":", "-.", (0, (5, 1))), (3.6, 1.8, 2, 1.8, 1.8), strict=True
    )
    for (case, row), (color, style, width) in zip(numbers.items(), styles, strict=True):
        label = f"{case}: $t^{{{row['exponent']:.2f}}}$"
        axes.plot(row["t"], row["lipschitz"], color=color, linestyle=style, linewidth=width, label=label)
    axes.set(xscale="log", yscale="log", xlabel="time $t$", ylabel="Lipschitz constant on the paths")
    axes.legend(frameon=False, fontsize=8, title="exponent for $t < 0.03$", title_fontsize=8)
    return figure


def toy_trivial_field(numbers: dict[str, Any]) -> Figure:
    """How much two data sets' exact fields differ, against the dimension."""
    figure, axes = _figure(1, 1, 6.0, 3.8)
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
