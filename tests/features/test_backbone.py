"""Backbones: packaged weights, weights files, layers at one scale, and the errors a user can make."""

from pathlib import Path
from unittest.mock import patch

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.features import backbone as module
from anomalib_wtflow.features.backbone import FeatureExtractor
from anomalib_wtflow.features.weights import packaged_weights

SMALL = "resnet10t"


def test_packaged_weights_know_an_espresso() -> None:
    """ImageNet's class 967, espresso, on scikit-image's picture of one, through timm's own pre-processing."""
    from PIL import Image
    from skimage.data import coffee

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    model.load_state_dict(packaged_weights(model))
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    with torch.no_grad():
        probability = model(transform(Image.fromarray(coffee()))[None]).softmax(1)[0]
    assert probability.argmax() == 967
    assert probability[967] > 0.8


def test_default_features_are_timms() -> None:
    model = timm.create_model(
        "tf_efficientnet_lite0", features_only=True, out_indices=[1, 2, 3], pretrained=False
    ).eval()
    model.load_state_dict(packaged_weights(model))
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        finest, fine, coarse = model(images)
    stacked = FeatureExtractor()(images)
    torch.testing.assert_close(stacked[:, -112:], coarse, rtol=1e-4, atol=1e-4)
    for maps, part in ((finest, stacked[:, :24]), (fine, stacked[:, 24:64])):
        expected = F.interpolate(maps, size=coarse.shape[-2:], mode="bilinear")
        torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-4)
    extractor = FeatureExtractor(layers=["blocks.2", "blocks.4"])
    assert extractor.out_channels == 40 + 112
    expected = torch.cat([F.avg_pool2d(fine, 2), coarse], 1)
    torch.testing.assert_close(extractor(images), expected, rtol=1e-4, atol=1e-4)


def test_nothing_runs_behind_the_last_layer() -> None:
    for name, count in (("blocks.2", 3), ("blocks.4", 5), ("blocks.6", 7)):
        assert len(FeatureExtractor(layers=[name]).network.blocks) == count
    vit = FeatureExtractor("vit_tiny_patch16_224", ["blocks.1", "blocks.3"], pre_trained=False, image_size=32)
    assert len(vit.network.model.blocks) == 4


def test_too_small_an_image() -> None:
    with pytest.raises(WTFlowError, match="Images of 8x64 pixels are smaller than the stride 16"):
        FeatureExtractor()(torch.rand(1, 3, 8, 64))
    assert FeatureExtractor(layers=["blocks.2"])(torch.rand(1, 3, 8, 64)).shape[-2:] == (1, 8)


def test_frozen_and_in_eval_mode() -> None:
    extractor = FeatureExtractor().train()
    assert not any(m.training for m in extractor.modules())
    assert not any(p.requires_grad for p in extractor.parameters())
    before = {name: tensor.clone() for name, tensor in extractor.state_dict().items()}
    extractor(torch.rand(2, 3, 64, 64))
    assert all(torch.equal(before[name], tensor) for name, tensor in extractor.state_dict().items())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_file(tmp_path: Path, suffix: str) -> None:
    """A full classifier's checkpoint, as timm publishes them, gives the backbone its weights; the head is left out."""
    source = timm.create_model(SMALL, pretrained=False)
    path = tmp_path / f"weights{suffix}"
    save_file(source.state_dict(), path) if suffix == ".safetensors" else torch.save(
        {"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, path
    )
    extractor = FeatureExtractor(SMALL, ["layer4"], weights=path)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(extractor(images), source.eval().forward_features(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reachable", [True, False])
def test_hub_weights(reachable: bool) -> None:
    """With a fake hub: timm is asked for pre-trained features, once, and what it gives is used."""
    real, asked = timm.create_model, []

    def fake(name: str, pretrained: bool = False, **kwargs: object) -> torch.nn.Module:
        model = real(name, pretrained=False, **kwargs)
        if pretrained and not reachable:
            raise ConnectionError
        if pretrained:
            asked.append(name)
            torch.nn.init.constant_(model.conv1[0].weight, 0.0)
        return model

    with patch.object(module.timm, "create_model", fake):
        if reachable:
            assert FeatureExtractor(SMALL).network.conv1[0].weight.eq(0).all()
            assert asked == [SMALL]
        else:
            message = r"'resnet10t' could not be fetched from the hub \(ConnectionError\): give .* as weights=PATH"
            with pytest.raises(WTFlowError, match=message):
                FeatureExtractor(SMALL)


def test_names_are_checked() -> None:
    with pytest.raises(WTFlowError, match="Unknown backbone 'resnt18': did you mean resnet18"):
        FeatureExtractor("resnt18")
    with pytest.raises(WTFlowError, match=r"Unknown layer 'layer9' of backbone 'resnet10t': choose from act1, layer1"):
        FeatureExtractor(SMALL, ["layer9"], pre_trained=False)
    with pytest.raises(WTFlowError, match="name each layer once, the finest first"):
        FeatureExtractor(SMALL, ["layer3", "layer2"], pre_trained=False)
