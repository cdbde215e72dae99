"""Ablation of WTFlow on cached features: one factor at a time, on both real sets, with the no-flow control beside each.

Usage:
    python benchmarks/ablation.py                     all factors, each around WTFlow's defaults
    python benchmarks/ablation.py FACTOR [FACTOR ...] [--base JSON] [--seeds 0 1 2]
    python benchmarks/ablation.py --rank              each factor's mean ranks as Markdown, from the JSON

The backbone's layers are computed once a run; a field is trained on them as ``WTFlow`` does by default (AdamW,
cosine), on the 80 % of the training images that WTFlow keeps, and scored from the start time; without one it is the
no-flow control. A factor is ranked at the base's start time. Pixel metrics are taken on every fourth
pixel in each direction of the 256 x 256 map. One JSON line a setting; what is there already is not repeated.
docs/ablation.md has the selection rule.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.metrics.aupro import _AUPRO
from lines import append, read
from rich.progress import track
from rows import data_module
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from anomalib_wtflow import WTFlow
from anomalib_wtflow.anomaly_map import AnomalyMapGenerator, density_proxy
from anomalib_wtflow.features.backbone import FeatureExtractor
from anomalib_wtflow.flow.coupling import get_coupling
from anomalib_wtflow.flow.field import get_field
from anomalib_wtflow.flow.normalization import NORMALIZATIONS, Whitening
from anomalib_wtflow.flow.path import ProbabilityPath
from anomalib_wtflow.flow.regression import thin
from anomalib_wtflow.flow.schedule import SCHEDULERS
from anomalib_wtflow.flow.solver import get_solver
from anomalib_wtflow.flow.times import get_time_sampling
from anomalib_wtflow.lightning_model import LIMIT_IMAGES
from anomalib_wtflow.loss import WTFlowLoss

RESULTS = Path(__file__).parent / "results" / "ablation.json"
SETS = ("mvtec_bottle", "magnetic_tile")
STRIDES = {4: "blocks.1", 8: "blocks.2", 16: "blocks.4", 32: "blocks.6"}
CHANNELS = {4: 24, 8: 40, 16: 112, 32: 320}
SHOWN = (0, 3, 4)
"""Which of the metrics a table shows."""
METRICS = ("image_AUROC", "image_AUPR", "image_F1Max", "pixel_AUROC", "pixel_AUPRO", "pixel_F1Max")


@dataclass(frozen=True)
class Setting:
    """One point of the ablation; the defaults are WTFlow's."""

    strides: tuple[int, ...] = (4, 8, 16)
    side: int = 16
    pool: int = 3
    standardise: bool = False
    normalization: str = "channel"
    ridge: float = 0.01
    network: str = "pointwise"
    fields: str = "per_layer"
    network_version: int = 2
    """Shape of the pointwise network: 2 since its first block reads the features themselves."""
    width: int | None = None
    depth: int | None = None
    path: str = "variance_preserving"
    coupling: str = "worst"
    thinning: int = 2
    time_sampling: str = "uniform"
    blocks: int = 1
    epochs: int = 80
    batch_size: int = 32
    learning_rate: float = 3e-3
    scheduler: str = "cosine"
    start_time: float | None = 0.35
    steps: int = 1
    density: str = "student"
    anomaly_map: str = "absolute"
    smoothing: float = 4.0
    top_fraction: float = 0.03
    image_score: str = "features"
    contrast: float = 0.75
    limit: bool = True
    score_window: int = 3
    seed: int = 0


START = Setting()
"""What the factors are varied around."""
SCORE = ("density", "anomaly_map", "smoothing", "top_fraction", "image_score", "contrast", "limit", "score_window")
"""What turns end points of the flow into a map and a score."""
INFERENCE = ("start_time", "steps", *SCORE)
"""What does not need another training, unless the times of training are centred at the start time."""
FEATURES = (
    "strides",
    "side",
    "pool",
    "standardise",
    "normalization",
    "ridge",
    *SCORE,
)
"""What the no-flow control depends on."""
TIE = 0.25
MOST_PARAMETERS, MOST_SECONDS = 5_000_000, 300

FACTORS: dict[str, list[dict[str, Any]]] = {
    "layers": [
        {"strides": (16,)},
        {"strides": (8, 16)},
        {"strides": (4, 8, 16)},
        {"strides": (4, 8, 16, 32)},
    ],
    "fields": [
        {"fields": fields, "density": density}
        for fields in ("joint", "per_layer")
        for density in ("gaussian", "student")
    ],
    "image score": [
        *({"contrast": share} for share in (0.0, 0.25, 0.5, 0.75)),
        {"limit": False},
        {"score_window": 1},
        {"score_window": 5},
        {"image_score": "map"},
        {"image_score": "map", "contrast": 0.0},
        *({"top_fraction": share} for share in (0.01, 0.1)),
    ],
    "map": [*({"smoothing": sigma} for sigma in (0.0, 2.0, 4.0, 6.0, 8.0)), {"anomaly_map": "relative"}],
    "start": [
        *({"start_time": time} for time in (0.0, 0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5)),
        *({"steps": steps} for steps in (2, 4)),
    ],
    "start and contrast": [
        {"start_time": time, "contrast": share} for time in (0.25, 0.3, 0.35, 0.4) for share in (0.5, 0.75)
    ],
    "coupling": [{"coupling": name} for name in ("independent", "worst", "worst_of_two", "antipodal")],
    "path": [{"path": name} for name in ("linear", "gaussian", "variance_preserving")],
    "normalization": [
        {"normalization": "channel"},
        {"normalization": "whitening"},
        {"normalization": "whitening", "ridge": 0.3},
        {"normalization": "layer_norm"},
    ],
    "network": [{"width": w, "depth": d} for w, d in ((64, 2), (128, 1), (128, 2), (256, 1), (256, 3), (512, 1))],
    "unet": [{"network": "pointwise"}, {"network": "unet", "width": 16}],
    "training": [
        *({"epochs": epochs} for epochs in (10, 20, 40, 80)),
        {"learning_rate": 1e-3},
        {"scheduler": "step"},
    ],
    "pool": [{"pool": size} for size in (1, 3, 5)],
    "time sampling": [{"time_sampling": name} for name in ("uniform", "logit_normal")],
    "time": [{"blocks": 1}, {"blocks": 2}],
    "thinning": [{"thinning": 1}, {"thinning": 2}, {"thinning": 4}],
}


@dataclass
class Images:
    """Backbone maps by stride, labels and every fourth pixel of the masks."""

    train: dict[int, Tensor]
    test: dict[int, Tensor]
    labels: Tensor
    masks: Tensor


def load(name: str) -> Images:
    """Extract all layers of a data set, in float16."""
    module = data_module(name)
    module.prepare_data()
    module.setup()
    extractor = FeatureExtractor(layers=list(STRIDES.values()))
    transform = WTFlow.configure_pre_processor().transform
    order = torch.randperm(len(module.train_data), generator=torch.Generator().manual_seed(0)).tolist()
    kept = sorted(order[round(0.2 * len(order)) :])

    def maps(data: Any, indices: list[int]) -> tuple[dict[int, Tensor], list[bool], list[Tensor]]:
        rows: list[list[Tensor]] = []
        labels, masks = [], []
        for index in track(indices, description=name, transient=True):
            item = data[index]
            mask = torch.zeros(item.image.shape[-2:]) if item.gt_mask is None else item.gt_mask.squeeze().float()
            with torch.no_grad():
                rows.append([m.half() for m in extractor.network(transform(item.image[None]))])
            labels.append(bool(item.gt_label))
            masks.append(F.interpolate(mask[None, None], (256, 256), mode="nearest")[0, 0, 2::4, 2::4] > 0.5)
        layers = [torch.cat(layer) for layer in zip(*rows, strict=True)]
        return dict(zip(STRIDES, layers, strict=True)), labels, masks

    train, _, _ = maps(module.train_data, kept)
    test, labels, masks = maps(module.test_data, list(range(len(module.test_data))))
    return Images(train, test, torch.tensor(labels), torch.stack(masks))


def features(maps: dict[int, Tensor], setting: Setting) -> Tensor:
    """Pool, resize and stack the layers of a setting."""
    layers = [F.avg_pool2d(maps[s].float(), setting.pool, 1, setting.pool // 2) for s in setting.strides]
    size = (setting.side, setting.side)
    x = torch.cat([F.interpolate(m, size=size, mode="bilinear", align_corners=False) for m in layers], dim=1)
    if setting.standardise:
        x = x - x.mean((2, 3), keepdim=True)
        x = x / (x.std((2, 3), keepdim=True) + 0.1)
    return x


def normalise(train: Tensor, test: Tensor, setting: Setting) -> tuple[Tensor, Tensor]:
    """Fit the normalisation on the training features, and apply it to both."""
    module = NORMALIZATIONS[setting.normalization](train.shape[1])
    if isinstance(module, Whitening):
        module.ridge = setting.ridge
        for batch in train.split(32):
            module.update(batch)
        module.finalize()
    with torch.no_grad():
        return torch.cat([module(b) for b in train.split(32)]), torch.cat([module(b) for b in test.split(32)])


def split(x: Tensor, blocks: int) -> Tensor:
    """Cut each map into ``blocks x blocks`` samples of their own, so that each draws its own time."""
    n, c, h, w = x.shape
    x = x.reshape(n, c, blocks, h // blocks, blocks, w // blocks)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, c, h // blocks, w // blocks)


def channels(setting: Setting) -> list[int]:
    """Return the channels of a setting's layers."""
    return [CHANNELS[stride] for stride in setting.strides]


def train(x0: Tensor, setting: Setting) -> tuple[nn.Module, float]:
    """Train a field as WTFlow does by default, epoch by epoch without the incomplete batch's loss of images."""
    torch.manual_seed(setting.seed)
    layers = channels(setting) if setting.fields == "per_layer" else sum(channels(setting))
    field = get_field(setting.network, layers, setting.width, setting.depth)
    path, coupling, loss = ProbabilityPath(setting.path), get_coupling(setting.coupling), WTFlowLoss()
    times = get_time_sampling(setting.time_sampling, setting.start_time)
    optimizer = torch.optim.AdamW(field.parameters(), lr=setting.learning_rate, weight_decay=1e-2)
    batches = -(-len(x0) // setting.batch_size)
    schedule = SCHEDULERS[setting.scheduler](setting.epochs * batches)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    start = time.perf_counter()
    field.train()
    for _ in range(setting.epochs):
        for batch in x0[torch.randperm(len(x0))].split(setting.batch_size):
            points = split(thin(batch, setting.thinning) if field.pointwise else batch, setting.blocks)
            sample = path.sample(points, coupling(points, torch.randn_like(points)), times(len(points)))
            optimizer.zero_grad()
            loss(field(sample.x_t, sample.t), sample.velocity).backward()
            optimizer.step()
            scheduler.step()
    return field.eval(), time.perf_counter() - start


@torch.no_grad()
def end_points(field: nn.Module, x0: Tensor, setting: Setting, start_time: float | None) -> Tensor:
    """Where the flow carries the features; the features themselves without a flow."""
    if start_time is None:
        return x0
    solver, path = get_solver("euler", setting.steps), ProbabilityPath(setting.path)
    out = []
    for batch in x0.split(64):
        start = path.coefficients(torch.tensor(start_time)).a.item() * batch
        out.append(batch + solver.mean_velocity(field, start, start_time, 1.0))
    return torch.cat(out)


def score(y: Tensor, reference: Tensor, setting: Setting) -> tuple[Tensor, Tensor]:
    """Image scores, and every fourth pixel of the maps in each direction.

    Args:
        y: End points of the test images.
        reference: Those of training images, which set the limit of the contrast.
        setting: The setting.
    """
    layers = channels(setting) if setting.fields == "per_layer" else [sum(channels(setting))]
    generator = AnomalyMapGenerator(
        setting.anomaly_map,
        setting.top_fraction,
        setting.smoothing,
        setting.image_score,
        setting.contrast,
        layers,
        setting.score_window,
    )
    if setting.limit:
        generator.observe(density_proxy(reference, layers, setting.density), (256, 256))
    scores, maps = [], []
    for batch in y.split(64):
        anomaly_map, image_score = generator(density_proxy(batch, layers, setting.density), (256, 256))
        scores.append(image_score)
        maps.append(anomaly_map[:, 0, 2::4, 2::4].clone())
    return torch.cat(scores), torch.cat(maps)


def measure(y: Tensor, reference: Tensor, images: Images, setting: Setting) -> dict[str, float]:
    """All six metrics."""
    scores, pixels = score(y, reference, setting)
    aupro = _AUPRO(fpr_limit=0.3)
    aupro.update(pixels, images.masks)
    label, mask = images.labels.numpy(), images.masks.flatten().numpy()
    flat = pixels.flatten().numpy()
    values = (
        roc_auc_score(label, scores),
        average_precision_score(label, scores),
        best_f1(label, scores.numpy()),
        roc_auc_score(mask, flat),
        float(aupro.compute()),
        best_f1(mask, flat),
    )
    return {name: round(float(value), 5) for name, value in zip(METRICS, values, strict=True)}


def best_f1(label: np.ndarray, score: np.ndarray) -> float:
    """Largest F1 of all thresholds."""
    precision, recall, _ = precision_recall_curve(label, score)
    return float((2 * precision * recall / np.maximum(precision + recall, 1e-12)).max())


def settings(factor: str, base: Setting, seeds: list[int]) -> list[Setting]:
    """Return the settings of a factor, for all seeds."""
    return [replace(base, **change, seed=seed) for seed in seeds for change in FACTORS[factor]]


def times(factor: str, setting: Setting) -> list[float | None]:
    """Return the start times that a setting is scored from; None is the no-flow control, where it can differ."""
    if any("start_time" in change or "steps" in change for change in FACTORS[factor]):
        return [setting.start_time]
    control = [None] if any(name in FEATURES for change in FACTORS[factor] for name in change) else []
    return [*control, setting.start_time]


def results(path: Path) -> list[dict[str, Any]]:
    """Read the measurements; those of the network's first shape do not say so."""
    lines = read(path)
    for line in lines:
        for setting in (line["setting"], line["base"]):
            setting.setdefault("network_version", 1)
    return lines


def key(data: str, setting: dict[str, Any]) -> str:
    """Identity of a measurement."""
    return json.dumps([data, setting], sort_keys=True)


def differing(lines: list[dict[str, Any]]) -> list[str]:
    """Name what differs between the settings of some lines, seeds aside."""
    values = {name: {json.dumps(line["setting"][name]) for line in lines} for name in lines[0]["setting"]}
    return [name for name in values if len(values[name]) > 1 and name != "seed"]


def label(setting: dict[str, Any], names: list[str]) -> str:
    """Name a setting by what differs."""
    return ", ".join(f"{name}={json.dumps(setting[name])}" for name in names)


def mean_ranks(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Mean rank of each label over metrics and sets, after averaging over seeds; 1 is best."""
    labels = list(dict.fromkeys(line["label"] for line in lines))
    ranks = []
    for data in SETS:
        for metric in METRICS:
            means = []
            for name in labels:
                values = [r["metrics"][metric] for r in lines if r["label"] == name and r["data"] == data]
                means.append(np.mean(values) if values else np.nan)
            if not np.isnan(means).any():
                ranks.append(rankdata(-np.round(means, 5)))
    return dict(zip(labels, np.mean(ranks, axis=0).tolist(), strict=True)) if ranks else {}


def winner(lines: list[dict[str, Any]], base: Setting) -> Setting:
    """Apply docs/ablation.md's rule to the lines of one factor."""
    ranks = mean_ranks(lines)
    allowed = {}
    for line in lines:
        if line["parameters"] <= MOST_PARAMETERS and line["seconds"] <= MOST_SECONDS:
            allowed[line["label"]] = line
        else:
            ranks.pop(line["label"], None)
    best = min(ranks.values())

    def order(name: str) -> tuple[float, ...]:
        setting, parameters = allowed[name]["setting"], allowed[name]["parameters"]
        changes = sum(setting[k] != v for k, v in jsonable(base).items())
        flow = parameters * setting["side"] ** 2 * setting["steps"] * setting["epochs"]
        return parameters, flow, setting["smoothing"], changes

    chosen = allowed[min((name for name, rank in ranks.items() if rank < best + TIE), key=order)]["setting"]
    return Setting(**{**chosen, "strides": tuple(chosen["strides"])})


def base_of(lines: list[dict[str, Any]], factor: str) -> Setting:
    """Return the setting that a factor was varied around, the last time."""
    base = next(line["base"] for line in reversed(lines) if line["factor"] == factor)
    return Setting(**{**base, "strides": tuple(base["strides"])})


def of_factor(lines: list[dict[str, Any]], factor: str, base: Setting) -> list[dict[str, Any]]:
    """Return a factor's lines that are ranked, with their labels: those at the start time of their setting."""
    own = {key(data, jsonable(s)) for data in SETS for s in settings(factor, base, [0, 1, 2])}
    here = [line for line in lines if line["factor"] == factor and key(line["data"], line["setting"]) in own]
    names = differing(here) if here else []
    return [{**line, "label": label(line["setting"], names)} for line in here]


def rankings(lines: list[dict[str, Any]]) -> str:
    """Render a Markdown table a factor, best first; a setting is named by what differs within the factor."""
    text = []
    for factor in dict.fromkeys(line["factor"] for line in lines):
        here = of_factor(lines, factor, base_of(lines, factor))
        if not here:  # its settings are not among today's
            continue
        titles = " | ".join(f"{data.split('_')[1]} {METRICS[k].replace('_', ' ')}" for data in SETS for k in SHOWN)
        text += [
            f"**{factor}**",
            "",
            f"| setting | mean rank | {titles} |",
            "|---" * (2 + len(SETS) * len(SHOWN)) + "|",
        ]
        for name, rank in sorted(mean_ranks(here).items(), key=lambda item: item[1]):
            figures = []
            for data in SETS:
                ours = [line["metrics"] for line in here if line["label"] == name and line["data"] == data]
                figures += [f"{np.mean([m[METRICS[k]] for m in ours]):.4f}" if ours else "" for k in SHOWN]
            text.append(f"| {name} | {rank:.2f} | {' | '.join(figures)} |")
        text.append("")
    return "\n".join(text)


class Ablation:
    """Measures what is missing of a factor.

    Args:
        output: Where the JSON lines are and go.
        cache: Folder that keeps the backbone's maps between runs, or None.
    """

    def __init__(self, output: Path, cache: Path | None = None) -> None:
        self.output, self.cache = output, cache
        self.loaded: dict[str, Images] = {}
        self.trained: tuple[Any, ...] = ()

    def images(self, data: str) -> Images:
        """Return a data set's maps, from memory, the cache or the backbone."""
        if data not in self.loaded:
            file = self.cache / f"{data}.pt" if self.cache else None
            if file and file.is_file():
                self.loaded[data] = torch.load(file, weights_only=False)
            else:
                self.loaded[data] = load(data)
                if file:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    torch.save(self.loaded[data], file)
        return self.loaded[data]

    def field(self, data: str, setting: Setting) -> tuple[nn.Module, Tensor, Tensor, float]:
        """Return the trained field, features of the test set and of training images, and the seconds of training.

        The last one is kept.
        """
        inference = set(INFERENCE) - ({"start_time"} if setting.time_sampling == "logit_normal" else set())
        training = (data, replace(setting, **{name: getattr(START, name) for name in inference}))
        if not self.trained or self.trained[0] != training:
            images = self.images(data)
            x, y = normalise(features(images.train, setting), features(images.test, setting), setting)
            field, seconds = train(x, setting)
            self.trained = (training, field, y, x[torch.randperm(len(x))[:LIMIT_IMAGES]], seconds)
        return self.trained[1:]

    def run(self, factor: str, base: Setting, seeds: list[int]) -> list[dict[str, Any]]:
        """Measure a factor around ``base``, and return its ranked lines."""
        lines = results(self.output)
        known = {key(line["data"], line["setting"]): line for line in lines}
        done = {(line["factor"], key(line["data"], line["setting"])) for line in lines}
        for data in SETS:
            for setting in settings(factor, base, seeds):
                for start_time in times(factor, setting):
                    one = replace(setting, start_time=start_time)
                    name = key(data, jsonable(one))
                    if (factor, name) in done:
                        continue
                    line = known[name] if name in known else self.line(data, one, setting)
                    line = {**line, "factor": factor, "base": jsonable(base)}
                    append(self.output, line)
                    known[name] = line
                    done.add((factor, name))
                    now = time.strftime("%H:%M:%S")
                    print(f"{now} {factor}: {data}, {line['metrics']}", file=sys.stderr, flush=True)
        return of_factor(results(self.output), factor, base)

    def line(self, data: str, setting: Setting, trained: Setting) -> dict[str, Any]:
        """Measure one setting on one data set, with the field trained for another that may differ in its start time."""
        field, features, training, seconds = self.field(data, trained)
        ends = [end_points(field, x, setting, setting.start_time) for x in (features, training)]
        return {
            "data": data,
            "setting": jsonable(setting),
            "metrics": measure(*ends, self.images(data), setting),
            "parameters": sum(p.numel() for p in field.parameters()),
            "seconds": round(seconds, 1),
        }


def main() -> int:
    """Run the factors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("factors", nargs="*", metavar="FACTOR", help=", ".join(FACTORS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--base", type=json.loads, default={}, help="JSON: what differs from the start of the search")
    parser.add_argument("--cache", type=Path, help="folder that keeps the backbone's maps from run to run")
    parser.add_argument("--rank", action="store_true", help="print the mean ranks of what is in the output")
    given = parser.parse_args()
    if given.rank:
        print(rankings(results(given.output)))
        return 0
    unknown = [factor for factor in given.factors if factor not in FACTORS]
    if unknown:
        parser.error(f"unknown factor {', '.join(unknown)}: choose from {', '.join(FACTORS)}.")
    base = replace(START, **{k: tuple(v) if isinstance(v, list) else v for k, v in given.base.items()})
    ablation = Ablation(given.output, given.cache)
    for factor in given.factors or FACTORS:
        chosen = winner(ablation.run(factor, base, given.seeds), base)
        varied = list(dict.fromkeys(name for change in FACTORS[factor] for name in change))
        print(f"{factor}: {label(jsonable(chosen), varied)}", flush=True)
    return 0


def jsonable(setting: Setting) -> dict[str, Any]:
    """Return a setting as JSON gives it back."""
    return json.loads(json.dumps(asdict(setting)))


if __name__ == "__main__":
    sys.exit(main())
