"""WT-Flow in plain torch: features, normalisation, vector field, flow, density proxy, anomaly map."""

from collections.abc import Sequence
from pathlib import Path

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn

from anomalib_wtflow.anomaly_map import DENSITIES, AnomalyMapGenerator, density_proxy
from anomalib_wtflow.features.backbone import DEFAULT_BACKBONE, FeatureExtractor
from anomalib_wtflow.flow.coupling import get_coupling
from anomalib_wtflow.flow.field import Field, get_field
from anomalib_wtflow.flow.normalization import get_normalization
from anomalib_wtflow.flow.path import ProbabilityPath
from anomalib_wtflow.flow.registry import lookup
from anomalib_wtflow.flow.regression import regress, thin
from anomalib_wtflow.flow.solver import get_solver
from anomalib_wtflow.flow.times import get_time_sampling


class WTFlowModel(nn.Module):
    """Time-reversed flow matching with worst transport on the features of a frozen backbone (arXiv 2508.05461v3).

    Training: ``x0`` = normalised features, times t drawn by ``time_sampling``, ``eps ~ N(0, I)`` coupled to ``x0``;
    the field is regressed on the velocity of the path. Inference: ``y`` = where the flow carries ``x0``, anomaly map
    from ``-log q(1/2 mean_c y_c^2)``, layer by layer. The path, coupling, network, solver, normalisation and score are
    chosen by name and independently.

    Args:
        backbone: Name of a timm CNN.
        layers: Feature layers, finest first; None for those at strides 4, 8 and 16, or the last if there are none.
        pre_trained: Whether the backbone gets trained weights.
        weights: Local weights file of the backbone, or None.
        pool_size: Side of the window that the features are averaged over, odd; 1 for none.
        pool_stride: Stride of that window.
        merge: ``finest`` or ``coarsest``: whose size the layers are brought to.
        normalization: ``layer_norm``, ``channel`` or ``whitening``; the last two are fitted on the training set.
        network: Vector field, ``pointwise`` or ``unet``.
        fields: ``per_layer`` for a network of its own for each layer, or ``joint`` for one that sees all of them.
        width: Width of each network; None for its own default.
        depth: Depth of each network; None for its own default.
        path: ``linear``, ``gaussian`` or ``variance_preserving``.
        s_min: Noise level of the path at t = 0.
        coupling: One of :data:`anomalib_wtflow.flow.coupling.COUPLINGS`.
        thinning: Stride of the positions that a training step takes of each map; 1 for all. Networks that see a
            neighbourhood always take all.
        time_sampling: Times of training: ``uniform``, or ``logit_normal`` around ``start_time``.
        solver: ``euler``, ``midpoint`` or ``rk4``; or, for analysis, without export, one of torchdiffeq's
            :data:`anomalib_wtflow.flow.solver.ADAPTIVE_SOLVERS`.
        steps: Steps of the first three.
        start_time: Time t_s in [0, 1) at which inference enters the flow, see :meth:`flow`. 0 is the paper's one-step
            inference ``y = x0 + v(x0, 0)``; one Euler step on the linear path gives ``y = x0 + v((1 - t_s) x0, t_s)``
            (ours).
        density: Density of where the flow ends, ``gaussian`` (the paper's) or ``student``.
        anomaly_map: ``absolute`` or ``relative``.
        top_fraction: Share of the values that makes the image score, in (0, 1].
        sigma: Standard deviation of the Gaussian that smooths the map, in pixels of the input; 0 for none.
        image_score: Whether the image score comes from the ``map`` (the authors') or from the ``features``' positions.
        contrast: Share of the image's mean that the image score leaves out, in [0, 1).
        score_window: Odd side of the window of positions over which the ``features``' score is averaged; 1 for none.

    Raises:
        ValueError: If a name is unknown or a number is out of range; the message lists what is valid.
        RuntimeError: If the backbone's weights cannot be fetched.
    """

    def __init__(
        self,
        backbone: str = DEFAULT_BACKBONE,
        layers: Sequence[str] | None = None,
        pre_trained: bool = True,
        weights: str | Path | None = None,
        pool_size: int = 3,
        pool_stride: int = 1,
        merge: str = "coarsest",
        normalization: str = "channel",
        network: str = "pointwise",
        fields: str = "per_layer",
        width: int | None = None,
        depth: int | None = None,
        path: str = "variance_preserving",
        s_min: float = 0.01,
        coupling: str = "worst",
        thinning: int = 2,
        time_sampling: str = "uniform",
        solver: str = "euler",
        steps: int = 1,
        start_time: float = 0.35,
        density: str = "student",
        anomaly_map: str = "absolute",
        top_fraction: float = 0.03,
        sigma: float = 4.0,
        image_score: str = "features",
        contrast: float = 0.75,
        score_window: int = 3,
    ) -> None:
        super().__init__()
        if not 0 <= start_time < 1:
            msg = f"start_time is {start_time}: choose a time in [0, 1)."
            raise ValueError(msg)
        if thinning < 1:
            msg = f"thinning is {thinning}: give a stride of at least 1, which takes all positions."
            raise ValueError(msg)
        self.thinning = thinning
        self.path = ProbabilityPath(path, s_min)
        self.coupling = get_coupling(coupling)
        self.solver = get_solver(solver, steps)
        self.start_time = start_time
        # A number, not a tensor to be read at each call, which would split a compiled graph.
        self.start_scale = self.path.coefficients(torch.tensor(start_time)).a.item()
        self.times = get_time_sampling(time_sampling, start_time)
        self.density = density
        lookup(DENSITIES, "density", density)
        self.feature_extractor = FeatureExtractor(backbone, layers, pre_trained, weights, pool_size, pool_stride, merge)
        channels = self.feature_extractor.channels
        self.density_layers = channels if fields == "per_layer" else [sum(channels)]
        self.anomaly_map_generator = AnomalyMapGenerator(
            anomaly_map, top_fraction, sigma, image_score, contrast, self.density_layers, score_window
        )
        self.normalization = get_normalization(normalization, sum(channels))
        self.field = self.build_field(network, fields, width, depth)

    def build_field(self, network: str, fields: str, width: int | None = None, depth: int | None = None) -> Field:
        """Build an untrained vector field for this model's features.

        Raises:
            ValueError: If a name is unknown or a number is out of range.
        """
        layers = self.feature_extractor.channels
        choices: dict[str, int | list[int]] = {"joint": sum(layers), "per_layer": layers}
        channels = lookup(choices, "fields", fields)
        return get_field(network, channels, width, depth)

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

    def regress(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """Draw times and noise, and return the field's prediction and the velocity that it should match.

        Args:
            x0: Normalised features ``(N, C, H, W)``.

        Returns:
            ``v_theta(x_t, t)`` and ``u_t``, each ``(N, C, H', W')``, at the positions that ``thinning`` leaves.
        """
        thinned = thin(x0, self.thinning) if self.field.pointwise else x0
        return regress(self.field, thinned, self.path, self.coupling, self.times)

    def flow(self, x0: Tensor) -> Tensor:
        """Carry normalised features ``(N, C, H, W)`` along the learnt field; near 0 is normal.

        ``y = x0 + (x(1) - x(t_s)) / (1 - t_s)`` with ``dx/dt = v(x, t)`` from ``x(t_s) = a_{t_s} x0``: the mean
        velocity from the start time on, followed for one unit of time.
        """
        return x0 + self.solver.mean_velocity(self.field, self.start_scale * x0, self.start_time, 1.0)

    def log_density(self, y: Tensor) -> Tensor:
        """Density proxy of end points ``(N, C, H, W)``, ``(N, L, H, W)``: of each layer that has a field of its own."""
        return density_proxy(y, self.density_layers, self.density)

    @torch.no_grad()
    def observe(self, features: Tensor, image_size: tuple[int, int] | torch.Size) -> None:
        """Set the limit of the contrast from backbone features ``(N, C, H, W)`` of training images."""
        parts = [self.log_density(self.flow(self.normalization(part))) for part in features.split(16)]
        self.anomaly_map_generator.observe(torch.cat(parts), image_size)

    def predict(self, features: Tensor, image_size: tuple[int, int] | torch.Size) -> InferenceBatch:
        """Score backbone features ``(N, C, H, W)`` of images of ``image_size`` pixels (height, width).

        Raises:
            RuntimeError: If the normalisation was never fitted: the model is not trained.
        """
        if not torch.compiler.is_compiling() and not self.normalization.fitted:
            msg = "This WTFlow model is not trained: fit it first, or load a checkpoint (--ckpt_path)."
            raise RuntimeError(msg)
        log_density = self.log_density(self.flow(self.normalization(features)))
        anomaly_map, pred_score = self.anomaly_map_generator(log_density, image_size)
        return InferenceBatch(pred_score=pred_score, anomaly_map=anomaly_map)

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
