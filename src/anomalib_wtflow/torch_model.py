"""WT-Flow in plain torch: features, normalisation, field, flow, density, anomaly map."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from anomalib_wtflow.anomaly_map import AnomalyMapGenerator, density_proxy
from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.features.backbone import FeatureExtractor
from anomalib_wtflow.flow.field import Field, get_field
from anomalib_wtflow.flow.finite import nan_unless_finite
from anomalib_wtflow.flow.normalization import NORMALIZATIONS
from anomalib_wtflow.flow.path import ProbabilityPath
from anomalib_wtflow.flow.rows import EMBEDDING_CHANNELS, allocate, class_embeddings
from anomalib_wtflow.flow.sampling import PositionSampling
from anomalib_wtflow.flow.solver import Solver
from anomalib_wtflow.products.recognition import ProductRecognizer, Recognition
from anomalib_wtflow.settings import Settings


class Predictions(NamedTuple):
    """Image scores ``(N,)``, anomaly maps ``(N, 1, H, W)``, and which products the images show."""

    pred_score: Tensor
    anomaly_map: Tensor
    recognition: Recognition


class WTFlowModel(nn.Module):
    """WT-Flow in one module: frozen backbone, vector field and score (arXiv 2508.05461v3).

    ``y`` = where the flow carries normalised features ``x0``; the anomaly map comes from ``-log q(1/2 mean_c y_c^2)``,
    layer by layer. Of several products (ours), the model recognises which one an image shows, normalises it as that
    product's training images were, and gives the field the product's class embedding. Path, network, solver,
    normalisation and score are chosen by name and independently. :func:`anomalib_wtflow.fit.fit_model` trains it; the
    model itself always evaluates, in :meth:`torch.nn.Module.train`'s mode too.

    Args:
        settings: All settings, see :class:`anomalib_wtflow.settings.Settings`; None for the defaults.

    Raises:
        WTFlowError: If the backbone or a layer is unknown, or the weights file does not fit.
    """

    per_product = ("class_embeddings",)
    class_embeddings: Tensor

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__()
        s = self.settings = settings or Settings()
        self.path = ProbabilityPath(s.path, s.s_min)
        self.solver = Solver(s.solver, s.steps)
        # A number, not a tensor to be read at each call, which would split a compiled graph.
        self.start_scale = self.path.coefficients(torch.tensor(s.start_time)).a.item()
        with torch.random.fork_rng(devices=[]):  # the weights of a random backbone depend on the seed alone
            torch.default_generator.manual_seed(s.seed)
            self.feature_extractor = FeatureExtractor(
                s.backbone, s.layers, s.pre_trained, s.weights, s.pool_size, s.pool_stride, s.image_size
            )
        self.channels = self.feature_extractor.channels
        self.normalization = NORMALIZATIONS[s.normalization](self.feature_extractor.out_channels)
        self.field = self.build_field()
        self.anomaly_map_generator = self.build_anomaly_map_generator()
        self.recognizer = ProductRecognizer(self.feature_extractor.out_channels)
        self.register_buffer("class_embeddings", class_embeddings(1))
        self.register_load_state_dict_pre_hook(_make_room)
        self.sampling = PositionSampling(self.channels, s.importance) if self.field.pointwise else None

    def train(self, mode: bool = True) -> "WTFlowModel":
        """Stay in evaluation mode."""
        del mode
        return super().train(mode=False)

    def build_field(self) -> Field:
        """Build an untrained vector field for these features, from the seed alone."""
        s = self.settings
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(s.seed)
            return get_field(s.network, self.channels, s.width, s.depth, EMBEDDING_CHANNELS)

    def build_anomaly_map_generator(self) -> AnomalyMapGenerator:
        """Build an anomaly map generator that is not fitted."""
        s = self.settings
        return AnomalyMapGenerator(
            s.anomaly_map, s.top_fraction, s.sigma, s.image_score, s.background_slope, self.channels
        )

    def set_products(self, count: int, known: int = 0) -> None:
        """Make room for ``count`` products, of which the first ``known`` keep their statistics."""
        allocate(self, count)
        self.class_embeddings = class_embeddings(count).to(self.class_embeddings)
        for name, rows in self.named_buffers():
            if name.endswith("fitted_rows"):
                rows[known:] = False

    @property
    def fitted(self) -> bool:
        """Return whether the statistics of all products are known."""
        return bool(self.recognizer.fitted and self.normalization.fitted)

    def extract(self, images: Tensor) -> Tensor:
        """Return features ``(N, C, H', W')`` of pre-processed images ``(N, 3, H, W)``.

        Raises:
            WTFlowError: If the images are too small for the backbone or for the network.
        """
        features = self.feature_extractor(images)
        if min(features.shape[-2:]) < self.field.min_size:
            sizes = [f"{shape[-2]}x{shape[-1]}" for shape in (images.shape, features.shape)]
            msg = (
                f"Images of {sizes[0]} pixels give {sizes[1]} features, and the network needs at least "
                f"{self.field.min_size} a side: raise image_size, or choose a finer layer or network 'pointwise'."
            )
            raise WTFlowError(msg)
        return features

    def normalise(self, features: Tensor) -> tuple[Tensor, Recognition]:
        """Recognise the products of features ``(N, C, H, W)``, and normalise each accordingly."""
        recognition = self.recognizer(features)
        return self.normalization(features, recognition.index), recognition

    def flow(self, x0: Tensor, index: Tensor) -> Tensor:
        """Carry normalised features ``(N, C, H, W)`` along the learnt field; near 0 is normal.

        ``y = x0 + (x(1) - x(t_s)) / (1 - t_s)`` with ``dx/dt = v(x, t)`` from ``x(t_s) = a_{t_s} x0``: the mean
        velocity from the start time on, followed for one unit of time. With ``t_s = 0`` and one Euler step it is the
        paper's one-step inference ``y = x0 + v(x0, 0)``; a later start is ours.

        Args:
            x0: Normalised features.
            index: Indices of the images' products, ``(N,)``.
        """
        field = partial(self.field, class_embedding=self.class_embeddings[index])
        return x0 + self.solver.mean_velocity(field, self.start_scale * x0, self.settings.start_time, 1.0)

    def log_density(self, y: Tensor) -> Tensor:
        """Return the density proxy of end points ``(N, C, H, W)`` in L layers, ``(N, L, H, W)``."""
        return density_proxy(y, self.channels, self.settings.density)

    def score(self, x0: Tensor, recognition: Recognition, image_size: tuple[int, int] | torch.Size) -> Predictions:
        """Score normalised features ``(N, C, H, W)``; ``image_size`` is (height, width).

        The score is NaN where anything that it comes from is NaN or infinite.
        """
        y = self.flow(x0, recognition.index)
        anomaly_map, score = self.anomaly_map_generator(self.log_density(y), image_size, recognition.index)
        return Predictions(nan_unless_finite(score, y, recognition.distance), anomaly_map, recognition)

    def predict(self, features: Tensor, image_size: tuple[int, int] | torch.Size) -> Predictions:
        """Score backbone features ``(N, C, H, W)``; ``image_size`` is (height, width).

        Raises:
            WTFlowError: If the model is not trained.
        """
        if not torch.compiler.is_compiling() and not self.fitted:
            msg = "This WTFlow model is not trained: train it first, or load a checkpoint (--ckpt_path)."
            raise WTFlowError(msg)
        return self.score(*self.normalise(features), image_size)

    def forward(self, images: Tensor) -> Predictions:
        """Score pre-processed images ``(N, 3, H, W)``."""
        result = self.predict(self.extract(images), images.shape[-2:])
        return result._replace(pred_score=nan_unless_finite(result.pred_score, images))


def _make_room(model: WTFlowModel, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Resize buffers to the loaded state's number of products."""
    embeddings = state.get(f"{prefix}class_embeddings")
    if embeddings is not None:
        allocate(model, len(embeddings))
