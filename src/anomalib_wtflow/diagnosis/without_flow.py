"""Controls for the flow: the same score without a flow (ours), and plain rFM."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anomalib_wtflow.diagnosis.scoring import ScoredImage, transformed
from anomalib_wtflow.fit import plan_of
from anomalib_wtflow.flow.normalization import Whitening
from anomalib_wtflow.flow.regression import FieldTraining, fit_field
from anomalib_wtflow.flow.rows import allocate
from anomalib_wtflow.lightning_model import WTFlow

IMAGES_AT_ONCE = 16
UNWHITENED = "features normalised as the model's"
WHITENED = "whitened features"
POSITION_MEANS = "whitened features less the mean of their position"
Ends = Callable[[Tensor, Tensor], Tensor]
"""What is scored instead of the flow's end: of features ``(N, C, H, W)`` and the indices of their products."""
Training = tuple[Tensor, Tensor]
"""Backbone features of good training images, ``(N, C, H, W)``, and the indices of their products, ``(N,)``."""


@torch.no_grad()
def training_features(model: WTFlow, items: Iterable[Any]) -> Training:
    """Extract the features of training images, and recognise their products."""
    features, indices = [], []
    for item in items:
        extracted = model.model.extract(transformed(model, item)[0][None].to(model.device))
        features.append(extracted.cpu())
        indices.append(model.model.recognizer(extracted).index.cpu())
    return torch.cat(features), torch.cat(indices)


def in_batches(features: Tensor, index: Tensor) -> Iterator[Training]:
    """Split features and indices into batches."""
    return zip(features.split(IMAGES_AT_ONCE), index.split(IMAGES_AT_ONCE), strict=True)


@torch.no_grad()
def without_flow(
    model: WTFlow, images: Sequence[ScoredImage], training: Training | None
) -> Iterator[tuple[str, list[ScoredImage]]]:
    """Score the test images by the density proxy of ``y = x0``, in three ways.

    Features normalised as the model's; whitened; and whitened less the mean of the training images at each position,
    of each product by itself. The background level is fitted to the training images, as the model's own is. Without
    training images of each product there is only the first. Yields the names, and the images with the new scores.
    """
    size, device = images[0].anomaly_map.shape, model.device
    tested = torch.stack([image.features for image in images]), torch.tensor([image.product for image in images])
    for name, ends in controls(model, training).items():

        def log_density(features: Tensor, index: Tensor, ends: Ends = ends) -> Tensor:
            return model.model.log_density(ends(features.to(device), index.to(device)))

        generator = model.model.build_anomaly_map_generator().to(device)
        allocate(generator, len(model.products))
        if training is not None:
            generator.fit(torch.cat([log_density(*batch) for batch in in_batches(*training)]), size, training[1])
        parts = [generator(log_density(*batch), size, batch[1].to(device)) for batch in in_batches(*tested)]
        maps, scores = (torch.cat(values).cpu() for values in zip(*parts, strict=True))
        pairs = zip(images, scores.tolist(), maps[:, 0], strict=True)
        yield name, [image._replace(score=score, anomaly_map=anomaly_map) for image, score, anomaly_map in pairs]


def controls(model: WTFlow, training: Training | None) -> dict[str, Ends]:
    """Build the controls by name; only the first if a product has no training images."""
    result: dict[str, Ends] = {UNWHITENED: model.model.normalization}
    if training is None or len(training[1].unique()) < len(model.products):
        return result
    features, index = training
    whitening = Whitening(features.shape[1])
    allocate(whitening, len(model.products))
    whitening.fit(in_batches(features, index))
    whitening.to(model.device)
    # Whitening is affine: the mean of the whitened features is the mean, whitened.
    average = torch.stack([features[index == k].mean(dim=0) for k in range(len(model.products))]).to(model.device)
    means = whitening(average, torch.arange(len(average)))
    return {
        **result,
        WHITENED: whitening,
        POSITION_MEANS: lambda features, index: whitening(features, index) - means[index],
    }


def fit_plain(model: WTFlow, training: Training, progress: Callable[[Iterable[int]], Iterable[int]]) -> nn.Module:
    """Train a field with independent coupling and the model's settings: plain rFM."""
    part, plan = model.model, plan_of(model.settings)
    with torch.no_grad():
        x0 = [part.normalization(f.to(model.device), k.to(model.device)).cpu() for f, k in in_batches(*training)]
    field, embedding = part.build_field().to(model.device), part.class_embeddings.cpu()[training[1]]
    fit_field(FieldTraining(field, torch.cat(x0), part.path, "independent", plan, part.sampling, embedding), progress)
    return field
