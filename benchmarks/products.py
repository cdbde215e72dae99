"""One model for many products, against one for each, and against anomalib's models on all products' images together.

    python -m benchmarks products                      all parts
    python -m benchmarks products --parts pooled --models WTFlow --seeds 0
    python -m benchmarks products --quick              latency of one and of two products

``pooled`` trains once on the training images of all four data sets (``Products``) and tests set by set. What each model
reaches on each set by itself comes from ``python -m benchmarks accuracy``. No row but WTFlow's has thresholds of its
own here. ``latency`` is that of one image, of models of different numbers of products that take turns. What else grows
with products is in ``python -m benchmarks growth``.
"""

import statistics
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning import seed_everything

from anomalib_wtflow import Products, WTFlow
from benchmarks.accuracy import shares
from benchmarks.base import Line, read, results
from benchmarks.candidates import Variant, interleaved, ratio
from benchmarks.common import Job, Promise, Verdict, averages, table
from benchmarks.datasets import FOLDERS, data_module, has_masks
from benchmarks.models import ROWS, build, evaluator, model_bytes, quiet_engine, with_statistics
from benchmarks.runtimes import SIDE, draw_images, in_openvino

PARTS = ("pooled", "latency")
SETS = tuple(FOLDERS)
MODELS = ("WTFlow", "No flow", "Patchcore", "Padim", "FastFlow", "MHPatchcore")
COUNTS = (1, 2, 4, 8, 16, 32)
RUNTIMES = ("torch", "OpenVINO f32")
POOLED = {"Patchcore": {"coreset_sampling_ratio": 0.001}}
"""0.5 % of the patches of all four sets would take three hours on two cores."""
KEY = ("part", "model", "data", "seed", "count", "settings")
OPTIONS = {"parts": PARTS, "models": MODELS, "seeds": (0, 1, 2)}
QUICK = {"parts": ["latency"]}


def pool(row: str, seed: int) -> list[Line]:
    """Train one of the accuracy benchmark's rows on all sets together, and test it on each."""
    modules = {data: data_module(data, None, ROWS[row].batch_size) for data in SETS}
    together = Products(members=modules, train_batch_size=ROWS[row].batch_size)
    if not ROWS[row].ours:
        seed_everything(seed, verbose=False)
    model = build(row, "all", **({"seed": seed} if ROWS[row].ours else {}))
    for name, value in POOLED.get(row, {}).items():
        setattr(model, name, value)
    lines = []
    with TemporaryDirectory() as folder:
        begin = time.perf_counter()
        quiet_engine(folder).fit(model, datamodule=together)
        seconds = time.perf_counter() - begin
        for data, module in modules.items():
            model.evaluator.test_metrics = evaluator(ROWS[row].ours, has_masks(module)).test_metrics
            (metrics,) = quiet_engine(folder).test(model, datamodule=module, verbose=False)
            line = {"metrics": shares(metrics), "fit_seconds": round(seconds, 1)}
            line["MB"] = round(model_bytes(model) / 1e6, 2)
            lines.append({**line, **(told_apart(model, module, data) if row == "WTFlow" else {})})
    return lines


@torch.no_grad()
def told_apart(model: WTFlow, module: Any, name: str) -> Line:
    """Count a product's test images by kind, how many are recognised, and errors at its own threshold."""
    model.eval()
    counts = dict.fromkeys(("good", "good_recognised", "false_alarms", "defective", "defective_recognised"), 0)
    for item in module.test_data:
        raw = model.model(model.pre_processor.transform(item.image[None]))
        kind = "defective" if bool(item.gt_label) else "good"
        counts[kind] += 1
        counts[f"{kind}_recognised"] += raw.recognition.names(model.products) == [name]
        counts["false_alarms"] += int(model.post_processor(raw).pred_label) if kind == "good" else 0
    rate = model.post_processor.effective_false_alarm_rate[model.products.index(name)]
    return {"told_apart": counts, "promised": round(float(rate), 5)}


def with_products(count: int) -> WTFlow:
    """An untrained model of so many products, with statistics of noise."""
    noise = torch.randn(2 * count, 176, 4, 4)
    return with_statistics(WTFlow(pre_trained=False), noise, torch.arange(count).repeat(2))


def latency(counts: tuple[int, ...], rounds: int = 30) -> list[Line]:
    """Time one image in torch and in OpenVINO, models of different numbers of products taking turns."""
    image, calls = draw_images(1), {}
    with TemporaryDirectory() as folder, torch.inference_mode():
        for count in counts:
            model = with_products(count)
            path = model.to_openvino(Path(folder) / str(count), input_size=(SIDE, SIDE))
            calls[Variant(str(count), "torch")] = partial(model, torch.from_numpy(image))
            calls[Variant(str(count), "OpenVINO f32")] = partial(in_openvino()(path), image)
        seconds = interleaved(calls, rounds)
    lines = []
    for count in counts:
        variants = {name: Variant(str(count), name) for name in RUNTIMES}
        ms = {name: round(1e3 * statistics.median(seconds[variant]), 2) for name, variant in variants.items()}
        to_one = {
            name: round(ratio(seconds, variant, Variant(str(counts[0]), name)), 4) for name, variant in variants.items()
        }
        lines.append({"ms": ms, "ratio": to_one})
    return lines


def jobs(given: Namespace) -> Iterator[Job]:
    """Plan the runs."""
    if "pooled" in given.parts:
        for row in given.models:
            settings = {**ROWS[row].settings, **POOLED.get(row, {})}
            for seed in given.seeds if row == "WTFlow" else given.seeds[:1]:
                gives = [{"part": "pooled", "model": row, "data": d, "seed": seed, "settings": settings} for d in SETS]
                yield gives, partial(merged, gives, partial(pool, row, seed))
    if "latency" in given.parts:
        counts, rounds = ((1, 2), 3) if given.quick else (COUNTS, 30)
        gives = [{"part": "latency", "model": "WTFlow", "count": count} for count in counts]
        yield gives, partial(merged, gives, partial(latency, counts, rounds))


def merged(gives: list[Line], job: Any) -> list[Line]:
    """Put what is measured beside what tells the lines apart."""
    return [{**a, **b} for a, b in zip(gives, job(), strict=True)]


def of(lines: list[Line], part: str) -> list[Line]:
    """The lines of a part."""
    return [line for line in lines if line["part"] == part]


def alone() -> dict[tuple[str, str], list[float]]:
    """Image AUROC of the models that were trained on one set each, by model and set."""
    values: dict[tuple[str, str], list[float]] = {}
    for line in read(results("accuracy")):
        values.setdefault((line["model"], line["data"]), []).append(line["metrics"]["image_AUROC"])
    return values


def render_pooled(lines: list[Line]) -> list[str]:
    """A row for each model: image AUROC by product, the mean, and the loss to separate models."""
    apart, rows = alone(), []
    for row in dict.fromkeys(line["model"] for line in lines):
        runs = [line for line in lines if line["model"] == row]
        by = {d: [line["metrics"] for line in runs if line["data"] == d] for d in SETS}
        mean = statistics.mean(statistics.mean(each["image_AUROC"] for each in by[d]) for d in SETS)
        separate = [statistics.mean(apart[row, d]) for d in SETS if (row, d) in apart]
        share = runs[0]["settings"].get("coreset_sampling_ratio")
        cells = {d: averages(by[d])["image_AUROC"] for d in SETS}
        seconds = statistics.median(line["fit_seconds"] for line in runs)
        name = row + (f" ({100 * share:g} % coreset)" if share else "")
        loss = {"loss": statistics.mean(separate) - mean} if len(separate) == len(SETS) else {}
        rows.append({"model": name, **cells, "mean": mean, **loss, "MB": runs[0]["MB"], "s": seconds})
    columns = {"one model for all": "{model}", **{d: f"{{{d}}}" for d in SETS}, "mean": "{mean:.4f}"}
    columns |= {"below one each": "{loss:.4f}", "size": "{MB:.1f} MB", "training": "{s:.0f} s"}
    return ["**One model for four products**: image AUROC", "", *table(columns, rows), *render_by_product(lines)]


def render_by_product(lines: list[Line]) -> list[str]:
    """A row for each product of WTFlow's model, at its own thresholds."""
    columns = {
        "product": "{data}",
        "F1": "{image_F1Score}",
        "best F1": "{image_F1Max}",
        "pixel AUROC": "{pixel_AUROC}",
        "AUPRO": "{pixel_AUPRO}",
        "good images recognised": "{told_apart[good_recognised]} of {told_apart[good]}",
        "defective ones": "{told_apart[defective_recognised]} of {told_apart[defective]}",
        "false alarms": "{told_apart[false_alarms]} of {told_apart[good]}",
        "promised": "{promised:.1%}",
    }
    rows = []
    for d in SETS:
        runs = [line for line in lines if line["model"] == "WTFlow" and line["data"] == d]
        rows += [{**runs[0], **averages([line["metrics"] for line in runs])}] if runs else []
    return ["**WTFlow by product**, at its own thresholds (counts: seed 0)", "", *table(columns, rows)]


def render_latency(lines: list[Line]) -> list[str]:
    """A row for each number of products."""
    columns = {"products": "{count}"}
    for name in RUNTIMES:
        columns |= {name: f"{{{name}}} ms", f"{name}, to one product": f"{{{name} ratio}}"}
    rows = [
        {"count": line["count"], **line["ms"], **{f"{n} ratio": f"{r:.3f}" for n, r in line["ratio"].items()}}
        for line in lines
    ]
    return ["**Latency of one image**", "", *table(columns, rows)]


def render(lines: list[Line]) -> str:
    """Render the tables of all parts that were measured."""
    renders = {"pooled": render_pooled, "latency": render_latency}
    return "\n".join(text for part, make in renders.items() if of(lines, part) for text in make(of(lines, part)))


def verdicts(lines: list[Line]) -> list[Verdict]:
    """Say which promises are kept."""
    result = []
    pooled = [line for line in of(lines, "pooled") if line["model"] == "WTFlow"]
    apart = alone()
    if pooled and all(("WTFlow", d) in apart for d in SETS):
        means = {
            d: statistics.mean(line["metrics"]["image_AUROC"] for line in pooled if line["data"] == d) for d in SETS
        }
        losses = {d: statistics.mean(apart["WTFlow", d]) - means[d] for d in SETS}
        result.append(Promise("One model below one each, mean", most=0.005).verdict(statistics.mean(losses.values())))
        result.append(Promise("the product that loses most", most=0.015).verdict(max(losses.values())))
    for line in of(lines, "latency"):
        if line["count"] == COUNTS[-1]:
            result += [
                Promise(f"latency of {COUNTS[-1]} products to one, {name}", most=1.03).verdict(ratio)
                for name, ratio in line["ratio"].items()
            ]
    return result
