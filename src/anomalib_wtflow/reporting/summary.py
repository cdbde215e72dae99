"""What a table of verdicts says, in short: numbers, and words for the terminal."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

HIGHEST = 10
TITLES = {"pred_score": "score", "pred_label": "verdict", "gt_label": "truth", "product": "product"}


@dataclass
class Summary:
    """Counts of verdicts, the scores' least, median and greatest, and the highest-scored images' rows."""

    images: int = 0
    given: int | None = None
    """Images that there were to judge; None if that is not known."""
    reason: str = ""
    """Why those that are left are not judged."""
    judged: int = 0
    """Of the images, how many have a verdict: none of a model without thresholds."""
    good: int = 0
    anomalous: int = 0
    unknown: int = 0
    """Of the anomalous, how many are like no product."""
    false_alarms: int = 0
    misses: int = 0
    truly_good: int = 0
    truly_anomalous: int = 0
    scores: list[float] = field(default_factory=list)
    highest: list[dict[str, Any]] = field(default_factory=list)
    promises: dict[str, float] = field(default_factory=dict)
    """By product, what share of good images may be called anomalous at most."""
    limit: float = 0.5
    """Score above which an image is anomalous."""

    def plain(self) -> dict[str, Any]:
        """Return all of it but the rows, which the file has, and the words."""
        return {name: value for name, value in asdict(self).items() if name not in ("highest", "reason")}


def sentences(summary: Summary) -> list[str]:
    """Say what the verdicts are, and of how many images; of good images only, what that does and does not tell."""
    s = summary
    rest = f"{s.images} of {s.given} images were judged, since {s.reason}: the others have no verdict."
    left = [rest] if s.images < (s.given or 0) else []
    if not s.judged:
        return [f"{s.images} images without verdicts: the model has no threshold.", *left]
    unknown = f" ({s.unknown} of them like no product)" if s.unknown else ""
    lines = [f"{s.images} image{'s' * (s.images != 1)}: {s.good} good, {s.anomalous} anomalous{unknown}.", *left]
    promise = f", at most {max(s.promises.values()):.1%} promised" if s.promises else ""
    if s.truly_good:
        lines.append(f"Of {s.truly_good} good ones {s.false_alarms} called anomalous{promise}.")
    if s.truly_anomalous:
        lines.append(f"Of {s.truly_anomalous} defective ones {s.misses} called good.")
    if s.scores:
        least, median, greatest = s.scores
        lines.append(f"Scores from {least:.3f} to {greatest:.3f}, median {median:.3f}; above {s.limit:g} is anomalous.")
    if s.truly_anomalous and not s.truly_good:
        lines.append("There are no good images, so AUROC, F1 and false alarms cannot be measured: give some.")
    if s.truly_good and not s.truly_anomalous:
        lines.append(
            "There are no defective images, so AUROC and F1 cannot be measured: give some, even a handful, to see what "
            "is found. To set the threshold with these or other good images: anomalib-wtflow calibrate."
        )
    return lines


def show(summary: Summary, path: Path, console: Console | None = None) -> None:
    """Print the sentences, the highest scores and where the files are; in plain lines where that is no terminal."""
    console = console or Console(highlight=False, markup=False, emoji=False)
    files = f"Every verdict: {path} and {path.with_suffix('.json').name}"
    names = [name for name in TITLES if any(row.get(name) for row in summary.highest)]
    if not console.is_terminal:
        rows = ["  ".join(text(row.get(name)) for name in (*names, "image_path")) for row in summary.highest]
        head = f"Highest scores ({', '.join([*(TITLES[name] for name in names), 'image'])}):"
        console.file.write("\n".join([*sentences(summary), head, *rows, files]) + "\n")
        return
    console.print("\n".join(sentences(summary)))
    table = Table(*(TITLES[name] for name in names), title="Highest scores", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("image", overflow="fold")
    for row in summary.highest:
        table.add_row(*(text(row.get(name)) for name in names), row["image_path"])
    if summary.highest:
        console.print(table)
    console.print(files, soft_wrap=True)


def text(value: Any) -> str:
    """Write a value of a row."""
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
