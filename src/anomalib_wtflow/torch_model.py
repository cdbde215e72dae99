"""WT-Flow in plain torch: features, normalisation, vector field, flow, density proxy, anomaly map."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel

from anomalib_wtflow.anomaly_map import AnomalyMapGenerator, density_proxy
from anomalib_wtflow.features.backbone import FeatureExtractor
from anomalib_wtflow.flow.coupling import get_coupling
from anomalib_wtflow.flow.field import Field, get_field, stacked
from anomalib_wtflow.flow.finite import nan_unless_finite
from anomalib_wtflow.flow.normalization import get_normalization
from anomalib_wtflow.flow.path import ProbabilityPath
from anomalib_wtflow.flow.regression import regress
from anomalib_wtflow.flow.rows import CODE_CHANNELS, Reduce, allocate, codes, own
from anomalib_wtflow.flow.sampling import PositionSampling
from anomalib_wtflow.flow.solver import get_solver
from anomalib_wtflow.products import ProductRecognition
from anomalib_wtflow.settings import Settings


class NormalisedFeatures(NamedTuple):
    """Normalised features ``(N, C, H, W)``, and what :class:`ProductRecognition` says of their images, ``(N,)``."""

    x0: Tensor
    product: Tensor
    strangeness: Tensor


class Predictions(NamedTuple):
    """What anomalib's ``InferenceBatch`` holds, and what :class:`ProductRecognition` says of the images, ``(N,)``."""

    pred_score: Tensor
    pred_label: None
    anomaly_map: Tensor
    pred_mask: None
    product: Tensor | None
    strangeness: Tensor | None


class WTFlowModel(nn.Module):
    """Time-reversed flow matching with worst transport on the features of a frozen backbone (arXiv 2508.05461v3).

    Training: ``x0`` = normalised features, ``t ~ U(0, 1)``, ``eps ~ N(0, I)`` coupled to ``x0``; the field is
    regressed on the velocity of the path. Inference: ``y`` = where the flow carries ``x0``, anomaly map from
    ``-log q(1/2 mean_c y_c^2)``, layer by layer. Of several products (ours), the model recognises by itself which one
    an image shows, normalises it as that product's training images were, and tells the field. The path, coupling,
    network, solver, normalisation and score are chosen by name and independently.

    Args:
        settings: All settings, see :class:`anomalib_wtflow.settings.Settings`; None for the defaults.

    Raises:
        ValueError: If the backbone or a layer is unknown, or the weights file does not fit.
        RuntimeError: If the backbone's weights cannot be fetched.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__()
        s = self.settings = settings or Settings()
        self.path = ProbabilityPath(s.path, s.s_min)
        self.coupling = get_coupling(s.coupling)
        self.solver = get_solver(s.solver, s.steps)
        # A number, not a tensor to be read at each call, which would split a compiled graph.
        self.start_scale = self.path.coefficients(torch.tensor(s.start_time)).a.item()
        with torch.random.fork_rng(devices=[]):  # the first weights depend on the seed alone, and disturb nobody else's
            torch.default_generator.manual_seed(s.seed)
            self.feature_extractor = FeatureExtractor(
                s.backbone, s.layers, s.pre_trained, s.weights, s.pool_size, s.pool_stride, s.detail, s.image_size
            )
            self.channels, self.detail = self.feature_extractor.channels, self.feature_extractor.detail
            self.anomaly_map_generator = AnomalyMapGenerator(
                s.anomaly_map, s.top_fraction, s.sigma, s.image_score, s.contrast, self.channels
            )
            self.normalization = get_normalization(s.normalization, self.feature_extractor.out_channels)
            self.field = self.build_field()
        self.recognition = ProductRecognition(self.feature_extractor.out_channels)
        self.codes: Tensor
        self.register_buffer("codes", codes(1))
        self.register_load_state_dict_pre_hook(_make_room)
        self.sampling = PositionSampling(self.channels, self.detail, s.importance) if self.field.pointwise else None
        self.averaged = averaged_over(self.field, s.averaging) if s.averaging else None

    def build_field(self) -> Field:
        """Build an untrained vector field for this model's features."""
        s = self.settings
        return get_field(s.network, self.channels, s.width, s.depth, self.detail, CODE_CHANNELS)

    @property
    def flow_field(self) -> Field:
        """The field that the flow follows: the averaged one, or the one that is trained if there is no averaging."""
        return self.field if self.averaged is None else self.averaged.module  # type: ignore[return-value]

    def average(self) -> None:
        """Take the present weights of the trained field into the average, after a training step."""
        if self.averaged is not None:
            self.averaged.update_parameters(self.field)

    def set_products(self, count: int, known: int | None = None) -> None:
        """Make room for ``count`` products, of which the first ``known`` (None for all) keep what is known of them."""
        allocate(self, count)
        self.codes = codes(count).to(self.codes)
        for part in (self.recognition, self.normalization):
            if part.needs_fit and known is not None:
                part.get_buffer("_fitted")[known:] = False
        self.reset()

    @property
    def fitted(self) -> bool:
        """Whether normalisation and recognition are fitted to all products."""
        return bool(self.recognition.fitted and self.normalization.fitted)

    def reset(self) -> None:
        """Forget the features that normalisation and recognition were updated with."""
        self.recognition.reset()
        if self.normalization.needs_fit:
            self.normalization.reset()  # type: ignore[operator]

    def update(self, features: Tensor, product: Tensor) -> None:
        """Take training features ``(N, C, H, W)`` of products ``(N,)`` for normalisation and recognition.

        Raises:
            ValueError: If a feature is not finite.
        """
        self.recognition.update(features, product)
        if self.normalization.needs_fit:
            self.normalization.update(features, product)  # type: ignore[operator]

    def finalize(self, reduce: Reduce = lambda value, _: value) -> None:
        """Fit recognition and normalisation of new products, and which positions are rare, from the features taken.

        Args:
            reduce: Reduces a value over the processes of a distributed training, by ``sum`` or ``max``.

        Raises:
            ValueError: If there are no features.
        """
        if self.normalization.needs_fit:
            covariance = self.normalization.finalize(lambda total: reduce(total, "sum"))  # type: ignore[operator]
            if self.sampling is not None:
                self.sampling.fit(covariance)
        self.recognition.finalize(reduce)

    def normalise(self, features: Tensor) -> NormalisedFeatures:
        """Recognise the products of backbone features ``(N, C, H, W)``, and normalise each as its product's."""
        product, strangeness = self.recognition(features)
        return NormalisedFeatures(self.normalization(features, product), product, strangeness)

    def extract(self, images: Tensor) -> Tensor:
        """Return the backbone's features of pre-processed images ``(N, 3, H, W)``, as ``(N, C, H', W')``.

        Raises:
            ValueError: If the images are too small for the backbone or for the network.
        """
        features = self.feature_extractor(images)
        smallest = self.field.min_size
        if min(features.shape[-2:]) < smallest:
            msg = (
                f"Images of {images.shape[-2]}x{images.shape[-1]} pixels give "
                f"{features.shape[-2]}x{features.shape[-1]} features, "
                f"and the network needs {smallest}x{smallest}: raise image_size, or choose a finer layer or "
                f"network='pointwise'."
            )
            raise ValueError(msg)
        return features

    def condition(self, product: Tensor | None) -> Tensor:
        """Return what the field is told of images of the products in these places, ``(N,)``; None for the only one."""
        return own(self.codes, product)

    def regress(
        self,
        x0: Tensor,
        generator: Generator | None = None,
        *,
        product: Tensor | None = None,
        averaged: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Draw times and noise, and return the field's prediction and the velocity that it should match.

        Args:
            x0: Normalised features ``(N, C, H, W)``.
            generator: Draws positions, times and noise, on the features' device; None for torch's own.
            product: Places of the images' products, ``(N,)``; None for the only one.
            averaged: Whether the averaged field predicts, not the one that is trained.

        Returns:
            ``v_theta(x_t, t)`` and ``u_t``, ``(N, C, H, W)`` each; of the drawn positions where the field is pointwise.
        """
        field: Any = self.flow_field if averaged else self.field
        shown = x0 if self.sampling is None else self.sampling(x0, generator)
        velocity = partial(field if self.sampling is None else field.points, condition=self.condition(product))
        return regress(velocity, shown, self.path, self.coupling, generator)

    def flow(self, x0: Tensor, product: Tensor | None = None) -> Tensor:
        """Carry normalised features ``(N, C, H, W)`` along the learnt field; near 0 is normal.

        ``y = x0 + (x(1) - x(t_s)) / (1 - t_s)`` with ``dx/dt = v(x, t)`` from ``x(t_s) = a_{t_s} x0``: the mean
        velocity from the start time on, followed for one unit of time. With ``t_s = 0`` and one Euler step it is the
        paper's one-step inference ``y = x0 + v(x0, 0)``; a later start is ours.
        """
        field = partial(self.flow_field, condition=self.condition(product))
        return x0 + self.solver.mean_velocity(field, self.start_scale * x0, self.settings.start_time, 1.0)

    def log_density(self, y: Tensor) -> Tensor:
        """Density proxy of end points ``(N, C, H, W)`` in each of the L layers, ``(N, L, r H, r W)``."""
        return density_proxy(y, self.channels, self.settings.density, self.detail)

    @torch.no_grad()
    def observe(
        self,
        x0: Tensor,
        image_size: tuple[int, int] | torch.Size,
        product: Tensor | None = None,
        reduce: Reduce | None = None,
    ) -> None:
        """Set slope and limit of the contrast from normalised features ``(N, C, H, W)`` of training images.

        Args:
            x0: The features; N may be 0 in one of several processes.
            image_size: Height and width of the images.
            product: Places of the images' products, ``(N,)``; None for the only one.
            reduce: Reduces a value over the processes of a distributed training, by ``sum`` or ``max``.
        """
        parts = [torch.empty(0)]
        if len(x0):
            products = [None] * len(x0) if product is None else product.split(16)
            parts = [self.log_density(self.flow(*each)) for each in zip(x0.split(16), products, strict=False)]
        self.anomaly_map_generator.observe(torch.cat(parts), image_size, product, reduce)

    def score(
        self,
        x0: Tensor,
        image_size: tuple[int, int] | torch.Size,
        product: Tensor | None = None,
        strangeness: Tensor | None = None,
    ) -> Predictions:
        """Score normalised features ``(N, C, H, W)`` of images of ``image_size`` pixels (height, width).

        The score is NaN where anything that it comes from is NaN or infinite.
        """
        y = self.flow(x0, product)
        anomaly_map, pred_score = self.anomaly_map_generator(self.log_density(y), image_size, product)
        pred_score = nan_unless_finite(pred_score, y, *([] if strangeness is None else [strangeness]))
        return Predictions(pred_score, None, anomaly_map, None, product, strangeness)

    def predict(self, features: Tensor, image_size: tuple[int, int] | torch.Size) -> Predictions:
        """Score backbone features ``(N, C, H, W)`` of images of ``image_size`` pixels (height, width).

        Raises:
            RuntimeError: If the normalisation was never fitted: the model is not trained.
        """
        if not torch.compiler.is_compiling() and not self.normalization.fitted:
            msg = "This WTFlow model is not trained: fit it first, or load a checkpoint (--ckpt_path)."
            raise RuntimeError(msg)
        x0, product, strangeness = self.normalise(features)
        return self.score(x0, image_size, product, strangeness)

    def forward(self, images: Tensor) -> Predictions | tuple[Tensor, Tensor]:
        """Run pre-processed images ``(N, 3, H, W)``.

        Returns:
            While training, what :meth:`regress` gives the loss; else image scores ``(N,)`` and anomaly maps ``(N, 1,
            H, W)``.
        """
        features = self.extract(images)
        if self.training:
            x0, product, _ = self.normalise(features)
            return self.regress(x0, product=product)
        result = self.predict(features, images.shape[-2:])
        return result._replace(pred_score=nan_unless_finite(result.pred_score, images))

    @torch.no_grad()
    def stages(self, images: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield, by name, what becomes of pre-processed images ``(N, 3, H, W)`` on the way to their scores."""
        yield "pixels", images
        features = self.extract(images)
        names = self.feature_extractor.network.feature_info.module_name()
        layers = features.split(stacked(self.channels, self.detail), dim=1)
        yield from ((f"features of layer '{name}'", layer) for name, layer in zip(names, layers, strict=True))
        x0, product, strangeness = self.normalise(features)
        yield from [("distances from the known products", strangeness), ("normalised features", x0)]
        y = self.flow(x0, product)
        yield "velocities of the field", y
        anomaly_map, score = self.anomaly_map_generator(self.log_density(y), images.shape[-2:], product)
        yield from [("values of the anomaly map", anomaly_map), ("scores", score)]

    def broken_tensor(self) -> str | None:
        """Return the name of a weight or statistic that is NaN or infinite; None if all are as they should be."""
        return next(broken_tensors(self.state_dict()), None)


def broken_tensors(state: Mapping[str, Tensor], prefix: str = "") -> Iterator[str]:
    """Yield the names in a model's state, all behind a prefix, of weights and statistics that are NaN or infinite.

    Infinite are only limits that do not hold: of recognition with one product or not all fitted, of the contrast until
    it is set.
    """
    codes, fitted = (state.get(f"{prefix}{name}") for name in ("codes", "recognition._fitted"))
    limits = {f"{prefix}anomaly_map_generator.limit"}
    if codes is None or fitted is None or len(codes) == 1 or not fitted.all():
        limits.add(f"{prefix}recognition.limit")
    for name, tensor in state.items():
        if name.startswith(prefix):
            sound = tensor > -torch.inf if name in limits else tensor.isfinite()
            if not sound.all():
                yield name


def _make_room(model: WTFlowModel, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a model take the weights of one with another number of products."""
    codes_there = state.get(f"{prefix}codes")
    if codes_there is not None:
        model.set_products(len(codes_there))


def averaged_over(field: nn.Module, share: float) -> AveragedModel:
    """Build the running average of a field's weights over about the last ``share`` of the training steps (ours).

    ``m_1 = w_1``, ``m_n = m_{n-1} + (w_n - m_{n-1}) / (1 + share (n - 1))`` after step n, so that the beginning is
    forgotten however long the training goes on, and its end need not be known. Batch norms, which a U-Net has, keep
    the statistics of the last weights.
    """
    averaged = AveragedModel(field, multi_avg_fn=partial(_average, share))
    return averaged.requires_grad_(requires_grad=False)


def _average(share: float, average: Sequence[Tensor], current: Sequence[Tensor], steps: Tensor | int) -> None:
    torch._foreach_lerp_(list(average), list(current), 1 / (1 + share * int(steps)))
