"""All settings, for the terminal and for the docs."""

from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from anomalib_wtflow.settings import RECIPES, declared, get_settings, option

HEAD = ("setting", "default", "paper", "meaning")


def yaml_text(value: Any) -> str:
    """Write a value as YAML has it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"[{', '.join(value)}]" if isinstance(value, tuple) else str(value)


def rows() -> list[tuple[str, str, str, str]]:
    """Return a row for each setting: option, default, ``paper``'s value, meaning."""
    default, paper = get_settings(), get_settings("paper")
    result = []
    for name, each in declared().items():
        rule = each.metadata["rule"]
        choices = f" One of {', '.join(rule.names)}." if rule.names else ""
        theirs = yaml_text(getattr(paper, name)) if name in RECIPES["paper"] else ""
        result.append((option(name), yaml_text(getattr(default, name)), theirs, each.metadata["meaning"] + choices))
    return result


def markdown() -> str:
    """Return the table in Markdown."""
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    lines += [f"| `{setting}` | {default} | {paper} | {meaning} |" for setting, default, paper, meaning in rows()]
    return "\n".join(lines)


def print_settings(as_markdown: bool = False) -> None:
    """Print each setting with its default and meaning; ``as_markdown``: as docs/settings.md."""
    console = Console(highlight=False)
    if as_markdown:
        console.file.write(markdown() + "\n")
        return
    for setting, default, paper, meaning in rows():
        console.print(Text.assemble((setting, "bold"), f" {default}", f"   (paper: {paper})" if paper else ""))
        console.print(Padding(Text(meaning), (0, 0, 0, 4)))
