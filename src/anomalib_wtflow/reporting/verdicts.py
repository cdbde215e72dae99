"""The verdict on each image, as a table in files: written while images come, summed up for the terminal."""

import csv
import heapq
import json
import math
import statistics
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TextIO

import torch
from filelock import FileLock, Timeout
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from anomalib_wtflow.flow.rows import own
from anomalib_wtflow.products import UNKNOWN
from anomalib_wtflow.reporting.data_sets import datasets
from anomalib_wtflow.reporting.summary import HIGHEST, Summary, show
from anomalib_wtflow.writing import one_sentence_for, refusal

NAME = "scores"
GOOD, ANOMALOUS = "good", "anomalous"
COLUMNS = (
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
"""``product`` only for models of several; ``threshold`` is the raw score's, at the model's sensitivity;
``largest_pixel`` is of the normalised map; ``outlined`` is the share of the image above the pixel threshold."""
ODD = "backslashreplace"
"""How bytes of a file's name that are no UTF-8 are written, as ``\\udcff``: any program reads the files then."""
NUMBERS = {"raw_score", "pred_score", "threshold", "largest_pixel", "outlined"}


class Verdicts(Callback):
    """Write ``scores.csv`` and ``scores.json`` into the run's folder, beside the pictures, and print what is in them.

    Rows are written as the images come, and none is kept: a stream of images takes no memory, and what was judged
    before a run was stopped is in the file. The JSON file is made from it at the end. A folder takes the verdicts of
    one run at a time: rows of two would be lost among each other.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self._lock: FileLock | None = None
        self._begun, self._judged = False, 0

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the files anew."""
        self._start(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the files anew."""
        self._start(trainer, pl_module)

    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any, **kwargs: Any) -> None:
        """Write the rows of a batch."""
        del trainer, args, kwargs
        self._write(pl_module, outputs)

    def on_predict_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any, **kwargs: Any) -> None:
        """Write the rows of a batch."""
        del trainer, args, kwargs
        self._write(pl_module, outputs)

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Finish the files, and print what is in them."""
        self._finish(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Finish the files, and print what is in them."""
        self._finish(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Close the file and leave the folder to other runs, whatever happened; say so if nothing was begun."""
        del pl_module
        if stage in ("test", "predict") and not self._begun:  # of no batches Lightning begins no run
            rank_zero_warn(f"No image was judged, since {reason(trainer)}: there are no verdicts.")
        self._close()
        if self._lock is not None:
            self._lock.release()
        self._lock = None

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Close the file after a failure; if a person or a machine stopped the run, say what was not judged."""
        try:
            if self._file is not None and isinstance(exception, KeyboardInterrupt | SIGTERMException):
                rank_zero_info(stopped(trainer, self._judged, Path(self._file.name)))
        finally:
            self.teardown(trainer, pl_module, "")

    # Files -----------------------------------------------------------------------------------------------------------

    @staticmethod
    def path(trainer: Trainer, rank: int = 0) -> Path:
        """Where a process writes its rows."""
        return Path(trainer.default_root_dir) / (f"{NAME}.csv" if rank == 0 else f"{NAME}-{rank}.csv")

    def _start(self, trainer: Trainer, pl_module: Any) -> None:
        path = self.path(trainer, trainer.global_rank)
        self._begun, self._judged = True, 0
        with told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = locked(path)
            path.with_suffix(".json").unlink(missing_ok=True)  # of an earlier run, should this one be stopped
            self._file = path.open("w", newline="", encoding="utf-8", errors=ODD)
            self._columns = [name for name in COLUMNS if name != "product" or len(pl_module.product_names) > 1]
            self._rows = csv.DictWriter(self._file, self._columns, extrasaction="ignore")
            self._rows.writeheader()
            self._file.flush()

    def _write(self, pl_module: Any, batch: Any) -> None:
        if self._file is not None:
            rows = rows_of(pl_module, batch)
            with told(Path(self._file.name)):
                self._rows.writerows(rows)
                self._file.flush()
            self._judged += len(rows)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _finish(self, trainer: Trainer, pl_module: Any) -> None:
        self._close()
        path = self.path(trainer)
        for rank in range(1, trainer.world_size):
            self._gather(trainer, path, rank)
        if not trainer.is_global_zero:
            return
        post = pl_module.post_processor
        rates = getattr(post, "promised_false_alarm_rate", torch.empty(0)).tolist()
        promises = dict(zip(pl_module.product_names, rates, strict=False))
        limit = float(getattr(post, "normalized_image_threshold", 0.5))
        with told(path.with_suffix(".json")):
            known = {name: rate for name, rate in promises.items() if rate == rate}
            summary = to_json(path, Summary(promises=known, limit=limit, given=given(trainer), reason=reason(trainer)))
        show(summary, path)

    def _gather(self, trainer: Trainer, path: Path, rank: int) -> None:
        """Move a process's rows into the first one's file, through their connection: it may be on another machine."""
        mine = trainer.global_rank == rank
        file = self.path(trainer, rank)
        text = trainer.strategy.broadcast(file.read_bytes() if mine else b"", rank)
        if mine:
            file.unlink()
        if trainer.is_global_zero:
            with told(path), path.open("ab") as whole:
                whole.write(text.partition(b"\n")[2])


def given(trainer: Trainer) -> int | None:
    """Return how many images the data sets of a test or a prediction hold; None if one has no length."""
    found = datasets(trainer)
    return sum(map(len, found)) if found and all(hasattr(each, "__len__") for each in found) else None


def reason(trainer: Trainer) -> str:
    """Say why a run that came to its end has not judged some of the images that it was given."""
    name = "limit_predict_batches" if trainer.predicting else "limit_test_batches"
    limit = getattr(trainer, name)
    return "the loader gave no more" if isinstance(limit, float) and limit == 1 else f"{name} is {limit:g}"


def stopped(trainer: Trainer, judged: int, path: Path) -> str:
    """Say what a run that is stopped has judged."""
    if trainer.world_size > 1:
        return f"Stopped: each process's verdicts are in {path.parent}, {NAME}*.csv; other images were not judged."
    whole = given(trainer)
    of = "" if whole is None else f" of {whole}"
    return f"Stopped after {judged}{of} images: their verdicts are in {path}, the others were not judged."


def told(path: Path) -> AbstractContextManager[None]:
    """Say that verdicts cannot be written."""
    way = "make room there, or do without them by --model.overrides.verdicts false"
    return one_sentence_for("The verdicts", path, way)


def locked(path: Path) -> FileLock | None:
    """Keep other runs from writing to a file until the lock is released, or this process has ended in any way.

    Raises:
        RuntimeError: If another run is writing to it.
    """
    lock = FileLock(path.with_name(f".{path.stem}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        msg = (
            f"Another run is writing its verdicts to {path}: wait until it has ended, or give this one a folder of its "
            "own by --default_root_dir."
        )
        raise RuntimeError(msg) from error
    except (OSError, NotImplementedError) as error:
        if refusal(path.parent) is not None:
            raise
        rank_zero_warn(
            f"The folder {path.parent} takes no lock ({error}): start no second run that writes there while this one "
            "lasts, since rows of both would be mixed."
        )
        return None
    return lock


def rows_of(model: Any, batch: Any) -> list[dict[str, Any]]:
    """Return a row for each image of a batch that the model and its post-processor have judged."""
    count = len(batch.pred_score)
    post, known = model.post_processor, batch.recognition
    threshold = getattr(post, "image_limit", getattr(post, "image_threshold", torch.tensor(torch.nan)))
    rows = own(threshold, known.product) if threshold.numel() > 1 else threshold.reshape(1).expand(count)
    columns: dict[str, list[Any]] = {
        "image_path": [str(path) for path in batch.image_path or [""] * count],
        "product": model.recognised(known),
        "raw_score": _numbers(batch.raw_score),
        "pred_score": _numbers(batch.pred_score),
        "threshold": _numbers(rows),
        "pred_label": _labels(batch.pred_label, count),
        "gt_label": _labels(batch.gt_label, count),
        "largest_pixel": _of_maps(batch.anomaly_map, Tensor.amax, count),
        "outlined": _of_maps(batch.pred_mask, Tensor.mean, count),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _numbers(values: Tensor) -> list[float | str]:
    """Numbers as float32 has them, in as few digits as tell them apart; nothing for NaN."""
    return ["" if value != value else float(f"{value:.9g}") for value in values.float().flatten().tolist()]


def _labels(values: Tensor | None, count: int) -> list[str]:
    return [""] * count if values is None else [ANOMALOUS if value else GOOD for value in values.flatten().tolist()]


def _of_maps(maps: Tensor | None, reduce: Any, count: int) -> list[Any]:
    return [""] * count if maps is None else _numbers(reduce(maps.float().flatten(1), dim=1))


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Read the rows of a file of verdicts one by one: numbers as numbers, what is not known as None."""
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            yield {name: None if text == "" else float(text) if name in NUMBERS else text for name, text in row.items()}


def to_json(path: Path, summary: Summary) -> Summary:
    """Write the rows of a CSV file as JSON beside it, one by one, and sum them up.

    Args:
        path: The CSV file.
        summary: What is known before, to which the rows are added.
    """
    scores: list[float] = []
    highest: list[tuple[float, int, dict[str, Any]]] = []
    with path.with_suffix(".json").open("w", encoding="utf-8") as file:
        file.write('{"images": [')
        for place, row in enumerate(read(path)):
            file.write(("," if place else "") + "\n" + json.dumps(row, ensure_ascii=False))
            count(summary, row)
            score = math.inf if row["pred_score"] is None else row["pred_score"]
            scores.append(score)
            keep = heapq.heappush if len(highest) < HIGHEST else heapq.heappushpop
            keep(highest, (score, -place, row))
        if scores:
            summary.scores = [min(scores), statistics.median(scores), max(scores)]
        summary.highest = [row for *_, row in sorted(highest, key=lambda each: each[:2], reverse=True)]
        file.write(f'\n], "summary": {json.dumps(summary.plain(), ensure_ascii=False)}}}\n')
    return summary


def count(summary: Summary, row: dict[str, Any]) -> None:
    """Count one verdict; without a score the image is no good one, and without labels there are no verdicts."""
    summary.images += 1
    if row["pred_label"] is None and row["pred_score"] is not None:
        return
    good, truth = row["pred_label"] == GOOD, row["gt_label"]
    summary.judged += 1
    summary.good += good
    summary.anomalous += not good
    summary.unknown += row.get("product") == UNKNOWN
    summary.truly_good += truth == GOOD
    summary.truly_anomalous += truth == ANOMALOUS
    summary.false_alarms += truth == GOOD and not good
    summary.misses += truth == ANOMALOUS and good
