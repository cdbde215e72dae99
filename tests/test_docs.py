"""What the pages name exists: every test, and in docs/plugin.md a test for each claim."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = {
    file.stem: {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}
    for file in (ROOT / "tests").rglob("test_*.py")
}
NAMED = re.compile(r"\b(test_\w+)::(test_\w+)(…?)")


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_every_test_that_is_named_exists(page: Path) -> None:
    """A name that ends in … stands for all that begin so."""
    missing = [
        f"{file}::{name}"
        for file, name, more in NAMED.findall(page.read_text())
        if not any(test.startswith(name) if more else test == name for test in TESTS.get(file, ()))
    ]
    assert not missing


def test_each_claim_about_plugins_names_its_test() -> None:
    _, text = (ROOT / "docs" / "plugin.md").read_text().split("\n## Registration\n")
    claims = re.findall(r"^- .*(?:\n  .*)*", text, flags=re.MULTILINE)
    traps = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(claims) > 10
    assert len(traps) > 10
    assert [claim for claim in claims + traps if not NAMED.search(claim)] == []
