"""What each figure of a diagnosis shows, in two sentences with the measured numbers."""

from typing import Any

Words = tuple[str, str]
"""Title and explanation."""


def radius(flow: dict[str, Any]) -> Words:
    """Explain how far features move."""
    medians = {kind: row["radius"]["median"] for kind, row in flow["scored"].items()}
    ends = "; ".join(f"{kind} {median[0]:.2f} to {median[-1]:.2f}" for kind, median in medians.items())
    return "The well and the escape", (
        "The radius of the feature positions (of defective images, those under the defect) along the flow, 1 being the "
        "shell where the noise lives: the median line and the band from 5 % to 95 %. "
        f"The flow that is scored moves the medians so: {ends}; the farther apart they end, the better it separates."
    )


def centripetal(flow: dict[str, Any]) -> Words:
    """Explain where the field points."""
    rows = flow["ode"][flow["trained_coupling"]]
    starts = "; ".join(f"{kind} {row['centripetal']['median'][0]:.2f}" for kind, row in rows.items())
    return "The centripetal field", (
        "The field's component along x on the way of the features, the median line and the band from 5 % to 95 %: -1 "
        "heads straight for the centre, 0 is sideways, above 0 outward. "
        f"At t = 0 the median of the trained field is: {starts}."
    )


def field(numbers: dict[str, Any]) -> Words:
    """Explain how large and how steep the field is."""
    constants = "; ".join(f"{name} {row['lipschitz'][0]:.1f}" for name, row in numbers["couplings"].items())
    return "Size and steepness of the field", (
        "Left, the field's norm on the paths it was trained on; right, its local Lipschitz constant, the largest over "
        f"the positions of an image, mean of {numbers['images']} images: at t = {numbers['t'][0]:.2g} it is "
        f"{constants}. The exact field of data without width would follow 1/t; where a trained network lies below the "
        "line, it smooths the singularity away."
    )


PIXELS: Words = (
    "The pixels and their threshold",
    "Pixels by their score in the anomaly map, those under a defect apart; what lies right of the line is marked. "
    "With the default post-processor the line comes from the largest pixel of each of the good images that the field "
    "was not trained on, so nearly all pixels of good images lie left of it.",
)
