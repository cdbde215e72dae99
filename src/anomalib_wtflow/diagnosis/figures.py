"""Figures of a trained model, from the numbers in a diagnosis's JSON. Headless."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from anomalib_wtflow.diagnosis.style import (
    COUPLING_STYLES,
    GREY,
    KINDS,
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
    figure, axes = new_figure(len(images), 4, 7.4, 1.95 * len(images) + 0.3, squeeze=False)
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
    figure, axes = new_figure(1, 1, 5.2, 3.8)
    for kind, rows in numbers["scores"].items():
        color, _, marker = KINDS[kind]
        axes.scatter(*zip(*rows, strict=True), color=color, marker=marker, s=18, alpha=0.7, label=kind)
    axes.set(xscale="log", xlabel=r"score by the density proxy $-\log q$")
    axes.set_ylabel(f"score by $-\\log p / C$ ({numbers['method']})")
    axes.legend(frameon=False)
    return figure
