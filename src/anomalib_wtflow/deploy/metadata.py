"""The metadata of an exported model, readable without this package."""

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
    """Describe a model and its guarantee; values by product are JSON lists.

    Thresholds are of raw scores: a normalised score is above 0.5 where the raw one is above its threshold. A rate is
    promised where the thresholds were set in the export's own precision.
    """
    settings, facts = model.settings, {"model": type(model).__name__, "version": __version__, "precision": precision}
    facts |= {"backbone": settings.backbone, "layers": json.dumps(settings.layers)}
    if isinstance(post, WTFlowPostProcessor) and post.false_alarm_rate is not None:
        facts |= {
            "false_alarm_rate": f"{post.false_alarm_rate:g}",
            "threshold": json.dumps(post.image_threshold.tolist()),
            "pixel_threshold": json.dumps(post.pixel_threshold.tolist()),
            "calibration_images": json.dumps(post.calibration_images.tolist()),
        }
        rates = post.promised_false_alarm_rate
        if promised and not rates.isnan().any():
            facts["promised_false_alarm_rate"] = json.dumps(rates.tolist())
    if len(model.products) > 1:
        facts["products"] = json.dumps(list(model.products), ensure_ascii=False)
    return facts


def write_onnx(path: Path, facts: Mapping[str, str]) -> None:
    """Write a description into the properties of an ONNX file."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    onnx.helper.set_model_props(model, {f"{SECTION}.{name}": value for name, value in facts.items()})
    onnx.save(model, path)


def write_openvino(path: Path, facts: Mapping[str, str]) -> None:
    """Write a description into the ``rt_info`` of an OpenVINO model's ``.xml`` file."""
    tree = ET.parse(path)  # nosec B314  # OpenVINO has just written it
    root = tree.getroot()
    info = root.find("rt_info")
    section = ET.SubElement(ET.SubElement(root, "rt_info") if info is None else info, SECTION)
    for name, value in facts.items():
        ET.SubElement(section, name, value=value)
    tree.write(path, encoding="utf-8", xml_declaration=True)
