"""Post-processor of WT-Flow: thresholds with a false-alarm rate, from normal images."""

from collections.abc import Collection
from typing import Any

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from anomalib_wtflow.conformal import Scores, conformal_threshold, images_needed
from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.flow.finite import finite
from anomalib_wtflow.flow.rows import allocate
from anomalib_wtflow.settings import Settings, check


class WTFlowPostProcessor(PostProcessor):
    """Thresholds from normal images only, and scores that are normalised around them.

    Two thresholds of :func:`conformal_threshold`: that of the image scores, so that at most the stated share of good
    images is called anomalous, and that of the largest pixel of each map, so that at most that share shows any
    anomalous pixel. With s >= 0 the raw score and T its threshold, the normalised score is ``s / (s + T)``: 0.5 at the
    threshold, 0.75 at three times the threshold, below 1 always, so that no two scores are clipped to the same value.
    A score is anomalous if it exceeds ``1 - sensitivity``.

    Each product has its own thresholds: T is that of the product which the model recognises. An image of an unknown
    product (distance d > 1) is anomalous, with a score of at least ``d T``. An image or pixel whose raw score is NaN or
    infinite is anomalous, with the highest score.

    The thresholds are set at the end of a training's validation, from held-out training images, good validation images
    or both.

    Args:
        false_alarm_rate: Share of good parts, in (0, 1), that may be called anomalous; None for anomalib's own
            post-processing (adaptive F1 threshold and min-max normalisation on the validation set).
        **kwargs: Arguments of anomalib's ``PostProcessor``.

    Raises:
        WTFlowError: If a rate is outside (0, 1).
    """

    per_product = ("_image_threshold", "_pixel_threshold", "effective_false_alarm_rate")
    effective_false_alarm_rate: Tensor
    calibration_scores: Tensor
    """The scores that the thresholds come from, and the indices of their products."""
    calibration_index: Tensor

    def __init__(self, false_alarm_rate: float | None = Settings.false_alarm_rate, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check("false_alarm_rate", false_alarm_rate)
        self.false_alarm_rate = false_alarm_rate
        for name in self.per_product:
            self.register_buffer(name, torch.full((1,), torch.nan))
        self.register_load_state_dict_pre_hook(_make_threshold_room)
        self.begin([""])

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "false_alarm_rate")

    @property
    def image_threshold(self) -> Tensor:
        """Return the threshold of image scores; NaN if not set, where anomalib takes the pixels'."""
        return super().image_threshold if self.false_alarm_rate is None else self._image_threshold

    @property
    def pixel_threshold(self) -> Tensor:
        """Return the threshold of maps; NaN if it is not set."""
        return super().pixel_threshold if self.false_alarm_rate is None else self._pixel_threshold

    def begin(self, products: list[str], validation_images: Collection[str] = (), held: Scores | None = None) -> None:
        """Begin to gather the scores that the thresholds come from.

        Args:
            products: Names of the products.
            validation_images: Files of the validation images to use.
            held: Scores of images that were held out of the training.
        """
        device = self._image_threshold.device
        self._remember(torch.empty(0, device=device), torch.empty(0, dtype=torch.int64, device=device))
        self.products, self.validation_images = products, set(validation_images)
        self.gathered: dict[str, tuple[float, float, int]] = {}
        self.held = held

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Gather scores of good validation images in a fit, or what anomalib's threshold needs."""
        if self.false_alarm_rate is None:
            super().on_validation_batch_end(trainer, pl_module, outputs, *args, **kwargs)
        elif trainer.state.fn == TrainerFn.FITTING and self.validation_images:
            peaks = outputs.anomaly_map.flatten(1).amax(dim=1)
            scores = Scores.of(outputs.pred_score, peaks, outputs.recognition)
            for path, *row in zip(outputs.image_path, *(column.tolist() for column in scores), strict=True):
                if path in self.validation_images:
                    self.gathered[path] = tuple(row)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the thresholds at the end of a fit's validation; a later validation does not."""
        if self.false_alarm_rate is None:
            super().on_validation_epoch_end(trainer, pl_module)
        elif trainer.state.fn == TrainerFn.FITTING:
            self.set_thresholds(trainer)

    def set_thresholds(self, trainer: Trainer) -> None:
        """Set the thresholds from the scores of all processes, and report the guarantee.

        Raises:
            WTFlowError: If there are no good images for the threshold of a product.
        """
        if trainer.world_size > 1:
            for rank in range(trainer.world_size):
                self.gathered |= trainer.strategy.broadcast(self.gathered, rank)
        rows = torch.tensor([self.gathered[path] for path in sorted(self.gathered)]).view(-1, 3)
        scores = Scores(rows[:, 0], rows[:, 1], rows[:, 2].long())
        if self.held is not None:
            scores = Scores(*map(torch.cat, zip(self.held, scores, strict=True)))
        missing = set(range(len(self.products))) - set(scores.index.tolist())
        if missing:
            msg = (
                f"No good image for the threshold is recognised as '{self.products[min(missing)]}': give it more good "
                "images, or check that its images are not those of another product."
            )
            raise WTFlowError(msg)
        self.calibrate(scores, len(self.products))
        self._report()

    def calibrate(self, scores: Scores, count: int = 1) -> None:
        """Set both thresholds of each of ``count`` products with scores; others keep theirs.

        Raises:
            WTFlowError: If a score is NaN, or too many of a product's are infinite.
        """
        assert self.false_alarm_rate is not None
        allocate(self, count)
        shown = scores.index.unique()
        for k in shown.tolist():
            own = scores.index == k
            image = conformal_threshold(scores.score[own], self.false_alarm_rate)
            self._image_threshold[k] = image.threshold
            self._pixel_threshold[k] = conformal_threshold(scores.peak[own], self.false_alarm_rate).threshold
            self.effective_false_alarm_rate[k] = image.false_alarm_rate
        kept = ~torch.isin(self.calibration_index, shown.to(self.calibration_index))
        pairs = ((self.calibration_scores, scores.score), (self.calibration_index, scores.index))
        self._remember(*(torch.cat([old[kept], new.to(old)]) for old, new in pairs))

    def _report(self) -> None:
        asked, few = self.false_alarm_rate, []
        assert asked is not None
        columns = (self.products, self.image_threshold, self.calibration_images, self.effective_false_alarm_rate)
        for name, threshold, n, rate in zip(*columns, strict=True):
            of = f" of '{name}'" if len(self.products) > 1 else ""
            rank_zero_info(
                f"Threshold{of}: {float(threshold):.4g}, from {n} good images that were not trained on. At most "
                f"{float(rate):.2%} of good images exceed it."
            )
            if rate > asked * (1 + 1e-6):  # the buffer is float32
                few.append(f"{n}{of} guarantee {float(rate):.4f}")
        if few:
            rank_zero_warn(
                f"false_alarm_rate={asked} needs at least {images_needed(asked)} good images for the threshold, and "
                f"{'; '.join(few)}: give more good images."
            )

    @property
    def calibration_images(self) -> Tensor:
        """Return the number of images behind the thresholds of each product."""
        return torch.bincount(self.calibration_index, minlength=len(self.effective_false_alarm_rate))

    @property
    def image_limit(self) -> Tensor:
        """Return the raw score of each product above which an image is anomalous."""
        if self.false_alarm_rate is None:
            return self.image_threshold + (0.5 - self.image_sensitivity) * (self.image_max - self.image_min)
        return _limit(self.image_threshold, self.image_sensitivity)

    @property
    def promised_false_alarm_rate(self) -> Tensor:
        """Return each product's promised false-alarm rate; NaN for a sensitivity above 0.5."""
        rate = self.effective_false_alarm_rate
        return rate if self.image_sensitivity <= 0.5 else torch.full_like(rate, torch.nan)

    def _remember(self, scores: Tensor, index: Tensor) -> None:
        self.register_buffer("calibration_scores", scores)
        self.register_buffer("calibration_index", index)

    def forward(self, predictions: Any) -> InferenceBatch:
        """Normalise and label raw predictions; NaN and infinite ones are anomalous.

        Raises:
            WTFlowError: If there is no threshold yet, or none that is finite (in Python only).
        """
        if not torch.compiler.is_compiling():
            self.raise_for_no_threshold()
        result = super().forward(predictions) if self.false_alarm_rate is None else self._judge(predictions)
        return self._condemn(result, predictions)

    def _judge(self, predictions: Any) -> InferenceBatch:
        score, anomaly_map, (index, distance) = predictions.pred_score, predictions.anomaly_map, predictions.recognition
        image, pixel = self.image_threshold[index], self.pixel_threshold[index]
        pixel = pixel.view(-1, *[1] * (anomaly_map.ndim - 1))
        label = self._label(score, image, self.image_sensitivity)
        unknown = distance > 1
        least = distance * image.clamp(min=torch.finfo(score.dtype).tiny)
        score = torch.where(unknown, score.maximum(least), score)
        return InferenceBatch(
            pred_score=self._normalise(score, image),
            pred_label=None if label is None else label | unknown,
            anomaly_map=self._normalise(anomaly_map, pixel),
            pred_mask=self._label(anomaly_map, pixel, self.pixel_sensitivity),
        )

    def post_process_batch(self, batch: Batch) -> None:
        """Normalise and label a batch in test and predict, as :meth:`forward` does."""
        result = self.forward(batch)
        batch.update(**{name: value for name, value in result._asdict().items() if value is not None})

    def raise_for_no_threshold(self) -> None:
        """Refuse to judge without a threshold.

        Raises:
            WTFlowError: If there is none, or one is infinite, and scores are to be normalised or labelled.
        """
        judges = self.enable_thresholding or self.enable_normalization
        ours = [] if self.false_alarm_rate is None else [self.pixel_threshold]  # anomalib's needs masks
        if judges and not all(threshold.isfinite().all() for threshold in (self.image_threshold, *ours)):
            msg = "There is no threshold: train the model, or load a trained checkpoint (--ckpt_path)."
            raise WTFlowError(msg)

    def _condemn(self, result: InferenceBatch, raw: Any) -> InferenceBatch:
        """Label images and pixels with non-finite raw scores anomalous, with the highest score."""
        highest = 1.0 if self.enable_normalization else torch.inf

        def condemn(broken: Tensor, score: Any, label: Tensor | None) -> tuple[Tensor, Tensor | None]:
            return torch.where(broken, highest, score), None if label is None else label.bool() | broken

        score, label = condemn(~finite(raw.pred_score, raw.anomaly_map), result.pred_score, result.pred_label)
        anomaly_map, mask = condemn(~raw.anomaly_map.isfinite(), result.anomaly_map, result.pred_mask)
        return InferenceBatch(pred_score=score, pred_label=label, anomaly_map=anomaly_map, pred_mask=mask)

    def _normalise(self, raw: Tensor, threshold: Tensor) -> Tensor:
        if not self.enable_normalization:
            return raw
        limits = torch.finfo(raw.dtype)
        raw = raw.clamp(max=limits.max / 4)  # so that an infinite score becomes 1, not infinity over infinity
        return raw / (raw + threshold.clamp(min=limits.tiny))

    def _label(self, raw: Tensor, threshold: Tensor, sensitivity: float) -> Tensor | None:
        if not self.enable_thresholding:
            return None
        # A comparison with NaN is false: "not below" calls a broken score anomalous, and any without a threshold.
        return ~(raw <= torch.where(threshold.isfinite(), _limit(threshold, sensitivity), float("nan")))


def _limit(threshold: Tensor, sensitivity: float) -> Tensor:
    """``s`` with ``s / (s + T) = 1 - sensitivity``: exactly T where the sensitivity is 0.5."""
    return threshold * ((1 - sensitivity) / sensitivity) if sensitivity > 0 else threshold + float("inf")


def _make_threshold_room(post_processor: WTFlowPostProcessor, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Resize buffers to the loaded state's number of products and calibration images."""
    rows = state.get(f"{prefix}effective_false_alarm_rate")
    if rows is not None:
        allocate(post_processor, len(rows))
        kept = (state[f"{prefix}{name}"] for name in ("calibration_scores", "calibration_index"))
        post_processor._remember(*(torch.empty_like(values) for values in kept))
