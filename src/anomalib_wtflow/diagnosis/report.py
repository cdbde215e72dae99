"""One self-contained HTML page from figures, words and numbers."""

import base64
import io
import json
import tempfile
import warnings
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Section = tuple[str, Figure, str, str]
"""File name of the figure, the figure, its title and its explanation."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; margin-bottom: .3rem; }}
h2 {{ font-size: 1.2rem; margin: 2.2rem 0 .3rem; }}
p {{ max-width: 46rem; }}
img {{ max-width: 100%; height: auto; }}
details {{ margin-top: 2rem; }}
pre {{ font-size: .8rem; overflow-x: auto; background: #f5f5f5; padding: .8rem; }}
@media print {{ section {{ break-inside: avoid; }} details {{ display: none; }} }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
{sections}
<details><summary>Settings</summary><pre>{settings}</pre></details>
<p><small>Made by <code>anomalib-wtflow diagnose</code>. The numbers behind the figures are in <code>numbers.json</code>
beside this page.</small></p>
</body>
</html>
"""

SECTION = """<section>
<h2>{title}</h2>
<p>{text}</p>
<img alt="{title}" src="data:image/png;base64,{data}">
</section>"""


def make_folder(output: Path) -> None:
    """Make the output folder, before the work whose result goes there.

    Raises:
        ValueError: If it is a file, or cannot be made or written to.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        msg = f"Nothing can be written to '{output}' ({error.strerror}): give another folder as --output."
        raise ValueError(msg) from error


def _rounded(value: Any) -> Any:
    """Six significant digits, so that the file stays small."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def write_report(output: Path, title: str, summary: str, sections: Sequence[Section], numbers: dict[str, Any]) -> Path:
    """Write ``<name>.png`` for each figure, ``numbers.json`` and ``index.html``, which holds the figures itself.

    Args:
        output: Folder, made if need be; files of these names in it are replaced.
        title: Title of the page.
        summary: A sentence or two below it.
        sections: Figures with their titles and explanations, in order.
        numbers: What the figures were drawn from.

    Returns:
        Path of the page.

    Raises:
        ValueError: If a number is NaN or infinite, or the folder cannot be written to.
    """
    text = json.dumps(_rounded(numbers), allow_nan=False)
    make_folder(output)
    parts = []
    for name, figure, heading, words in sections:
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            # A file name may hold letters that matplotlib's font lacks; they are drawn as boxes.
            warnings.filterwarnings("ignore", message=r"Glyph \d+")
            figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
        (output / f"{name}.png").write_bytes(buffer.getvalue())
        data = base64.b64encode(buffer.getvalue()).decode()
        parts.append(SECTION.format(title=escape(heading), text=escape(words), data=data))
    (output / "numbers.json").write_text(text + "\n", encoding="utf-8")
    settings = escape(json.dumps(numbers.get("settings", {}), indent=1))
    page = output / "index.html"
    page.write_text(
        PAGE.format(title=escape(title), summary=escape(summary), sections="\n".join(parts), settings=settings),
        encoding="utf-8",
    )
    return page
