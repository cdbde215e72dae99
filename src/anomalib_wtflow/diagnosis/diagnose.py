"""Can a trained model be trusted, and why: ``anomalib-wtflow diagnose`` and its Python functions."""

import math
from pathlib import Path
from typing import Any

from anomalib.data import AnomalibDataModule
from lightning import seed_everything
from torch import nn

from anomalib_wtflow.diagnosis import explanations, figures, gallery, toy_figures
from anomalib_wtflow.diagnosis.control import fit_control
from anomalib_wtflow.diagnosis.flow_numbers import flow_and_field_numbers
from anomalib_wtflow.diagnosis.front import front
from anomalib_wtflow.diagnosis.gallery import ranked_images
from anomalib_wtflow.diagnosis.progress import Progress
from anomalib_wtflow.diagnosis.report import make_folder, write_report
from anomalib_wtflow.diagnosis.score_numbers import DivergenceChoice, all_numbers, log_density_numbers
from anomalib_wtflow.diagnosis.scoring import ScoredImage, score_images
from anomalib_wtflow.diagnosis.without_flow import training_features, without_flow
from anomalib_wtflow.lightning_model import WTFlow
from anomalib_wtflow.operation.checkpoint import load_model, to_device
from anomalib_wtflow.operation.data import data_sets
from anomalib_wtflow.theory.centripetal import centripetal_components
from anomalib_wtflow.theory.points import DATA, TOY_COUPLINGS
from anomalib_wtflow.theory.singularity import lipschitz_growth
from anomalib_wtflow.theory.trivial_field import trivial_field
from anomalib_wtflow.theory.well import trajectories, well_and_escape

TRAINING_IMAGES = 512
"""Of which features are taken, for the comparisons."""


def diagnose(
    ckpt_path: str | Path,
    data: AnomalibDataModule | str | Path,
    output: str | Path = "results/diagnose",
    flow_images: int = 8,
    control_steps: int | None = 0,
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
        flow_images: Test images of each kind, good and defective, whose features are followed along the flow.
        control_steps: Training steps of the plain rFM field (independent coupling) that the trained one is compared
            with; 0 for no comparison, None for as many as the checkpoint has. Its batches are about as large as the
            checkpoint's, whose steps an epoch are known.
        log_density: ``exact`` or ``hutchinson``, to compare the density proxy with the log-density along the ODE.
        device: ``auto``, ``cpu``, ``cuda`` and so on.
        seed: Seed of the noise and of the comparison's training.
        progress: Whether to say on standard error how far it is: with bars on a terminal, in lines elsewhere.

    Returns:
        Path of ``index.html``.

    Raises:
        FileNotFoundError: If the checkpoint or the data is not there.
        ValueError: If the checkpoint is not a WTFlow model's, an image cannot be read, or an argument is out of range.
        RuntimeError: If the output cannot be written.
    """
    _check(flow_images, control_steps, log_density)
    show = Progress(progress)
    model, trained_steps, steps_per_epoch = load_model(ckpt_path)
    to_device(model, device)
    make_folder(Path(output))
    train_data, test_data = data_sets(data)
    seed_everything(seed, verbose=False)

    images = ranked_images(model, list(score_images(model, test_data, show)))
    training = None if train_data is None else training_features(model, train_data, TRAINING_IMAGES, show)
    steps = trained_steps if control_steps is None else control_steps
    fields: dict[str, nn.Module] = {model.settings.coupling: model.model.flow_field}
    if train_data is not None and training is not None and steps > 0 and model.settings.coupling != "independent":
        batch_size = math.ceil(len(train_data) / steps_per_epoch) if steps_per_epoch else 32
        fields["independent"] = fit_control(model, training, steps, batch_size, show)
    numbers: dict[str, Any] = {
        "checkpoint": Path(ckpt_path).name,
        "settings": {k: v for k, v in model.settings.plain().items() if k not in ("pre_trained", "weights")},
        "training_steps": trained_steps,
        "control_steps": steps if len(fields) > 1 else 0,
        "images": gallery.rows(model, images),
        **all_numbers(model, images, without_flow(model, images, training, show)),
        **flow_and_field_numbers(model, fields, images, flow_images, show),
    }
    if log_density is not None:
        numbers["log_density"] = log_density_numbers(model, images, log_density, show)
    return _write(Path(output), model, numbers, images, show)


def _write(output: Path, model: WTFlow, numbers: dict[str, Any], images: list[ScoredImage], show: Progress) -> Path:
    drawn = {
        "radius": figures.radius_along_the_flow(numbers["flow"]),
        "centripetal": figures.centripetal(numbers["flow"]),
        "field": figures.field_over_time(numbers["field"]),
        "histograms": figures.histograms(numbers["scores"]),
    }
    if "log_density" in numbers:
        drawn["log_density"] = figures.log_density(numbers["log_density"])
    sections = [(name, figure, *explanations.model(name, numbers)) for name, figure in drawn.items()]
    rows = zip(images, numbers["images"], strict=True)
    shown = list(gallery.entries(model, show(rows, "Drawing the images", len(images))))
    numbers["images_shown"] = len(shown)
    title, summary = "Can this model be trusted on these parts?", explanations.summary(numbers)
    return write_report(output, title, summary, sections, numbers, front(output, numbers, shown))


def _check(flow_images: int, control_steps: int | None, log_density: str | None) -> None:
    if flow_images < 1 or (control_steps is not None and control_steps < 0):
        msg = (
            f"flow_images is {flow_images} and control_steps {control_steps}: follow at least 1 image, and train for 0 "
            "steps (no comparison) or more."
        )
        raise ValueError(msg)
    if log_density not in (None, "exact", "hutchinson"):
        msg = f"Unknown log_density '{log_density}': choose one of exact, hutchinson, or leave it out."
        raise ValueError(msg)


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
    trainings = 3 + seeds * len(TOY_COUPLINGS) * len(DATA)
    bar = iter(Progress(progress)(range(trainings + 1), "Training toy fields, then measuring exact ones"))
    next(bar)
    numbers: dict[str, Any] = {
        "trajectories": trajectories(progress=lambda: next(bar)),
        "well_and_escape": well_and_escape(tuple(range(seeds)), progress=lambda: next(bar)),
        "lipschitz": lipschitz_growth(),
        "trivial_field": trivial_field(),
        "centripetal": centripetal_components(),
    }
    next(bar, None)
    drawn = {
        "trajectories": toy_figures.toy_trajectories(numbers["trajectories"]),
        "well_and_escape": toy_figures.toy_well_and_escape(numbers["well_and_escape"]),
        "centripetal": toy_figures.toy_centripetal(numbers["centripetal"]),
        "lipschitz": toy_figures.toy_lipschitz(numbers["lipschitz"]),
        "trivial_field": toy_figures.toy_trivial_field(numbers["trivial_field"]),
    }
    sections = [(name, figure, *explanations.toy(name, numbers)) for name, figure in drawn.items()]
    summary = f"Drawn data, {seeds} seeds. Each figure is a claim of arXiv 2508.05461, measured; not all of them hold."
    return write_report(Path(output), "WT-Flow on data that we draw", summary, sections, numbers)
