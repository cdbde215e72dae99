"""What an exported model says of itself, readable without this package."""

import json
import xml.etree.ElementTree as ET  # nosec B405  # for what OpenVINO has just written
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anomalib_wtflow import __version__
from anomalib_wtflow.post_processor import WTFlowPostProcessor

SECTION = "anomalib_wtflow"
"""Section of OpenVINO's ``rt_info``, and beginning of the names of ONNX's properties, ``anomalib_wtflow.threshold``."""


def describe(model: Any, post: Any, precision: str, promised: bool) -> dict[str, str]:
    """Say which model it is and what its threshold promises; what has a value for each product is a JSON list.

    Thresholds are of raw scores: a normalised score is above 0.5 where the raw one is above its threshold. A rate is
    promised where the thresholds were set in the export's own precision.
    """
    settings, said = model.settings, {"model": type(model).__name__, "version": __version__, "precision": precision}
    said |= {"backbone": settings.backbone, "layers": json.dumps(settings.layers)}
    if isinstance(post, WTFlowPostProcessor) and post.false_alarm_rate is not None:
        said |= {
            "false_alarm_rate": f"{post.false_alarm_rate:g}",
            "threshold": _numbers(post.image_threshold.tolist()),
            "pixel_threshold": _numbers(post.pixel_threshold.tolist()),
            "calibration_images": json.dumps(post.calibration_images.tolist()),
        }
        rates = post.promised_false_alarm_rate
        if promised and not rates.isnan().any():
            said["promised_false_alarm_rate"] = _numbers(rates.tolist())
    if len(model.products) > 1:
        said["products"] = json.dumps(list(model.products), ensure_ascii=False)
    return said


def _numbers(values: list[float]) -> str:
    return json.dumps([float(f"{value:.9g}") for value in values])


def write_onnx(path: Path, said: Mapping[str, str]) -> None:
    """Write it into the properties of an ONNX file."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    onnx.helper.set_model_props(model, {f"{SECTION}.{name}": value for name, value in said.items()})
    onnx.save(model, path)


def write_openvino(path: Path, said: Mapping[str, str]) -> None:
    """Write it into the ``rt_info`` of an OpenVINO model's ``.xml`` file."""
    tree = ET.parse(path)  # nosec B314  # OpenVINO has just written it
    root = tree.getroot()
    info = root.find("rt_info")
    section = ET.SubElement(ET.SubElement(root, "rt_info") if info is None else info, SECTION)
    for name, value in said.items():
        ET.SubElement(section, name, value=value)
    tree.write(path, encoding="utf-8", xml_declaration=True)
