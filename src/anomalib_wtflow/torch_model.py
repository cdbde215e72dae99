"""WT-Flow in plain torch: features, normalisation, vector field, flow, density proxy, anomaly map."""

import torch
from anomalib.data import InferenceBatch
from torch import Generator, Tensor, nn

from anomalib_wtflow.anomaly_map import AnomalyMapGenerator, density_proxy
from anomalib_wtflow.features.backbone import FeatureExtractor
from anomalib_wtflow.flow.coupling import get_coupling
from anomalib_wtflow.flow.field import Field, get_field
from anomalib_wtflow.flow.normalization import get_normalization
from anomalib_wtflow.flow.path import ProbabilityPath
from anomalib_wtflow.flow.regression import regress, thin
from anomalib_wtflow.flow.solver import get_solver
from anomalib_wtflow.settings import Settings


class WTFlowModel(nn.Module):
    """Time-reversed flow matching with worst transport on the features of a frozen backbone (arXiv 2508.05461v3).

    Training: ``x0`` = normalised features, ``t ~ U(0, 1)``, ``eps ~ N(0, I)`` coupled to ``x0``; the field is
    regressed on the velocity of the path. Inference: ``y`` = where the flow carries ``x0``, anomaly map from
    ``-log q(1/2 mean_c y_c^2)``, layer by layer. The path, coupling, network, solver, normalisation and score are
    chosen by name and independently.

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
                s.backbone, s.layers, s.pre_trained, s.weights, s.pool_size, s.pool_stride, s.merge
            )
            self.channels = self.feature_extractor.channels
            self.anomaly_map_generator = AnomalyMapGenerator(
                s.anomaly_map, s.top_fraction, s.sigma, s.image_score, s.contrast, self.channels
            )
            self.normalization = get_normalization(s.normalization, sum(self.channels))
            self.field = self.build_field()

    def build_field(self) -> Field:
        """Build an untrained vector field for this model's features."""
        return get_field(self.settings.network, self.channels, self.settings.width, self.settings.depth)

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

    def regress(self, x0: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw times and noise, and return the field's prediction and the velocity that it should match.

        Args:
            x0: Normalised features ``(N, C, H, W)``.
            generator: Draws positions, times and noise, on the features' device; None for torch's own.

        Returns:
            ``v_theta(x_t, t)`` and ``u_t``, each ``(N, C, H', W')``; a pointwise field sees every second position.
        """
        thinned = thin(x0, generator) if self.field.pointwise else x0
        return regress(self.field, thinned, self.path, self.coupling, generator)

    def flow(self, x0: Tensor) -> Tensor:
        """Carry normalised features ``(N, C, H, W)`` along the learnt field; near 0 is normal.

        ``y = x0 + (x(1) - x(t_s)) / (1 - t_s)`` with ``dx/dt = v(x, t)`` from ``x(t_s) = a_{t_s} x0``: the mean
        velocity from the start time on, followed for one unit of time. With ``t_s = 0`` and one Euler step it is the
        paper's one-step inference ``y = x0 + v(x0, 0)``; a later start is ours.
        """
        return x0 + self.solver.mean_velocity(self.field, self.start_scale * x0, self.settings.start_time, 1.0)

    def log_density(self, y: Tensor) -> Tensor:
        """Density proxy of end points ``(N, C, H, W)`` in each of the L layers, ``(N, L, H, W)``."""
        return density_proxy(y, self.channels, self.settings.density)

    @torch.no_grad()
    def observe(self, x0: Tensor, image_size: tuple[int, int] | torch.Size) -> None:
        """Set the limit of the contrast from normalised features ``(N, C, H, W)`` of training images."""
        parts = [self.log_density(self.flow(part)) for part in x0.split(16)]
        self.anomaly_map_generator.observe(torch.cat(parts), image_size)

    def score(self, x0: Tensor, image_size: tuple[int, int] | torch.Size) -> InferenceBatch:
        """Score normalised features ``(N, C, H, W)`` of images of ``image_size`` pixels (height, width)."""
        anomaly_map, pred_score = self.anomaly_map_generator(self.log_density(self.flow(x0)), image_size)
        return InferenceBatch(pred_score=pred_score, anomaly_map=anomaly_map)

    def predict(self, features: Tensor, image_size: tuple[int, int] | torch.Size) -> InferenceBatch:
        """Score backbone features ``(N, C, H, W)`` of images of ``image_size`` pixels (height, width).

        Raises:
            RuntimeError: If the normalisation was never fitted: the model is not trained.
        """
        if not torch.compiler.is_compiling() and not self.normalization.fitted:
            msg = "This WTFlow model is not trained: fit it first, or load a checkpoint (--ckpt_path)."
            raise RuntimeError(msg)
        return self.score(self.normalization(features), image_size)

    def forward(self, images: Tensor) -> InferenceBatch | tuple[Tensor, Tensor]:
        """Run pre-processed images ``(N, 3, H, W)``.

        Returns:
            While training, what :meth:`regress` gives the loss; else image scores ``(N,)`` and anomaly maps ``(N, 1,
            H, W)``.
        """
        features = self.extract(images)
        if self.training:
            return self.regress(self.normalization(features))
        return self.predict(features, images.shape[-2:])
