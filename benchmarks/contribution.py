"""What the flow adds to whitened features, and what each coupling adds to independent coupling, with 95 % intervals.

Usage: python benchmarks/contribution.py [--base JSON] [--data mvtec_bottle magnetic_tile synthetic] [--cache FOLDER]

Fields are trained as in ablation.py with seeds 0, 1, 2 and scored at the base's start time. Each difference is the mean
over the seeds; its 95 % interval comes from drawing the test images anew 2000 times, normal and anomalous ones each
among themselves, the same draw for all seeds and both sides. AUPRO has no interval of this kind: its spread is that of
the seeds. One JSON line a data set; ``--render`` prints the table.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ablation import START, Ablation, Images, Setting, end_points, features, jsonable, measure, normalise, score
from lines import append, read
from torch import Tensor

from anomalib_wtflow.lightning_model import LIMIT_IMAGES

RESULTS = Path(__file__).parent / "results" / "contribution.json"
DATA = ("mvtec_bottle", "magnetic_tile", "synthetic")
COUPLINGS = ("independent", "worst_of_two", "worst")
NO_FLOW = "whitened, no flow"
SAME_FEATURES = "no flow"
"""The first control is the stronger: the Mahalanobis distance. The second has the flow's own normalisation."""
BINS = 1024
DRAWS = 2000


def image_auroc(score: np.ndarray, label: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """AUROC of N scores under B weightings ``(B, N)`` of the images; ties count half."""
    positive, negative = score[label], score[~label]
    wins = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    above, below = weight[:, label], weight[:, ~label]
    return ((above @ wins) * below).sum(1) / (above.sum(1) * below.sum(1))


def pixel_auroc(histograms: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """AUROC of pixels in ordered bins, from each image's counts ``(N, 2, BINS)`` of normal and anomalous pixels."""
    below, above = weight @ histograms[:, 0], weight @ histograms[:, 1]
    before = below.cumsum(1) - below
    return (above * (before + below / 2)).sum(1) / (above.sum(1) * below.sum(1))


def histograms(pixels: Tensor, masks: Tensor) -> np.ndarray:
    """Count each image's normal and anomalous pixels in bins that hold equally many pixels overall."""
    edges = np.quantile(pixels.numpy(), np.linspace(0, 1, BINS + 1)[1:-1])
    bins = np.digitize(pixels.flatten(1).numpy(), edges)
    mask = masks.flatten(1).numpy()
    return np.stack(
        [
            [np.bincount(row[m == side], minlength=BINS) for side in (False, True)]
            for row, m in zip(bins, mask, strict=True)
        ]
    ).astype(float)


def draws(label: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draw how often each image is taken: all once, then ``DRAWS`` times with replacement within its class."""
    weight = np.zeros((DRAWS, len(label)))
    for side in (False, True):
        (index,) = np.nonzero(label == side)
        weight[:, index] = generator.multinomial(len(index), np.full(len(index), 1 / len(index)), size=DRAWS)
    return np.vstack([np.ones(len(label)), weight])


def variant(ablation: Ablation, data: str, setting: Setting) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """Measure one setting: its metrics, image scores and pixel counts."""
    images: Images = ablation.images(data)
    if setting.start_time is None:
        x, y = normalise(features(images.train, setting), features(images.test, setting), setting)
        ends = [y, x[:: len(x) // LIMIT_IMAGES + 1]]
    else:
        field, *both, _ = ablation.field(data, setting)
        ends = [end_points(field, x, setting, setting.start_time) for x in both]
    scores, pixels = score(*ends, setting)
    return measure(*ends, images, setting), scores.numpy(), histograms(pixels, images.masks)


def contribution(ablation: Ablation, data: str, base: Setting, seeds: list[int]) -> dict[str, Any]:
    """Measure all variants on one data set, and the differences between them."""
    label = ablation.images(data).labels.numpy()
    weight = draws(label, np.random.default_rng(0))
    control = replace(base, start_time=None)
    measured: dict[str, list[tuple[dict[str, float], np.ndarray, np.ndarray]]] = {
        NO_FLOW: [variant(ablation, data, replace(control, normalization="whitening"))],
        SAME_FEATURES: [variant(ablation, data, control)],
    }
    for coupling in dict.fromkeys([*COUPLINGS, base.coupling]):
        measured[coupling] = []
        for seed in seeds:
            setting = replace(base, coupling=coupling, seed=seed)
            measured[coupling].append(variant(ablation, data, setting))
            print(f"{data}: {coupling}, seed {seed}", file=sys.stderr, flush=True)
    curves = {
        name: {
            "image_AUROC": np.mean([image_auroc(score, label, weight) for _, score, _ in runs], axis=0),
            "pixel_AUROC": np.mean([pixel_auroc(counts, weight) for _, _, counts in runs], axis=0),
        }
        for name, runs in measured.items()
    }
    flows = [name for name in measured if name not in (NO_FLOW, SAME_FEATURES)]
    pairs = [(name, NO_FLOW) for name in flows]
    pairs += [(name, "independent") for name in flows if name != "independent"]
    return {
        "data": data,
        "setting": jsonable(base),
        "seeds": seeds,
        "metrics": {name: [metrics for metrics, _, _ in runs] for name, runs in measured.items()},
        "differences": [
            {"of": a, "to": b, "metric": metric, **interval(curves[a][metric] - curves[b][metric])}
            for a, b in pairs
            for metric in ("image_AUROC", "pixel_AUROC")
        ],
    }


def interval(values: np.ndarray) -> dict[str, float]:
    """Difference, and its 95 % interval over the draws."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return {"difference": round(float(values[0]), 5), "low": round(float(low), 5), "high": round(float(high), 5)}


def table(lines: list[dict[str, Any]]) -> str:
    """Render means and spreads, and the differences with their intervals."""
    text = []
    for line in lines:
        text += [f"**{line['data']}**", "", "| | image AUROC | pixel AUROC | AUPRO |", "|---|---|---|---|"]
        for name, runs in line["metrics"].items():
            cells = []
            for metric in ("image_AUROC", "pixel_AUROC", "pixel_AUPRO"):
                values = [run[metric] for run in runs]
                spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
                cells.append(f"{np.mean(values):.4f}{spread}")
            text.append(f"| {name} | {' | '.join(cells)} |")
        text += ["", "| difference | image AUROC | pixel AUROC |", "|---|---|---|"]
        for a, b in dict.fromkeys((d["of"], d["to"]) for d in line["differences"]):
            ours = [d for d in line["differences"] if (d["of"], d["to"]) == (a, b)]
            cells = [f"{d['difference']:+.4f} ({d['low']:+.4f} to {d['high']:+.4f})" for d in ours]
            text.append(f"| {a} less {b} | {' | '.join(cells)} |")
        text.append("")
    return "\n".join(text)


def main() -> int:
    """Measure what is missing, and render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=list(DATA))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--base", type=json.loads, default={}, help="JSON: what differs from the start of the search")
    parser.add_argument("--cache", type=Path, help="folder that keeps the backbone's maps from run to run")
    parser.add_argument("--render", action="store_true")
    given = parser.parse_args()
    if not given.render:
        base = replace(START, **{k: tuple(v) if isinstance(v, list) else v for k, v in given.base.items()})
        ablation = Ablation(given.output, given.cache)
        done = {json.dumps([line["data"], line["setting"], line["seeds"]]) for line in read(given.output)}
        for data in given.data:
            if json.dumps([data, jsonable(base), given.seeds]) not in done:
                append(given.output, contribution(ablation, data, base, given.seeds))
    print(table(read(given.output)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
