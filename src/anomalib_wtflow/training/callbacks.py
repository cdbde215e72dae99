"""The callbacks of a WTFlow model, in their order."""

from typing import Any

from lightning.pytorch import Callback

from anomalib_wtflow.post_processor import WTFlowPostProcessor
from anomalib_wtflow.reporting.measurable import MeasurableMetrics
from anomalib_wtflow.reporting.product_report import ProductReport
from anomalib_wtflow.reporting.unjudged import Unjudged
from anomalib_wtflow.reporting.verdicts import Verdicts
from anomalib_wtflow.training.averaging import WeightAveraging
from anomalib_wtflow.training.batch_check import BatchCheck
from anomalib_wtflow.training.calibration import Calibration
from anomalib_wtflow.training.checkpoint_reading import CheckpointReading
from anomalib_wtflow.training.contrast import Contrast
from anomalib_wtflow.training.feature_caching import FeatureCaching
from anomalib_wtflow.training.image_check import ImageCheck
from anomalib_wtflow.training.plateau import Plateau
from anomalib_wtflow.training.processes import Processes
from anomalib_wtflow.training.resuming import Resuming
from anomalib_wtflow.training.same_data import SameData
from anomalib_wtflow.training.seeding import SeededOrder


def of(model: Any) -> list[Callback]:
    """Build the callbacks of a model, anew for each run, so that none knows anything of the one before.

    What keeps processes together comes first, and what looks at the images as they were given; then averaged weights,
    then the contrast, which depends on them, then the thresholds, which depend on it. They are held out before features
    take the images' place. The check of the images comes last: when something has failed it raises, after the others
    have put the data module in order.
    """
    settings, post_processor = model.settings, model.post_processor
    caching = FeatureCaching(settings.feature_cache)
    result: list[Callback] = [Processes(), SameData(), WeightAveraging(), Contrast(caching)]
    if isinstance(post_processor, WTFlowPostProcessor):
        result.append(Calibration(post_processor, settings.calibration_ratio, caching))
    result += [caching, SeededOrder(settings.seed), Plateau(caching, settings.plateau), Resuming()]
    result += [MeasurableMetrics(), ProductReport(), *([Verdicts()] if settings.verdicts else []), Unjudged()]
    return [*result, CheckpointReading(), BatchCheck(), ImageCheck()]
