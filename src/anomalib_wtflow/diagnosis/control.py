"""The plain rFM field that a trained one is compared with."""

from functools import partial

import torch
from torch import nn

from anomalib_wtflow.diagnosis.progress import Progress
from anomalib_wtflow.diagnosis.without_flow import TrainingFeatures
from anomalib_wtflow.flow.coupling import get_coupling
from anomalib_wtflow.flow.regression import fit_field
from anomalib_wtflow.lightning_model import WTFlow


def fit_control(model: WTFlow, training: TrainingFeatures, steps: int, batch_size: int, show: Progress) -> nn.Module:
    """Train the model's network with independent coupling on features of training images.

    AdamW under a cosine, and the last weights, where the model's own are averaged at a constant rate.
    """
    product = training.product.to(model.device)
    with torch.no_grad():
        x0 = model.model.normalization(training.features.to(model.device), product)
    settings = model.settings
    return fit_field(
        model.model.build_field().to(x0.device),
        x0,
        model.model.path,
        get_coupling("independent"),
        steps,
        batch_size,
        settings.learning_rate,
        settings.weight_decay,
        progress=partial(show, description="Training plain rFM, to compare with", total=steps),
        sampling=model.model.sampling,
        condition=model.model.condition(product),
    )
