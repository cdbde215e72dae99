"""``anomalib-wtflow diagnose``: can a trained model be trusted, and why?"""

from functools import partial
from pathlib import Path
from typing import Any

from anomalib.data import AnomalibDataModule
from lightning import seed_everything
from torch import nn
from tqdm import tqdm

from anomalib_wtflow.diagnosis.flow_numbers import field_numbers, flow_numbers
from anomalib_wtflow.diagnosis.gallery import entries, gallery_rows
from anomalib_wtflow.diagnosis.page import write_page
from anomalib_wtflow.diagnosis.scores import all_numbers, by_product
from anomalib_wtflow.diagnosis.scoring import informative_first, score_image, spread
from anomalib_wtflow.diagnosis.without_flow import fit_plain, training_features, without_flow
from anomalib_wtflow.operation.checkpoint import load_model, to_device
from anomalib_wtflow.operation.data import data_sets

TRAINING_IMAGES = 512
"""Of which features are taken, for the comparisons."""


def diagnose(
    ckpt_path: str | Path,
    data: AnomalibDataModule | str | Path,
    output: str | Path = "results/diagnose",
    flow_images: int = 8,
    control: bool = False,
    device: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Write figures (PNG), numbers (JSON) and one self-contained HTML page about a model.

    Args:
        ckpt_path: Checkpoint of a ``WTFlow`` model.
        data: anomalib data module; or a YAML file with its config; or a folder in MVTec's layout (``train/good``,
            ``test/good``, ``test/<defect>``, ``ground_truth/<defect>``); or a folder of images without labels.
        output: Folder to write into.
        flow_images: Test images of each kind, at least 1, whose features are followed along the flow.
        control: Whether to train plain rFM (independent coupling) by the same settings, to compare the field with.
        device: ``auto``, ``cpu``, ``cuda`` and so on.
        seed: Seed of the noise that the measurements draw.
        progress: Whether to show bars on standard error, if it is a terminal.

    Returns:
        Path of ``index.html``.

    Raises:
        FileNotFoundError: If the checkpoint or the data is not there.
        WTFlowError: If the checkpoint is not a trained WTFlow model's, or there are no images.
    """
    show = partial(tqdm, leave=False, disable=None if progress else True)
    model = load_model(ckpt_path)
    to_device(model, device)
    train_data, test_data = data_sets(data)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    seed_everything(seed, verbose=False)

    tested = show(range(len(test_data)), "Scoring the test images")
    images = informative_first([score_image(model, test_data[k]) for k in tested], by_product(model, "image_threshold"))
    fields: dict[str, nn.Module] = {model.settings.coupling: model.model.field}
    training = None
    if train_data is not None:
        chosen = show(spread(range(len(train_data)), TRAINING_IMAGES), "Extracting the training features")
        training = training_features(model, (train_data[k] for k in chosen))
        if control and "independent" not in fields:
            fields["independent"] = fit_plain(model, training, partial(show, desc="Training plain rFM"))
    kinds = {kind: [image for image in images if image.kind == kind] for kind in ("normal", "anomalous", "unlabelled")}
    followed = {kind: spread(group, flow_images) for kind, group in kinds.items() if group}
    numbers: dict[str, Any] = {
        "checkpoint": Path(ckpt_path).name,
        "settings": {k: v for k, v in model.settings.plain().items() if k not in ("pre_trained", "weights")},
        "images": gallery_rows(model, images),
        **all_numbers(model, images, dict(show(without_flow(model, images, training), "Scoring without a flow"))),
        "flow": flow_numbers(model, fields, followed),
        "field": field_numbers(model, fields, next(iter(followed.values()))),
    }
    rows = zip(images, show(numbers["images"], "Drawing the images"), strict=True)
    return write_page(output, numbers, list(entries(model, rows)))
