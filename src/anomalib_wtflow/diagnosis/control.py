"""The plain rFM field that a trained one is compared with."""

from typing import Any

import torch
from torch import nn

from anomalib_wtflow.diagnosis.progress import Progress
from anomalib_wtflow.diagnosis.scoring import items, spread, transform
from anomalib_wtflow.flow.coupling import get_coupling
from anomalib_wtflow.flow.regression import fit_field
from anomalib_wtflow.lightning_model import WTFlow

TRAINING_IMAGES = 512


def fit_control(model: WTFlow, train_data: Any, steps: int, batch_size: int, show: Progress) -> nn.Module:
    """Train the model's network with independent coupling on at most 512 of the training images.

    AdamW under a cosine, and the last weights, where the model's own are averaged at a constant rate.
    """
    chosen = spread(range(len(train_data)), TRAINING_IMAGES)
    with torch.no_grad():
        features, products = [], []
        for item in show(items(train_data, chosen), "Extracting the training features", len(chosen)):
            image, _ = transform(model, item)
            x0, product, _ = model.model.normalise(model.model.extract(image[None].to(model.device)))
            features.append(x0)
            products.append(product)
    x0 = torch.cat(features)
    control, settings = model.model.build_field().to(x0.device), model.settings
    title = "Training plain rFM, to compare with"
    show.say(title)
    return fit_field(
        control,
        x0,
        model.model.path,
        get_coupling("independent"),
        steps,
        batch_size,
        settings.learning_rate,
        settings.weight_decay,
        description=title if show.shown else None,
        sampling=model.model.sampling,
        condition=model.model.condition(torch.cat(products)),
    )
