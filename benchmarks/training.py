"""Seconds and memory of training: WTFlow beside FastFlow, Padim and Patchcore on the same backbone.

    python -m benchmarks training [--data mvtec_bottle magnetic_tile]
    python -m benchmarks training --quick                    bottles; WTFlow, with and without cache, and Padim

Seed 0, through anomalib's ``Engine``, image decoding included; WTFlow trains on the 80 % of the images that it does not
hold out for its threshold, the others on all. FastFlow, Padim and Patchcore run the backbone as timm builds it, WTFlow
its own, folded one. Each model runs in a process of its own. Flows are tested after an epoch with the clock stopped,
for the AUROC at each moment: FastFlow in the run that is timed, whose peak memory is then that before its first test;
WTFlow in a run of its own. ``WTFlow, no cache`` passes all images through the backbone in every epoch, for a few
epochs. ``WTFlow, command`` is what a user types, ``anomalib train --model WTFlow --data MVTecAD ...``, with anomalib's
8 workers, from the start of the process to its end: imports, testing and drawing of the test images included; in
brackets without the imports; memory without the workers'. Promised: at least 5 times as fast as FastFlow to its best
AUROC, no more memory than Patchcore, a cached epoch at most 0.1 of loading and backbone.
"""

import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from anomalib.pre_processing import PreProcessor
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch import Callback
from sklearn.metrics import roc_auc_score

from benchmarks.base import Line, call, last_json, peak_MiB
from benchmarks.common import Job, Promise, Verdict, machine_of, table
from benchmarks.datasets import FOLDERS, REAL, data_module
from benchmarks.models import ROWS, Memo, build, feature_network, quiet_engine, settings_of

NO_CACHE, COMMAND = "WTFlow, no cache", "WTFlow, command"
MODELS = ("WTFlow", NO_CACHE, COMMAND, "FastFlow", "Padim", "Patchcore")
KEY = ("model", "data")
OPTIONS = {"data": REAL, "models": MODELS}
QUICK = {"data": ["mvtec_bottle"], "models": ["WTFlow", NO_CACHE, "Padim"]}
COMMAND_DATA = ("mvtec_bottle",)
"""Data sets that the command knows by a class and a category."""
TEST_EVERY = {"WTFlow": 2, "FastFlow": 1}
"""Epochs between two tests."""
FEW_EPOCHS = 4
SOONER = Promise("FastFlow / WTFlow, seconds to FastFlow's best image AUROC", least=5, digits=".3g")
SMALLER = Promise("WTFlow / Patchcore, peak memory", most=1, digits=".3g")
CACHED = Promise("Cached epoch / loading and backbone of an epoch", most=0.1, digits=".3g")
COLUMNS = {
    "model": "{model}",
    "training": "{training}",
    "epochs": "{epochs}",
    "an epoch": "{epoch_seconds:.2f} s",
    "peak memory": "{peak_MiB} MiB",
    "to FastFlow's best image AUROC": "{until}",
}

TRAIN = """
import json, sys, time
from anomalib.cli.cli import main
start = time.perf_counter()
status = main()
seconds = time.perf_counter() - start
from benchmarks.base import peak_MiB
print()
print(json.dumps({"after_imports": round(seconds, 2), "peak_MiB": peak_MiB()}))
sys.exit(status)
"""
"""The command ``anomalib``, as its package installs it, with a clock."""


class Clock(Callback):
    """Seconds from the start of the fit to the end of each epoch; with test images, the AUROC then, off the clock.

    Args:
        module: Data module whose test images are scored, or None.
        every: Epochs between two tests.
    """

    def __init__(self, module: Any = None, every: int = 1) -> None:
        self.module, self.every = module, every
        self.start, self.stopped = time.perf_counter(), 0.0
        self.peak_MiB: int | None = None
        self.seconds: list[float] = []
        self.curve: list[tuple[int, float, float]] = []
        self.memo = Memo()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note when the first epoch begins: with a cache, after the images have passed the backbone."""
        if trainer.current_epoch == 0:
            self.begun = time.perf_counter() - self.start
        else:
            self.test_at_times(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time. The test comes later, when the model has finished the epoch too."""
        del trainer, pl_module
        self.seconds.append(time.perf_counter() - self.start - self.stopped)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test the last epoch."""
        del trainer
        self.test_at_times(pl_module)

    def test_at_times(self, model: Any) -> None:
        """Test if it is time, with the clock stopped."""
        epoch = len(self.seconds)
        if self.module is None or (epoch > 2 and epoch % self.every):
            return
        pause = time.perf_counter()
        self.peak_MiB = self.peak_MiB or peak_MiB()
        self.curve.append((epoch, round(self.seconds[-1], 2), self.test(model)))
        self.stopped += time.perf_counter() - pause

    @torch.no_grad()
    def test(self, model: Any) -> float:
        """Return the image AUROC; a test image passes the backbone once in all tests."""
        network = feature_network(model)
        forward = network.forward
        self.memo.wrap(network)
        model.eval()
        scores, labels = [], []
        with torch.random.fork_rng():
            for batch in self.module.test_dataloader():
                pre_processor = model.pre_processor
                images = pre_processor(batch.image) if isinstance(pre_processor, PreProcessor) else batch.image
                scores += model.model(images).pred_score.flatten().tolist()
                labels += batch.gt_label.tolist()
        model.train()
        network.forward = forward
        return round(float(roc_auc_score(labels, scores)), 4)


def train(name: str, data: str, test: bool) -> Line:
    """Train a model in this process, and measure it."""
    row = "WTFlow" if name == NO_CACHE else name
    seed_everything(0, verbose=False)
    extra = {"overrides": {"feature_cache": 0.0}, "max_epochs": FEW_EPOCHS} if name == NO_CACHE else {}
    model = build(row, data, **extra)
    module = data_module(data, None, ROWS[row].batch_size)
    clock = Clock(module if test else None, TEST_EVERY.get(name, 1))
    with TemporaryDirectory() as folder:
        engine = quiet_engine(folder, callbacks=[clock])
        clock.start = time.perf_counter()
        engine.fit(model, datamodule=module)
        seconds = time.perf_counter() - clock.start - clock.stopped
    epochs = [b - a for a, b in zip(clock.seconds, clock.seconds[1:], strict=False)]
    return {
        "settings": {**settings_of(row, data), **extra},
        "seconds": round(seconds, 2),
        "before_first_epoch": round(clock.begun, 2),
        "epoch_seconds": round(statistics.median(epochs), 3) if epochs else None,
        "epochs": len(clock.seconds),
        "peak_MiB": clock.peak_MiB or peak_MiB(),
        "curve": clock.curve,
    }


def train_by_command(data: str, *more: str) -> Line:
    """Run the command that a user types, with more of its options if given."""
    folder = FOLDERS[data].resolve()
    options = ["--model", "WTFlow", "--data", "MVTecAD", "--data.root", str(folder.parent)]
    command = [sys.executable, "-c", TRAIN, "train", *options, "--data.category", folder.name, *more]
    with TemporaryDirectory() as results:
        start = time.perf_counter()
        line = last_json(command, Path(results))
        seconds = time.perf_counter() - start
    return {"settings": {}, "seconds": round(seconds, 2), "curve": [], **line}


def measure(name: str, data: str, curve: bool) -> Line:
    """Measure a model on a data set, with WTFlow's curve or without, which takes a training more."""
    if name == COMMAND:
        return train_by_command(data)
    line = call(train, name, data, name == "FastFlow")
    if name == "WTFlow" and curve:
        line["curve"] = call(train, name, data, True)["curve"]
    return line


def jobs(given: Namespace) -> Iterator[Job]:
    """Plan the trainings."""
    for data in given.data:
        for name in given.models:
            if name != COMMAND or data in COMMAND_DATA:
                yield {"model": name, "data": data}, partial(measure, name, data, not given.quick)


def reached(curve: list[list[float]], auroc: float) -> float | None:
    """Return the seconds until an AUROC is first reached."""
    return next((seconds for _, seconds, value in curve if value >= auroc), None)


def aim_of(lines: list[Line]) -> float | None:
    """Return FastFlow's best AUROC."""
    curves = [line["curve"] for line in lines if line["model"] == "FastFlow"]
    return max((value for curve in curves for _, _, value in curve), default=None)


def render(lines: list[Line]) -> str:
    """Render the tables and the promises."""
    text = [machine_of(lines), ""]
    for data in dict.fromkeys(line["data"] for line in lines):
        here = [line for line in lines if line["data"] == data]
        aim, rows = aim_of(here), []
        for line in here:
            until = reached(line["curve"], aim) if aim and line["curve"] else None
            cell = "never" if until is None else f"{until:.1f} s ({aim:.4f})"
            after = f" ({line['after_imports']:.0f} s)" if "after_imports" in line else ""
            training = f"{line['seconds']:.0f} s{after}"
            rows.append({**line, "training": training, "until": cell if aim and line["curve"] else ""})
        text += [f"**{data}**", "", *table(COLUMNS, rows), *(f"- {verdict}" for _, verdict in verdicts(here)), ""]
    return "\n".join(text)


def verdicts(lines: list[Line]) -> list[Verdict]:
    """Say what is kept of what was promised, for each data set."""
    found = []
    for data in dict.fromkeys(line["data"] for line in lines):
        here = {line["model"]: line for line in lines if line["data"] == data}
        aim = aim_of(list(here.values()))
        if {"WTFlow", "FastFlow"} <= set(here):
            ours, theirs = (reached(here[name]["curve"], aim) if aim else None for name in ("WTFlow", "FastFlow"))
            found.append(SOONER.verdict(theirs / ours if ours and theirs else None))
        if {"WTFlow", "Patchcore"} <= set(here):
            found.append(SMALLER.verdict(here["WTFlow"]["peak_MiB"] / here["Patchcore"]["peak_MiB"]))
        if {"WTFlow", NO_CACHE} <= set(here):
            cached, whole = here["WTFlow"]["epoch_seconds"], here[NO_CACHE]["epoch_seconds"]
            found.append(CACHED.verdict(cached / (whole - cached)))
    return found
