"""One model for many products, against one for each, and against anomalib's models on all products' images together.

    python -m benchmarks products                      all parts
    python -m benchmarks products --parts told         what the field is told, on cached features (the rule's table)
    python -m benchmarks products --parts pooled --models WTFlow --seeds 0
    python -m benchmarks products --parts growth       1 to 32 drawn products
    python -m benchmarks products --quick              two drawn products

``pooled`` trains once on the training images of all four data sets (``Products``) and tests set by set; what each
model reaches on each set by itself comes from ``python -m benchmarks accuracy``. No row but WTFlow's has thresholds of
its own here. ``told`` holds out a fifth of the training images and has, beside the test images' AUROC, the criterion
without labels of ``generalise`` (``still``). ``growth`` trains in a process of its own for each number of products.
"""

import statistics
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning import seed_everything
from torch import Tensor, nn

from anomalib_wtflow import Products, SyntheticParts, WTFlow, WTFlowModel
from anomalib_wtflow.flow.field import PointwiseField
from anomalib_wtflow.torch_model import averaged_over
from benchmarks.base import ROOT, Line, call, peak_MiB, read, results
from benchmarks.cached import BATCH, MAP, Cache, features, reference_of, start, untrained
from benchmarks.common import Job, Promise, Verdict, table
from benchmarks.datasets import FOLDERS, data_module, has_masks
from benchmarks.generalise import Altered, auroc
from benchmarks.models import ROWS, Memo, build, evaluator, feature_network, quiet_engine
from benchmarks.pseudo import KINDS

PARTS = ("told", "pooled", "growth", "latency")
SETS = tuple(FOLDERS)
MODELS = ("WTFlow", "No flow", "Patchcore", "Padim", "FastFlow", "MHPatchcore")
COUNTS = (1, 2, 4, 8, 16, 32)
GROWING = ("WTFlow", "Patchcore")
MOST = {"Patchcore": 8}
"""Products up to which a model grows here: the greedy coreset's time grows with their square."""
POOLED = {"Patchcore": {"coreset_sampling_ratio": 0.001}}
"""0.5 % of the patches of all four sets would take three hours on two cores."""
DRAWN = {"train_images": 24, "test_images": 8, "defect_images": 4}
KEY = ("part", "model", "data", "seed", "count", "told", "settings")
OPTIONS = {"parts": PARTS, "models": MODELS, "seeds": (0, 1, 2)}
QUICK = {"parts": ["growth"], "models": ["WTFlow"], "seeds": [0]}
TOLD: dict[str, dict[str, Any]] = {
    "nothing, one normalisation": {"own": False, "code": "none"},
    "nothing, own normalisation": {"code": "none"},
    "a code at the block": {},
    "a code at the block and the stem": {"code": "stem"},
    "a code at the block, width 384": {"width": 384},
    "a code at the block, drawn by the root of their images": {"balance": 0.5},
    "a code at the block, drawn alike often": {"balance": 1.0},
}
"""From the simplest on; the third is WTFlow's."""


# What the field is told ----------------------------------------------------------------------------------------------


def normalised(model: WTFlowModel, parts: dict[str, Tensor], own: bool) -> tuple[Tensor, Tensor]:
    """Fit a model's normalisation and recognition on the features of each product; return them normalised."""
    model.set_products(len(parts) if own else 1, 0)
    for place, part in enumerate(parts.values()):
        for few in part.split(BATCH):
            model.update(few, torch.full((len(few),), place if own else 0))
    model.finalize()
    with torch.no_grad():
        done = [model.normalise(few) for part in parts.values() for few in part.split(BATCH)]
    return torch.cat([each.x0 for each in done]), torch.cat([each.product for each in done])


class StemTold(PointwiseField):
    """A field that is told the code at its stem, too: ``h = A x + D c + B silu(...)``."""

    def __init__(self, field: PointwiseField) -> None:
        super().__init__(field.stem.in_channels, field.stem.out_channels, len(field.inner), field.condition.shape[1])
        self.load_state_dict(field.state_dict())
        self.at_stem = nn.Parameter(torch.zeros_like(self.condition))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the velocity at points and times."""
        bias = torch.zeros(1, len(self.at_stem)) if condition is None else condition @ self.at_stem.T
        hook = self.stem.register_forward_hook(lambda _module, _inputs, h: h + bias[:, :, None, None])
        try:
            return super().forward(x, t, condition)
        finally:
            hook.remove()

    points = forward


def rebuild(model: WTFlowModel, code: str) -> None:
    """Leave the code out of a model, or tell it to the field's stem, too."""
    if code == "none":
        model.codes.zero_()
    if code == "stem":
        model.field.fields = nn.ModuleList(map(StemTold, model.field.fields))
        model.averaged = averaged_over(model.field, model.settings.averaging)


def train(model: WTFlowModel, x0: Tensor, product: Tensor, balance: float) -> float:
    """Train a field as WTFlow does on normalised features; return the seconds."""
    torch.manual_seed(model.settings.seed)
    s, begin = model.settings, time.perf_counter()
    optimizer = torch.optim.AdamW(model.field.parameters(), lr=s.learning_rate, weight_decay=s.weight_decay)
    weights = product.bincount()[product].double() ** -balance
    model.field.train()
    for _ in range(s.max_epochs):
        order = torch.multinomial(weights, len(x0), replacement=True) if balance else torch.randperm(len(x0))
        for indices in order.split(BATCH):
            optimizer.zero_grad()
            prediction, velocity = model.regress(x0[indices], product=product[indices])
            torch.nn.functional.mse_loss(prediction, velocity).backward()
            optimizer.step()
            model.average()
    model.eval()
    return time.perf_counter() - begin


@torch.no_grad()
def scored(model: WTFlowModel, x: Tensor) -> Tensor:
    """Score backbone features."""
    return torch.cat([model.predict(few, MAP).pred_score for few in x.split(BATCH)])


def tell(cache: Cache, altered: Altered, name: str, seed: int) -> list[Line]:
    """Train one model on the four sets, told a certain thing, and measure it on each."""
    given = {"own": True, "code": "block", "balance": 0.0, **TOLD[name]}
    point = start(seed=seed, plateau=0.0, **({"width": given["width"]} if "width" in given else {}))
    model = untrained(point)
    parts = {data: features(model, cache.images(data).train, point) for data in SETS}
    x0, product = normalised(model, parts, given["own"])
    rebuild(model, given["code"])
    seconds = train(model, x0, product, given["balance"])
    ends = torch.tensor([0, *(len(part) for part in parts.values())]).cumsum(0).tolist()
    chosen = torch.cat([reference_of(torch.arange(a, b)) for a, b in pairwise(ends)])
    model.observe(x0[chosen], MAP, product[chosen])
    lines = []
    for data in SETS:
        images, pseudo = cache.images(data), altered.of(data)
        score = {kind: scored(model, features(model, pseudo[kind], point)) for kind in ("good", *KINDS)}
        test = scored(model, features(model, images.test, point))
        label = images.labels
        lines.append(
            {
                "data": data,
                "still": round(statistics.mean(auroc(score["good"], score[kind]) for kind in KINDS), 5),
                "metrics": {"image_AUROC": round(auroc(test[~label], test[label]), 5)},
                "seconds": round(seconds, 1),
            }
        )
    return lines


# All products in one model -------------------------------------------------------------------------------------------


def pool(row: str, seed: int, memo: Memo) -> list[Line]:
    """Train one of the accuracy benchmark's rows on all sets together, and test it on each."""
    settings = {**ROWS[row].settings, **POOLED.get(row, {})}
    modules = {data: data_module(data, None, ROWS[row].batch_size) for data in SETS}
    together = Products(members=modules, train_batch_size=ROWS[row].batch_size)
    if not ROWS[row].ours:
        seed_everything(seed, verbose=False)
    more = {"seed": seed} if ROWS[row].ours else POOLED.get(row, {})
    model = build(row, "all", memo, **{name: value for name, value in more.items() if name not in ROWS[row].settings})
    for name, value in POOLED.get(row, {}).items():
        setattr(model.model if name == "memory_bank" else model, name, value)
    lines = []
    with TemporaryDirectory() as folder:
        runner = quiet_engine(folder)
        begin = time.perf_counter()
        runner.fit(model, datamodule=together)
        seconds = time.perf_counter() - begin
        for data, module in modules.items():
            model.evaluator.test_metrics = evaluator(ROWS[row].ours, has_masks(module)).test_metrics
            (metrics,) = quiet_engine(folder).test(model, datamodule=module, verbose=False)
            line = {
                "data": data,
                "settings": settings,
                "metrics": {name: float(value) for name, value in metrics.items()},
                "fit_seconds": round(seconds, 1),
                "MB": round(model_bytes(model) / 1e6, 2),
            }
            if row == "WTFlow":
                line |= told_apart(model, module, list(modules).index(data))
            lines.append(line)
    return lines


def model_bytes(model: Any) -> int:
    """Size of what a model has learnt: its state without the backbone's weights."""
    backbone = {id(value) for value in feature_network(model).state_dict(keep_vars=True).values()}
    state = model.model.state_dict(keep_vars=True).values()
    return sum(value.numel() * value.element_size() for value in state if id(value) not in backbone)


@torch.no_grad()
def told_apart(model: WTFlow, module: Any, place: int) -> Line:
    """Count test images by kind, how many are recognised as their product, and errors at its own threshold."""
    name = SETS[place]
    model.eval()
    counts = dict.fromkeys(("good", "good_recognised", "false_alarms", "defective", "defective_recognised"), 0)
    for index in range(len(module.test_data)):
        item = module.test_data[index]
        image = model.pre_processor.transform(item.image[None])
        raw = model.model(image)
        kind = "defective" if bool(item.gt_label) else "good"
        counts[kind] += 1
        counts[f"{kind}_recognised"] += model.recognised(raw)[0] == name
        if kind == "good":
            counts["false_alarms"] += int(model.post_processor(raw).pred_label)
    thresholds = dict(zip(model.product_names, model.post_processor.effective_false_alarm_rate.tolist(), strict=True))
    return {"told_apart": counts, "promised": round(thresholds[name], 5)}


# Growth --------------------------------------------------------------------------------------------------------------


def drawn(count: int) -> Products:
    """Drawn products, as many as asked for."""
    root = ROOT / "datasets" / "SyntheticParts"
    members = {f"product {k:02d}": SyntheticParts(root=root, product=k, **DRAWN) for k in range(count)}
    return Products(members=members)


def grow(row: str, count: int) -> Line:
    """Train one model on so many drawn products."""
    import logging

    logging.disable(logging.WARNING)
    products = drawn(count)
    products.prepare_data()
    extra = {"max_epochs": 30} if row == "WTFlow" else {}
    model = build(row, "drawn", **extra)
    with TemporaryDirectory() as folder:
        runner = quiet_engine(folder)
        begin = time.perf_counter()
        runner.fit(model, datamodule=products)
        seconds, memory, values, alarms, good, right = time.perf_counter() - begin, peak_MiB(), [], 0, 0, 0
        for member in products.members.values():
            batches = runner.predict(model, datamodule=member)
            labels = torch.cat([batch.gt_label for batch in batches]).bool()
            score = torch.cat([batch.pred_score for batch in batches])
            values.append(auroc(score[~labels], score[labels]))
            good += int((~labels).sum())
            if row == "WTFlow":
                called = torch.cat([batch.pred_label for batch in batches])
                alarms += int(called[~labels].sum())
                name = next(name for name, each in products.members.items() if each is member)
                names = [each for batch in batches for each in model.recognised(batch.recognition)]
                right += sum(each == name for each, label in zip(names, labels.tolist(), strict=True) if not label)
    return {
        "image_AUROC": round(statistics.mean(values), 5),
        "least": round(min(values), 5),
        "fit_seconds": round(seconds, 1),
        "MiB": memory,
        "bytes": model_bytes(model),
        **({"good": good, "false_alarms": alarms, "recognised": right} if row == "WTFlow" else {}),
    }


def with_products(count: int) -> WTFlow:
    """An untrained model of so many products, with statistics of noise."""
    model = WTFlow(pre_trained=False).eval()
    model.set_products([f"product {k:02d}" for k in range(count)])
    noise = torch.randn(2 * count, 176, 4, 4)
    model.model.update(noise, torch.arange(count).repeat(2))
    model.model.finalize()
    model.post_processor.calibrate(torch.ones(count), torch.ones(count), torch.arange(count), count)
    return model


def latency(rounds: int = 30) -> list[Line]:
    """Time one image in torch and in OpenVINO, models of different numbers of products taking turns."""
    from benchmarks.runtimes import draw_images, in_openvino

    image = draw_images(1)
    calls: dict[tuple[int, str], Any] = {}
    with TemporaryDirectory() as folder, torch.no_grad():
        for count in COUNTS:
            model = with_products(count)
            path = model.to_openvino(Path(folder) / str(count), input_size=MAP)
            calls[count, "torch"] = partial(model, torch.from_numpy(image))
            calls[count, "OpenVINO f32"] = partial(in_openvino()(path), image)
        times: dict[tuple[int, str], list[float]] = {key: [] for key in calls}
        for turn in range(rounds + 3):
            for key, function in calls.items():
                begin = time.perf_counter()
                for _ in range(5):
                    function()
                if turn >= 3:
                    times[key].append((time.perf_counter() - begin) / 5)
    lines = []
    for count in COUNTS:
        ratios = {
            name: statistics.median(a / b for a, b in zip(times[count, name], times[1, name], strict=True))
            for name in ("torch", "OpenVINO f32")
        }
        ms = {name: round(1e3 * statistics.median(times[count, name]), 2) for name in ratios}
        lines.append({"count": count, "ms": ms, "ratio": {name: round(value, 4) for name, value in ratios.items()}})
    return lines


# The command ---------------------------------------------------------------------------------------------------------


def jobs(given: Namespace) -> Iterator[Job]:
    """Plan the runs."""
    counts = (1, 2) if given.quick else COUNTS
    if "told" in given.parts:
        cache, altered = Cache(), Altered()
        for name in TOLD:
            for seed in given.seeds[:1]:
                gives = [{"part": "told", "model": "WTFlow", "data": d, "seed": seed, "told": name} for d in SETS]
                yield gives, partial(merged, gives, partial(tell, cache, altered, name, seed))
    if "pooled" in given.parts:
        memo = Memo()
        for row in given.models:
            settings = {**ROWS[row].settings, **POOLED.get(row, {})}
            for seed in given.seeds if ROWS[row].seeded and row == "WTFlow" else given.seeds[:1]:
                gives = [{"part": "pooled", "model": row, "data": d, "seed": seed, "settings": settings} for d in SETS]
                yield gives, partial(merged, gives, partial(pool, row, seed, memo))
    if "growth" in given.parts:
        for row in (row for row in GROWING if row in given.models):
            for count in (count for count in counts if count <= MOST.get(row, count)):
                yield {"part": "growth", "model": row, "count": count}, partial(call, grow, row, count)
    if "latency" in given.parts:
        gives = [{"part": "latency", "model": "WTFlow", "count": count} for count in COUNTS]
        yield gives, partial(merged, gives, latency)


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


def written(values: list[float]) -> str:
    """Write a mean and, of several values, their standard deviation."""
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def render_told(lines: list[Line]) -> list[str]:
    """A row for each thing the field can be told: test AUROC (criterion)."""
    rows = []
    for name in dict.fromkeys(line["told"] for line in lines):
        own = {line["data"]: line for line in lines if line["told"] == name}
        cells = {d: f"{own[d]['metrics']['image_AUROC']:.4f} ({own[d]['still']:.4f})" for d in own}
        mean = statistics.mean(line["metrics"]["image_AUROC"] for line in own.values())
        still = statistics.mean(line["still"] for line in own.values())
        rows.append({"told": name, **cells, "mean": f"{mean:.4f} ({still:.4f})", "s": own[SETS[0]]["seconds"]})
    columns = {
        "the field is told": "{told}",
        **{d: f"{{{d}}}" for d in SETS},
        "mean": "{mean}",
        "training": "{s:.0f} s",
    }
    return ["**What the field is told**: test image AUROC (criterion without labels)", "", *table(columns, rows)]


def render_pooled(lines: list[Line]) -> list[str]:
    """A row for each model: image AUROC by product, the mean, and the loss to separate models."""
    apart, rows = alone(), []
    for row in dict.fromkeys(line["model"] for line in lines):
        own = [line for line in lines if line["model"] == row]
        by = {d: [line["metrics"]["image_AUROC"] for line in own if line["data"] == d] for d in SETS}
        mean = statistics.mean(statistics.mean(values) for values in by.values())
        separate = [statistics.mean(apart[row, d]) for d in SETS if (row, d) in apart]
        loss = statistics.mean(separate) - mean if len(separate) == len(SETS) else None
        ratio = own[0]["settings"].get("coreset_sampling_ratio")
        cells = {d: written(values) for d, values in by.items()}
        seconds = statistics.median(line["fit_seconds"] for line in own)
        name = row + (f" ({100 * ratio:g} % coreset)" if ratio else "")
        more = {} if loss is None else {"loss": loss}
        rows.append({"model": name, **cells, "mean": mean, **more, "MB": own[0]["MB"], "s": seconds})
    columns = {"one model for all": "{model}", **{d: f"{{{d}}}" for d in SETS}, "mean": "{mean:.4f}"}
    columns |= {"below one each": "{loss:.4f}", "size": "{MB:.1f} MB", "training": "{s:.0f} s"}
    text = ["**One model for four products**: image AUROC", "", *table(columns, rows)]
    ours = [line for line in lines if line["model"] == "WTFlow"]
    names = {"image_F1Score": "F1", "image_F1Max": "best F1", "pixel_AUROC": "pixel AUROC", "pixel_AUPRO": "AUPRO"}
    rows = []
    for d in SETS:
        own = [line for line in ours if line["data"] == d]
        if own:
            cells = {n: written([line["metrics"][n] for line in own]) for n in names if n in own[0]["metrics"]}
            counts = own[0]["told_apart"]
            rows.append({"data": d, **cells, **counts, "promised": own[0]["promised"]})
    columns = {"product": "{data}", **{title: f"{{{name}}}" for name, title in names.items()}}
    columns |= {
        "good images recognised": "{good_recognised} of {good}",
        "defective ones": "{defective_recognised} of {defective}",
        "false alarms": "{false_alarms} of {good}",
        "promised": "{promised:.1%}",
    }
    return [*text, "**WTFlow by product**, at its own thresholds (counts: seed 0)", "", *table(columns, rows)]


def render_growth(lines: list[Line]) -> list[str]:
    """A row for each number of products of each model."""
    columns = {
        "model": "{model}",
        "products": "{count}",
        "image AUROC": "{image_AUROC:.4f}",
        "least": "{least:.4f}",
        "size": "{MB:.2f} MB",
        "peak memory": "{MiB} MiB",
        "training": "{fit_seconds:.0f} s",
        "good images recognised": "{recognised} of {good}",
        "false alarms": "{false_alarms}",
    }
    rows = [{**line, "MB": line["bytes"] / 1e6} for line in lines]
    return ["**Drawn products**", "", *table(columns, rows)]


def render_latency(lines: list[Line]) -> list[str]:
    """A row for each number of products."""
    columns = {"products": "{count}"}
    for name in ("torch", "OpenVINO f32"):
        columns |= {name: f"{{{name}}} ms", f"{name}, to one product": f"{{{name} ratio}}"}
    rows = [
        {"count": line["count"], **line["ms"], **{f"{n} ratio": f"{r:.3f}" for n, r in line["ratio"].items()}}
        for line in lines
    ]
    return ["**Latency of one image**", "", *table(columns, rows)]


def render(lines: list[Line]) -> str:
    """Render the tables of all parts that were measured."""
    renders = {"told": render_told, "pooled": render_pooled, "growth": render_growth, "latency": render_latency}
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
    growth = {line["count"]: line for line in of(lines, "growth") if line["model"] == "WTFlow"}
    if {1, 32} <= growth.keys():
        each = (growth[32]["bytes"] - growth[1]["bytes"]) / 31
        result.append(Promise("bytes a product", most=4000, digits=".0f").verdict(each))
    for line in of(lines, "latency"):
        if line["count"] == COUNTS[-1]:
            result += [
                Promise(f"latency of {COUNTS[-1]} products to one, {name}", most=1.03).verdict(ratio)
                for name, ratio in line["ratio"].items()
            ]
    return result


def compare(lines: list[Line]) -> list[Verdict]:
    """A quick run has nothing to compare with."""
    del lines
    return []
