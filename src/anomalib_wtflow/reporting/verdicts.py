"""The verdict on each image: files, written image by image, and a summary."""

import csv
import sys
from pathlib import Path
from typing import Any, TextIO

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from anomalib_wtflow._registration import register_report
from anomalib_wtflow.reporting.summary import LABELS, highest, read_rows, sentences, summary_of, write_json

VERDICT_COLUMNS = (
    "image_path",
    "product",
    "raw_score",
    "pred_score",
    "threshold",
    "pred_label",
    "gt_label",
    "largest_pixel",
    "outlined",
)
"""``product`` only for models of several."""


@register_report
class Verdicts(Callback):
    """``scores.csv`` and ``scores.json`` in the run's folder, and a printed summary.

    Rows are written as the images come, and none is kept: a stream of images takes no memory, and what was judged
    before a run was stopped is in the file. The JSON file is made from it at the end. Each process writes a file of its
    own, and the first one puts them together.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Open new files."""
        self._file = None
        if not hasattr(pl_module, "products"):
            return
        rank = trainer.global_rank
        path = Path(trainer.default_root_dir) / (f"scores-{rank}.csv" if rank else "scores.csv")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").unlink(missing_ok=True)  # of an earlier run, should this one be stopped
        # Bytes of a file's name that are no UTF-8 become \udcff, so that any program reads the files.
        self._file = path.open("w", newline="", encoding="utf-8", errors="backslashreplace")
        columns = [name for name in VERDICT_COLUMNS if name != "product" or len(pl_module.products) > 1]
        self._rows = csv.DictWriter(self._file, columns, extrasaction="ignore")
        self._rows.writeheader()

    def on_test_batch_end(self, _trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        """Write the rows of a batch."""
        if self._file is not None:
            self._rows.writerows(rows_of(pl_module, outputs))
            self._file.flush()

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Finish the files, and print what is in them."""
        if self._file is None:
            return
        self._file.close()
        path = Path(self._file.name)
        if trainer.world_size > 1:
            self._put_together(path, trainer)
        if trainer.is_global_zero:
            sum_up(path, pl_module)

    on_predict_start = on_test_start
    on_predict_batch_end = on_test_batch_end  # type: ignore[assignment]  # the names differ
    on_predict_end = on_test_end

    def on_exception(self, *_: Any) -> None:
        """Close the file after a failure, too."""
        if self._file is not None:
            self._file.close()

    def _put_together(self, path: Path, trainer: Trainer) -> None:
        """Write the rows of all processes into the first file, each image once."""
        parts: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(parts, list(read_rows(path)))
        rows = [row for part in parts for row in part]
        rows = list({row["image_path"] or number: row for number, row in enumerate(rows)}.values())
        if not trainer.is_global_zero:
            path.unlink()
            return
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._rows.fieldnames)
            writer.writeheader()
            writer.writerows(rows)


def sum_up(path: Path, model: Any) -> None:
    """Write the JSON file of a model's verdicts, and print their summary."""
    post = model.post_processor
    rates = getattr(post, "promised_false_alarm_rate", torch.empty(0)).tolist()
    promises = {name: rate for name, rate in zip(model.products, rates, strict=False) if rate == rate}
    summary = summary_of(path, promises, float(getattr(post, "normalized_image_threshold", 0.5)))
    write_json(path, summary)
    lines = [*sentences(summary), *highest(path), f"Every verdict: {path} and {path.with_suffix('.json').name}"]
    sys.stdout.write("\n".join(lines) + "\n")


def rows_of(model: Any, batch: Any) -> list[dict[str, Any]]:
    """Return a row for each image of a batch that the model and its post-processor have judged."""
    count, recognition = len(batch.pred_score), batch.recognition
    threshold = getattr(model.post_processor, "image_limit", torch.tensor(torch.nan)).reshape(-1)
    columns: dict[str, list[Any]] = {
        "image_path": [str(path) for path in batch.image_path or [""] * count],
        "product": recognition.names(model.products),
        "raw_score": rounded(batch.raw_score),
        "pred_score": rounded(batch.pred_score),
        "threshold": rounded(threshold[recognition.index.to(threshold.device).clamp(max=len(threshold) - 1)]),
        "pred_label": words(batch.pred_label, count),
        "gt_label": words(batch.gt_label, count),
        "largest_pixel": reduced(batch.anomaly_map, Tensor.amax, count),
        "outlined": reduced(batch.pred_mask, Tensor.mean, count),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def rounded(values: Tensor) -> list[float | str]:
    """Return numbers as float32 has them, in as few digits as tell them apart; nothing for NaN."""
    return ["" if value != value else float(f"{value:.9g}") for value in values.float().flatten().tolist()]


def words(values: Tensor | None, count: int) -> list[str]:
    """Return labels as words; nothing where they are not known."""
    return [""] * count if values is None else [LABELS[bool(value)] for value in values.flatten().tolist()]


def reduced(maps: Tensor | None, reduce: Any, count: int) -> list[Any]:
    """Reduce each map to a number; nothing where there are no maps."""
    return [""] * count if maps is None else rounded(reduce(maps.float().flatten(1), dim=1))
