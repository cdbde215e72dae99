"""Low precision of exported models: which parts of an OpenVINO graph stay in float (ours).

The backbone's stem, which reads the image, and the tail, flow and score, are sensitive; what is between them is not.
"""

import xml.etree.ElementTree as ET  # nosec B405  # for what OpenVINO has just written
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anomalib_wtflow.errors import WTFlowError

CONVOLUTIONS = ("Convolution", "GroupConvolution")
STEM_CONVOLUTIONS = 3
"""Convolutions of the stem, which in 8 bits make most of the error of the features where the contrast is low."""


@torch.no_grad()
def count_convolutions(extractor: Any) -> int:
    """Count the convolutions of a feature extractor that its exported graph keeps.

    They are those that run, and read something else for another image: what is the same for all becomes a constant.
    """
    device = next(extractor.parameters()).device
    sums: list[list[float]] = [[], []]
    for seed, row in enumerate(sums):
        hooks = [
            module.register_forward_pre_hook(lambda _, inputs, row=row: row.append(float(inputs[0].double().sum())))
            for module in extractor.network.modules()
            if isinstance(module, nn.Conv2d)
        ]
        extractor.network(extractor.draw_image(seed).to(device))
        for hook in hooks:
            hook.remove()
    return sum(first != second for first, second in zip(*sums, strict=True))


def needed_by_convolutions(model: Any, count: int) -> list[str]:
    """Name the operations that a graph's first convolutions need, and these, in order.

    Raises:
        WTFlowError: If the graph has fewer convolutions.
    """
    operations = model.get_ordered_ops()
    convolutions = [op for op in operations if op.get_type_name() in CONVOLUTIONS]
    if len(convolutions) < count:
        msg = f"The exported graph has {len(convolutions)} convolutions and the backbone {count}: export to ONNX."
        raise WTFlowError(msg)
    open_ = convolutions[:count]
    needed: set[str] = set()
    while open_:
        operation = open_.pop()
        if operation.get_friendly_name() not in needed:
            needed.add(operation.get_friendly_name())
            open_ += [value.get_source_output().get_node() for value in operation.inputs()]
    return [name for name in (op.get_friendly_name() for op in operations) if name in needed]


def stem_names(model: Any, backbone_convolutions: int) -> list[str]:
    """Name the operations of a graph from the image to the backbone's third convolution."""
    return needed_by_convolutions(model, min(STEM_CONVOLUTIONS, backbone_convolutions))


def tail_names(model: Any, backbone_convolutions: int) -> list[str]:
    """Name the operations of a graph after all of the backbone's convolutions."""
    # What comes after the backbone needs all of it, so its convolutions are the first ones in the order.
    backbone = set(needed_by_convolutions(model, backbone_convolutions))
    return [op.get_friendly_name() for op in model.get_ordered_ops() if op.get_friendly_name() not in backbone]


def residual_names(model: Any) -> list[str]:
    """Name the additions of an OpenVINO graph that have no constant side."""
    names = []
    for operation in model.get_ordered_ops():
        sources = [value.get_source_output().get_node() for value in operation.inputs()]
        if operation.get_type_name() == "Add" and all(source.get_type_name() != "Constant" for source in sources):
            names.append(operation.get_friendly_name())
    return names


def quantize(model: Any, images: Any, backbone_convolutions: int) -> Any:
    """Quantise a backbone to INT8 with NNCF; its stem and the tail stay in float.

    The ranges are those of ``images``, arrays ``(1, 3, H, W)``; 128 of them serve.

    Raises:
        WTFlowError: If the backbone has no convolutions behind its stem, as a transformer.
    """
    import nncf

    if backbone_convolutions <= STEM_CONVOLUTIONS:
        msg = (
            f"INT8_PTQ supports CNN backbones only, with more than {STEM_CONVOLUTIONS} convolutions, and this one has "
            f"{backbone_convolutions}: export it in FP16 or FP32."
        )
        raise WTFlowError(msg)
    tail = tail_names(model, backbone_convolutions)
    in_float = {*stem_names(model, backbone_convolutions), *residual_names(model), *tail}
    # NNCF's defaults, symmetric ranges and a fast correction of the biases, cost 0.028 pixel AUROC on bottles.
    quantized = nncf.quantize(
        model,
        nncf.Dataset(images),
        preset=nncf.QuantizationPreset.MIXED,
        fast_bias_correction=False,
        ignored_scope=nncf.IgnoredScope(names=sorted(in_float), validate=False),
    )
    # What the backbone's next convolution reads in 8 bits, the tail reads as it was before.
    for operation in quantized.get_ordered_ops():
        if operation.get_friendly_name() in tail:
            for value in operation.inputs():
                source = value.get_source_output().get_node()
                if source.get_type_name() == "FakeQuantize":
                    value.replace_source_output(source.input(0).get_source_output())
    return quantized


def keep_precise(path: Path, backbone_convolutions: int) -> None:
    """Mark the stem in a model's ``.xml`` file, so that it is never computed in 16 bits.

    OpenVINO has a mark for this in its files, ``precise``, and no way to set it from Python.
    """
    import openvino

    names = set(stem_names(openvino.Core().read_model(path), backbone_convolutions))
    tree = ET.parse(path)  # nosec B314  # OpenVINO has just written it
    for layer in tree.iterfind("layers/layer"):
        if layer.get("name") in names and layer.get("type") not in ("Const", "Convert"):
            info = layer.find("rt_info")
            if info is None:
                info = ET.Element("rt_info")
                layer.insert(0 if layer.find("data") is None else 1, info)
            ET.SubElement(info, "attribute", name="precise", version="0")
    tree.write(path, encoding="utf-8", xml_declaration=True)
