"""Post-processor of WT-Flow: a threshold from normal images only, with a stated false-alarm rate."""

import math
from typing import Any, NamedTuple

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.data.utils import LabelName
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from anomalib_wtflow.features.cache import FeatureStore

NO_NORMALS = (
    "There are no normal images for the threshold: give at least 2 normal training images, or a validation set with "
    "normal "
    "images, or ask for anomalib's F1 threshold with false_alarm_rate=None (null in a config)."
)


class ConformalThreshold(NamedTuple):
    """A threshold and the false-alarm rate that it guarantees."""

    threshold: Tensor
    false_alarm_rate: float


def conformal_threshold(scores: Tensor, false_alarm_rate: float) -> ConformalThreshold:
    """Split-conformal threshold: the k-th smallest of n normal scores, ``k = n + 1 - floor(rate (n + 1))``.

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
        ValueError: If there are no scores, or one is NaN or infinite.
    """
    n = scores.numel()
    finite = int(scores.isfinite().sum())
    if n == 0 or finite < n:
        msg = (
            f"{n} scores of normal images, {n - finite} of them NaN or infinite, give no threshold: check the "
            f"calibration images."
        )
        raise ValueError(msg)
    exceed = max(1, math.floor(round(false_alarm_rate * (n + 1), 9)))
    return ConformalThreshold(scores.sort().values[n - exceed], exceed / (n + 1))


class WTFlowPostProcessor(PostProcessor):
    """Normalise scores around a threshold and label them; the threshold comes from normal images only.

    Two thresholds of :func:`conformal_threshold`: that of the image scores, so that at most the stated share of good
    images is called anomalous, and that of the largest pixel of each map, so that at most that share shows any
    anomalous pixel. With s >= 0 the raw score and T its threshold, the normalised score is ``s / (s + T)``: 0.5 at the
    threshold, 0.75 at three times the threshold, below 1 always, so that no two scores are clipped to the same value.
    A score is anomalous if it exceeds ``1 - sensitivity``.

    The normal images are those of the validation set, if none of them is also in the test set; else a seeded slice of
    the training set, which the field is then not trained on.

    A NaN score is an error in Python, and anomalous in an exported graph.

    Args:
        false_alarm_rate: Share of good parts, in (0, 1), that may be called anomalous; None for anomalib's own
            post-processing (adaptive F1 threshold and min-max normalisation on the validation set).
        calibration_ratio: Share of the training images, in (0, 1), in the slice.
        calibration_seed: Seed of the slice.
        **kwargs: Arguments of anomalib's ``PostProcessor``.

    Raises:
        ValueError: If a rate is outside (0, 1).
    """

    effective_false_alarm_rate: Tensor

    def __init__(
        self,
        false_alarm_rate: float | None = 0.05,
        calibration_ratio: float = 0.2,
        calibration_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, rate in (("false_alarm_rate", false_alarm_rate), ("calibration_ratio", calibration_ratio)):
            if rate is not None and not 0 < rate < 1:
                msg = f"{name} is {rate}: choose a share between 0 and 1, such as 0.05."
                raise ValueError(msg)
        self.false_alarm_rate = false_alarm_rate
        self.calibration_ratio = calibration_ratio
        self.calibration_seed = calibration_seed
        self.register_buffer("effective_false_alarm_rate", torch.tensor(float("nan")))
        self._calibration_data: Any = None
        self._calibration_features: FeatureStore | None = None
        self._full_train_data: Any = None
        self._calibrated_at = -1

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "false_alarm_rate", "calibration_ratio", "calibration_seed")

    # Calibration -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the normal images for the threshold before the training data is loaded.

        Raises:
            ValueError: If there are none; or, for anomalib's F1 threshold, no defective validation images.
        """
        del pl_module
        self._calibrated_at = -1
        datamodule = getattr(trainer, "datamodule", None)
        if stage == "fit" and self.false_alarm_rate is None:
            samples = getattr(getattr(datamodule, "val_data", None), "samples", None)
            if samples is not None and not (samples["label_index"] == LabelName.ABNORMAL).any():
                msg = (
                    "false_alarm_rate=None asks for anomalib's F1 threshold, which needs defective validation images, "
                    "and there are none: give some, or a rate such as 0.05, which needs good ones only."
                )
                raise ValueError(msg)
        if stage == "fit" and self.false_alarm_rate is not None and datamodule is not None:
            others = [getattr(datamodule, name, None) for name in ("train_data", "test_data")]
            normals = self._normals(getattr(datamodule, "val_data", None), others)
            self._calibration_data = self._hold_out(datamodule) if normals is None else normals

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Without a data module, take the normal images of the validation loader that the user gave.

        Raises:
            ValueError: If there are none.
        """
        del pl_module
        if self.false_alarm_rate is None or getattr(trainer, "datamodule", None) is not None:
            return
        loaders = trainer.val_dataloaders
        loader = loaders[0] if isinstance(loaders, list) and loaders else loaders
        others = [getattr(trainer.train_dataloader, "dataset", None)]
        self._calibration_data = self._normals(getattr(loader, "dataset", None), others)
        if self._calibration_data is None:
            raise ValueError(NO_NORMALS)

    @staticmethod
    def _normals(data: Any, others: list[Any]) -> Any:
        """Return the normal images of an anomalib data set; None if there are none or one of them is in another set."""
        samples = getattr(data, "samples", None)
        if samples is None:
            return None
        normal = (samples["label_index"] == LabelName.NORMAL).to_numpy().nonzero()[0].tolist()
        paths = {samples["image_path"][index] for index in normal}
        shared = any(paths & set(other.samples["image_path"]) for other in others if hasattr(other, "samples"))
        return None if shared or not normal else data.subsample(normal)

    def _hold_out(self, datamodule: Any) -> Any:
        """Take a seeded slice out of the data module's training set, and return it."""
        train_data = getattr(datamodule, "train_data", None)
        count = max(1, round(self.calibration_ratio * len(train_data or ())))
        if train_data is None or not hasattr(train_data, "subsample") or count >= len(train_data):
            raise ValueError(NO_NORMALS)
        order = torch.randperm(len(train_data), generator=torch.Generator().manual_seed(self.calibration_seed)).tolist()
        held_out, kept = sorted(order[:count]), sorted(order[count:])
        calibration_data = train_data.subsample(held_out)
        calibration_data.augmentations = getattr(
            getattr(datamodule, "test_data", None), "augmentations", train_data.augmentations
        )
        self._full_train_data = train_data
        datamodule.train_data = train_data.subsample(kept)
        return calibration_data

    def _give_back(self, trainer: Trainer) -> None:
        if self._full_train_data is not None and getattr(trainer, "datamodule", None) is not None:
            trainer.datamodule.train_data = self._full_train_data  # type: ignore[attr-defined]
        self._full_train_data = None
        self._calibration_data = self._calibration_features = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the slice back to the data module, which other models may use after this one."""
        del pl_module
        if stage == "fit":
            self._give_back(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the slice back."""
        del pl_module, exception
        self._give_back(trainer)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Gather what anomalib's threshold needs, if that was asked for."""
        if self.false_alarm_rate is None:
            super().on_validation_batch_end(*args, **kwargs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the threshold, before the checkpoint is written; a later validation run leaves it alone."""
        if self.false_alarm_rate is None:
            super().on_validation_epoch_end(trainer, pl_module)
        elif trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._calibrate(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the threshold where no validation has, before a checkpoint of the epoch is written."""
        self._calibrate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the threshold for the final weights, if the last validation was before the last step, and report it."""
        self._calibrate(trainer, pl_module)
        if self._calibration_data is not None:
            self._report()

    def _calibrate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._calibration_data is None or self.false_alarm_rate is None:
            return
        if self._calibrated_at == trainer.global_step:
            return
        scores, peaks = self._score_calibration_images(trainer, pl_module)
        image, pixel = (conformal_threshold(values, self.false_alarm_rate) for values in (scores, peaks))
        self._image_threshold.copy_(image.threshold)
        self._pixel_threshold.copy_(pixel.threshold)
        self.effective_false_alarm_rate.fill_(image.false_alarm_rate)
        self._calibrated_at = trainer.global_step

    @torch.no_grad()
    def _score_calibration_images(self, trainer: Trainer, pl_module: Any) -> tuple[Tensor, Tensor]:
        """Return the image scores and the largest pixels of the maps."""
        if self._calibration_features is None:
            loader = DataLoader(
                self._calibration_data,
                batch_size=getattr(getattr(trainer, "datamodule", None), "eval_batch_size", 32),
                collate_fn=self._calibration_data.collate_fn,
            )
            store = FeatureStore(len(self._calibration_data), pl_module.feature_cache * 2**30)
            for index, batch in enumerate(loader):
                store.append(pl_module.extract_features(batch, index))
                self._calibration_size = tuple(batch.image.shape[-2:])
            self._calibration_features = store
        pl_module.observe()
        scores, peaks = [], []
        for features in self._calibration_features.features.split(32):
            outputs = pl_module.score_features(features, self._calibration_size)
            scores.append(outputs.pred_score.float().cpu())
            peaks.append(outputs.anomaly_map.flatten(1).amax(dim=1).float().cpu())
        return torch.cat(scores), torch.cat(peaks)

    def _report(self) -> None:
        """Tell the user what the threshold promises, and warn if that is less than was asked for."""
        n, asked, given = len(self._calibration_data), self.false_alarm_rate, float(self.effective_false_alarm_rate)
        if asked is None:
            return
        rank_zero_info(
            f"Threshold {float(self._image_threshold):.4g} from {n} normal images that were not trained on: "
            f"a good image is called anomalous with a probability of at most {given:.2%}."
        )
        if given > asked * (1 + 1e-6):  # the buffer is float32
            rank_zero_warn(
                f"false_alarm_rate={asked} needs at least {math.ceil(round(1 / asked, 9)) - 1} normal images for the "
                f"threshold and there are {n}: the threshold guarantees {given:.4f} instead; give more good images to "
                "have the rate that you asked for."
            )

    # Application -----------------------------------------------------------------------------------------------------

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """Normalise and label raw predictions, in Python and in exported graphs.

        Raises:
            ValueError: If a score is NaN, or there is no threshold yet (in Python only).
        """
        score, anomaly_map = predictions.pred_score, predictions.anomaly_map
        if score is None:
            msg = "WTFlowPostProcessor needs pred_score: give it what WTFlowModel returns."
            raise ValueError(msg)
        self._check(score)
        if self.false_alarm_rate is None:
            result = super().forward(predictions)
            return result._replace(
                pred_label=self._or_nan(result.pred_label, score), pred_mask=self._or_nan(result.pred_mask, anomaly_map)
            )
        return InferenceBatch(
            pred_score=self._normalise(score, self.image_threshold),
            pred_label=self._label(score, self.image_threshold, self.image_sensitivity),
            anomaly_map=self._normalise(anomaly_map, self.pixel_threshold),
            pred_mask=self._label(anomaly_map, self.pixel_threshold, self.pixel_sensitivity),
        )

    def post_process_batch(self, batch: Batch) -> None:
        """Normalise and label a batch in test and predict, as :meth:`forward` does.

        Raises:
            ValueError: If a score is NaN, or there is no threshold yet.
        """
        broken = [] if batch.pred_score is None else batch.pred_score.isnan().nonzero().flatten().tolist()
        paths = getattr(batch, "image_path", None)
        if broken and paths is not None:
            msg = (
                f"The score of '{paths[broken[0]]}' is NaN ({len(broken)} such images in this batch), which is neither "
                "normal nor anomalous: the weights or the image are broken; load another checkpoint or train again."
            )
            raise ValueError(msg)
        result = self.forward(InferenceBatch(pred_score=batch.pred_score, anomaly_map=batch.anomaly_map))
        batch.update(**{name: value for name, value in result._asdict().items() if value is not None})

    def _check(self, score: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        if score.isnan().any():
            msg = (
                f"{int(score.isnan().sum())} of {score.numel()} scores are NaN, which is neither normal nor anomalous: "
                "the weights or the images are broken; load another checkpoint or train again."
            )
            raise ValueError(msg)
        if (self.enable_thresholding or self.enable_normalization) and self.image_threshold.isnan():
            msg = "There is no threshold: train the model, or load a trained checkpoint (--ckpt_path)."
            raise ValueError(msg)

    @staticmethod
    def _or_nan(label: Tensor | None, raw: Tensor | None) -> Tensor | None:
        return label if label is None or raw is None else label.bool() | raw.isnan()

    def _normalise(self, raw: Tensor | None, threshold: Tensor) -> Tensor | None:
        if raw is None or not self.enable_normalization:
            return raw
        limits = torch.finfo(raw.dtype)
        raw = raw.clamp(max=limits.max / 4)  # so that an infinite score becomes 1, not infinity over infinity
        return raw / (raw + threshold.clamp(min=limits.tiny))

    def _label(self, raw: Tensor | None, threshold: Tensor, sensitivity: float) -> Tensor | None:
        if raw is None or not self.enable_thresholding:
            return None
        # s / (s + T) > 1 - sensitivity, on the raw scale: exact at the threshold, and the same without normalisation.
        limit = threshold * ((1 - sensitivity) / sensitivity) if sensitivity > 0 else threshold + float("inf")
        # A comparison with NaN is false: "not below" calls a broken score anomalous, and any without a threshold.
        return ~(raw <= torch.where(threshold.isfinite(), limit, float("nan")))
