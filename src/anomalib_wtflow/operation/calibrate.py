"""Move the threshold of a trained model to what the process is like today, without training."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import mannwhitneyu
from torch import Tensor

from anomalib_wtflow.flow.rows import allocate
from anomalib_wtflow.lightning_model import WTFlow
from anomalib_wtflow.operation.checkpoint import load_model, to_device
from anomalib_wtflow.operation.data import images_of
from anomalib_wtflow.operation.fresh import fresh_ones
from anomalib_wtflow.post_processor import WTFlowPostProcessor, images_needed
from anomalib_wtflow.reporting.data_sets import image_paths
from anomalib_wtflow.reporting.unjudged import first_few, quoted
from anomalib_wtflow.settings import check
from anomalib_wtflow.training import checkpoint_rules
from anomalib_wtflow.training.calibration import Scores, score_images
from anomalib_wtflow.writing import one_sentence_for, replace_whole

LAYOUT = ("train", "test", "ground_truth")
ALPHA = 0.01
"""Probability of the sentence that the process has moved where it has not, over all products of a model."""
HIGHEST = 1 / 8
"""Share of the old scores: were the new ones all among these highest, that should show."""


@dataclass(frozen=True)
class Moved:
    """A product's threshold before and after, on the scale of raw scores, and what the new images say.

    ``p_value`` is that of a two-sided Mann-Whitney U test of the new scores against those that the old threshold came
    from; None where the checkpoint does not hold these. ``promised`` is the false-alarm rate that ``images`` support.
    ``can_tell`` says whether so many scores could tell that the process has moved (:func:`could_tell`).
    ``anomalous`` are the new images above the old threshold, with their raw scores (infinite if like no product), the
    highest first, by their names below the data's folder.
    """

    product: str
    before: float
    after: float
    pixel_before: float
    pixel_after: float
    images: int
    promised: float
    p_value: float | None
    higher: bool
    moved: bool
    can_tell: bool
    anomalous: Mapping[str, float]

    @property
    def suspicious(self) -> bool:
        """Whether the new images should be looked at: ``after > before``, or one of them is like no product.

        A share of good images is above the old threshold by its promise. The new threshold is above the old one just
        where as many are as set it, whatever their number, and only then an image that was anomalous passes as good
        from now on.
        """
        return bool(self.anomalous) and (self.after > self.before or math.inf in self.anomalous.values())

    def sentences(self, asked: float, of: str = "") -> list[str]:
        """Say it."""
        few = f", not the {asked:.2%} asked for: give more good images" if self.promised > asked * (1 + 1e-6) else ""
        lines = [
            f"Threshold{of} {self.before:.4g} -> {self.after:.4g} (pixels {self.pixel_before:.4g} -> "
            f"{self.pixel_after:.4g}): {self.images} good images support a false-alarm rate of at most "
            f"{self.promised:.2%}{few}."
        ]
        if self.p_value is None:
            lines.append("The checkpoint does not hold the scores it was calibrated on: no comparison.")
        elif self.moved:
            how = "higher" if self.higher else "lower"
            lines.append(
                f"These images score {how} than those it was calibrated on (Mann-Whitney, p = {self.p_value:.2g}): the "
                "process has moved."
            )
        elif not self.can_tell:
            lines.append(
                f"{self.images} image{'s are' if self.images > 1 else ' is'} too few to tell whether the process has "
                f"moved (Mann-Whitney, p = {self.p_value:.2g}): give more good images."
            )
        else:
            lines.append(f"They score like those it was calibrated on (Mann-Whitney, p = {self.p_value:.2g}).")
        if self.suspicious:
            several = len(self.anomalous) > 1
            lines.append(
                f"{len(self.anomalous)} of {self.images} images{of} {'are' if several else 'is'} anomalous at the old "
                f"threshold, {named(self.anomalous)}: leave {'those that are' if several else 'it out if it is'} "
                f"defective{' out' if several else ''} and calibrate again."
            )
        return lines


@dataclass(frozen=True)
class Calibrated:
    """What :func:`calibrate` did."""

    path: Path
    false_alarm_rate: float
    products: list[Moved]
    unseen: list[str]
    """Products that no or too few new images show; they keep their thresholds."""
    left_out: Mapping[str, float]
    """The images that show these, with their raw scores, as in :class:`Moved`."""
    trained_on: Sequence[str] = ()
    """Images that were not used, since the model was trained with them."""
    copies: Sequence[str] = ()
    """Images that were not used, since they are copies of others."""

    def __str__(self) -> str:
        """Say it in a few lines."""
        several = len(self.products) + len(self.unseen) > 1
        lines = []
        if self.trained_on:
            what = "whose scores promise nothing for new parts"
            lines.append(
                f"Left out {len(self.trained_on)} that the model was trained with, {what}: {quoted(self.trained_on)}."
            )
        if self.copies:
            lines.append(
                f"Left out {len(self.copies)} that are copies of others, and tell nothing new: {quoted(self.copies)}."
            )
        for each in self.products:
            lines += each.sentences(self.false_alarm_rate, f" of '{each.product}'" if several else "")
        if self.unseen:
            names = ", ".join(map(repr, self.unseen))
            some = f" Left out: {named(self.left_out)}." if self.left_out else ""
            lines.append(f"No or too few images show {names}: thresholds kept.{some}")
        return "\n".join(lines)


def calibrate(
    ckpt_path: str | Path,
    data: str | Path,
    output: str | Path | None = None,
    false_alarm_rate: float | None = None,
    device: str = "auto",
) -> Calibrated:
    """Set a trained model's thresholds from new good images, and write a new checkpoint; weights stay as they are.

    The thresholds are those of :func:`anomalib_wtflow.post_processor.conformal_threshold`: at most the stated share of
    good images like these is called anomalous, each product by itself. Images that the model was trained with are left
    out, as are copies of others (:func:`anomalib_wtflow.operation.fresh.fresh_ones`).

    Args:
        ckpt_path: Checkpoint of a trained WTFlow model.
        data: Folder of good images, searched with its sub-folders, or one in MVTec's layout, of which ``train/good`` is
            not used, since the model was trained on it, and ``test/good`` is.
        output: Checkpoint to write; None for ``…-calibrated.ckpt`` beside the old one.
        false_alarm_rate: Share of good images that may be called anomalous, in (0, 1); None for the model's.
        device: ``auto``, ``cpu``, ``cuda``, …

    Returns:
        Old and new thresholds of each product, the rates that they support, how unlike the old scores the new are, and
        which images are anomalous at the old thresholds.

    Raises:
        FileNotFoundError: If the checkpoint or the data is not there.
        ValueError: If the checkpoint is none of a trained WTFlow model, there are no images, or none that the model was
            not trained with, or too few finite scores, or the output is the input.
    """
    path = Path(ckpt_path)
    target = path.with_name(f"{path.stem}-calibrated.ckpt") if output is None else Path(output)
    model, _, _ = load_model(path)
    if target.resolve() == path.resolve():
        msg = (
            f"output is '{output}', the checkpoint itself: give another path, to have the old thresholds to go back to."
        )
        raise ValueError(msg)
    images = good_images(Path(data))
    given = names_below(images, Path(data))
    places = fresh_ones(images.image_filenames, model.trained_on)
    images.image_filenames = [images.image_filenames[place] for place in places.fresh]
    to_device(model, device)
    post = with_rate(model, false_alarm_rate)
    allocate(post, len(model.product_names))
    before = post.image_threshold.clone(), post.pixel_threshold.clone()
    old = Scores(post.calibration_scores.cpu(), post.calibration_scores.cpu(), post.calibration_product.cpu())
    names, scored = [given[place] for place in places.fresh], score_images(model, images)
    new = enough(scored, old, len(model.product_names), post)
    set_thresholds(post, new, len(model.product_names), by_score(names, scored, scored.scores.isinf()))
    products = []
    for place in new.product.unique().tolist():
        limit = before[0][place].cpu()
        anomalous = by_score(
            names, scored, (scored.product == place) & ((scored.scores > limit) | scored.scores.isinf())
        )
        products.append(moved(post, model.product_names[place], place, before, old, new, anomalous))
    unseen = [name for place, name in enumerate(model.product_names) if place not in new.product]
    left_out = by_score(names, scored, ~torch.isin(scored.product, new.product))
    save(path, target, model)
    assert post.false_alarm_rate is not None
    unused = ([given[place] for place in some] for some in (places.trained_on, places.copies))
    return Calibrated(target, post.false_alarm_rate, products, unseen, left_out, *unused)


def good_images(path: Path) -> Any:
    """Find the images of a folder.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it has defective images, or no images.
    """
    if not path.exists():
        msg = f"There is no data at '{path}': give a folder of good images."
        raise FileNotFoundError(msg)
    if (path / "test" / "good").is_dir():
        path = path / "test" / "good"
    folders = [folder for folder in path.rglob("*") if folder.is_dir()]
    kinds = path.name == "test" and any(folder.parent == path and folder.name != "good" for folder in folders)
    if kinds or any(folder.name in LAYOUT for folder in folders):
        msg = f"'{path}' holds more than good images (train, test or ground_truth): give a folder of good images alone."
        raise ValueError(msg)
    return images_of(path)


def names_below(images: Any, folder: Path) -> list[str]:
    """Name images by their paths below a folder, whatever links lead there."""
    paths, folder = [Path(path) for path in image_paths(images)], folder.resolve()
    return [path.relative_to(folder).as_posix() if folder in path.parents else path.name for path in paths]


def by_score(names: Sequence[str], scored: Scores, chosen: Tensor) -> dict[str, float]:
    """Return the raw scores of some images, ``chosen`` being a mask ``(n,)``, by their names; the highest first."""
    order = scored.scores.argsort(descending=True, stable=True)
    return {names[k]: float(scored.scores[k]) for k in order[chosen[order]].tolist()}


def named(images: Mapping[str, float]) -> str:
    """Name some images with their raw scores, and say how many more there are."""
    return first_few(
        [f"'{name}' ({'like no product' if score == math.inf else f'{score:.4g}'})" for name, score in images.items()]
    )


def set_thresholds(post: WTFlowPostProcessor, new: Scores, count: int, strange: Mapping[str, float]) -> None:
    """Set the thresholds of the products that the new images show.

    Args:
        post: Takes them.
        new: Of the new images.
        count: Number of the model's products.
        strange: The images like no product, which count as anomalous at any threshold.

    Raises:
        ValueError: If there are so many of these that a threshold would be infinite.
    """
    try:
        post.calibrate(*new, count=count, keep=True)
    except ValueError as error:
        msg = (
            f"Too many of the images are anomalous at any threshold, {named(strange)}: leave those out that do not "
            "belong there, or give more good images."
        )
        raise ValueError(msg) from error


def with_rate(model: WTFlow, rate: float | None) -> WTFlowPostProcessor:
    """Return the post-processor of a model, with another rate if one is given.

    Raises:
        ValueError: If it has no conformal threshold, or the rate is outside (0, 1).
    """
    post: Any = model.post_processor
    ours = isinstance(post, WTFlowPostProcessor)
    if not ours or (post.false_alarm_rate is None and rate is None):
        way = "give --false_alarm_rate, such as 0.05" if ours else "train it with a false_alarm_rate"
        msg = (
            f"The model has anomalib's F1 threshold (false_alarm_rate null), which good images alone cannot set: {way}."
        )
        raise ValueError(msg)
    if rate is not None:
        check("false_alarm_rate", rate)
        post.false_alarm_rate = rate
    return post


def enough(new: Scores, old: Scores, count: int, post: WTFlowPostProcessor) -> Scores:
    """Leave out products of several that fewer images show than the rate needs and than the old threshold came from.

    A few images of another product, recognised as this one, would set its threshold.

    Raises:
        ValueError: If no product is left.
    """
    assert post.false_alarm_rate is not None
    asked = images_needed(post.false_alarm_rate)
    counts, before = (torch.bincount(scores.product, minlength=count) for scores in (new, old))
    kept = (counts > 0) & (counts >= (before.clamp(max=asked) if count > 1 else 1))
    if not kept.any():
        msg = f"The {len(new.product)} good images are too few of each product: the rate needs {asked} of one."
        raise ValueError(msg)
    return Scores(*(values[kept[new.product]] for values in new))


def moved(
    post: WTFlowPostProcessor,
    name: str,
    place: int,
    before: tuple[Tensor, Tensor],
    old: Scores,
    new: Scores,
    anomalous: Mapping[str, float],
) -> Moved:
    """Compare a product's new scores with those that its old threshold came from."""
    mine, theirs = new.scores[new.product == place], old.scores[old.product == place]
    p_value, higher, alpha = None, False, ALPHA / len(new.product.unique())
    if len(theirs):
        test = mannwhitneyu(mine.numpy(), theirs.numpy(), alternative="two-sided")
        p_value, higher = float(test.pvalue), float(test.statistic) > len(mine) * len(theirs) / 2
    return Moved(
        product=name,
        before=float(before[0][place]),
        after=float(post.image_threshold[place]),
        pixel_before=float(before[1][place]),
        pixel_after=float(post.pixel_threshold[place]),
        images=len(mine),
        promised=float(post.effective_false_alarm_rate[place]),
        p_value=p_value,
        higher=higher,
        moved=p_value is not None and p_value < alpha,
        can_tell=could_tell(len(mine), len(theirs), alpha),
        anomalous=anomalous,
    )


def could_tell(new: int, old: int, alpha: float) -> bool:
    """Whether a two-sided Mann-Whitney U test has p < alpha where all new scores are above seven eighths of the old.

    Where even so much does not show, that nothing shows says nothing. Of 1 to 3 new scores it never does at 0.01; of
    20 old ones at least 6 new ones do, of 200 at least 4.
    """
    if not old:
        return False
    below = math.floor((1 - HIGHEST) * old)
    ranks = below - 0.5 + np.linspace(0.1, 0.2, new)  # no ties, for which scipy has no exact p
    return bool(mannwhitneyu(ranks, np.arange(old), alternative="two-sided").pvalue < alpha)


def save(source: Path, target: Path, model: WTFlow) -> None:
    """Write a checkpoint with other thresholds and rate.

    Raises:
        RuntimeError: If it cannot be written.
    """
    checkpoint = checkpoint_rules.read(source)
    assert model.post_processor is not None
    state = model.post_processor.state_dict(prefix="post_processor.")
    checkpoint["state_dict"] |= {name: value.cpu() for name, value in state.items()}
    model.on_save_checkpoint(checkpoint)
    checkpoint["hyper_parameters"]["false_alarm_rate"] = model.post_processor.false_alarm_rate
    buffer = BytesIO()
    torch.save(checkpoint, buffer)
    way = "make room there, or give --output a path in another folder"
    with one_sentence_for("The checkpoint", target, way):
        replace_whole(target, buffer.getbuffer())
