"""Models that are ready to score drawn parts: their field is fitted in an epoch."""

import torch
from torch import Tensor

from anomalib_wtflow import WTFlow
from anomalib_wtflow.conformal import Scores
from anomalib_wtflow.data.drawing import draw_part
from anomalib_wtflow.fit import fit_model

SIDE = 64


def drawn(seeds: range, product: int = 0, side: int = SIDE) -> Tensor:
    """Good parts, ``(N, 3, side, side)``, as anomalib reads them."""
    pixels = [torch.from_numpy(draw_part(seed, side, None, product)[0]) for seed in seeds]
    return torch.stack(pixels).permute(0, 3, 1, 2).float() / 255


def ready(products: int = 1, **overrides: object) -> WTFlow:
    """A model of drawn products, whose thresholds lie half above the scores of further good parts."""
    model = WTFlow(image_size=SIDE, false_alarm_rate=0.1, max_epochs=1, overrides={"width": 8, **overrides}).eval()
    model.products = [str(k) for k in range(products)]
    network, prepare = model.model, model.pre_processor
    network.set_products(products)
    with torch.no_grad():
        features = network.extract(prepare(torch.cat([drawn(range(12), k) for k in range(products)])))
    fit_model(network, list(features), torch.arange(products).repeat_interleave(12), (SIDE, SIDE))
    with torch.no_grad():
        result = network(prepare(torch.cat([drawn(range(20, 32), k) for k in range(products)])))
    peaks = result.anomaly_map.flatten(1).amax(dim=1)
    model._is_fitted = torch.tensor([True])  # so that a validation does not collect
    model.post_processor.calibrate(Scores.of(1.5 * result.pred_score, 1.5 * peaks, result.recognition), products)
    return model
