"""One self-contained HTML page, made from the template ``page/page.html``."""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from anomalib_wtflow.diagnosis import figures
from anomalib_wtflow.diagnosis.figures import KIND_NAMES
from anomalib_wtflow.diagnosis.scoring import VERDICTS, WRONG, Numbers
from anomalib_wtflow.diagnosis.verdict import overall, percent, verdict


def write_page(output: Path, numbers: Numbers, shown: Sequence[Numbers]) -> Path:
    """Write ``<name>.png`` for each figure, ``numbers.json`` and ``index.html``.

    Args:
        output: Folder; files of these names in it are replaced.
        numbers: All numbers of the diagnosis.
        shown: Images that the page holds, the most informative first.

    Raises:
        ValueError: If a number is NaN or infinite.
    """
    numbers = json.loads(json.dumps(numbers, allow_nan=False), parse_float=lambda text: float(f"{float(text):.6g}"))
    (output / "numbers.json").write_text(f"{json.dumps(numbers)}\n", encoding="utf-8")
    scores, products = numbers["scores"], numbers.get("products", {})
    drawn = {
        "radius": figures.along_the_flow(numbers["flow"], "radius", r"radius $\|x\|/\sqrt{C}$", 1),
        "centripetal": figures.along_the_flow(numbers["flow"], "centripetal", r"$\langle v, x\rangle / \|x\|^2$", 0),
        "field": figures.field_over_time(numbers["field"]),
        "pixels": figures.histogram(scores, "pixel"),
    }
    front = _part(output, "", scores, " (1 = threshold of its product)" if products else "")
    front["verdict"] = front["verdict"]._replace(answer=overall(scores, products))
    environment = Environment(loader=PackageLoader("anomalib_wtflow.diagnosis", "page"), autoescape=True)
    html = environment.get_template("page.html").render(
        numbers=numbers,
        front=front,
        products={name: _part(output, f"product-{k:02d}-", row) for k, (name, row) in enumerate(products.items())},
        inside={name: _saved(output, name, figure) for name, figure in drawn.items()},
        example=_example(shown),
        shown=shown,
        verdicts=VERDICTS,
        wrong=WRONG,
        percent=percent,
        kinds=KIND_NAMES,
    )
    page = output / "index.html"
    page.write_bytes(html.encode(errors="backslashreplace"))  # names of files need be no UTF-8
    return page


def _saved(output: Path, name: str, figure: Figure) -> str:
    """Write ``<name>.png``, and return the address of an ``img`` with the same content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    (output / f"{name}.png").write_bytes(buffer.getvalue())
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _part(output: Path, prefix: str, scores: Numbers, unit: str = "") -> dict[str, Any]:
    """Judge a product or all of them, and draw the figures."""
    histogram = _saved(output, f"{prefix}scores", figures.histogram(scores, "image", unit))
    kinds = _saved(output, f"{prefix}kinds", figures.called_by_kind(scores))
    return {"verdict": verdict(scores), "scores": scores, "histogram": histogram, "kinds": kinds}


def _example(shown: Sequence[Numbers]) -> tuple[str, Numbers]:
    """Choose the worst wrong verdict, or else the found defect with the middle score."""
    worst = shown[0]
    if worst["verdict"] in WRONG:
        return f"Worst {worst['verdict']}", worst
    found = sorted((entry for entry in shown if entry["verdict"] == "found"), key=lambda entry: entry["score"])
    return ("Typical found", found[len(found) // 2]) if found else ("Highest score", worst)
