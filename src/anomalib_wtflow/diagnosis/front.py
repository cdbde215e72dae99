"""The front of a page about a trained model: the answer in words and three pictures, the products, the gallery."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from anomalib_wtflow.diagnosis import figures
from anomalib_wtflow.diagnosis.gallery import Entry
from anomalib_wtflow.diagnosis.report import embedded, folded, image_of, part_of_page
from anomalib_wtflow.diagnosis.scoring import VERDICTS, WRONG
from anomalib_wtflow.diagnosis.style import SHOWN
from anomalib_wtflow.diagnosis.verdict import LEVELS, answer, overall, percent, verdict

Numbers = dict[str, Any]


def front(output: Path, numbers: Numbers, shown: Sequence[Entry]) -> str:
    """Write the figures of the front, and return its HTML.

    Args:
        output: Folder of the page.
        numbers: All numbers of the diagnosis.
        shown: Images that the page holds, the most informative first.
    """
    scores, products = numbers["scores"], numbers.get("products", {})
    pictures = [*_figures(output, "", scores, "products" in numbers), _example(shown)]
    parts = [_words(overall(scores, products), scores), f'<div class="pictures">{"".join(pictures)}</div>']
    if products:
        parts.append(_table(products))
    parts.append(_gallery(shown, numbers["images"]))
    for place, (name, own) in enumerate(products.items()):
        drawn = "".join(_figures(output, f"product-{place:02d}-", own, several=False))
        body = f'{_words(answer(own), own)}\n<div class="pictures">{drawn}</div>'
        parts.append(folded(f"{name}: {answer(own)}", body))
    return "\n".join(parts)


def _words(text: str, scores: Numbers) -> str:
    level = next(level for level in LEVELS if text.startswith(level))
    told = verdict(scores)
    findings = "".join(
        f"<div><dt>{escape(question)}</dt><dd>{escape(finding)}</dd></div>" for question, finding in told.findings
    )
    advice = "".join(f"<li>{escape(sentence)}</li>" for sentence in told.advice)
    return (
        f'<p class="answer {_slug(level)}">{escape(text)}</p>\n<dl>{findings}\n'
        f'<div class="next"><dt>What next?</dt><dd><ul>{advice}</ul></dd></div></dl>'
    )


def _figures(output: Path, prefix: str, scores: Numbers, several: bool) -> list[str]:
    drawn = {
        "scores": (
            figures.score_histogram(scores, several),
            "Histogram of the scores of good and defective images, with the threshold.",
        ),
        "kinds": (figures.called_by_kind(scores), "Share of the images of each kind that is called anomalous."),
    }
    return [f"<figure>{image_of(output, f'{prefix}{name}', *each)}</figure>" for name, each in drawn.items()]


def _slug(text: str) -> str:
    return text.lower().replace(" ", "-")


def _example(shown: Sequence[Entry]) -> str:
    """Show the worst image if there is a wrong verdict, else the found defect with the middle score."""
    found = sorted((entry for entry in shown if entry.row["verdict"] == "found"), key=lambda entry: entry.row["score"])
    worst = shown[0]
    title, entry = ("Typical found", found[len(found) // 2]) if found else ("Highest score", worst)
    if worst.row["verdict"] in WRONG:
        title, entry = f"Worst {worst.row['verdict']}", worst
    return (
        f'<figure class="example"><p class="title">{title}: image and anomaly map</p>'
        f'<div class="pair">{_images(entry)}</div>{_caption(entry)}</figure>'
    )


def _images(entry: Entry) -> str:
    name = escape(f"{entry.row['verdict']} {entry.row['kind']} {entry.row['file']}")
    return (
        f'<img alt="Image: {name}" src="{embedded(entry.picture, "jpeg")}">'
        f'<img alt="Anomaly map: {name}" src="{embedded(entry.heat, "jpeg")}">'
    )


def _caption(entry: Entry) -> str:
    row = entry.row
    threshold = row["threshold"]
    score = f"score {row['score']:.3g}"
    if threshold:
        score += f", {row['score'] / threshold:.3f} times the threshold"
    # A model of one product may have no name for it.
    names = " ".join(filter(None, (row["recognised"], row["kind"])))
    return (
        f'<figcaption><span class="badge {_slug(row["verdict"])}">{row["verdict"]}</span> '
        f"{escape(names)}, {score}<br><code>{escape(row['file'])}</code></figcaption>"
    )


def _entry(entry: Entry) -> str:
    row = entry.row
    data = " ".join(f'data-{key}="{escape(row[key])}"' for key in ("verdict", "kind", "product"))
    label = escape(f"Enlarge {row['verdict']} {row['kind']} {row['file']}")
    return (
        f'<figure class="entry" {data}>'
        f'<button type="button" class="pair" aria-label="{label}">{_images(entry)}</button>'
        f"{_caption(entry)}</figure>"
    )


def _table(products: dict[str, Numbers]) -> str:
    head = ("product", "answer", "test images", "image AUROC", "good parts rejected", "promised", "defects missed")
    lines = []
    for name, own in products.items():
        images, auroc = own["images"], own["image_auroc"]
        cells = (
            name,
            answer(own),
            ", ".join(f"{count} {SHOWN[kind]}" for kind, count in images.items()),
            "" if auroc is None else f"{auroc:.4f}",
            "" if own["false_alarms"] is None else f"{own['false_alarms']} of {images.get('normal', 0)}",
            "" if own["promised_rate"] is None else percent(own["promised_rate"]),
            "" if own["misses"] is None else f"{own['misses']} of {images.get('anomalous', 0)}",
        )
        lines.append("".join(f"<td>{escape(cell)}</td>" for cell in cells))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    heads = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    return (
        '<section><h2>Product by product</h2><div class="table" tabindex="0" role="region" aria-label="Products">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _gallery(shown: Sequence[Entry], told: Sequence[Numbers]) -> str:
    choices = {key: sorted({entry.row[key] for entry in shown}) for key in ("kind", "product")}
    there = {row["verdict"] for row in told}
    # That there are no wrong ones says something too, where there could be.
    there |= set(WRONG) if there & {"found", "passed"} else set()
    verdicts = [verdict for verdict in VERDICTS if verdict in there]
    words = (
        f"{len(shown)} of the {len(told)} test images: wrong verdicts first, then the closest calls; of unlabelled "
        "images the highest scores. Beside each its anomaly map, from dark (like good parts) to bright (from twice the "
        "threshold of pixels on); outlined in white is what the model marks, in green the mask that came with the "
        "image. Click a picture to enlarge it."
    )
    return Template(part_of_page("gallery.html")).substitute(
        words=words,
        verdicts="".join(
            f'<button type="button" data-choice="{verdict}">{label} ({count})</button>'
            for verdict, label, count in _choices(shown, verdicts)
        ),
        kinds=_options("all kinds", choices["kind"]),
        products=_options("all products", choices["product"]),
        only_several="" if len(choices["product"]) > 1 else " hidden",
        entries="\n".join(map(_entry, shown)),
    )


def _choices(shown: Sequence[Entry], verdicts: Sequence[str]) -> list[tuple[str, str, int]]:
    counted = [
        (verdict, verdict.capitalize(), sum(entry.row["verdict"] == verdict for entry in shown)) for verdict in verdicts
    ]
    return [("", "All", len(shown)), *counted]


def _options(every: str, values: Sequence[str]) -> str:
    return f'<option value="">{every}</option>' + "".join(f"<option>{escape(value)}</option>" for value in values)
