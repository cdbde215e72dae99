"""Plain words: how long the pages are, how docstrings begin, which words are not used, and where links lead."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
SOURCES = sorted((ROOT / "src").rglob("*.py"))
LIMITS = {"ablation": 2600, "accuracy": 1200, "method": 2200, "plugin": 1100, "speed": 1600}
"""Most words of a page; all pages together have at most 15,000."""
UNUSED = (
    r"strangeness",
    r"see to (it|that|this)",
    r"(is|are|was|were) told",
    r"good for nothing",
    r"by the letter of",
    r"feature[_ ]cache",
    r"overrides\.(contrast|detail)",
    r"AnyFolder",
    r"the version before",
    r"round (one|two|three|four|five|six|seven)",
    r"as was (tried|said)",
)
"""Words of the project's own, of settings that are gone, and of its history."""


def words(text: str) -> int:
    """Count what has a letter or a digit between two spaces; lines of a table's frame and ± are none."""
    return sum(bool(re.search(r"\w", each)) for each in text.split())


def docstrings(file: Path) -> Iterator[tuple[str, str]]:
    """Yield the names and the docstrings of a file's module, classes and functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield f"{file.name}: {getattr(node, 'name', '')}", ast.get_docstring(node) or ""


def test_length_of_the_readme() -> None:
    assert words(README.read_text()) <= 1300
    assert len(README.read_text().splitlines()) <= 150


def test_length_of_the_pages() -> None:
    counts = {page.stem: words(page.read_text()) for page in PAGES}
    assert {name: counts[name] for name, limit in LIMITS.items() if counts[name] > limit} == {}
    assert sum(counts.values()) <= 15_000


def test_docstrings_begin_with_a_short_line() -> None:
    firsts = {name: text.splitlines()[0] for file in SOURCES for name, text in docstrings(file) if text}
    assert {name: first for name, first in firsts.items() if len(first) > 90} == {}


@pytest.mark.parametrize("file", [README, *PAGES, *SOURCES], ids=lambda file: file.name)
def test_words_that_are_not_used(file: Path) -> None:
    text = re.sub(r"\s+", " ", file.read_text())
    assert [found[0] for word in UNUSED for found in re.finditer(word, text, flags=re.IGNORECASE)] == []


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """To a file of the repository and a heading there, as GitHub names it; others need a network."""
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not name.startswith("http") and not (target.exists() and heading_exists(target, heading)):
            missing.append(link)
    assert missing == []


def heading_exists(page: Path, anchor: str) -> bool:
    if not anchor:
        return True
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_no_picture_is_left_over() -> None:
    text = "".join(page.read_text() for page in [README, *PAGES])
    pictures = [picture.relative_to(ROOT / "docs").as_posix() for picture in (ROOT / "docs/images").rglob("*.png")]
    assert [picture for picture in pictures if picture not in text] == []
