"""What each figure of a diagnosis shows, in two sentences with the measured numbers."""

from collections.abc import Callable
from statistics import mean
from typing import Any

from anomalib_wtflow.diagnosis.style import SHOWN

Words = tuple[str, str]
"""Title and explanation."""


def summary(numbers: dict[str, Any]) -> str:
    """Say what was tested."""
    counts = ", ".join(f"{count} {SHOWN[kind]}" for kind, count in numbers["scores"]["images"].items())
    products = numbers.get("products", {})
    names = f" of {len(products)} products; AUROCs are their mean" if products else ""
    return f"{numbers['checkpoint']} on test images: {counts}{names}."


def model(name: str, numbers: dict[str, Any]) -> Words:
    """Explain a figure of a trained model."""
    return _MODEL[name](numbers)


def toy(name: str, numbers: dict[str, Any]) -> Words:
    """Explain a figure of the drawn data."""
    return _TOY[name](numbers)


def _radius(numbers: dict[str, Any]) -> Words:
    rows = numbers["flow"]["scored"]
    medians = {kind: row["radius"]["median"] for kind, row in rows.items()}
    ends = "; ".join(f"{kind} {median[0]:.2f} to {median[-1]:.2f}" for kind, median in medians.items())
    return "The well and the escape", (
        "The radius of the feature positions (of defective images, those under the defect) along the flow, 1 being the "
        "shell where the noise lives: the median line and the band from 5 % to 95 %. "
        f"The flow that is scored moves the medians so: {ends}; the farther apart they end, the better it separates."
    )


def _centripetal(numbers: dict[str, Any]) -> Words:
    flow = numbers["flow"]
    coupling = flow["trained_coupling"]
    rows, predicted = flow["ode"][coupling], flow["predicted_start"][coupling]
    starts = "; ".join(f"{kind} {row['centripetal']['median'][0]:.2f}" for kind, row in rows.items())
    verdict = "where -1 heads straight for the centre."
    if predicted is not None and "normal" in rows:
        share = rows["normal"]["centripetal"]["median"][0] / predicted
        verdict = f"and for normal data the coupling implies {predicted:.2f} (star): this field has {share:.0%} of it"
        verdict += (
            ", so it is far from trained, and the score is close to that of the features alone." if share < 0.5 else "."
        )
    return "The centripetal field", (
        f"The trained field's component along x at t = 0 is, in the median: {starts}; {verdict} "
        "Below, the cosine of the field to the optimal-transport direction, which is to noise that an assignment "
        "within the image gives."
    )


def _field(numbers: dict[str, Any]) -> Words:
    field = numbers["field"]
    constants = "; ".join(f"{name} {row['lipschitz'][0]:.1f}" for name, row in field["couplings"].items())
    return "Size and steepness of the field", (
        "Left, the field's norm on the paths it was trained on; right, its local Lipschitz constant, the largest over "
        f"the positions of an image, mean of {field['images']} images: at t = {field['t'][0]:.2g} it is {constants}. "
        "The exact field of data without width would follow 1/t; where a trained network lies below the line, it "
        "smooths the singularity away."
    )


def _histograms(numbers: dict[str, Any]) -> Words:
    del numbers
    return "The score and its threshold", (
        "Images (left) and pixels (right) by their score; what lies right of the line is called anomalous. "
        "With the default post-processor the lines come from good images that the field was not trained on, so that "
        "good images lie right of the left line at the rate that was asked for, give or take the draw."
    )


def _log_density(numbers: dict[str, Any]) -> Words:
    proxy, exact = numbers["log_density"]["auroc"]
    measured = "." if proxy is None else f": image AUROC {proxy:.4f} by the proxy, {exact:.4f} by the log-density."
    return "Density proxy and log-density", (
        "Each point is an image: across, the score of the density proxy; up, the score of the log-density along the "
        "ODE, turned into an image score in the same way. "
        f"The second is exact for the learnt flow, up to its solver and divergence, and costs far more{measured}"
    )


def _trajectories(numbers: dict[str, Any]) -> Words:
    scores = ", ".join(f"{name} {row['auroc']:.3f}" for name, row in numbers["trajectories"].items())
    return "Trajectories under three couplings", (
        "Above, which noise each normal point is carried to; below, where the field learnt from such pairs carries "
        "normal points (blue) and anomalous ones (orange, dashed), hollow after one step. "
        f"Normal points are drawn inwards and anomalous ones leave: AUROC of one step {scores}."
    )


def _well(numbers: dict[str, Any]) -> Words:
    row = numbers["well_and_escape"]["subspace"]
    plain, worst = mean(row["independent"]["auroc"]), mean(row["worst_of_two"]["auroc"])
    whitened = mean(row["control_whitened"])
    return "The well and the escape, by coupling", (
        "Above, the mean radius after one step, below, the AUROC, a marker a seed: the random couplings draw normal "
        "points farther in than anomalous ones, antipodal carries both through the centre to the other side. "
        f"What worst transport adds to plain rFM on the subspace is {worst - plain:+.4f} AUROC (worst_of_two less "
        f"independent, mean of {len(row['control'])} seeds), and whitening without a flow has {whitened:.4f}, against "
        f"{plain:.4f}."
    )


def _components(numbers: dict[str, Any]) -> Words:
    rows = numbers["centripetal"]
    return "The centripetal component at the start", (
        "Markers are measured, lines are -(1 + c) in closed form, and the grey band is what an assignment in batches "
        f"of {rows['batch']} can reach. "
        f"In high dimension all but antipodal come close to -1: at D = {rows['D'][-1]} even optimal coupling has "
        f"{rows['optimal']['mean'][-1]:.2f}, and heads for the centre too."
    )


def _lipschitz(numbers: dict[str, Any]) -> Words:
    case = numbers["lipschitz"]["finite data, independent"]
    return "The singularity at the initial time", (
        f"The exact field's Lipschitz constant on its paths grows with the exponent {case['exponent']:.2f} where the "
        "data have no width in some direction (finite sets, a plane), and not at all where they have width in all. "
        "Worst transport tames it where it is a map (antipodal), at the price of a new singularity where all paths "
        "cross, at t = 1/2; worst_of_two leaves noise across the data, and with it the exponent."
    )


def _trivial(numbers: dict[str, Any]) -> Words:
    rows = numbers["trivial_field"]
    return "The trivial field", (
        "The exact fields of two data sets of fixed radius become indistinguishable as the dimension grows "
        f"(exponent {rows['inside']['exponent']:.2f}). "
        f"On the shell, where normalised features are, they do not (exponent {rows['shell']['exponent']:.2f})."
    )


_MODEL: dict[str, Callable[[dict[str, Any]], Words]] = {
    "radius": _radius,
    "centripetal": _centripetal,
    "field": _field,
    "histograms": _histograms,
    "log_density": _log_density,
}
_TOY: dict[str, Callable[[dict[str, Any]], Words]] = {
    "trajectories": _trajectories,
    "well_and_escape": _well,
    "centripetal": _components,
    "lipschitz": _lipschitz,
    "trivial_field": _trivial,
}
