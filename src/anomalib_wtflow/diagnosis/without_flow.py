"""What the flow is compared with: the same score of the same features without a flow (ours)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anomalib_wtflow.anomaly_map import AnomalyMapGenerator
from anomalib_wtflow.diagnosis.progress import Progress
from anomalib_wtflow.diagnosis.scoring import ScoredImage, items, spread, transform
from anomalib_wtflow.flow.normalization import Whitening
from anomalib_wtflow.flow.rows import allocate
from anomalib_wtflow.lightning_model import WTFlow

BATCH = 16
UNWHITENED = "features normalised as the model's"
WHITENED = "whitened features"
POSITION_MEANS = "whitened features less the mean of their position"
NAMES = (UNWHITENED, WHITENED, POSITION_MEANS)
"""Simplest first."""
Ends = Callable[[Tensor, Tensor], Tensor]
"""What is scored in the place of the flow's end: of features ``(N, C, H, W)`` and the places of their products."""


class TrainingFeatures(NamedTuple):
    """Backbone features of good training images, ``(N, C, H, W)``, and the places of their products, ``(N,)``."""

    features: Tensor
    product: Tensor

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Split both into batches."""
        return zip(self.features.split(BATCH), self.product.split(BATCH), strict=True)


@torch.no_grad()
def training_features(model: WTFlow, train_data: Any, count: int, show: Progress) -> TrainingFeatures:
    """Extract the features of at most ``count`` training images, evenly spread over all."""
    chosen = spread(range(len(train_data)), count)
    features, products = [], []
    for item in show(items(train_data, chosen), "Extracting the training features", len(chosen)):
        image, _ = transform(model, item)
        extracted = model.model.extract(image[None].to(model.device))
        features.append(extracted.cpu())
        products.append(model.model.recognition(extracted).product.cpu())
    return TrainingFeatures(torch.cat(features), torch.cat(products))


def without_flow(
    model: WTFlow, images: Sequence[ScoredImage], training: TrainingFeatures | None, show: Progress
) -> Iterator[tuple[str, list[ScoredImage]]]:
    """Score the test images by the density proxy of their features themselves, ``y = x0``, in each of three ways.

    Features normalised as the model's; whitened; and whitened less the mean of the training images at each position,
    of each product by itself. The contrast of the image score is observed on the training images, as the model's own
    is. Without training images only the first, and its contrast has slope 1.

    Args:
        model: The trained model.
        images: The test images.
        training: Features of good training images; None if there are none.
        show: Where to say how far it is.

    Yields:
        Name of the control, and the test images with its scores and maps.
    """
    size = images[0].anomaly_map.shape
    batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    for name, ends in controls(model, images, training).items():
        generator = _generator(model, ends, training, size)
        scored = []
        for batch in show(batches, f"Scoring without a flow, {name}", len(batches)):
            product = torch.cat([image.product for image in batch])
            log_density = _log_density(model, ends, torch.stack([image.features for image in batch]), product)
            maps, scores = (values.cpu() for values in generator(log_density, size, product))
            scored += [
                image._replace(score=float(score), anomaly_map=one[0])
                for image, score, one in zip(batch, scores, maps, strict=True)
            ]
        yield name, scored


def _log_density(model: WTFlow, ends: Ends, features: Tensor, product: Tensor) -> Tensor:
    return model.model.log_density(ends(features.to(model.device), product.to(model.device)))


def _generator(
    model: WTFlow, ends: Ends, training: TrainingFeatures | None, size: tuple[int, int] | torch.Size
) -> AnomalyMapGenerator:
    """Copy the model's, with the contrast that suits these ends."""
    generator = model.model.anomaly_map_generator.without_limit()
    if training is not None:
        log_density = torch.cat([_log_density(model, ends, *batch) for batch in training.batches()])
        generator.observe(log_density, size, training.product)
    return generator


def controls(model: WTFlow, images: Sequence[ScoredImage], training: TrainingFeatures | None) -> dict[str, Ends]:
    """Build the controls, by name; only the first where there is nothing to whiten an image's product with."""
    result: dict[str, Ends] = {UNWHITENED: model.model.normalization}
    if training is None or not {int(image.product) for image in images} <= set(training.product.tolist()):
        return result
    known = training.product.unique()

    def place(product: Tensor) -> Tensor:
        return torch.searchsorted(known, product.cpu())

    whitening = Whitening(training.features.shape[1])
    allocate(whitening, len(known))
    whitening.reset()
    for features, product in training.batches():
        whitening.update(features, place(product))
    whitening.finalize()
    whitening.to(model.device)
    result[WHITENED] = whitened = lambda features, product: whitening(features, place(product))
    # Whitening is affine: the mean of the whitened features is the mean, whitened.
    average = [training.features[training.product == one].mean(dim=0) for one in known]
    means = whitened(torch.stack(average).to(model.device), known)
    result[POSITION_MEANS] = lambda features, product: whitened(features, product) - means[place(product)]
    return result
