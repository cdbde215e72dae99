"""Accuracy of WTFlow, anomalib's models and two controls on the same features, through anomalib's ``Engine``.

    python -m benchmarks accuracy                          all models, the data sets, seeds 0, 1, 2
    python -m benchmarks accuracy --quick                  bottles, WTFlow and Patchcore, seed 0, against the JSON
    python -m benchmarks accuracy --data MVTecAD:screw --root ../datasets/MVTecAD

Images, size, split and backbone features are the same for all rows. No row sees the test set before it is tested. F1
is the best that any threshold gives (F1Max); ``image_F1Score`` and the false alarms, the share of good test images
above the threshold, are WTFlow's at its own threshold, which comes from
normal images only. Figures of pixels are left out where the data set has no masks.
"""

import statistics
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning import seed_everything

from benchmarks.base import Line, identity, read, results
from benchmarks.common import METRICS, Job, Verdict, averages, table
from benchmarks.datasets import DATA, data_module, has_masks
from benchmarks.models import ROWS, build, feature_network, quiet_engine, settings_of

COLUMNS = {
    "model": "{model}",
    "seeds": "{seeds}",
    **{title: f"{{{name}}}" for name, title in METRICS.items()},
    "false alarms": "{false_alarms}",
    "parameters": "{millions:.2f} M",
    "training": "{seconds:.0f} s",
}
OPTIONS = {"models": tuple(ROWS), "data": DATA, "root": None, "seeds": (0, 1, 2)}
QUICK = {"models": ["WTFlow", "Patchcore"], "data": ["mvtec_bottle"], "seeds": [0]}
GROUP = ("model", "data", "settings")
KEY = ("seed", *GROUP)
REPRODUCED = 0.005
"""Largest difference of a metric between the quick run and the JSON that still counts as reproduced."""


def run(row: str, data: str, seed: int = 0, root: Path | None = None, **engine: Any) -> Line:
    """Train and test one row on one data set with one seed, with more arguments for the engine if given."""
    module = data_module(data, root, ROWS[row].batch_size)
    if not ROWS[row].ours:
        seed_everything(seed, verbose=False)
    model = build(row, data, has_masks(module), **({"seed": seed} if ROWS[row].ours else {}))
    backbone = {id(p) for p in feature_network(model).parameters()}
    with TemporaryDirectory() as folder:
        runner = quiet_engine(folder, **engine)
        start = time.perf_counter()
        runner.fit(model, datamodule=module)
        fitted = time.perf_counter()
        (metrics,) = runner.test(model, datamodule=module, verbose=False)
    return {
        "settings": settings_of(row, data),
        "train_images": len(module.train_data),
        "test_images": len(module.test_data),
        "metrics": shares(metrics),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in backbone),
        "fit_seconds": round(fitted - start, 1),
        "test_seconds": round(time.perf_counter() - fitted, 1),
        "versions": {name: version(name) for name in ("anomalib", "anomalib-wtflow", "torch", "timm")},
    }


def shares(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return anomalib's metrics as the JSON has them, with false alarms, which are one less the specificity."""
    values = {name: float(value) for name, value in metrics.items()}
    specificity = values.pop("image_BinarySpecificity", None)
    return values if specificity is None else {**values, "false_alarms": 1 - specificity}


def jobs(given: Namespace) -> Iterator[Job]:
    """Plan the runs; a model that does not depend on the seed needs only one."""
    for data in given.data:
        for row in given.models:
            for seed in given.seeds if ROWS[row].seeded else given.seeds[:1]:
                gives = {"model": row, "data": data, "seed": seed, "settings": settings_of(row, data)}
                yield gives, partial(run, row, data, seed, given.root)


def render(runs: list[Line]) -> str:
    """Render a Markdown table for each data set: mean ± standard deviation over the seeds."""
    text = []
    for data in dict.fromkeys(run["data"] for run in runs):
        groups: dict[str, list[Line]] = {}
        for run in sorted(runs, key=lambda run: list(ROWS).index(run["model"])):
            if run["data"] == data:
                groups.setdefault(identity(run, GROUP), []).append(run)
        rows = []
        for group in groups.values():
            one = group[0]
            ratio = one["settings"].get("coreset_sampling_ratio")
            name = one["model"] + (f" ({100 * ratio:g} % coreset)" if ratio else "")
            seconds = statistics.median(run["fit_seconds"] for run in group)
            row = {"model": name, "seeds": len(group), "millions": one["parameters"] / 1e6, "seconds": seconds}
            rows.append({**row, **averages([run["metrics"] for run in group])})
        text += [f"**{data}** ({one['train_images']} training, {one['test_images']} test images)", ""]
        text += table(COLUMNS, rows)
    return "\n".join(text)


def compare(runs: list[Line]) -> list[Verdict]:
    """Say whether runs reproduce the committed figures."""
    published = {identity(run, KEY): run["metrics"] for run in read(results("accuracy"))}
    verdicts = []
    for run in runs:
        there = published.get(identity(run, KEY), {})
        for name, title in METRICS.items():
            if name in run["metrics"]:
                value = run["metrics"][name]
                held = name in there and abs(value - there[name]) <= REPRODUCED
                other = f"{there[name]:.4f}" if name in there else "none"
                text = f"{run['model']}: {title:12} {value:.4f}   published {other}"
                verdicts.append((held, f"{text}   {'reproduced' if held else 'NOT reproduced'}"))
    return verdicts
