"""Controls without a flow: against the model with an identity in the flow's place, and an exact case."""

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from anomalib_wtflow.diagnosis.progress import Progress
from anomalib_wtflow.diagnosis.scoring import score_images
from anomalib_wtflow.diagnosis.without_flow import (
    POSITION_MEANS,
    UNWHITENED,
    WHITENED,
    TrainingFeatures,
    controls,
    training_features,
    without_flow,
)
from anomalib_wtflow.flow.normalization import get_normalization

QUIET = Progress(wanted=False)


def reference(model: Any, training: TrainingFeatures, features: Tensor, normalization: str) -> list[float]:
    """Scores of the whole model with an identity for its flow, the contrast observed anew."""
    model = copy.deepcopy(model)
    if normalization != model.settings.normalization:
        model.normalization = get_normalization(normalization, features.shape[1])
        model.normalization.update(training.features)
        model.normalization.finalize()
    model.flow = lambda x0, product=None: x0
    model.anomaly_map_generator = model.anomaly_map_generator.without_limit()
    size = (128, 128)
    with torch.no_grad():
        model.observe(model.normalization(training.features, training.product), size, training.product)
        return model.score(
            model.normalization(features), size, torch.zeros(len(features), dtype=torch.int64)
        ).pred_score.tolist()


@pytest.mark.slow
def test_controls_are_the_model_without_its_flow(trained: SimpleNamespace) -> None:
    trained.parts.setup()
    images = list(score_images(trained.model, trained.parts.test_data, QUIET))[::4]
    training = training_features(trained.model, trained.parts.train_data, 512, QUIET)
    assert len(training.features) == len(trained.parts.train_data)
    scored = dict(without_flow(trained.model, images, training, QUIET))
    assert list(scored) == [UNWHITENED, WHITENED, POSITION_MEANS]
    features = torch.stack([image.features for image in images])
    for name, normalization in ((UNWHITENED, "channel"), (WHITENED, "whitening")):
        expected = reference(trained.model.model, training, features, normalization)
        assert [image.score for image in scored[name]] == pytest.approx(expected, rel=1e-4)
    assert [image.path for image in scored[WHITENED]] == [image.path for image in images]
    assert list(dict(without_flow(trained.model, images, None, QUIET))) == [UNWHITENED]


@pytest.mark.slow
def test_an_image_that_is_the_mean_of_its_positions_is_normal_all_over(trained: SimpleNamespace) -> None:
    """Of one training image, which is the test image too, nothing is left; of the whitened features alone something."""
    trained.parts.setup()
    image = next(iter(score_images(trained.model, trained.parts.test_data, QUIET)))
    training = TrainingFeatures(image.features[None], image.product)
    scored = dict(without_flow(trained.model, [image], training, QUIET))
    assert np.abs(scored[POSITION_MEANS][0].anomaly_map.numpy()).max() < 1e-5
    assert scored[WHITENED][0].anomaly_map.max() > 0.1
    # Nothing to whiten with for the test image's product.
    other = TrainingFeatures(training.features, training.product + 1)
    assert list(controls(trained.model, [image], other)) == [UNWHITENED]
