"""One self-contained HTML page from figures, words and numbers."""

import base64
import io
import json
import warnings
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from tempfile import TemporaryFile
from typing import Any

from matplotlib.figure import Figure

from anomalib_wtflow.writing import one_sentence_for

WHAT, WAY = "The diagnosis", "make room there, or give another folder as --output"
"""What is written, and what to do if it cannot be, as :func:`anomalib_wtflow.writing.one_sentence_for` says it."""
Section = tuple[str, Figure, str, str]
"""File name of the figure, the figure, its title and its explanation."""


def make_folder(output: Path) -> None:
    """Make the output folder, before the work whose result goes there.

    Raises:
        RuntimeError: If it is a file, or cannot be made or written to.
    """
    with one_sentence_for(WHAT, output, WAY):
        output.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=output):
            pass


def _rounded(value: Any) -> Any:
    """Six significant digits, so that the file stays small."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def part_of_page(name: str) -> str:
    """Read a file of the folder ``page``."""
    return (files("anomalib_wtflow.diagnosis") / "page" / name).read_text(encoding="utf-8")


def embedded(data: bytes, kind: str) -> str:
    """Return a picture as the address of an ``img``."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def put(file: Path, content: bytes) -> None:
    """Write a file of a diagnosis.

    Raises:
        RuntimeError: If the disk is full or the folder cannot be written to.
    """
    with one_sentence_for(WHAT, file, WAY):
        file.write_bytes(content)


def image_of(output: Path, name: str, figure: Figure, alt: str) -> str:
    """Write ``<name>.png``, and return an ``img`` that holds the same."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A kind may have a name with letters that matplotlib's font lacks; they are drawn as boxes.
        warnings.filterwarnings("ignore", message=r"Glyph \d+")
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    put(output / f"{name}.png", buffer.getvalue())
    return f'<img alt="{escape(alt)}" src="{embedded(buffer.getvalue(), "png")}">'


def section_of(output: Path, section: Section) -> str:
    """Write a figure, and return its section of the page."""
    name, figure, title, words = section
    image = image_of(output, name, figure, f"Figure: {title}")
    return f"<section>\n<h2>{escape(title)}</h2>\n<p>{escape(words)}</p>\n{image}\n</section>"


def folded(title: str, body: str) -> str:
    """Return a part of the page that opens at a click."""
    return f"<details><summary>{escape(title)}</summary>\n{body}\n</details>"


def write_report(
    output: Path,
    title: str,
    summary: str,
    sections: Sequence[Section],
    numbers: dict[str, Any],
    front: str = "",
) -> Path:
    """Write ``<name>.png`` for each figure, ``numbers.json`` and ``index.html``, which holds the figures itself.

    Args:
        output: Folder, made if need be; files of these names in it are replaced.
        title: Title of the page.
        summary: A sentence or two below it.
        sections: Figures with their titles and explanations, in order.
        numbers: What the figures were drawn from.
        front: HTML that comes before the sections, which are then folded away.

    Returns:
        Path of the page.

    Raises:
        ValueError: If a number is NaN or infinite.
        RuntimeError: If the disk is full or the folder cannot be written to.
    """
    text = json.dumps(_rounded(numbers), allow_nan=False)
    make_folder(output)
    inside = "\n".join(section_of(output, section) for section in sections)
    put(output / "numbers.json", f"{text}\n".encode())
    page = output / "index.html"
    html = Template(part_of_page("page.html")).substitute(
        title=escape(title),
        summary=escape(summary),
        body=f"{front}\n{folded('How it works inside', inside)}" if front else inside,
        settings=escape(json.dumps(numbers.get("settings", {}), indent=1)),
        style=part_of_page("page.css"),
        script=part_of_page("page.js"),
    )
    put(page, html.encode(errors="backslashreplace"))  # names of files need be no UTF-8
    return page
