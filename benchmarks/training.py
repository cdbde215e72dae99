"""Seconds and memory of training: WTFlow beside FastFlow, Padim and Patchcore on the same backbone.

Usage:
    python benchmarks/training.py [--data mvtec_bottle magnetic_tile]     measure what is missing; JSON
    python benchmarks/training.py --render                                the tables of the README, from the JSON

Seed 0, through anomalib's ``Engine``, image decoding included; WTFlow trains on the 80 % of the images that it does not
hold out for its threshold, the others on all. FastFlow, Padim and Patchcore run the backbone as timm builds it, WTFlow
its own, folded one. Each model runs in a process of its own. Flows are tested after an epoch with the clock stopped,
for the AUROC at each moment: FastFlow in the run that is timed, whose peak memory is then that before its first test;
WTFlow in a run of its own. ``WTFlow, no cache`` passes all images through the backbone in every epoch, for a few
epochs.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accuracy import machine
from anomalib.pre_processing import PreProcessor
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch import Callback
from lines import append, need, read
from rich.progress import track
from rows import ROWS, Memo, build, data_module, feature_network, quiet_engine
from runtimes import peak_MiB
from sklearn.metrics import roc_auc_score

from anomalib_wtflow import WTFlow

RESULTS = Path(__file__).parent / "results" / "training.json"
DATA = ("mvtec_bottle", "magnetic_tile")
NO_CACHE = "WTFlow, no cache"
MODELS = ("WTFlow", NO_CACHE, "FastFlow", "Padim", "Patchcore")
TEST_EVERY = {"WTFlow": 2, "FastFlow": 1}
"""Epochs between two tests."""
FEW_EPOCHS = 4


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
        del pl_module
        if trainer.current_epoch == 0:
            self.begun = time.perf_counter() - self.start

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time, and test."""
        self.seconds.append(time.perf_counter() - self.start - self.stopped)
        epoch = trainer.current_epoch + 1
        if self.module is None or (epoch > 2 and epoch % self.every):
            return
        pause = time.perf_counter()
        self.peak_MiB = self.peak_MiB or peak_MiB()
        self.curve.append((epoch, round(self.seconds[-1], 2), self.test(pl_module)))
        self.stopped += time.perf_counter() - pause

    @torch.no_grad()
    def test(self, model: Any) -> float:
        """Return the image AUROC; a test image passes the backbone once in all tests."""
        network = feature_network(model)
        forward = network.forward
        self.memo.wrap(network)
        model.eval()
        if isinstance(model, WTFlow):  # its own hook, which sets the limit of the contrast, comes after this one
            model.model.observe(model._reference, model._image_size)
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


def train(name: str, data: str, test: bool) -> dict[str, Any]:
    """Train a model in this process, and measure it."""
    row = "WTFlow" if name == NO_CACHE else name
    seed_everything(0, verbose=False)
    extra = {"feature_cache": 0.0, "max_epochs": FEW_EPOCHS} if name == NO_CACHE else {}
    model, settings = build(row, data, None, **extra)
    module = data_module(data, None, ROWS[row].batch_size)
    if test:
        module.prepare_data()
        module.setup()
    clock = Clock(module if test else None, TEST_EVERY.get(name, 1))
    with TemporaryDirectory() as folder:
        engine = quiet_engine(folder, callbacks=[clock])
        clock.start = time.perf_counter()
        engine.fit(model, datamodule=module)
        seconds = time.perf_counter() - clock.start - clock.stopped
    epochs = [b - a for a, b in zip(clock.seconds, clock.seconds[1:], strict=False)]
    return {
        "model": name,
        "data": data,
        "settings": {**settings, **extra},
        "seconds": round(seconds, 2),
        "before_first_epoch": round(clock.begun, 2),
        "epoch_seconds": round(statistics.median(epochs), 3) if epochs else None,
        "epochs": len(clock.seconds),
        "peak_MiB": clock.peak_MiB or peak_MiB(),
        "curve": clock.curve,
        "machine": machine(),
    }


def child(name: str, data: str, test: bool) -> dict[str, Any]:
    """Train a model in a process of its own."""
    command = [sys.executable, __file__, "--child", name, data, str(int(test))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, data: str) -> dict[str, Any]:
    """Measure a model on a data set."""
    line = child(name, data, test=name == "FastFlow")
    if name == "WTFlow":
        line["curve"] = child(name, data, test=True)["curve"]
    return line


def reached(curve: list[list[float]], auroc: float) -> float | None:
    """Return the seconds until an AUROC is first reached."""
    return next((seconds for _, seconds, value in curve if value >= auroc), None)


def tables(lines: list[dict[str, Any]]) -> str:
    """Render the tables and the promises."""
    text = [f"{lines[0]['machine']['cpu']}, {lines[0]['machine']['threads']} threads", ""]
    for data in dict.fromkeys(line["data"] for line in lines):
        here = {line["model"]: line for line in lines if line["data"] == data}
        text += [
            f"**{data}**",
            "",
            "| model | training | epochs | an epoch | peak memory | to FastFlow's best image AUROC |",
            "|---" * 6 + "|",
        ]
        best = max((value for _, _, value in here["FastFlow"]["curve"]), default=None) if "FastFlow" in here else None
        times: dict[str, float] = {}
        for name, line in here.items():
            flow = best is not None and line["curve"]
            until = reached(line["curve"], best) if flow else None
            cell = "never" if flow else ""
            if until is not None:
                times[name] = until
                cell = f"{until:.1f} s ({best:.4f})"
            epoch = "" if line["epoch_seconds"] is None else f"{line['epoch_seconds']:.2f} s"
            text.append(
                f"| {name} | {line['seconds']:.0f} s | {line['epochs']} | {epoch} | {line['peak_MiB']} MiB | {cell} |"
            )
        text.append("")
        text += promises(here, times)
        text.append("")
    return "\n".join(text)


def promises(here: dict[str, dict[str, Any]], times: dict[str, float]) -> list[str]:
    """Say what is kept of what was promised, for one data set."""
    text = []
    if {"WTFlow", "FastFlow"} <= set(times):
        ratio = times["FastFlow"] / times["WTFlow"]
        text.append(verdict("FastFlow / WTFlow, seconds to FastFlow's best image AUROC", ratio, least=5))
    elif {"WTFlow", "FastFlow"} <= set(here):
        text.append("- FastFlow / WTFlow, seconds to FastFlow's best image AUROC: never reached (at least 5) MISSED")
    if {"WTFlow", "Patchcore"} <= set(here):
        ratio = here["WTFlow"]["peak_MiB"] / here["Patchcore"]["peak_MiB"]
        text.append(verdict("WTFlow / Patchcore, peak memory", ratio, most=1))
    if {"WTFlow", NO_CACHE} <= set(here):
        cached, whole = here["WTFlow"]["epoch_seconds"], here[NO_CACHE]["epoch_seconds"]
        text.append(verdict("Cached epoch / loading and backbone of an epoch", cached / (whole - cached), most=0.1))
    return text


def verdict(text: str, ratio: float, least: float = 0.0, most: float = float("inf")) -> str:
    """Say whether a ratio is within its limit."""
    limit = f"at least {least:g}" if least else f"at most {most:g}"
    return f"- {text}: {ratio:.3g} ({limit}) {'kept' if least <= ratio <= most else 'MISSED'}"


def main() -> int:
    """Measure what is missing, and render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=list(DATA))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if given.child:
        name, data, test = given.child
        print(json.dumps(train(name, data, bool(int(test)))))
        return 0
    if not given.render:
        done = {(line["model"], line["data"]) for line in read(given.output)}
        plan = [(name, data) for data in given.data for name in given.models if (name, data) not in done]
        for name, data in track(plan, description="Training", transient=True):
            append(given.output, measure(name, data))
    print(tables(need(given.output, "training.py")))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    sys.exit(main())
