"""What the first screen says of given numbers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from drawn import diagnosed, model_of, scored, write_images

from anomalib_wtflow.diagnosis.scores import all_numbers
from anomalib_wtflow.diagnosis.verdict import advice, answer, overall, verdict
from anomalib_wtflow.diagnosis.without_flow import POSITION_MEANS, UNWHITENED, WHITENED

GOOD, BAD = [0.3 + 0.01 * k for k in range(40)], [1.5 + 0.01 * k for k in range(40)]


def numbers_of(good: Sequence[float], bad: Sequence[float], **promise: Any) -> dict:
    """Numbers of a model of one product whose threshold is 1."""
    images = [scored(f"good/{k}.png", False, score) for k, score in enumerate(good)]
    images += [scored(f"scratch/{k}.png", True, score) for k, score in enumerate(bad)]
    return all_numbers(model_of([1.0], **promise), images, {UNWHITENED: images})["scores"]


@pytest.mark.parametrize(
    ("good", "bad", "promise", "expected"),
    [
        (GOOD, BAD, {}, "Yes, on parts like these."),
        (GOOD, [*BAD, 0.9], {}, "With care: it misses some of the defective parts."),
        (GOOD, BAD, {"images": 18}, "With care: its threshold comes from too few images."),
        (GOOD[:30] + [1.2] * 10, BAD, {}, "No: it rejects more good parts than it promises."),
        (GOOD, [*BAD[:5], *[0.95] * 6], {}, "No: it misses most of the defective parts."),
        (GOOD, GOOD, {}, "No: it is no better than chance."),
        ([0.5], [1.5], {}, "Not known: these test images do not tell it from chance."),
        (GOOD, [], {}, "Not known: there are no test images of defective parts."),
        ([], BAD, {}, "Not known: there are no test images of parts known to be good."),
    ],
)
def test_answer(good: list[float], bad: list[float], promise: dict, expected: str) -> None:
    assert answer(numbers_of(good, bad, **promise)) == expected


def test_answer_without_a_promise() -> None:
    numbers = numbers_of(GOOD, BAD)
    assert answer({**numbers, "promised_rate": None}) == "With care: its threshold promises no false-alarm rate."
    assert answer({**numbers, "threshold": None}) == "Not known: the model has no threshold."


def test_numbers_in_words() -> None:
    numbers = numbers_of([*GOOD, 1.2], [*BAD, 0.6])
    found = verdict(numbers).findings
    low, high = numbers["image_auroc_interval"]
    assert numbers["false_alarms_to_find_all"] == 11  # 0.6 to 0.69, and 1.2
    assert found["Does it tell defective parts from good ones?"].startswith(
        f"Image AUROC {numbers['image_auroc']:.4f} (95 % interval {low:.3f} to {high:.3f}), from 41 good and "
    )
    lowest, highest = numbers["false_alarm_band"]
    assert found["Does it reject good parts?"] == (
        f"It rejects 1 of 41 good images. Its threshold promises at most 5 %, which makes {lowest} to {highest} of 41 "
        "likely (95 %), so this is as promised."
    )
    assert "misses 1 of 41 defective images" in found["Does it miss defects?"]
    assert "would reject 11 of 41 good images" in found["Does it miss defects?"]


def test_the_flow_is_compared_with_the_strongest_control() -> None:
    """The highest AUROC, and of equals the simplest; the words follow the interval of the difference."""
    images = [scored(f"good/{k}.png", False, score) for k, score in enumerate(GOOD)]
    images += [scored(f"scratch/{k}.png", True, score) for k, score in enumerate(BAD)]
    alike, turned = (
        [image._replace(score=score(image)) for image in images] for score in (lambda _: 1.0, lambda i: -i.score)
    )
    model = model_of([1.0])
    for controls, name, gain, start in (
        ({UNWHITENED: alike}, UNWHITENED, 0.5, "Yes: "),
        ({UNWHITENED: alike, WHITENED: images, POSITION_MEANS: images}, WHITENED, 0.0, "Not shown on these images: "),
    ):
        numbers = all_numbers(model, images, controls)["scores"]
        assert numbers["strongest_control"] == name
        assert numbers["flow_gain"] == pytest.approx(gain)
        text = verdict(numbers).findings["Is the flow worth its cost?"]
        assert text.startswith(start)
        assert f"control without a flow, {name}" in text
    numbers = all_numbers(model, turned, {WHITENED: images})["scores"]
    assert verdict(numbers).findings["Is the flow worth its cost?"].startswith("No, it does harm: ")
    assert numbers["flow_gain"] == pytest.approx(-1)


def test_advice() -> None:
    assert advice(numbers_of(GOOD, BAD)) == [
        "Test it on parts of another day, before you rely on it: these images are of one occasion."
    ]
    few = advice(numbers_of(GOOD, BAD, images=13, rate=0.01))
    assert few[0].startswith("Give the threshold 86 more good images")
    assert "a promise of 1 % needs 99, and it has 13" in few[0]
    assert advice(numbers_of(GOOD, []))[0].startswith("Test on parts known to be defective")
    assert advice(numbers_of(GOOD[:30] + [1.2] * 10, BAD))[0].startswith("Train again with good images")


def test_overall_names_the_worst_product() -> None:
    fine, care, bad = numbers_of(GOOD, BAD), numbers_of(GOOD, [*BAD, 0.9]), numbers_of(GOOD, [*BAD[:1], 0.9, 0.9])
    assert overall(fine, {"a": fine, "b": fine}) == "Yes, on parts like these."
    assert overall(fine, {"a": fine, "b": care, "c": care}) == (
        "With care for b, c: it misses some of the defective parts."
    )
    assert overall(care, {"a": care, "b": bad}) == "No for b: it misses most of the defective parts."


def test_products(tmp_path: Path) -> None:
    """Sums and means of all products, each product's own, and a section each on the page."""
    rows = [("good", 0.5 + 0.01 * k, p) for p in (0, 1) for k in range(20)] + [("good", 1.5, 1)]
    rows += [("hole", 2.0 + 0.01 * k, p) for p in (0, 1) for k in range(10)] + [("hole", 0.45, 0)]
    page = diagnosed(tmp_path / "page", model_of([1.0, 1.0], ["disc", "plate"]), write_images(tmp_path, rows))
    numbers = json.loads((page.parent / "numbers.json").read_text())
    scores, disc, plate = numbers["scores"], numbers["products"]["disc"], numbers["products"]["plate"]
    assert (scores["misses"], disc["misses"], plate["misses"]) == (1, 1, 0)
    assert (scores["false_alarms"], disc["false_alarms"], plate["false_alarms"]) == (1, 0, 1)
    assert disc["image_auroc"] == pytest.approx(10 / 11, abs=1e-5)
    assert scores["image_auroc"] == pytest.approx((10 / 11 + 1) / 2, abs=1e-5)
    assert scores["kinds"] == {"good": {"images": 41, "called": 1}, "hole": {"images": 21, "called": 20}}
    assert [row["verdict"] for row in numbers["images"]].count("missed") == 1
    assert numbers["images"][0]["file"] == "hole/061.png"
    text = page.read_text()
    assert "<summary>disc: With care: it misses some of the defective parts.</summary>" in text
    assert "<summary>plate: Yes, on parts like these.</summary>" in text
