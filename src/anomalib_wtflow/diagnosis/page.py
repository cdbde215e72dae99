"""One self-contained HTML page, which the template ``page/page.html`` makes of figures, words and numbers."""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from anomalib_wtflow.diagnosis import explanations, figures
from anomalib_wtflow.diagnosis.figures import SHOWN
from anomalib_wtflow.diagnosis.gallery import Entry
from anomalib_wtflow.diagnosis.scoring import VERDICTS, WRONG
from anomalib_wtflow.diagnosis.verdict import overall, percent, verdict

Numbers = dict[str, Any]


def write_page(output: Path, numbers: Numbers, shown: Sequence[Entry], title: str) -> Path:
    """Write ``<name>.png`` for each figure, ``numbers.json`` and ``index.html``, which holds the figures itself.

    Args:
        output: Folder; files of these names in it are replaced.
        numbers: All numbers of the diagnosis.
        shown: Images that the page holds, the most informative first.
        title: Title of the page.

    Returns:
        Path of the page.

    Raises:
        ValueError: If a number is NaN or infinite.
    """
    numbers = json.loads(json.dumps(numbers, allow_nan=False), parse_float=lambda text: float(f"{float(text):.6g}"))
    (output / "numbers.json").write_text(f"{json.dumps(numbers)}\n", encoding="utf-8")
    scores, products = numbers["scores"], numbers.get("products", {})
    front = _part(output, "", scores, " (1 = threshold of its product)" if products else "")
    front["verdict"] = front["verdict"]._replace(answer=overall(scores, products))
    environment = Environment(loader=PackageLoader("anomalib_wtflow.diagnosis", "page"), autoescape=True)
    html = environment.get_template("page.html").render(
        title=title,
        numbers=numbers,
        front=front,
        products={name: _part(output, f"product-{k:02d}-", row) for k, (name, row) in enumerate(products.items())},
        example=_example(shown),
        shown=shown,
        verdicts=_verdicts(numbers["images"]),
        inside=_inside(output, numbers),
        percent=percent,
        kinds=SHOWN,
    )
    page = output / "index.html"
    page.write_bytes(html.encode(errors="backslashreplace"))  # names of files need be no UTF-8
    return page


def _picture(output: Path, name: str, figure: Figure, alt: str) -> dict[str, str]:
    """Write ``<name>.png``, and return what an ``img`` that holds the same needs."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    (output / f"{name}.png").write_bytes(buffer.getvalue())
    return {"src": f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}", "alt": alt}


def _part(output: Path, prefix: str, scores: Numbers, unit: str = "") -> dict[str, Any]:
    """Judge a product or all of them, and draw the figures."""
    histogram, kinds = figures.histogram(scores, "image", unit), figures.called_by_kind(scores)
    pictures = [
        _picture(output, f"{prefix}scores", histogram, "Histogram of the scores of the images, with the threshold."),
        _picture(output, f"{prefix}kinds", kinds, "Share of the images of each kind that is called anomalous."),
    ]
    return {"verdict": verdict(scores), "pictures": pictures, "scores": scores}


def _inside(output: Path, numbers: Numbers) -> list[dict[str, str]]:
    """Draw what the page folds away."""
    flow, field = numbers["flow"], numbers["field"]
    drawn = {
        "radius": (figures.radius_along_the_flow(flow), explanations.radius(flow)),
        "centripetal": (figures.centripetal(flow), explanations.centripetal(flow)),
        "field": (figures.field_over_time(field), explanations.field(field)),
        "pixels": (figures.histogram(numbers["scores"], "pixel"), explanations.PIXELS),
    }
    return [
        {"title": title, "words": words, **_picture(output, name, figure, f"Figure: {title}")}
        for name, (figure, (title, words)) in drawn.items()
    ]


def _example(shown: Sequence[Entry]) -> tuple[str, Entry]:
    """Choose the worst image if there is a wrong verdict, else the found defect with the middle score."""
    worst = shown[0]
    if worst.row["verdict"] in WRONG:
        return f"Worst {worst.row['verdict']}", worst
    found = sorted((entry for entry in shown if entry.row["verdict"] == "found"), key=lambda entry: entry.row["score"])
    return ("Typical found", found[len(found) // 2]) if found else ("Highest score", worst)


def _verdicts(rows: Sequence[Numbers]) -> list[str]:
    """Return the verdicts to choose from; that there are no wrong ones says something too, where there could be."""
    there = {row["verdict"] for row in rows}
    there |= set(WRONG) if there & {"found", "passed"} else set()
    return [each for each in VERDICTS if each in there]
