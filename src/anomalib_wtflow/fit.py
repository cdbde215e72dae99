"""Fitting a model to the features of good images, in plain torch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from anomalib_wtflow.flow.regression import FieldTraining, TrainingPlan, fit_field
from anomalib_wtflow.products.recognition import Recognition
from anomalib_wtflow.settings import Settings
from anomalib_wtflow.torch_model import WTFlowModel

BATCH = 32
BACKGROUND_IMAGES, FEWEST, MOST = 96, 24, 768
"""Images of each product that the background slope comes from, fewer of many products, and most of all."""


def plan_of(settings: Settings) -> TrainingPlan:
    """Return the settings of a training."""
    return TrainingPlan(**{each.name: getattr(settings, each.name) for each in fields(TrainingPlan)})


def _chunks(rows: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    for start in range(0, len(rows), BATCH):
        yield list(rows[start : start + BATCH])


def _batches(rows: Sequence[Tensor], index: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(map(torch.stack, _chunks(rows)), index.split(BATCH), strict=True)


@torch.no_grad()
def score_rows(
    model: WTFlowModel, rows: list[Tensor], image_size: tuple[int, int]
) -> tuple[Tensor, Tensor, Recognition]:
    """Score features ``(C, H, W)``: scores, maxima of maps and recognitions, ``(M,)``."""
    parts, peaks = [], []
    for batch in _chunks(rows):
        score, maps, recognition = model.predict(torch.stack(batch).to(model.class_embeddings.device), image_size)
        parts.append((score.cpu(), recognition.index.cpu(), recognition.distance.cpu()))
        peaks.append(maps.flatten(1).amax(dim=1).cpu())  # the maps themselves would take gigabytes
    scores, index, distance = (torch.cat(values) for values in zip(*parts, strict=True))
    return scores, torch.cat(peaks), Recognition(index, distance)


@torch.no_grad()
def fit_statistics(model: WTFlowModel, rows: list[Tensor], index: Tensor) -> Tensor:
    """Fit normalisation and recogniser to features ``(C, H, W)``; normalise these in place.

    Args:
        model: The model.
        rows: Features of each image, in float32 on the CPU.
        index: Index of each image's product, ``(M,)``.

    Returns:
        The index of the product that the model itself recognises in each image, as in inference, ``(M,)``.
    """
    covariance = model.normalization.fit(_batches(rows, index))  # type: ignore[operator]
    if model.sampling is not None and covariance is not None:
        model.sampling.fit(covariance)
    model.recognizer.fit(_batches(rows, index))
    recognised = []
    for batch in _chunks(rows):
        x0, recognition = model.normalise(torch.stack(batch).to(model.class_embeddings.device))
        for row, value in zip(batch, x0, strict=True):
            row.copy_(value)
        recognised.append(recognition.index.cpu())
    return torch.cat(recognised)


def fit_model(
    model: WTFlowModel,
    rows: list[Tensor],
    index: Tensor,
    image_size: tuple[int, int],
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    log: Callable[[int, float], None] = lambda *_: None,
) -> list[float]:
    """Fit the statistics, then the field, then the background level, to features of good images.

    Args:
        model: The model, with room for all products (:meth:`WTFlowModel.set_products`).
        rows: Backbone features ``(C, H, W)`` of each image, in float32 on the CPU; normalised in place.
        index: Index of each image's product, ``(M,)``; each product has at least one image.
        image_size: Height and width of the images.
        progress: Wraps the iteration over epochs.
        log: Is given each epoch, from 0, and its training loss.

    Returns:
        The training loss of each epoch.

    Raises:
        WTFlowError: If the features or the loss are NaN or infinite, or the coupling needs more images.
    """
    shown = fit_statistics(model, rows, index)
    embedding = model.class_embeddings.cpu()[shown]
    s = model.settings
    training = FieldTraining(model.field, rows, model.path, s.coupling, plan_of(s), model.sampling, embedding)
    losses = fit_field(training, progress, log)
    fit_background(model, rows, shown, image_size)
    return losses


@torch.no_grad()
def fit_background(model: WTFlowModel, x0: Sequence[Tensor], index: Tensor, image_size: tuple[int, int]) -> None:
    """Fit the background level of each product to some of its images, evenly spread over all.

    Args:
        model: The model.
        x0: Normalised features ``(C, H, W)`` of good images.
        index: Index of each image's product, ``(M,)``.
        image_size: Height and width of the images.
    """
    kinds, device = index.unique().tolist(), model.class_embeddings.device
    most = max(FEWEST, min(BACKGROUND_IMAGES, MOST // len(kinds)))
    own = [(index == k).nonzero().flatten() for k in kinds]
    chosen = torch.cat([each[torch.linspace(0, len(each) - 1, min(len(each), most)).long()] for each in own])
    parts = [
        model.log_density(model.flow(batch.to(device), shown.to(device)))
        for batch, shown in _batches([x0[k] for k in chosen.tolist()], index[chosen])
    ]
    model.anomaly_map_generator.fit(torch.cat(parts), image_size, index[chosen].to(device))
