"""New thresholds for a trained model, from today's good images, without training."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from anomalib.data import PredictDataset
from scipy.stats import mannwhitneyu
from torch import Tensor

from anomalib_wtflow.checkpoint import read_checkpoint
from anomalib_wtflow.conformal import Scores, images_needed
from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.flow.rows import allocate
from anomalib_wtflow.images import mark_of, marks_of
from anomalib_wtflow.lightning_model import WTFlow
from anomalib_wtflow.operation.checkpoint import load_model, score_files, to_device
from anomalib_wtflow.post_processor import WTFlowPostProcessor
from anomalib_wtflow.settings import check

ALPHA = 0.01
"""Probability of the sentence that the process has moved where it has not, over all products of a model."""


@dataclass(frozen=True)
class Change:
    """A product's threshold before and after, in raw scores, and a test of the new images.

    ``p_value`` is that of a two-sided Mann-Whitney U test of the new scores against those that the old threshold came
    from. ``anomalous`` are the new images above the old threshold, with their raw scores, the highest first.
    """

    product: str
    before: float
    after: float
    pixel_before: float
    pixel_after: float
    images: int
    promised: float
    p_value: float
    higher: bool
    moved: bool
    can_tell: bool
    anomalous: Mapping[str, float]

    def describe(self, asked: float, of: str = "") -> list[str]:
        """Describe the change; ``asked`` is the rate asked for."""
        few = f", not the {asked:.2%} asked for: give more good images" if self.promised > asked * (1 + 1e-6) else ""
        lines = [
            f"Threshold{of} {self.before:.4g} -> {self.after:.4g} (pixels {self.pixel_before:.4g} -> "
            f"{self.pixel_after:.4g}): {self.images} good images support a false-alarm rate of at most "
            f"{self.promised:.2%}{few}."
        ]
        test = f"(Mann-Whitney, p = {self.p_value:.2g})"
        if self.moved:
            how = "higher" if self.higher else "lower"
            lines.append(f"These images score {how} than those it was calibrated on {test}: the process has moved.")
        elif self.can_tell:
            lines.append(f"They score like those it was calibrated on {test}.")
        else:
            lines.append(f"So few images cannot tell whether the process has moved {test}: give more good images.")
        # Where the threshold does not rise, what was anomalous stays so, and some good parts are, by the rate.
        if self.anomalous and (self.after > self.before or math.inf in self.anomalous.values()):
            lines.append(
                f"Of {self.images} images{of}, {len(self.anomalous)} exceed the old threshold, "
                f"{listed(self.anomalous)}: leave out those that are defective, and calibrate again."
            )
        return lines


@dataclass(frozen=True)
class Calibrated:
    """Result of :func:`calibrate`: a change for each product that enough new images show.

    ``unseen`` products keep their thresholds. ``unused`` are images by the reason why they were left out.
    """

    path: Path
    false_alarm_rate: float
    products: list[Change]
    unseen: list[str]
    unused: Mapping[str, list[str]]

    def __str__(self) -> str:
        """Describe it in a few lines."""
        lines = [f"Left out {len(names)}, since {why}: {listed(names)}." for why, names in self.unused.items() if names]
        several = len(self.products) + len(self.unseen) > 1
        for each in self.products:
            lines += each.describe(self.false_alarm_rate, f" of '{each.product}'" if several else "")
        if self.unseen:
            lines.append(f"No or too few images show {listed(self.unseen)}: thresholds kept.")
        return "\n".join([*lines, f"Wrote {self.path}"])


def calibrate(
    ckpt_path: str | Path,
    data: str | Path,
    output: str | Path | None = None,
    false_alarm_rate: float | None = None,
    device: str = "auto",
) -> Calibrated:
    """Set a model's thresholds from new good images, and write a new checkpoint.

    At most the stated share of good images like these is called anomalous, each product by itself. Images that the
    model was trained with are left out, as are copies of others.

    Args:
        ckpt_path: Checkpoint of a trained WTFlow model.
        data: Folder of good images, searched with its sub-folders, or one in MVTec's layout: its ``test/good`` is used.
        output: Checkpoint to write; None for ``…-calibrated.ckpt`` beside the old one.
        false_alarm_rate: Share of good images that may be called anomalous, in (0, 1); None for the model's.
        device: ``auto``, ``cpu``, ``cuda``, …

    Raises:
        WTFlowError: If the output is the checkpoint itself, or the images are not good ones, not new, or too few.
    """
    path, folder = Path(ckpt_path), Path(data).resolve()
    target = path.with_name(f"{path.stem}-calibrated.ckpt") if output is None else Path(output)
    if target.resolve() == path.resolve():
        msg = f"output is '{target}', the checkpoint itself: give another path, to keep the old thresholds."
        raise WTFlowError(msg)
    model = load_model(path)
    post: Any = model.post_processor
    rate = getattr(post, "false_alarm_rate", None) if false_alarm_rate is None else false_alarm_rate
    if not isinstance(post, WTFlowPostProcessor) or rate is None:
        msg = "The model has anomalib's F1 threshold, which good images cannot set: give a false_alarm_rate."
        raise WTFlowError(msg)
    check("false_alarm_rate", rate)
    post.false_alarm_rate = rate
    fresh, unused = sort_images(good_images(folder), model.marks["training"])
    to_device(model, device)
    new = score_files(model, fresh)
    old = Scores(post.calibration_scores.cpu(), post.calibration_scores.cpu(), post.calibration_index.cpu())
    used = enough_images(new, old, len(model.products), images_needed(rate))
    allocate(post, len(model.products))
    before = post.image_threshold.tolist(), post.pixel_threshold.tolist()
    post.calibrate(Scores(*(values[used] for values in new)), len(model.products))
    names = [os.path.relpath(each, folder) for each in fresh]
    shown = new.index[used].unique().tolist()
    changes = [change_of(model, k, before, new, old, names, ALPHA / len(shown)) for k in shown]
    files = marks_of([each for each, kept in zip(fresh, used.tolist(), strict=True) if kept])
    model.marks = {**model.marks, "calibration": files}
    save(path, target, model)
    unseen = [name for k, name in enumerate(model.products) if k not in shown]
    unused = {why: [os.path.relpath(each, folder) for each in paths] for why, paths in unused.items()}
    unused["too few show their product"] = list(by_score(names, new.score, ~used))
    return Calibrated(target, rate, changes, unseen, unused)


def good_images(folder: Path) -> list[str]:
    """List the images of a folder, or of its ``test/good``.

    Raises:
        WTFlowError: If there is no such folder, or it may hold defective images.
    """
    if (folder / "test" / "good").is_dir():
        folder = folder / "test" / "good"
    below = [path.name for path in folder.rglob("*") if path.is_dir()]
    if not folder.is_dir() or {"train", "test", "ground_truth"} & set(below) or (folder.name == "test" and below):
        msg = f"'{folder}' is not a folder of good images only: give one without train, test and ground_truth."
        raise WTFlowError(msg)
    return [str(path) for path in PredictDataset(folder).image_filenames]


def sort_images(paths: Sequence[str], trained_on: Tensor) -> tuple[list[str], dict[str, list[str]]]:
    """Return the new images, and those left out, by reason.

    Raises:
        WTFlowError: If no image is left.
    """
    known, seen = set(trained_on.tolist()), set()
    fresh, familiar, copies = list[str](), list[str](), list[str]()
    for path in paths:
        content = sha256(Path(path).read_bytes()).digest()
        (familiar if mark_of(path) in known else copies if content in seen else fresh).append(path)
        seen.add(content)
    if not fresh:
        msg = f"The model was trained with all {len(paths)} images: give good images that it has not seen."
        raise WTFlowError(msg)
    return fresh, {"the model was trained with them": familiar, "they are copies of others": copies}


def enough_images(new: Scores, old: Scores, count: int, needed: int) -> Tensor:
    """Mask the images, ``(n,)``, of products with as many as the rate or old threshold needs.

    A few images of another product, recognised as this one, would set its threshold. Of one product, any number does.

    Raises:
        WTFlowError: If no product is left.
    """
    counts, before = (torch.bincount(scores.index, minlength=count) for scores in (new, old))
    kept = counts >= (before.clamp(max=needed) if count > 1 else 1)
    if not kept[new.index].any():
        msg = f"The {len(new.index)} good images are too few: the rate needs at least {needed} of one product."
        raise WTFlowError(msg)
    return kept[new.index]


def change_of(
    model: WTFlow,
    k: int,
    before: tuple[list[float], list[float]],
    new: Scores,
    old: Scores,
    names: list[str],
    alpha: float,
) -> Change:
    """Compare the old and new scores and thresholds of product ``k``.

    The test can tell nothing where p would not be below alpha if all n new scores were above all m old ones: that gives
    the least p, ``2 n! m! / (n + m)!``. A model that had anomalib's threshold has no old scores, and m is 0.
    """
    post: Any = model.post_processor
    own = new.index == k
    scores, others = new.score[own].numpy(), old.score[old.index == k].numpy()
    test = mannwhitneyu(scores, others if len(others) else scores, alternative="two-sided")
    return Change(
        product=model.products[k],
        before=before[0][k],
        after=float(post.image_threshold[k]),
        pixel_before=before[1][k],
        pixel_after=float(post.pixel_threshold[k]),
        images=len(scores),
        promised=float(post.effective_false_alarm_rate[k]),
        p_value=float(test.pvalue),
        higher=bool(test.statistic > len(scores) * len(others) / 2),
        moved=bool(test.pvalue < alpha),
        can_tell=2 / math.comb(len(scores) + len(others), len(scores)) < alpha,
        anomalous=by_score(names, new.score, own & (new.score > before[0][k])),
    )


def by_score(names: Sequence[str], scores: Tensor, chosen: Tensor) -> dict[str, float]:
    """Return the scores of images of a mask ``(n,)`` by name, the highest first."""
    order = scores.argsort(descending=True, stable=True)
    return {names[k]: float(scores[k]) for k in order[chosen[order]].tolist()}


def listed(names: Sequence[str] | Mapping[str, float], most: int = 5) -> str:
    """Name the first images, with their scores if there are any, and how many more there are."""
    scores = names if isinstance(names, Mapping) else {}
    texts = [f"'{name}' ({scores[name]:.4g})" if name in scores else f"'{name}'" for name in names]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def save(source: Path, target: Path, model: WTFlow) -> None:
    """Write a checkpoint with the model's thresholds and rate, and all else as it was."""
    checkpoint = read_checkpoint(source)
    post: Any = model.post_processor
    state = post.state_dict(prefix="post_processor.")
    checkpoint["state_dict"] |= {name: value.cpu() for name, value in state.items()}
    model.on_save_checkpoint(checkpoint)
    checkpoint["hyper_parameters"]["false_alarm_rate"] = post.false_alarm_rate
    torch.save(checkpoint, target)
