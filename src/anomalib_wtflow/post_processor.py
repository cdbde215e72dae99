"""Post-processor of WT-Flow: a threshold from normal images only, with a stated false-alarm rate."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from anomalib_wtflow.flow.finite import broken, finite
from anomalib_wtflow.flow.rows import allocate, own
from anomalib_wtflow.settings import Settings, check


class ConformalThreshold(NamedTuple):
    """A threshold and the false-alarm rate that it guarantees."""

    threshold: Tensor
    false_alarm_rate: float


class Scored(NamedTuple):
    """Raw predictions, and what the model recognised."""

    pred_score: Tensor | None
    anomaly_map: Tensor | None
    product: Tensor | None = None
    strangeness: Tensor | None = None


def conformal_threshold(scores: Tensor, false_alarm_rate: float) -> ConformalThreshold:
    """Split-conformal threshold: the k-th smallest of n normal scores, ``k = n + 1 - floor(rate (n + 1))``.

    A score may be infinite: anomalous whatever the threshold.

    If the n scores and that of the next normal image are exchangeable, the next one exceeds the threshold with a
    probability of at most ``(n + 1 - k) / (n + 1) <= rate``, whatever the distribution. Where ``rate < 1 / (n + 1)``
    no threshold can promise that: the largest score is taken, which promises ``1 / (n + 1)``. (Vovk et al., 2005; its
    use here is ours.)

    Args:
        scores: Scores of n normal images that the model was not trained on, ``(n,)``.
        false_alarm_rate: Rate in (0, 1).

    Returns:
        The threshold, above which a score is anomalous, and the rate that it guarantees.

    Raises:
        ValueError: If there are no scores, one is NaN, or so many are infinite that the threshold would be.
    """
    n = scores.numel()
    exceed = max(1, math.floor(round(false_alarm_rate * (n + 1), 9)))
    threshold = scores.sort().values[n - exceed] if n and not scores.isnan().any() else scores.new_tensor(torch.inf)
    if threshold.isinf():
        msg = (
            f"{n} scores of normal images, {n - int(scores.isfinite().sum())} of them NaN or infinite, give no "
            f"threshold: check the calibration images."
        )
        raise ValueError(msg)
    return ConformalThreshold(threshold, exceed / (n + 1))


def images_needed(false_alarm_rate: float) -> int:
    """Return ``ceil(1 / rate) - 1``: the fewest normal images whose threshold guarantees a rate (Vovk et al., 2005)."""
    return math.ceil(round(1 / false_alarm_rate, 9)) - 1


def image_name(paths: Sequence[str] | None, place: int) -> str:
    """Name an image of a batch: its file, or where it stands if it has none."""
    return f"image {place} of the batch" if paths is None else f"'{paths[place]}'"


def no_verdict(what: str, count: int) -> str:
    """Say why what is broken of an image, with its verb, lets nobody judge it."""
    return (
        f"{what} NaN or infinite ({count} such images in this batch), which is neither normal nor anomalous: the "
        "weights or the image are broken; load another checkpoint or train again, or replace the image."
    )


class WTFlowPostProcessor(PostProcessor):
    """Normalise scores around a threshold and label them; the threshold comes from normal images only.

    Two thresholds of :func:`conformal_threshold`: that of the image scores, so that at most the stated share of good
    images is called anomalous, and that of the largest pixel of each map, so that at most that share shows any
    anomalous pixel. With s >= 0 the raw score and T its threshold, the normalised score is ``s / (s + T)``: 0.5 at the
    threshold, 0.75 at three times the threshold, below 1 always, so that no two scores are clipped to the same value.
    A score is anomalous if it exceeds ``1 - sensitivity``.

    Each product has thresholds of its own: T is that of the product which the model recognises. An image that is like
    no product (strangeness u > 1) is anomalous, with a score of at least ``u T``.

    Which normal images they come from, :class:`anomalib_wtflow.training.calibration.Calibration` says.

    An image of which the score or a pixel of the map is NaN or infinite is anomalous, with the highest score, as are
    such pixels; in test and prediction it is an error (:meth:`post_process_batch`).

    Args:
        false_alarm_rate: Share of good parts, in (0, 1), that may be called anomalous; None for anomalib's own
            post-processing (adaptive F1 threshold and min-max normalisation on the validation set).
        **kwargs: Arguments of anomalib's ``PostProcessor``.

    Raises:
        ValueError: If a rate is outside (0, 1).
    """

    per_product = ("_image_threshold", "_pixel_threshold", "effective_false_alarm_rate")
    effective_false_alarm_rate: Tensor
    calibration_scores: Tensor
    """The scores that the thresholds come from, and the places of their products."""
    calibration_product: Tensor

    def __init__(self, false_alarm_rate: float | None = Settings.false_alarm_rate, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.given = {name: kwargs[name] for name in super()._checkpoint_config_keys if name in kwargs}
        check("false_alarm_rate", false_alarm_rate)
        self.false_alarm_rate = false_alarm_rate
        for name in self.per_product:
            self.register_buffer(name, torch.full((1,), torch.nan))
        self._remember(torch.empty(0), torch.empty(0, dtype=torch.int64))
        self.register_load_state_dict_pre_hook(_make_room)

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "false_alarm_rate")

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Take a checkpoint's options, but for those that this post-processor was built with: they stay, and say so.

        anomalib's takes all, so that a sensitivity given to ``predict`` would change nothing.
        """
        for name, value in self.given.items():
            if name in config and config[name] != value:
                rank_zero_info(f"{name}={value}, given here, is in force instead of the checkpoint's {config[name]}.")
        super().load_checkpoint_config({**config, **self.given})

    @property
    def image_threshold(self) -> Tensor:
        """Threshold of image scores; NaN if it is not set.

        anomalib's takes that of the pixels then, which is another quantity here.
        """
        return super().image_threshold if self.false_alarm_rate is None else self._image_threshold

    @property
    def pixel_threshold(self) -> Tensor:
        """Threshold of maps; NaN if it is not set."""
        return super().pixel_threshold if self.false_alarm_rate is None else self._pixel_threshold

    # Thresholds ------------------------------------------------------------------------------------------------------

    def calibrate(
        self, scores: Tensor, peaks: Tensor, product: Tensor | None = None, count: int = 1, keep: bool = False
    ) -> None:
        """Set both thresholds of each product.

        Args:
            scores: Image scores of n normal images that the field was not trained on, ``(n,)``; infinite where an image
                is like no product.
            peaks: Largest values of their maps, ``(n,)``.
            product: Places of the products that they were recognised as, ``(n,)``; None for one product.
            count: Number of products.
            keep: Whether a product that has none keeps its thresholds.

        Raises:
            ValueError: If a product has none, one is NaN, or too many are infinite.
        """
        assert self.false_alarm_rate is not None
        allocate(self, count)
        product = torch.zeros(len(scores), dtype=torch.int64) if product is None else product
        places = product.unique().tolist() if keep else range(count)
        for place in places:
            chosen = [values[product == place] for values in (scores, peaks)]
            image, pixel = (conformal_threshold(values, self.false_alarm_rate) for values in chosen)
            self._image_threshold[place] = image.threshold
            self._pixel_threshold[place] = pixel.threshold
            self.effective_false_alarm_rate[place] = image.false_alarm_rate
        old = ~torch.isin(self.calibration_product.cpu(), torch.tensor(list(places)))
        scores, product = scores.to(self.calibration_scores), product.to(self.calibration_product)
        self._remember(
            torch.cat([self.calibration_scores[old], scores]), torch.cat([self.calibration_product[old], product])
        )

    @property
    def calibration_images(self) -> Tensor:
        """Number of images that the thresholds of each product come from; 0 where that is not known."""
        return torch.bincount(self.calibration_product, minlength=len(self.effective_false_alarm_rate))

    @property
    def image_limit(self) -> Tensor:
        """Raw scores above which an image is anomalous, by product: the thresholds, where the sensitivity is 0.5."""
        if self.false_alarm_rate is None:
            return self.image_threshold + (0.5 - self.image_sensitivity) * (self.image_max - self.image_min)
        return _limit(self.image_threshold, self.image_sensitivity)

    @property
    def promised_false_alarm_rate(self) -> Tensor:
        """By product, what share of good images is called anomalous at most; NaN where nothing is promised.

        A sensitivity above 0.5 calls images anomalous below the thresholds, which the rate is of.
        """
        rate = self.effective_false_alarm_rate
        return rate if self.image_sensitivity <= 0.5 else torch.full_like(rate, torch.nan)

    def _remember(self, scores: Tensor, product: Tensor) -> None:
        self.register_buffer("calibration_scores", scores)
        self.register_buffer("calibration_product", product)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Gather what anomalib's threshold needs, if that was asked for."""
        if self.false_alarm_rate is None:
            super().on_validation_batch_end(*args, **kwargs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set anomalib's threshold, if that was asked for."""
        if self.false_alarm_rate is None:
            super().on_validation_epoch_end(trainer, pl_module)

    # Application -----------------------------------------------------------------------------------------------------

    def forward(self, predictions: Any) -> InferenceBatch:
        """Normalise and label raw predictions, in Python and in exported graphs; what is not finite is anomalous.

        Raises:
            ValueError: If there is no threshold yet, or none that is finite (in Python only).
        """
        if predictions.pred_score is None:
            msg = "WTFlowPostProcessor needs pred_score: give it what WTFlowModel returns."
            raise ValueError(msg)
        if not torch.compiler.is_compiling():
            self.raise_for_no_threshold()
        result = super().forward(predictions) if self.false_alarm_rate is None else self._judge(predictions)
        return self._condemn(result, predictions)

    def _judge(self, predictions: Any) -> InferenceBatch:
        score, anomaly_map = predictions.pred_score, predictions.anomaly_map
        product, strangeness = getattr(predictions, "product", None), getattr(predictions, "strangeness", None)
        image, pixel = own(self.image_threshold, product), own(self.pixel_threshold, product)[:, None, None, None]
        if anomaly_map is not None and anomaly_map.ndim == 3:
            pixel = pixel[:, 0]
        label = self._label(score, image, self.image_sensitivity)
        if strangeness is not None:
            strange = strangeness > 1
            least = strangeness * image.clamp(min=torch.finfo(score.dtype).tiny)
            score = torch.where(strange, score.maximum(least), score)
            label = None if label is None else label | strange
        return InferenceBatch(
            pred_score=self._normalise(score, image),
            pred_label=label,
            anomaly_map=self._normalise(anomaly_map, pixel),
            pred_mask=self._label(anomaly_map, pixel, self.pixel_sensitivity),
        )

    def post_process_batch(self, batch: Batch) -> None:
        """Normalise and label a batch in test and predict, as :meth:`forward` does.

        Raises:
            ValueError: If a score or a pixel of a map is NaN or infinite, or there is no threshold yet.
        """
        values = [each for each in (batch.pred_score, batch.anomaly_map) if each is not None]
        places = broken(*values) if values else []
        if places:
            name = image_name(getattr(batch, "image_path", None), places[0])
            raise ValueError(no_verdict(f"The score or map of {name} is", len(places)))
        known = getattr(batch, "recognition", None)
        result = self.forward(Scored(batch.pred_score, batch.anomaly_map, *(known or (None, None))))
        batch.update(**{name: value for name, value in result._asdict().items() if value is not None})

    def raise_for_no_threshold(self) -> None:
        """Refuse to judge without a threshold.

        Raises:
            ValueError: If there is none, or one is infinite, and scores are to be normalised or labelled.
        """
        judges = self.enable_thresholding or self.enable_normalization
        ours = [] if self.false_alarm_rate is None else [self.pixel_threshold]  # anomalib's needs masks
        if judges and not all(threshold.isfinite().all() for threshold in (self.image_threshold, *ours)):
            msg = "There is no threshold: train the model, or load a trained checkpoint (--ckpt_path)."
            raise ValueError(msg)

    def _condemn(self, result: InferenceBatch, raw: Any) -> InferenceBatch:
        """Call anomalous, with the highest score, the images and pixels whose raw scores are not finite."""
        images = ~finite(*(each for each in (raw.pred_score, raw.anomaly_map) if each is not None))
        highest = 1.0 if self.enable_normalization else torch.inf

        def condemn(broken: Tensor, score: Any, label: Tensor | None) -> tuple[Tensor, Tensor | None]:
            return torch.where(broken, highest, score), None if label is None else label.bool() | broken

        score, label = condemn(images, result.pred_score, result.pred_label)
        if raw.anomaly_map is None:
            return InferenceBatch(pred_score=score, pred_label=label)
        anomaly_map, mask = condemn(~raw.anomaly_map.isfinite(), result.anomaly_map, result.pred_mask)
        return InferenceBatch(pred_score=score, pred_label=label, anomaly_map=anomaly_map, pred_mask=mask)

    def _normalise(self, raw: Tensor | None, threshold: Tensor) -> Tensor | None:
        if raw is None or not self.enable_normalization:
            return raw
        limits = torch.finfo(raw.dtype)
        raw = raw.clamp(max=limits.max / 4)  # so that an infinite score becomes 1, not infinity over infinity
        return raw / (raw + threshold.clamp(min=limits.tiny))

    def _label(self, raw: Tensor | None, threshold: Tensor, sensitivity: float) -> Tensor | None:
        if raw is None or not self.enable_thresholding:
            return None
        # A comparison with NaN is false: "not below" calls a broken score anomalous, and any without a threshold.
        return ~(raw <= torch.where(threshold.isfinite(), _limit(threshold, sensitivity), float("nan")))


def _limit(threshold: Tensor, sensitivity: float) -> Tensor:
    """Where ``s / (s + T) = 1 - sensitivity``, raw: exact at the threshold, and the same without normalisation."""
    return threshold * ((1 - sensitivity) / sensitivity) if sensitivity > 0 else threshold + float("inf")


def _make_room(post_processor: WTFlowPostProcessor, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a post-processor take the thresholds of one with another number of products, and of images they come from."""
    rows = state.get(f"{prefix}effective_false_alarm_rate")
    if rows is not None and rows.ndim:
        allocate(post_processor, len(rows))
    names = ("calibration_scores", "calibration_product")
    kept = [state.setdefault(f"{prefix}{name}", getattr(post_processor, name)[:0]) for name in names]
    post_processor._remember(*(torch.empty_like(values) for values in kept))
