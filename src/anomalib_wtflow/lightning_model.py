"""WT-Flow as an anomalib model."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, AnomalibDataset, Batch, InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from rich.progress import track
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_wtflow._registration import register_model
from anomalib_wtflow.anomaly_map import DensityName, ImageScoreName, MapName
from anomalib_wtflow.cli.errors import one_sentence
from anomalib_wtflow.deploy.quantization import count_convolutions, keep_precise, quantize
from anomalib_wtflow.features.backbone import DEFAULT_BACKBONE, MergeName, get_data_config
from anomalib_wtflow.features.cache import FeatureBatch, FeatureLoader, FeatureStore, is_deterministic
from anomalib_wtflow.flow.coupling import BATCH_COUPLINGS, CouplingName
from anomalib_wtflow.flow.field import FieldName, FieldsName
from anomalib_wtflow.flow.normalization import NormalizationName
from anomalib_wtflow.flow.path import PathName
from anomalib_wtflow.flow.registry import lookup
from anomalib_wtflow.flow.schedule import OPTIMIZERS, SCHEDULERS, OptimizerName, SchedulerName
from anomalib_wtflow.flow.solver import SolverName, not_exportable
from anomalib_wtflow.flow.times import TimeSamplingName
from anomalib_wtflow.loss import WTFlowLoss
from anomalib_wtflow.post_processor import WTFlowPostProcessor
from anomalib_wtflow.torch_model import WTFlowModel
from anomalib_wtflow.training.epoch_default import EpochDefault
from anomalib_wtflow.training.image_check import ImageCheck

TRAINING_ONLY = ("coupling", "thinning", "time_sampling")
"""Settings of the torch model that do not change what a trained one computes."""
CALIBRATION_IMAGES = 128
"""Training images that set the ranges of a quantised export."""
LIMIT_IMAGES = 64
"""Training images among which the contrast's limit is the largest mean."""


@register_model
class WTFlow(EpochDefault, AnomalibModule):
    """Time-reversed flow matching with worst transport (arXiv 2508.05461v3) on a frozen backbone.

    The first 27 arguments are those of :class:`anomalib_wtflow.torch_model.WTFlowModel`. Anything given to the trainer
    (``max_epochs``, ``max_steps``, ``max_time``) wins over ``max_epochs`` here.

    Args:
        backbone: Name of a timm CNN; the default brings its weights along and needs no network.
        layers: Feature layers, finest first; None for those at strides 4, 8 and 16, or the last if there are none.
        pre_trained: Whether the backbone gets trained weights.
        weights: Local ``.safetensors`` or ``.pth`` file with the backbone's weights.
        pool_size: Side of the window that the features are averaged over, odd; 1 for none.
        pool_stride: Stride of that window.
        merge: ``finest`` or ``coarsest``: whose size the layers are brought to.
        normalization: ``layer_norm``, ``channel`` or ``whitening``.
        network: Vector field, ``pointwise`` or ``unet``.
        fields: ``per_layer`` for a network of its own for each layer, or ``joint`` for one that sees all of them.
        width: Width of each network; None for its own default (256, or 48 for the U-Net).
        depth: Depth of each network; None for its own default (1, or 2 for the U-Net).
        path: ``linear``, ``gaussian`` or ``variance_preserving``.
        s_min: Noise level of the path at t = 0.
        coupling: ``independent``, ``optimal``, ``optimal_image``, ``worst``, ``worst_image``, ``worst_local``,
            ``worst_of_two`` or ``antipodal``.
        thinning: Stride of the positions that a training step takes of each map; 1 for all. Networks that see a
            neighbourhood always take all.
        time_sampling: Times of training: ``uniform``, or ``logit_normal`` around ``start_time``.
        solver: ``euler``, ``midpoint`` or ``rk4``; or, for analysis, without export, ``dopri5``, ``dopri8``, ``bosh3``,
            ``fehlberg2`` or ``adaptive_heun``.
        steps: Steps of the first three at inference.
        start_time: Time in [0, 1) at which inference enters the flow.
        density: Density of where the flow ends, ``gaussian`` (the paper's) or ``student``.
        anomaly_map: ``absolute`` or ``relative``.
        top_fraction: Share of the values that makes the image score, in (0, 1].
        sigma: Standard deviation of the Gaussian that smooths the map, in pixels of the input; 0 for none.
        image_score: Whether the image score comes from the ``map`` (the authors') or from the ``features``' positions.
        contrast: Share of the image's mean that the image score leaves out, in [0, 1).
        score_window: Odd side of the window of positions over which the ``features``' score is averaged; 1 for none.
        image_size: Side, or height and width, that images are resized to; None for the backbone's own.
        false_alarm_rate: Share of good parts, in (0, 1), that may be called anomalous. The threshold is the
            split-conformal quantile of normal images that the field was not trained on; None for anomalib's adaptive
            F1 threshold.
        calibration_ratio: Share of the training images, in (0, 1), that is held out for the threshold where the
            validation set cannot serve.
        feature_cache: GiB of memory for the features of the training images, and as much each for those of the
            validation images and of the ones held out for the threshold, which otherwise pass the backbone in every
            epoch; beyond it they go to a memory-mapped temporary file; 0 for none. There is none either where images
            are augmented at random, pre-processed by transforms that are not known to be deterministic, or trained on
            by several processes.
        max_epochs: Epochs, unless the trainer is told otherwise.
        optimizer: ``adamw``, ``adam`` or ``sgd``.
        learning_rate: Peak learning rate.
        weight_decay: Weight decay.
        scheduler: ``cosine``, ``step`` or ``constant``, over the whole training.
        pre_processor: As in anomalib; True for a resize to ``image_size`` and the backbone's own mean and deviation.
        post_processor: As in anomalib; True for :class:`anomalib_wtflow.post_processor.WTFlowPostProcessor`.
        evaluator: As in anomalib.
        visualizer: As in anomalib.

    Raises:
        ValueError: If a name is unknown or a number is out of range; the message lists what is valid.
        RuntimeError: If the backbone's weights cannot be fetched.
    """

    model: WTFlowModel
    loss: WTFlowLoss
    trained_steps: int = 0
    """Training steps and epochs of the checkpoint that was loaded, if one was."""
    trained_epochs: int = 0
    _store: FeatureStore | None = None
    _image_loader: Any = None
    _validation: tuple[Any, FeatureStore, dict[int, slice]] | None = None
    """The validation loader, the features of its images, and where those of each batch are."""

    def __init__(
        self,
        backbone: str = DEFAULT_BACKBONE,
        layers: Sequence[str] | None = None,
        pre_trained: bool = True,
        weights: str | Path | None = None,
        pool_size: int = 3,
        pool_stride: int = 1,
        merge: MergeName = "coarsest",
        normalization: NormalizationName = "channel",
        network: FieldName = "pointwise",
        fields: FieldsName = "per_layer",
        width: int | None = None,
        depth: int | None = None,
        path: PathName = "variance_preserving",
        s_min: float = 0.01,
        coupling: CouplingName = "worst",
        thinning: int = 2,
        time_sampling: TimeSamplingName = "uniform",
        solver: SolverName = "euler",
        steps: int = 1,
        start_time: float = 0.35,
        density: DensityName = "student",
        anomaly_map: MapName = "absolute",
        top_fraction: float = 0.03,
        sigma: float = 4.0,
        image_score: ImageScoreName = "features",
        contrast: float = 0.75,
        score_window: int = 3,
        image_size: int | tuple[int, int] | None = None,
        false_alarm_rate: float | None = 0.05,
        calibration_ratio: float = 0.2,
        feature_cache: float = 4.0,
        max_epochs: int = 80,
        optimizer: OptimizerName = "adamw",
        learning_rate: float = 3e-3,
        weight_decay: float = 1e-2,
        scheduler: SchedulerName = "cosine",
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        with one_sentence():
            if max_epochs < 1:
                msg = f"max_epochs is {max_epochs}: train for at least 1 epoch."
                raise ValueError(msg)
            if learning_rate <= 0 or weight_decay < 0:
                msg = (
                    f"learning_rate is {learning_rate} and weight_decay {weight_decay}: choose a positive rate "
                    "and a decay of at least 0."
                )
                raise ValueError(msg)
            if feature_cache < 0:
                msg = f"feature_cache is {feature_cache}: give GiB of memory, or 0 for no cache."
                raise ValueError(msg)
            self._optimizer_class = lookup(OPTIMIZERS, "optimizer", optimizer)
            self._schedule = lookup(SCHEDULERS, "scheduler", scheduler)
            super().__init__(
                pre_processor=(
                    self.configure_pre_processor(image_size, backbone) if pre_processor is True else pre_processor
                ),
                post_processor=(
                    WTFlowPostProcessor(false_alarm_rate=false_alarm_rate, calibration_ratio=calibration_ratio)
                    if post_processor is True
                    else post_processor
                ),
                evaluator=evaluator,
                visualizer=visualizer,
            )
            self.max_epochs = max_epochs
            self.feature_cache = feature_cache
            self.learning_rate = learning_rate
            self.weight_decay = weight_decay
            self.coupling = coupling
            self.model = WTFlowModel(
                backbone=backbone,
                layers=layers,
                pre_trained=pre_trained,
                weights=weights,
                pool_size=pool_size,
                pool_stride=pool_stride,
                merge=merge,
                normalization=normalization,
                network=network,
                fields=fields,
                width=width,
                depth=depth,
                path=path,
                s_min=s_min,
                coupling=coupling,
                thinning=thinning,
                time_sampling=time_sampling,
                solver=solver,
                steps=steps,
                start_time=start_time,
                density=density,
                anomaly_map=anomaly_map,
                top_fraction=top_fraction,
                sigma=sigma,
                image_score=image_score,
                contrast=contrast,
                score_window=score_window,
            )
            self.loss = WTFlowLoss()

    @classmethod
    def configure_pre_processor(
        cls,
        image_size: int | tuple[int, int] | None = None,
        backbone: str = DEFAULT_BACKBONE,
    ) -> PreProcessor:
        """Build the pre-processor: resize, then ``(x - mean) / std`` with the backbone's own mean and deviation.

        The resize is not antialiased: exported graphs cannot antialias, and where training could, the scores of good
        images larger than ``image_size`` would rise in production (by a fifth, on bottles of twice the size), and the
        false-alarm rate with them.

        Args:
            image_size: Side, or height and width, in pixels; None for the backbone's own.
            backbone: Name of the timm model that the statistics belong to.

        Raises:
            ValueError: If the backbone is unknown or the size is not positive.
        """
        config = get_data_config(backbone)
        size = config.image_size if image_size is None else image_size
        height, width = (size, size) if isinstance(size, int) else size
        if min(height, width) < 1:
            msg = f"image_size is {image_size}: give a side, or a height and a width, in pixels."
            raise ValueError(msg)
        return PreProcessor(
            transform=Compose([Resize((height, width), antialias=False), Normalize(mean=config.mean, std=config.std)]),
        )

    def configure_post_processor(self) -> PostProcessor:
        """Build the post-processor with its defaults."""
        return WTFlowPostProcessor()

    def configure_callbacks(self) -> Sequence[Callback]:
        """Add the check of the image files to anomalib's components; it comes last, since it raises."""
        callbacks = super().configure_callbacks()
        return [*(callbacks if isinstance(callbacks, Sequence) else [callbacks]), ImageCheck()]

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """No validation before training: there is nothing to validate until the normalisation is fitted."""
        return {"num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> LearningType:
        """One-class: trained on normal images only."""
        return LearningType.ONE_CLASS

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint. The backbone's weights come from it, so neither a hub nor the weights file is needed."""
        return super().load_from_checkpoint(*args, **{"pre_trained": False, "weights": None, **kwargs})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model: settings that fit can still change the scores under its threshold.

        Raises:
            ValueError: If the checkpoint was trained with other settings of the torch model.
        """
        theirs, ours = checkpoint.get("hyper_parameters", {}), self.hparams
        names = set(signature(WTFlowModel).parameters) - {"pre_trained", "weights", "layers", *TRAINING_ONLY}
        names |= {"image_size"}
        unknown = sorted(names - set(theirs))
        if unknown:
            msg = f"The checkpoint has no {unknown[0]}, so an earlier version wrote it: train the model again."
            raise ValueError(msg)
        differing = sorted(name for name in names & set(theirs) if theirs[name] != ours[name])
        if list(theirs.get("layers") or []) != list(ours["layers"] or []):
            differing.append("layers")
        resuming = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if resuming and isinstance(self.post_processor, WTFlowPostProcessor):
            # The slice that the field is not trained on was chosen before this checkpoint was read.
            saved, chosen = (
                checkpoint.get("anomalib_post_processor_config", {}),
                self.post_processor.checkpoint_config(),
            )
            for name in ("false_alarm_rate", "calibration_ratio", "calibration_seed"):
                if name in saved and saved[name] != chosen[name]:
                    theirs, ours = {**theirs, name: saved[name]}, {**ours, name: chosen[name]}
                    differing.append(name)
        if differing:
            settings = ", ".join(f"{name}={theirs[name]!r} (here {ours[name]!r})" for name in differing)
            msg = f"The checkpoint was trained with {settings}: give the model the same, as --model.{differing[0]}."
            raise ValueError(msg)
        asked, trained = ours.get("false_alarm_rate"), theirs.get("false_alarm_rate")
        if not resuming and asked != trained:
            rank_zero_warn(
                f"The checkpoint's threshold is for false_alarm_rate={trained}; {asked}, given here, changes nothing: "
                "train again for another rate."
            )
        trained_with_ours = "post_processor.effective_false_alarm_rate" in checkpoint.get("state_dict", {})
        if isinstance(self.post_processor, WTFlowPostProcessor) and not trained_with_ours:
            self.post_processor = PostProcessor()
        self.trained_steps, self.trained_epochs = checkpoint.get("global_step", 0), checkpoint.get("epoch", 0) + 1
        super().on_load_checkpoint(checkpoint)

    def to_torch(self, *args: Any, **kwargs: Any) -> Path:
        """Export as anomalib does.

        Raises:
            ValueError: If the solver is adaptive, and so does not export.
        """
        self._check_exportable()
        return super().to_torch(*args, **kwargs)

    def to_onnx(self, *args: Any, **kwargs: Any) -> Path:  # type: ignore[override]
        """Export as anomalib does, to ONNX and, on the way, to OpenVINO.

        Raises:
            ValueError: If the solver is adaptive, and so does not export.
        """
        self._check_exportable()
        return super().to_onnx(*args, **kwargs)

    def to_openvino(self, *args: Any, **kwargs: Any) -> Path:
        """Export as anomalib does; whatever precision the runtime chooses, the backbone's stem stays in f32.

        Raises:
            ValueError: If the solver is adaptive, and so does not export.
        """
        path = super().to_openvino(*args, **kwargs)
        keep_precise(path, count_convolutions(self.model.feature_extractor.network))
        return path

    def _post_training_quantization_ov(self, model: Any, datamodule: AnomalibDataModule | None = None) -> Any:  # type: ignore[override]
        """Quantise as anomalib does for INT8_PTQ, but the backbone behind its stem only, and with the training images.

        anomalib takes the validation images, which are often the test set.
        """
        if datamodule is None:
            msg = "INT8_PTQ sets its ranges with training images: give the export a data module (--data)."
            raise ValueError(msg)
        datamodule.setup("fit")
        images: list[Any] = []
        for batch in datamodule.train_dataloader():
            images.extend(batch.image.numpy()[:, None])
            if len(images) >= CALIBRATION_IMAGES:
                break
        convolutions = count_convolutions(self.model.feature_extractor.network)
        return quantize(model, images[:CALIBRATION_IMAGES], convolutions)

    def _check_exportable(self) -> None:
        if not self.model.solver.exportable:
            raise ValueError(not_exportable(self.model.solver.name))

    def on_fit_start(self) -> None:
        """Forget what an interrupted training has left, and keep Lightning from warning of the frozen backbone."""
        self._validation = None
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")

    def on_train_start(self) -> None:
        """Check the batch size, and fit the normalisation in one pass over the training images.

        Raises:
            ValueError: If the coupling needs several images a batch, or the training set is empty.
        """
        loader: Any = self.trainer.train_dataloader
        images_a_batch = min(getattr(loader, "batch_size", None) or 2, len(loader.dataset))
        if self.coupling in BATCH_COUPLINGS and images_a_batch == 1:
            msg = (
                f"coupling '{self.coupling}' rearranges noise between the images of a batch, and the batch size is "
                f"1: raise "
                "--data.train_batch_size, or choose worst_of_two, worst_image, antipodal or independent."
            )
            raise ValueError(msg)
        self._extract_training_features(loader)

    def _extract_training_features(self, loader: Any) -> None:
        """Run the training images through the backbone: for the normalisation, the cache, and the contrast's limit."""
        normalization: Any = self.model.normalization
        resumed = self.trainer.ckpt_path is not None and normalization.fitted
        to_fit = normalization.needs_fit and not resumed
        count = len(loader.dataset)
        store = FeatureStore(count, self.feature_cache * 2**30) if self._can_cache(loader) else None
        reference = FeatureStore(min(count, LIMIT_IMAGES), float("inf"))
        if to_fit:
            normalization.reset()
        batches = track(
            loader,
            description="Extracting the training images' features",
            transient=True,
            disable=self.trainer.progress_bar_callback is None or not self.trainer.is_global_zero,
        )
        for index, batch in enumerate(batches):
            features = self.extract_features(batch, index)
            if to_fit:
                normalization.update(features)
            if store is not None:
                store.append(features)
            reference.append(features[: reference.count - reference.filled])
            if not to_fit and store is None and reference.filled == reference.count:
                break
        self._reference, self._observed_at = reference.features, -1
        self._image_size = tuple(batch.image.shape[-2:])
        if to_fit and self.trainer.world_size == 1:
            normalization.finalize()
        elif to_fit:
            reduce = self.trainer.strategy.reduce
            normalization.finalize(lambda total: reduce(total.to(self.device), reduce_op="sum"))
        if store is not None:
            store.apply(lambda part: normalization(part.to(self.device)))
            self._store, self._image_loader = store, loader
            shuffle = isinstance(loader.sampler, RandomSampler)
            self._feed(FeatureLoader(store.features, loader.batch_size, shuffle, loader.drop_last))

    def _features_of(self, batch: Batch, index: int) -> Tensor:
        """Return a validation batch's features, from the cache if this training has seen the batch before."""
        images: Any = batch.image
        loader: Any = self.trainer.val_dataloaders
        if not self._can_cache(loader) or not isinstance(loader.sampler, SequentialSampler):
            return self.model.extract(images)
        if self._validation is None or self._validation[0] is not loader:
            self._validation = loader, FeatureStore(len(loader.dataset), self.feature_cache * 2**30), {}
        _, store, places = self._validation
        if index not in places:
            place = slice(store.filled, store.filled + len(images))
            store.append(self.model.extract(images))
            places[index] = place
        return store.features[places[index]].to(self.device)

    def _can_cache(self, loader: Any) -> bool:
        """Whether each epoch would show the backbone the same images, all of them to this process."""
        if not isinstance(loader, DataLoader):
            return False
        data = loader.dataset
        transform = getattr(self.pre_processor, "transform", None)
        return (
            self.feature_cache > 0
            and self.trainer.world_size == 1
            and isinstance(loader.sampler, RandomSampler | SequentialSampler)
            and loader.batch_size is not None
            and isinstance(data, AnomalibDataset)
            and is_deterministic(data.augmentations)
            and (self.pre_processor is None or isinstance(self.pre_processor, PreProcessor))
            and is_deterministic(transform)
        )

    def _feed(self, loader: Any) -> None:
        """Make the training go on with another loader of as many batches."""
        loop = self.trainer.fit_loop
        combined: Any = loop._combined_loader  # Lightning has no public way, and asks for a loader once
        fetcher: Any = loop._data_fetcher
        combined.flattened = [loader]
        fetcher.setup(combined)
        iter(fetcher)

    def on_train_epoch_end(self) -> None:
        """Set the limit of the contrast before a checkpoint of the epoch is written."""
        self.observe()

    def on_train_end(self) -> None:
        """Set the limit of the contrast for the final weights, and let go of the features."""
        self.observe()
        if self._store is not None:
            loop: Any = self.trainer.fit_loop
            loop._combined_loader.flattened = [self._image_loader]
        self._store = self._image_loader = self._validation = None

    def on_validation_start(self) -> None:
        """Set the limit of the contrast for the present weights."""
        self.observe()

    def observe(self) -> None:
        """Set the limit of the contrast for the present weights, while training; once a step."""
        if self.trainer.state.fn != TrainerFn.FITTING or self._observed_at == self.global_step:
            return
        with self._evaluating():
            self.model.observe(self._reference.to(self.device), self._image_size)
        limit = self.model.anomaly_map_generator.limit
        if self.trainer.world_size > 1:
            limit.copy_(self.trainer.strategy.reduce(limit, reduce_op="max"))
        self._observed_at = self.global_step

    @torch.no_grad()
    def extract_features(self, batch: Batch, index: int = 0) -> Tensor:
        """Move a batch of images to the device, pre-process it, and return its backbone features ``(N, C, H, W)``."""
        batch = self.trainer.strategy.batch_to_device(self.trainer.precision_plugin.convert_input(batch))
        if isinstance(self.pre_processor, PreProcessor):
            self.pre_processor.on_validation_batch_start(self.trainer, self, batch, index)
        with self.trainer.precision_plugin.val_step_context():
            return self.model.extract(batch.image)  # type: ignore[arg-type]

    @torch.no_grad()
    def score_features(self, features: Tensor, image_size: tuple[int, int]) -> InferenceBatch:
        """Score backbone features ``(N, C, H, W)`` of images of ``image_size`` pixels as the model does by now."""
        with self._evaluating():
            return self._finite(self.model.predict(features.to(self.device), image_size))

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluate in training, with its precision; only the field knows the two modes."""
        field = self.model.field
        training = field.training
        field.eval()
        try:
            with self.trainer.precision_plugin.val_step_context():
                yield
        finally:
            field.train(training)

    def training_step(self, batch: Batch | FeatureBatch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Regress the field on one batch.

        Raises:
            RuntimeError: If the loss is NaN or infinite.
        """
        del args, kwargs
        if isinstance(batch, FeatureBatch):
            size, pair = len(batch.features), self.model.regress(batch.features)
        else:
            images: Any = batch.image
            size, pair = len(images), self.model(images)
        loss = self.loss(*pair)
        value = loss.item()
        if not math.isfinite(value):
            self._stop(f"The training loss became {value} in epoch {self.current_epoch}")
        self.log(
            "train_loss",
            value,
            on_step=False,
            on_epoch=True,
            prog_bar=True,
            batch_size=size,
            sync_dist=True,
        )
        return {"loss": loss}

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score one batch; while training, its images pass the backbone the first time only."""
        index = args[0] if args else kwargs["batch_idx"]
        if self.trainer.state.fn != TrainerFn.FITTING:
            return self._score(batch)
        images: Any = batch.image
        return self._update(batch, self.model.predict(self._features_of(batch, index), images.shape[-2:]))

    def test_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score one batch."""
        del args, kwargs
        return self._score(batch)

    def predict_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score one batch."""
        del args, kwargs
        return self._score(batch)

    def _score(self, batch: Batch) -> STEP_OUTPUT:
        return self._update(batch, self.model(batch.image))

    def _update(self, batch: Batch, predictions: InferenceBatch) -> STEP_OUTPUT:
        return batch.update(**self._finite(predictions)._asdict())

    def _finite(self, predictions: InferenceBatch) -> InferenceBatch:
        score: Any = predictions.pred_score
        if self.trainer.state.fn == TrainerFn.FITTING and not score.isfinite().all():
            self._stop(f"The scores became NaN or infinite in epoch {self.current_epoch}")
        return predictions

    def _stop(self, what: str) -> None:
        saved = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        where = f"the last checkpoint with finite scores is {saved}" if saved else "there is no checkpoint yet"
        msg = f"{what}: lower learning_rate (now {self.learning_rate}); {where}."
        raise RuntimeError(msg)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimiser and its schedule for the field; the backbone is frozen."""
        # Fused, a training step takes 15 % less on two cores; Lightning then cannot clip under mixed precision.
        fused = self.device.type == "cpu" and not isinstance(self.trainer.precision_plugin, MixedPrecision)
        optimizer = self._optimizer_class(
            self.model.field.parameters(),
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            fused=fused or None,
        )
        schedule = self._schedule(self.trainer.estimated_stepping_batches)
        scheduler = optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
