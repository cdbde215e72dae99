"""Accuracy of WTFlow, anomalib's models and two controls on the same features, through anomalib's ``Engine``.

Usage:
    python benchmarks/accuracy.py                       all rows, the three data sets, seeds 0, 1, 2
    python benchmarks/accuracy.py --quick               bottles, WTFlow and Patchcore, seed 0; compares with the JSON
    python benchmarks/accuracy.py --data MVTecAD:screw --root ../datasets/MVTecAD
    python benchmarks/accuracy.py --render              the tables of the README, from the JSON

One JSON line a run is appended to ``--output``; a run that is already there is not repeated, so that an interrupted
benchmark goes on where it stopped. Images, size, split and backbone features are the same for all rows. No row sees
the test set before it is tested. F1 is the best that any threshold gives (F1Max); ``image_F1Score`` is WTFlow's at its
own threshold, which comes from normal images only. The backbone's output is kept in memory between the runs
(``--no-memo`` to time what a user would wait for).
"""

import argparse
import json
import logging
import os
import statistics
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from couplings import cpu
from lightning import seed_everything
from lines import append, read
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rows import ROWS, Memo, build, data_module, feature_network, quiet_engine, settings_of

RESULTS = Path(__file__).parent / "results" / "accuracy.json"
DATA = ("mvtec_bottle", "magnetic_tile", "synthetic")
METRICS = {
    "image_AUROC": "image AUROC",
    "image_AUPR": "image AUPR",
    "image_F1Max": "image F1",
    "pixel_AUROC": "pixel AUROC",
    "pixel_AUPRO": "AUPRO",
    "pixel_F1Max": "pixel F1",
}
QUICK = (("WTFlow", "mvtec_bottle", 0), ("Patchcore", "mvtec_bottle", 0))
REPRODUCED = 0.005
"""Largest difference of a metric between the quick run and the JSON that still counts as reproduced."""


def machine() -> dict[str, Any]:
    """Name the processor and the threads."""
    return {"cpu": cpu(), "threads": torch.get_num_threads()}


def run(row: str, data: str, seed: int, root: Path | None, memo: Memo | None, **kwargs: Any) -> dict[str, Any]:
    """Train and test one row on one data set with one seed, with more arguments for the engine if given."""
    seed_everything(seed, verbose=False)
    model, settings = build(row, data, memo)
    backbone = {id(p) for p in feature_network(model).parameters()}
    module = data_module(data, root, ROWS[row].batch_size)
    with TemporaryDirectory() as folder:
        engine = quiet_engine(folder, **kwargs)
        start = time.perf_counter()
        engine.fit(model, datamodule=module)
        fitted = time.perf_counter()
        (metrics,) = engine.test(model, datamodule=module, verbose=False)
    return {
        "model": row,
        "data": data,
        "seed": seed,
        "settings": settings,
        "train_images": len(module.train_data),
        "test_images": len(module.test_data),
        "metrics": {name: float(value) for name, value in metrics.items()},
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in backbone),
        "fit_seconds": round(fitted - start, 1),
        "test_seconds": round(time.perf_counter() - fitted, 1),
        "backbone_memo": memo is not None,
        "machine": machine(),
        "versions": {name: version(name) for name in ("anomalib", "anomalib-wtflow", "torch", "timm")},
    }


def identity(run: dict[str, Any]) -> tuple:
    """Tell runs apart: two with the same identity are repetitions."""
    return run["model"], run["data"], run["seed"], json.dumps(run["settings"], sort_keys=True)


def spread(values: list[float]) -> str:
    """Mean and, of several values, standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def note(row: str, settings: dict[str, Any]) -> str:
    """Name a row, with what differs between data sets."""
    ratio = settings.get("coreset_sampling_ratio")
    return f"{row} ({100 * ratio:g} % coreset)" if ratio else row


def tables(runs: list[dict[str, Any]]) -> str:
    """Render a Markdown table for each data set: mean ± standard deviation over the seeds."""
    lines = []
    for data in dict.fromkeys(run["data"] for run in runs):
        here = [run for run in runs if run["data"] == data]
        lines += [
            f"**{data}** ({here[0]['train_images']} training, {here[0]['test_images']} test images)",
            "",
            "| model | seeds | " + " | ".join(METRICS.values()) + " | parameters | training |",
            "|---" * (len(METRICS) + 4) + "|",
        ]
        groups = {identity({**run, "seed": None}): run for run in here}
        for group, one in sorted(groups.items(), key=lambda item: list(ROWS).index(item[1]["model"])):
            ours = [run for run in here if identity({**run, "seed": None}) == group]
            row = one["model"]
            cells = [spread([run["metrics"][name] for run in ours]) for name in METRICS]
            seconds = statistics.median(run["fit_seconds"] for run in ours)
            lines.append(
                f"| {note(row, ours[0]['settings'])} | {len(ours)} | "
                + " | ".join(cells)
                + f" | {ours[0]['parameters'] / 1e6:.2f} M | {seconds:.0f} s |"
            )
        lines.append("")
    return "\n".join(lines)


def quick(given: argparse.Namespace) -> int:
    """Run the quick subset, and compare it with the committed figures."""
    start, wrong = time.perf_counter(), 0
    published = {identity(r): r for r in read(given.output)}
    console = Console()
    for key in QUICK:
        console.print(f"{key[0]} on {key[1]}, seed {key[2]} …")
        result = run(*key, given.root, None)
        for name, title in METRICS.items():
            here = result["metrics"][name]
            there = published.get(identity(result), {"metrics": {}})["metrics"].get(name)
            held = there is not None and abs(here - there) <= REPRODUCED
            wrong += not held
            verdict = "reproduced" if held else "NOT reproduced"
            console.print(
                f"  {title:12} {here:.4f}   published {'none' if there is None else f'{there:.4f}'}   {verdict}"
            )
    minutes = (time.perf_counter() - start) / 60
    console.print(f"{minutes:.1f} minutes")
    return int(wrong > 0)


def main() -> int:
    """Run what is missing, and render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW", help=", ".join(ROWS)
    )
    parser.add_argument("--data", nargs="+", default=list(DATA), help="names, folders, or CLASS:CATEGORY")
    parser.add_argument("--root", type=Path, help="folder of the data sets given as CLASS:CATEGORY")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--no-memo", action="store_true", help="run the backbone on every image, every time")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--render", action="store_true")
    given = parser.parse_args()
    if given.render:
        print(tables(read(given.output)))
        return 0
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if given.quick:
        return quick(given)

    done = {identity(run) for run in read(given.output)}
    plan = [(row, data, seed) for data in given.data for row in given.models for seed in given.seeds]
    plan = [(row, data, seed) for row, data, seed in plan if ROWS[row].seeded or seed == given.seeds[0]]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    memo: Memo | None = None
    last = ""
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(plan))
        for row, data, seed in plan:
            progress.update(task, description=f"{data}: {row}, seed {seed}")
            planned = {"model": row, "data": data, "seed": seed, "settings": settings_of(row, data)}
            if identity(planned) not in done:
                if data != last:
                    memo, last = None if given.no_memo else Memo(), data
                append(given.output, run(row, data, seed, given.root, memo))
            progress.advance(task)
    print(tables(read(given.output)))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    sys.exit(main())
