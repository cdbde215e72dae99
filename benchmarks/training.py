"""Seconds and memory of training: WTFlow beside FastFlow, Padim and Patchcore on the same backbone.

    python -m benchmarks training [--data mvtec_bottle magnetic_tile]
    python -m benchmarks training --quick                    bottles, WTFlow

Seed 0, through anomalib's ``Engine``, image decoding included. WTFlow trains on the 80 % of the images that it does not
hold out for its threshold, the others on all. FastFlow, Padim and Patchcore run the backbone as timm builds it, WTFlow
its own, folded one. Each model runs in a process of its own. WTFlow collects features first, and the fit is the rest.
``WTFlow, command`` is what a user types, ``anomalib train --model WTFlow --data MVTecAD ...``, with anomalib's 8
workers, from the start of the process to its end: imports, testing and drawing of the test images included; in
brackets without the imports; memory without the workers'. A *pass* is a plain pass of all images of the data set, those
of the test too, through decoding, pre-processing and backbone; it is measured just before each model, so that a ratio
to it says as much on another machine. Promised: FastFlow takes at least 5 times as long, Patchcore at least as much
memory, and the command at most 8 passes.
"""

import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from lightning import seed_everything

from anomalib_wtflow import WTFlow
from benchmarks.base import Line, call, last_json, peak_MiB
from benchmarks.common import Job, Promise, Verdict, machine_of, table
from benchmarks.datasets import FOLDERS, REAL, data_module
from benchmarks.models import ROWS, build, quiet_engine, settings_of, timed_fit

COMMAND = "WTFlow, command"
MODELS = ("WTFlow", COMMAND, "FastFlow", "Padim", "Patchcore")
KEY = ("model", "data")
OPTIONS = {"data": REAL, "models": MODELS}
QUICK = {"data": ["mvtec_bottle"], "models": ["WTFlow"]}
COMMAND_DATA = ("mvtec_bottle",)
"""Data sets that the command knows by a class and a category."""
SOONER = Promise("FastFlow / WTFlow, seconds", least=5, digits=".3g")
SMALLER = Promise("WTFlow / Patchcore, peak memory", most=1, digits=".3g")
PASSES = Promise("The command / a plain pass of its images", most=8, digits=".3g")
COLUMNS = {
    "model": "{model}",
    "training": "{training}",
    "of it the fit": "{fit_seconds:.1f} s",
    "the fit, in passes": "{fit_passes:.2f}",
    "all, in passes": "{passes:.2f}",
    "a pass": "{pass_seconds:.1f} s",
    "peak memory": "{peak_MiB} MiB",
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


@torch.no_grad()
def plain_pass(data: str) -> Line:
    """Pass all images of a data set through decoding, pre-processing and backbone, and nothing else."""
    module, model = data_module(data), WTFlow()
    start = time.perf_counter()
    for loader in (module.train_dataloader(), module.test_dataloader()):
        for batch in loader:
            model.model.extract(model.pre_processor(batch.image))
    images = len(module.train_data) + len(module.test_data)
    return {"pass_seconds": round(time.perf_counter() - start, 2), "pass_images": images}


def train(name: str, data: str) -> Line:
    """Train a model in this process, and measure it."""
    seed_everything(0, verbose=False)
    model, module = build(name, data), data_module(data, None, ROWS[name].batch_size)
    fits = timed_fit(model) if name == "WTFlow" else []
    with TemporaryDirectory() as folder:
        start = time.perf_counter()
        quiet_engine(folder).fit(model, datamodule=module)
        seconds = time.perf_counter() - start
    line = {"settings": settings_of(name, data), "seconds": round(seconds, 2), "peak_MiB": peak_MiB()}
    return {**line, "fit_seconds": round(fits[0], 2)} if fits else line


def train_by_command(data: str, *more: str) -> Line:
    """Run the command that a user types, with more of its options if given."""
    folder = FOLDERS[data].resolve()
    options = ["--model", "WTFlow", "--data", "MVTecAD", "--data.root", str(folder.parent)]
    command = [sys.executable, "-c", TRAIN, "train", *options, "--data.category", folder.name, *more]
    with TemporaryDirectory() as results:
        start = time.perf_counter()
        line = last_json(command, Path(results))
        seconds = time.perf_counter() - start
    return {"settings": {}, "seconds": round(seconds, 2), **line}


def measure(name: str, data: str) -> Line:
    """Measure a plain pass, then a model."""
    passed = call(plain_pass, data)
    return {**passed, **(train_by_command(data) if name == COMMAND else call(train, name, data))}


def jobs(given: Namespace) -> Iterator[Job]:
    """Plan the trainings."""
    for data in given.data:
        for name in given.models:
            if name != COMMAND or data in COMMAND_DATA:
                yield {"model": name, "data": data}, partial(measure, name, data)


def render(lines: list[Line]) -> str:
    """Render the tables and the promises."""
    text = [machine_of(lines), ""]
    for data in dict.fromkeys(line["data"] for line in lines):
        here, rows = [line for line in lines if line["data"] == data], []
        for line in here:
            after = f" ({line['after_imports']:.0f} s)" if "after_imports" in line else ""
            row = {**line, "training": f"{line['seconds']:.0f} s{after}"}
            if "pass_seconds" in line:
                row["passes"] = line["seconds"] / line["pass_seconds"]
                row |= {"fit_passes": line["fit_seconds"] / line["pass_seconds"]} if "fit_seconds" in line else {}
            rows.append(row)
        text += [f"**{data}**", "", *table(COLUMNS, rows), *(f"- {verdict}" for _, verdict in verdicts(here)), ""]
    return "\n".join(text)


def verdicts(lines: list[Line]) -> list[Verdict]:
    """Say what is kept of what was promised, for each data set."""
    found = []
    for data in dict.fromkeys(line["data"] for line in lines):
        here = {line["model"]: line for line in lines if line["data"] == data}
        if {"WTFlow", "FastFlow"} <= set(here):
            found.append(SOONER.verdict(here["FastFlow"]["seconds"] / here["WTFlow"]["seconds"]))
        if {"WTFlow", "Patchcore"} <= set(here):
            found.append(SMALLER.verdict(here["WTFlow"]["peak_MiB"] / here["Patchcore"]["peak_MiB"]))
        if COMMAND in here:
            found.append(PASSES.verdict(here[COMMAND]["seconds"] / here[COMMAND]["pass_seconds"]))
    return found
