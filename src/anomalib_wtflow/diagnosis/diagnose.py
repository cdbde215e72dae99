"""Why a trained model separates, in figures: ``anomalib-wtflow diagnose`` and its Python functions."""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from anomalib.data import AnomalibDataModule
from lightning import seed_everything
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from anomalib_wtflow.diagnosis import explanations, figures
from anomalib_wtflow.diagnosis.data import data_sets
from anomalib_wtflow.diagnosis.report import make_folder, write_report
from anomalib_wtflow.flow.coupling import get_coupling
from anomalib_wtflow.flow.path import ProbabilityPath
from anomalib_wtflow.flow.regression import fit_field
from anomalib_wtflow.flow.solver import Solver
from anomalib_wtflow.lightning_model import WTFlow
from anomalib_wtflow.theory import toy
from anomalib_wtflow.theory.diagnostics import centripetal_component, local_lipschitz, radius, trajectory
from anomalib_wtflow.theory.log_density import log_density as log_density_along_flow
from anomalib_wtflow.training.image_check import raise_for_unreadable

DivergenceChoice = Literal["exact", "hutchinson"]
ODE_TIMES = torch.linspace(0, 1, 17)
FIELD_TIMES = torch.logspace(-2, 0, 9)
LIPSCHITZ_IMAGES = 4
TRAINING_IMAGES = 512
GALLERY_IMAGES = 6
LOG_DENSITY_SOLVER = Solver("rk4", 8)


class ScoredImage(NamedTuple):
    """A test image and what the model made of it; maps and masks are ``(H, W)``, features ``(C, h, w)``.

    ``anomalous`` and ``mask`` are the truth, None where it is not known; ``score`` and ``anomaly_map`` are raw;
    ``called`` and ``called_mask`` are the verdict, None if the model has no threshold.
    """

    path: str
    anomalous: bool | None
    mask: Tensor | None
    score: float
    anomaly_map: Tensor
    called: bool | None
    called_mask: Tensor | None
    x0: Tensor

    @property
    def kind(self) -> str:
        """``normal``, ``anomalous`` or ``unlabelled``."""
        return "unlabelled" if self.anomalous is None else "anomalous" if self.anomalous else "normal"


class Progress:
    """Bars on the terminal, or none."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown and Console().is_terminal

    def __call__(self, items: Iterable, description: str, total: int | None = None) -> Iterable:
        """Iterate over the items under a bar."""
        return track(items, description=description, total=total, transient=True, disable=not self.shown)


# What to show --------------------------------------------------------------------------------------------------------


def diagnose(
    ckpt_path: str | Path,
    data: AnomalibDataModule | str | Path,
    output: str | Path = "results/diagnose",
    flow_images: int = 16,
    control_steps: int | None = None,
    log_density: DivergenceChoice | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Write figures (PNG), the numbers behind them (JSON) and one self-contained HTML page about a trained model.

    Args:
        ckpt_path: Checkpoint of a ``WTFlow`` model.
        data: anomalib data module; or a YAML file with its config; or a folder in MVTec's layout (``train/good``,
            ``test/good``, ``test/<defect>``, ``ground_truth/<defect>``); or a folder of images without labels.
        output: Folder to write into.
        flow_images: Test images of each kind whose features are followed along the flow.
        control_steps: Training steps of the plain rFM field (independent coupling) that the trained one is compared
            with; None for as many as the checkpoint has, 0 for no comparison. Its batches are about as large as the
            checkpoint's, whose steps an epoch are known.
        log_density: ``exact`` or ``hutchinson``, to compare the density proxy with the log-density along the ODE.
        device: ``auto``, ``cpu``, ``cuda`` and so on.
        seed: Seed of the noise and of the comparison's training.
        progress: Whether to show progress bars.

    Returns:
        Path of ``index.html``.

    Raises:
        FileNotFoundError: If the checkpoint or the data is not there.
        ValueError: If the checkpoint is not a WTFlow model's, an image cannot be read, the output cannot be written, or
            an argument is out of range.
    """
    if flow_images < 1 or (control_steps is not None and control_steps < 0):
        msg = (
            f"flow_images is {flow_images} and control_steps {control_steps}: follow at least 1 image, and train for 0 "
            "steps (no comparison) or more."
        )
        raise ValueError(msg)
    if log_density not in (None, "exact", "hutchinson"):
        msg = f"Unknown log_density '{log_density}': choose one of exact, hutchinson, or leave it out."
        raise ValueError(msg)
    show = Progress(progress)
    model, trained_steps, steps_per_epoch = load_model(ckpt_path)
    _to_device(model, device)
    make_folder(Path(output))
    train_data, test_data = data_sets(data)
    seed_everything(seed, verbose=False)

    images = list(score_images(model, test_data, show))
    steps = trained_steps if control_steps is None else control_steps
    fields: dict[str, nn.Module] = {model.coupling: model.model.field}
    if train_data is not None and steps > 0 and model.coupling != "independent":
        batch_size = math.ceil(len(train_data) / steps_per_epoch) if steps_per_epoch else 32
        fields["independent"] = fit_control(model, train_data, steps, batch_size, show)
    kinds = ("normal", "anomalous", "unlabelled")
    followed = {kind: _spread([image for image in images if image.kind == kind], flow_images) for kind in kinds}
    followed = {kind: chosen for kind, chosen in followed.items() if chosen}

    numbers: dict[str, Any] = {
        "checkpoint": Path(ckpt_path).name,
        "settings": {
            name: value
            for name, value in model.hparams.items()
            if isinstance(value, str | int | float) and name not in ("pre_trained", "weights")
        },
        "training_steps": trained_steps,
        "control_steps": steps if len(fields) > 1 else 0,
        "scores": score_numbers(model, images),
        "flow": flow_numbers(model, fields, followed, show),
        "field": field_numbers(model, fields, followed.get("normal") or images[:flow_images], show),
    }
    drawn = {
        "radius": figures.radius_along_the_flow(numbers["flow"]),
        "centripetal": figures.centripetal(numbers["flow"]),
        "field": figures.field_over_time(numbers["field"]),
        "histograms": figures.histograms(numbers["scores"]),
        "gallery": figures.gallery(worst_first(images)[:GALLERY_IMAGES], numbers["scores"]["pixel_threshold"]),
    }
    if log_density is not None:
        numbers["log_density"] = log_density_numbers(model, images, log_density, show)
        drawn["log_density"] = figures.log_density(numbers["log_density"])
    sections = [(name, figure, *explanations.model(name, numbers)) for name, figure in drawn.items()]
    return write_report(
        Path(output), "Why this WT-Flow model separates", explanations.summary(numbers), sections, numbers
    )


def diagnose_toy(output: str | Path = "results/diagnose-toy", seeds: int = 3, progress: bool = True) -> Path:
    """Write the paper's claims, measured on data that we draw: figures, numbers and a page, as :func:`diagnose` does.

    Args:
        output: Folder to write into.
        seeds: Seeds of the trainings, at least 1.
        progress: Whether to show a progress bar.

    Returns:
        Path of ``index.html``.

    Raises:
        ValueError: If there is no seed.
    """
    if seeds < 1:
        msg = f"seeds is {seeds}: train with at least 1 seed."
        raise ValueError(msg)
    make_folder(Path(output))
    trainings = 3 + seeds * len(toy.TOY_COUPLINGS) * len(toy.DATA)
    bar = iter(Progress(progress)(range(trainings + 1), "Training toy fields, then measuring exact ones"))
    next(bar)
    numbers: dict[str, Any] = {
        "trajectories": toy.trajectories(progress=lambda: next(bar)),
        "well_and_escape": toy.well_and_escape(tuple(range(seeds)), progress=lambda: next(bar)),
        "lipschitz": toy.lipschitz_growth(),
        "trivial_field": toy.trivial_field(),
        "centripetal": toy.centripetal_components(),
    }
    next(bar, None)
    drawn = {
        "trajectories": figures.toy_trajectories(numbers["trajectories"]),
        "well_and_escape": figures.toy_well_and_escape(numbers["well_and_escape"]),
        "centripetal": figures.toy_centripetal(numbers["centripetal"]),
        "lipschitz": figures.toy_lipschitz(numbers["lipschitz"]),
        "trivial_field": figures.toy_trivial_field(numbers["trivial_field"]),
    }
    sections = [(name, figure, *explanations.toy(name, numbers)) for name, figure in drawn.items()]
    summary = f"Drawn data, {seeds} seeds. Each figure is a claim of arXiv 2508.05461, measured; not all of them hold."
    return write_report(Path(output), "WT-Flow on data that we draw", summary, sections, numbers)


# The model and the test images ---------------------------------------------------------------------------------------


def load_model(ckpt_path: str | Path) -> tuple[WTFlow, int, int]:
    """Load a trained model, in evaluation mode, its number of training steps, and how many of them an epoch had.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a checkpoint of a trained WTFlow model.
    """
    path = Path(ckpt_path)
    if not path.is_file():
        msg = (
            f"There is no checkpoint at '{ckpt_path}': give the model.ckpt that 'anomalib train --model WTFlow' wrote."
        )
        raise FileNotFoundError(msg)
    try:
        model = WTFlow.load_from_checkpoint(path, map_location="cpu").eval()
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        msg = f"'{ckpt_path}' is not a checkpoint of a WTFlow model: give the model.ckpt of its run ({reason})."
        raise ValueError(msg) from error
    if not model.model.normalization.fitted:
        msg = f"The model in '{ckpt_path}' is not trained: give a checkpoint written after training has begun."
        raise ValueError(msg)
    return model, model.trained_steps, model.trained_steps // max(1, model.trained_epochs)


def _to_device(model: WTFlow, device: str) -> None:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        msg = f"device is '{device}', which this machine cannot use: give auto, or one that torch finds ({error})."
        raise ValueError(msg) from error


def _items(data: Any, indices: Iterable[int]) -> Iterator[Any]:
    try:
        for index in indices:
            yield data[index]
    except (OSError, SyntaxError, ValueError) as error:
        raise_for_unreadable([data], decode=True, cause=error)
        raise


def _transform(model: WTFlow, item: Any) -> tuple[Tensor, Tensor | None]:
    transform = getattr(model.pre_processor, "transform", None)
    mask = getattr(item, "gt_mask", None)
    if transform is None:
        return item.image, mask
    return (transform(item.image), None) if mask is None else transform(item.image, mask)


@torch.no_grad()
def score_images(model: WTFlow, data: Any, show: Progress) -> Iterator[ScoredImage]:
    """Score each image of an anomalib data set as the model does in production."""
    for item in show(_items(data, range(len(data))), "Scoring the test images", len(data)):
        image, mask = _transform(model, item)
        features = model.model.extract(image[None].to(model.device))
        raw: Any = model.model.predict(features, image.shape[-2:])
        verdict: Any = raw if model.post_processor is None else model.post_processor(raw)
        label = None if item.gt_label is None else bool(item.gt_label)
        truth = None if mask is None else mask.squeeze().bool().cpu()
        if label and (truth is None or not truth.any()):
            truth = None
        elif label is False:
            truth = torch.zeros(raw.anomaly_map.shape[-2:], dtype=torch.bool)
        yield ScoredImage(
            path=str(item.image_path),
            anomalous=label,
            mask=truth,
            score=raw.pred_score.item(),
            anomaly_map=raw.anomaly_map[0, 0].cpu(),
            called=None if verdict.pred_label is None else bool(verdict.pred_label),
            called_mask=None if verdict.pred_mask is None else verdict.pred_mask[0, 0].bool().cpu(),
            x0=model.model.normalization(features)[0].cpu(),
        )


def fit_control(model: WTFlow, train_data: Any, steps: int, batch_size: int, show: Progress) -> nn.Module:
    """Train the model's network with independent coupling on at most 512 of the training images (AdamW, cosine)."""
    chosen = _spread(range(len(train_data)), TRAINING_IMAGES)
    with torch.no_grad():
        features = []
        for item in show(_items(train_data, chosen), "Extracting the training features", len(chosen)):
            image, _ = _transform(model, item)
            features.append(model.model.normalization(model.model.extract(image[None].to(model.device))))
    x0 = torch.cat(features)
    settings = model.hparams
    control = model.model.build_field(*(settings[name] for name in ("network", "fields", "width", "depth"))).to(
        x0.device
    )
    return fit_field(
        control, x0, model.model.path, get_coupling("independent"), steps, batch_size,
        model.learning_rate, model.weight_decay,
        model.model.thinning if model.model.field.pointwise else 1, model.model.times,
        description="Training plain rFM, to compare with" if show.shown else None,
    )  # fmt: skip


def _spread(items: Sequence, count: int) -> list:
    """At most ``count`` items, evenly spread over all."""
    step = max(1, len(items) / count)
    return [items[int(k * step)] for k in range(min(count, len(items)))]


def worst_first(images: list[ScoredImage]) -> list[ScoredImage]:
    """False alarms (highest score first) and misses (lowest first) in turn, then the rest, highest scores first."""
    false_alarms = sorted((i for i in images if i.anomalous is False and i.called), key=lambda i: -i.score)
    misses = sorted((i for i in images if i.anomalous and i.called is False), key=lambda i: i.score)
    wrong = [image for pair in zip(false_alarms, misses, strict=False) for image in pair]
    shared = len(wrong) // 2
    wrong += false_alarms[shared:] + misses[shared:]
    chosen = {image.path for image in wrong}
    return wrong + sorted((i for i in images if i.path not in chosen), key=lambda i: -i.score)


# What to measure -----------------------------------------------------------------------------------------------------


def _quantiles(values: Tensor) -> dict[str, float]:
    low, median, high = values.flatten().double().cpu().quantile(torch.tensor([0.05, 0.5, 0.95]).double()).tolist()
    return {"low": low, "median": median, "high": high}


def _series(rows: Iterable[Tensor]) -> dict[str, list[float]]:
    """5 %, 50 % and 95 % quantiles of each row."""
    quantiles = [_quantiles(row) for row in rows]
    return {key: [row[key] for row in quantiles] for key in ("low", "median", "high")}


def _number(value: Tensor | float | None) -> float | None:
    number = float("nan") if value is None else float(value)
    return number if number == number else None


def _positions(images: Sequence[ScoredImage]) -> Tensor:
    """Which feature positions stand for the kind of their image, ``(N, h, w)``: all, or those half under a defect."""
    size = images[0].x0.shape[-2:]
    chosen = [
        torch.ones(size, dtype=torch.bool)
        if image.mask is None or not image.mask.any()
        else F.interpolate(image.mask[None, None].float(), size=size, mode="area")[0, 0] > 0.5
        for image in images
    ]
    return torch.stack(chosen)


def score_numbers(model: WTFlow, images: Sequence[ScoredImage]) -> dict[str, Any]:
    """Raw scores, thresholds, errors at them, AUROCs, and histograms of the density proxy of images and pixels."""
    kinds = {kind: [image for image in images if image.kind == kind] for kind in ("normal", "anomalous", "unlabelled")}
    thresholds = [_number(getattr(model.post_processor, name, None)) for name in ("image_threshold", "pixel_threshold")]
    result: dict[str, Any] = {
        "threshold": thresholds[0],
        "pixel_threshold": thresholds[1],
        "images": {kind: len(members) for kind, members in kinds.items() if members},
        "false_alarms": sum(bool(image.called) for image in kinds["normal"]) if thresholds[0] is not None else None,
        "misses": sum(image.called is False for image in kinds["anomalous"]) if thresholds[0] is not None else None,
        "image_scores": {kind: [image.score for image in members] for kind, members in kinds.items() if members},
    }
    pixels = {"normal": [image.anomaly_map[~image.mask] for image in images if image.mask is not None]}
    pixels["anomalous"] = [image.anomaly_map[image.mask] for image in kinds["anomalous"] if image.mask is not None]
    pixels["unlabelled"] = [image.anomaly_map.flatten() for image in kinds["unlabelled"]]
    joined = {kind: torch.cat(parts) for kind, parts in pixels.items() if parts}
    scores = {kind: torch.tensor(values) for kind, values in result["image_scores"].items()}
    without_flow = _without_flow(model, images)
    for (name, values), control in zip((("image", scores), ("pixel", joined)), without_flow, strict=True):
        both = "normal" in values and "anomalous" in values
        result[f"{name}_auroc"] = toy.auroc(values["normal"], values["anomalous"]) if both else None
        result[f"{name}_auroc_no_flow"] = toy.auroc(control["normal"], control["anomalous"]) if both else None
        if not values:  # defective images without masks, and no good ones: no pixel has a known kind
            result[f"{name}_histogram"] = None
            continue
        low = min(float(value.min()) for value in values.values())
        high = max(float(value.max()) for value in values.values())
        edges = torch.logspace(math.log10(max(low, 1e-6) * 0.999), math.log10(max(high, 1e-5) * 1.001), 41)
        counts = {kind: torch.histogram(value.clamp(min=edges[0]), edges).hist for kind, value in values.items()}
        result[f"{name}_histogram"] = {
            "edges": edges.tolist(),
            **{kind: (count / count.sum()).tolist() for kind, count in counts.items()},
        }
    return result


def _without_flow(model: WTFlow, images: Sequence[ScoredImage]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The control: scores of images and of pixels by kind from the density proxy of the features, ``y = x0``."""
    generator = model.model.anomaly_map_generator.without_limit()
    scores: dict[str, list[Tensor]] = {}
    pixels: dict[str, list[Tensor]] = {}
    for image in images:
        log_density = model.model.log_density(image.x0[None].to(model.device))
        result = generator(log_density, image.anomaly_map.shape)
        anomaly_map, score = (values.cpu() for values in result)
        scores.setdefault(image.kind, []).append(score)
        if image.mask is not None:
            pixels.setdefault("normal", []).append(anomaly_map[0, 0][~image.mask])
            pixels.setdefault("anomalous", []).append(anomaly_map[0, 0][image.mask])
    joined = [{kind: torch.cat(parts) for kind, parts in kinds.items()} for kinds in (scores, pixels)]
    return joined[0], joined[1]


def flow_numbers(
    model: WTFlow, fields: dict[str, nn.Module], followed: dict[str, list[ScoredImage]], show: Progress
) -> dict[str, Any]:
    """Radius, centripetal component and cosine to the optimal-transport direction along the flow, by kind of position.

    Along the flow as it is scored, ``x0 + tau (y - x0)``; and along the learnt ODE from ``x(0) = x0``, for the trained
    and the plain field. The optimal-transport direction is ``eps - x0``, eps coupled to x0 by ``optimal_image``.
    """
    channels = next(iter(followed.values()))[0].x0.shape[0]
    start = {"independent": 0.0, "worst_of_two": (2 / torch.pi / channels) ** 0.5, "antipodal": 1.0}
    result: dict[str, Any] = {
        "ode_times": ODE_TIMES.tolist(),
        "couplings": list(fields),
        "trained_coupling": model.coupling,
        "start_time": model.model.start_time,
        "predicted_start": dict.fromkeys(fields),
        "positions": {},
        "scored": {},
        "ode": {name: {} for name in fields},
    }
    jobs = [(kind, members, name) for kind, members in followed.items() for name in fields]
    for kind, members, name in show(jobs, "Following the flow", len(jobs)):
        with torch.no_grad():
            x0 = torch.stack([image.x0 for image in members]).to(model.device)
            chosen = _positions(members).to(model.device)
            if not chosen.any():
                chosen = torch.ones_like(chosen)
            optimal = get_coupling("optimal_image")(x0, torch.randn_like(x0)) - x0
            points = trajectory(fields[name], x0, ODE_TIMES)
            velocities = [
                fields[name](x, torch.full((len(x),), t, device=x.device))
                for x, t in zip(points, ODE_TIMES.tolist(), strict=True)
            ]
            pairs = list(zip(points, velocities, strict=True))
            result["ode"][name][kind] = {
                "radius": _series(radius(x)[chosen] for x in points),
                "centripetal": _series(centripetal_component(v, x)[chosen] for x, v in pairs),
                "cosine_to_optimal": _series(F.cosine_similarity(v, optimal, dim=1)[chosen] for v in velocities),
            }
            if kind == "normal" and name in start:
                middle = result["ode"][name][kind]["radius"]["median"][0]
                result["predicted_start"][name] = predicted_component(model.model.path, start[name], middle)
            if name == model.coupling:
                y = model.model.flow(x0)
                steps = torch.linspace(0, 1, 21)
                result["scored"][kind] = {
                    "tau": steps.tolist(),
                    "radius": _series(radius(x0 + tau * (y - x0))[chosen] for tau in steps),
                }
                result["positions"][kind] = int(chosen.sum())
    return result


def predicted_component(path: ProbabilityPath, strength: float, radius: float) -> float:
    """Component along x of the exact field at t = 0: ``a'_0 / a_0 - s'_0 c / r`` (ours).

    Args:
        path: The probability path; on the linear one this is ``-1 - c / r``.
        strength: c, minus the mean component of the coupled noise along the data, in units of sqrt(C).
        radius: r, the data's norm in the same units.
    """
    at = path.coefficients(torch.tensor(0.0))
    return float(at.da / at.a - at.ds * strength / radius)


def field_numbers(
    model: WTFlow, fields: dict[str, nn.Module], images: Sequence[ScoredImage], show: Progress
) -> dict[str, Any]:
    """Norm ``||v|| / sqrt(C)`` and local Lipschitz constant of each field at points of the paths it was trained on."""
    x0 = torch.stack([image.x0 for image in images]).to(model.device)
    times = FIELD_TIMES.tolist()
    result: dict[str, Any] = {"t": times, "images": min(len(x0), LIPSCHITZ_IMAGES), "couplings": {}}
    for name, field in fields.items():
        norms, constants = [], []
        for t in show(times, f"Measuring the field ({name})"):
            noise = get_coupling(name)(x0, torch.randn_like(x0))
            sample = model.model.path.sample(x0, noise, torch.full((len(x0),), t, device=x0.device))
            with torch.no_grad():
                norms.append(float(radius(field(sample.x_t, sample.t)).mean()))
            few = slice(LIPSCHITZ_IMAGES)
            constants.append(float(local_lipschitz(field, sample.x_t[few], sample.t[few], 10).mean()))
        result["couplings"][name] = {"norm": norms, "lipschitz": constants}
    return result


def log_density_numbers(
    model: WTFlow, images: Sequence[ScoredImage], method: DivergenceChoice, show: Progress
) -> dict[str, Any]:
    """Score each image by ``-log p / C`` along the ODE in place of the density proxy, with the same map and top share.

    From ``a_{t_s} x0`` at the start time to t = 1, in eight RK4 steps.
    """
    torch_model = model.model
    start = torch_model.start_time
    scale = torch_model.start_scale
    pointwise = torch_model.field.pointwise
    generator = torch_model.anomaly_map_generator.without_limit()
    scores: dict[str, list[list[float]]] = {}
    for image in show(images, "Log-density along the flow", len(images)):
        x = scale * image.x0[None].to(model.device)
        _, channels, height, width = x.shape
        samples = x.movedim(1, -1).reshape(-1, channels, 1, 1) if pointwise else x
        values = log_density_along_flow(torch_model.field, samples, start, 1.0, method, solver=LOG_DENSITY_SOLVER)
        log_p = values.view(1, 1, height, width) / channels
        _, score = generator(log_p, image.anomaly_map.shape)
        scores.setdefault(image.kind, []).append([image.score, score.item()])
    both = "normal" in scores and "anomalous" in scores
    columns = {kind: torch.tensor(rows).T for kind, rows in scores.items()}
    return {
        "method": method,
        "scores": scores,
        "auroc": [toy.auroc(columns["normal"][k], columns["anomalous"][k]) if both else None for k in range(2)],
    }
