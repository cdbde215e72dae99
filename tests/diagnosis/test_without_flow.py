"""Controls without a flow: against the model with an identity in the flow's place, and an exact case."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from anomalib_wtflow.diagnosis.scoring import score_image
from anomalib_wtflow.diagnosis.without_flow import (
    POSITION_MEANS,
    UNWHITENED,
    WHITENED,
    controls,
    training_features,
    without_flow,
)
from anomalib_wtflow.fit import fit_background
from anomalib_wtflow.flow.normalization import Whitening


@pytest.mark.slow
def test_controls_are_the_model_without_its_flow(trained: SimpleNamespace) -> None:
    parts, model = trained.parts, trained.model
    parts.setup()
    images = [score_image(model, parts.test_data[k]) for k in range(0, len(parts.test_data), 4)]
    features, index = training_features(model, parts.train_data)
    assert len(features) == len(parts.train_data)
    scored = dict(without_flow(model, images, (features, index)))
    assert list(scored) == [UNWHITENED, WHITENED, POSITION_MEANS]
    tested = torch.stack([image.features for image in images])
    whitening = Whitening(features.shape[1])
    whitening.fit([(features, index)])
    for name, normalization in ((UNWHITENED, model.model.normalization), (WHITENED, whitening)):
        reference = copy.deepcopy(model.model)
        reference.normalization = normalization
        reference.flow = lambda x0, index: x0
        fit_background(reference, normalization(features, index), index, (128, 128))
        expected = reference.predict(tested, (128, 128)).pred_score.tolist()
        assert [image.score for image in scored[name]] == pytest.approx(expected, rel=1e-4)
    assert [image.path for image in scored[WHITENED]] == [image.path for image in images]
    assert list(dict(without_flow(model, images, None))) == [UNWHITENED]


@pytest.mark.slow
def test_an_image_that_is_the_mean_of_its_positions_is_normal_all_over(trained: SimpleNamespace) -> None:
    """Of one training image, which is the test image too, nothing is left; of the whitened features alone something."""
    trained.parts.setup()
    image = score_image(trained.model, trained.parts.test_data[0])
    training = image.features[None], torch.tensor([image.product])
    scored = dict(without_flow(trained.model, [image], training))
    assert np.abs(scored[POSITION_MEANS][0].anomaly_map.numpy()).max() < 1e-5
    assert scored[WHITENED][0].anomaly_map.max() > 0.1
    model = SimpleNamespace(model=trained.model.model, products=["a", "b"])
    assert list(controls(model, training)) == [UNWHITENED]
