"""The answer on the first screen, in words, by rules on a diagnosis's JSON alone."""

from collections.abc import Mapping
from typing import NamedTuple

from anomalib_wtflow.conformal import images_needed
from anomalib_wtflow.diagnosis.figures import KIND_NAMES
from anomalib_wtflow.diagnosis.scoring import Numbers

LEVELS = ("Yes", "With care", "Not known", "No")
"""How answers begin, mildest first."""


class Verdict(NamedTuple):
    """The answer in a few words, a sentence or two on each question, and what to do next."""

    answer: str
    findings: dict[str, str]
    advice: list[str]

    @property
    def level(self) -> str:
        """Return the first words of the answer as a CSS class of the page."""
        return LEVELS[_severity(self.answer)].lower().replace(" ", "-")


def verdict(scores: Numbers) -> Verdict:
    """Judge the numbers of the scores, of one product or of all."""
    findings = {
        "Does it tell defective parts from good ones?": _separation(scores),
        "Does it reject good parts?": _false_alarms(scores),
        "Does it miss defects?": _misses(scores),
        "Is the flow worth its cost?": _flow(scores),
    }
    return Verdict(answer(scores), findings, advice(scores))


def answer(scores: Numbers) -> str:
    """Answer whether the model can be trusted on parts like these: the first rule that holds."""
    images, misses, auroc = scores["images"], scores["misses"] or 0, scores["image_auroc"]
    low = (scores["image_auroc_interval"] or [1])[0]
    rules = {
        "No: it rejects more good parts than it promises.": _too_many_false_alarms(scores),
        "No: it is no better than chance.": auroc is not None and auroc <= 0.5,
        "No: it misses most of the defective parts.": 2 * misses > images.get("anomalous", 0),
        "Not known: there are no test images of parts known to be good.": not images.get("normal"),
        "Not known: there are no test images of defective parts.": not images.get("anomalous"),
        "Not known: these test images do not tell it from chance.": low <= 0.5,
        "Not known: the model has no threshold.": scores["threshold"] is None,
        "With care: it misses some of the defective parts.": misses > 0,
        "With care: its threshold promises no false-alarm rate.": scores["promised_rate"] is None,
        "With care: its threshold comes from too few images.": _too_few_calibration_images(scores),
        "Yes, on parts like these.": True,
    }
    return next(text for text, holds in rules.items() if holds)


def overall(scores: Numbers, products: Mapping[str, Numbers]) -> str:
    """Answer for all products: that of the worst, by name, if worse than for all together."""
    texts = {name: answer(row) for name, row in products.items()}
    whole = answer(scores)
    worst = max(texts.values(), key=_severity, default=whole)
    if _severity(worst) <= _severity(whole):
        return whole
    level, reason = worst.split(":")
    return f"{level} for {', '.join(name for name, text in texts.items() if text == worst)}:{reason}"


def _severity(text: str) -> int:
    return [text.startswith(level) for level in LEVELS].index(True)


def _too_many_false_alarms(scores: Numbers) -> bool:
    """Return whether more good images are rejected than chance explains."""
    band = scores["false_alarm_band"]
    return band is not None and scores["false_alarms"] is not None and scores["false_alarms"] > band[1]


def _too_few_calibration_images(scores: Numbers) -> bool:
    """Return whether the threshold promises a higher rate than requested."""
    asked, promised = scores["asked_rate"], scores["promised_rate"]
    return asked is not None and promised is not None and promised > asked * (1 + 1e-5)  # float32, six digits


def _separation(scores: Numbers) -> str:
    good, bad = (scores["images"].get(kind, 0) for kind in ("normal", "anomalous"))
    if scores["image_auroc"] is None:
        return f"Not known: that needs good and defective test images, and there are {good} and {bad}."
    low, high = scores["image_auroc_interval"]
    return (
        f"Image AUROC {scores['image_auroc']:.4f} (95 % interval {low:.3f} to {high:.3f}), from {good} good and {bad} "
        "defective images: so likely is it that a defective part scores above a good one."
    )


def _false_alarms(scores: Numbers) -> str:
    good, found, band = scores["images"].get("normal", 0), scores["false_alarms"], scores["false_alarm_band"]
    if not good or found is None:
        return "Not known: that needs a threshold and test images of good parts."
    text = f"It rejects {found} of {good} good images."
    if scores["promised_rate"] is None:
        return f"{text} Its threshold promises no rate."
    text += f" Its threshold promises at most {percent(scores['promised_rate'])}"
    if band is None:
        return f"{text}; the checkpoint does not say from how many images."
    judged = "too many for chance: these good parts differ from those the threshold comes from"
    if found <= band[1]:
        judged = "as promised" if found >= band[0] else "fewer than promised"
    return f"{text}, which makes {band[0]} to {band[1]} of {good} likely (95 %), so this is {judged}."


def _misses(scores: Numbers) -> str:
    bad, misses = scores["images"].get("anomalous", 0), scores["misses"]
    if not bad or misses is None:
        return "Not known: that needs a threshold and test images of defective parts."
    low, high = scores["miss_interval"]
    text = f"It misses {misses} of {bad} defective images (95 % interval {percent(low)} to {percent(high)})."
    good, rejected = scores["images"].get("normal", 0), scores["false_alarms_to_find_all"]
    if misses and good:
        text += f" A threshold that finds all of them would reject {rejected} of {good} good images."
    return text


def _flow(scores: Numbers) -> str:
    name = scores["strongest_control"]
    if name is None:
        return "Not known: that needs good and defective test images."
    gain, (low, high) = scores["flow_gain"], scores["flow_gain_interval"]
    judged = "Yes" if low > 0 else "No, it does harm" if high < 0 else "Not shown on these images"
    ours, theirs = scores["pixel_auroc"], scores["strongest_pixel_auroc"]
    pixels = "" if ours is None or theirs is None else f" By pixels it is {ours:.4f} against {theirs:.4f}."
    only = "" if len(scores["compared_with"]) > 1 else " (whitened ones need the training images)"
    return (
        f"{judged}: image AUROC {scores['image_auroc']:.4f} against {scores['strongest_image_auroc']:.4f} of the "
        f"strongest control without a flow, {name}{only}; the difference is {gain:+.4f} (95 % interval {low:+.4f} to "
        f"{high:+.4f}).{pixels}"
    )


def advice(scores: Numbers) -> list[str]:
    """Return what to do next, most urgent first."""
    images, found = scores["images"], []
    if _too_many_false_alarms(scores):
        found.append("Train again with good images of today's parts, light and camera: the threshold is for others.")
    if _too_few_calibration_images(scores) and scores["calibration_images"]:
        asked, given = scores["asked_rate"], scores["calibration_images"]
        needed = images_needed(asked)
        found.append(
            f"Give the threshold {needed - given} more good images (add some, or raise calibration_ratio): a promise "
            f"of {percent(asked)} needs {needed}, and it has {given}."
        )
    missing = [KIND_NAMES[kind] for kind in ("normal", "anomalous") if not images.get(kind)]
    if missing:
        found.append(f"Test on parts known to be {' and on ones known to be '.join(missing)}: nothing else tells.")
    if scores["misses"]:
        found.append(
            "Look at the missed parts below: where the map lights up, a higher false_alarm_rate finds them; where it "
            "does not, a larger image_size may."
        )
    if scores["unknown"]:
        found.append(f"Look at the {scores['unknown']} images that are like no product of the model.")
    low, high = scores["image_auroc_interval"] or (0, 0)
    if high - low > 0.1:
        found.append(f"Test on more images: the AUROC is only known to lie in {low:.3f} to {high:.3f}.")
    return found or ["Test it on parts of another day, before you rely on it: these images are of one occasion."]


def percent(share: float) -> str:
    """Format a share with two significant digits."""
    return "100 %" if share > 0.995 else f"{100 * share:.2g} %" if share > 1e-6 else "0 %"
