"""A file of verdicts, read and summed up: numbers, and sentences for the terminal."""

import csv
import heapq
import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from anomalib_wtflow.products.recognition import UNKNOWN

NUMBERS = {"raw_score", "pred_score", "threshold", "largest_pixel", "outlined"}
LABELS = ("good", "anomalous")
MOST_SHOWN = 10
SHOWN = ("pred_score", "pred_label", "gt_label", "product", "image_path")


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of verdicts: numbers as floats, empty fields as None."""
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            yield {name: None if text == "" else float(text) if name in NUMBERS else text for name, text in row.items()}


def summary_of(path: Path, promises: Mapping[str, float], limit: float) -> dict[str, Any]:
    """Count the verdicts in a file.

    Args:
        path: The file.
        promises: By product, what share of good images may be called anomalous at most.
        limit: Score above which an image is anomalous.
    """
    pairs: Counter[tuple[str | None, str | None]] = Counter()
    scores, unknown = [], 0
    for row in read_rows(path):
        pairs[row["gt_label"], row["pred_label"]] += 1
        unknown += row.get("product") == UNKNOWN
        scores.append(row["pred_score"])
    good, anomalous = LABELS
    truths, labels = (Counter(pair[k] for pair in pairs.elements()) for k in (0, 1))
    return {
        "images": len(scores),
        "good": labels[good],
        "anomalous": labels[anomalous],
        "unknown": unknown,
        "false_alarms": pairs[good, anomalous],
        "misses": pairs[anomalous, good],
        "truly_good": truths[good],
        "truly_anomalous": truths[anomalous],
        "scores": [min(scores), statistics.median(scores), max(scores)] if scores else [],
        "promises": dict(promises),
        "limit": limit,
    }


def write_json(path: Path, summary: Mapping[str, Any]) -> None:
    """Write the rows of a file of verdicts, and their summary, as JSON beside it."""
    with path.with_suffix(".json").open("w", encoding="utf-8") as file:
        file.write('{"images": [')
        for number, row in enumerate(read_rows(path)):
            file.write(("," if number else "") + "\n" + json.dumps(row, ensure_ascii=False))
        file.write(f'\n], "summary": {json.dumps(summary, ensure_ascii=False)}}}\n')


def sentences(summary: Mapping[str, Any]) -> list[str]:
    """Describe the verdicts, and what cannot be measured with these images."""
    s = summary
    if not s["good"] + s["anomalous"]:
        return [f"{s['images']} images without verdicts: the model has no threshold."]
    unknown = f" ({s['unknown']} of them like no product)" if s["unknown"] else ""
    least, median, greatest = s["scores"]
    lines = [
        f"{s['images']} image{'s' * (s['images'] != 1)}: {s['good']} good, {s['anomalous']} anomalous{unknown}.",
        f"Scores from {least:.3f} to {greatest:.3f}, median {median:.3f}; above {s['limit']:g} is anomalous.",
    ]
    if s["truly_good"]:
        promise = f", at most {max(s['promises'].values()):.1%} promised" if s["promises"] else ""
        lines.append(f"Of {s['truly_good']} good ones {s['false_alarms']} called anomalous{promise}.")
    if s["truly_anomalous"]:
        lines.append(f"Of {s['truly_anomalous']} defective ones {s['misses']} called good.")
    if s["truly_anomalous"] and not s["truly_good"]:
        lines.append("There are no good images, so AUROC, F1 and false alarms cannot be measured: give some.")
    if s["truly_good"] and not s["truly_anomalous"]:
        lines.append(
            "There are no defective images, so AUROC and F1 cannot be measured: give some, even a handful, to see what "
            "is found. To set the threshold with these or other good images: anomalib-wtflow calibrate."
        )
    return lines


def highest(path: Path) -> list[str]:
    """List the images with the highest scores, below a head; nothing if there are none."""
    rows = heapq.nlargest(MOST_SHOWN, read_rows(path), key=lambda row: row["pred_score"])
    names = [name for name in SHOWN if any(row.get(name) for row in rows)]
    lines = ["  ".join([f"{row['pred_score']:.4f}", *(row[name] or "" for name in names[1:])]) for row in rows]
    return [f"Highest scores ({', '.join(names)}):", *lines] if rows else []
