"""Transformers and other backbones than plain CNNs, against timm's own models: maps, sizes, layers, weights files."""

import logging
from itertools import product
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from anomalib_wtflow.deploy.quantization import quantize
from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.features.backbone import FeatureExtractor, default_layers, get_data_config, get_image_size
from anomalib_wtflow.features.folding import fold_batch_norms

VIT = "vit_tiny_patch16_224"
DINO = "vit_small_patch14_dinov2"


def randomised(name: str, size: tuple[int, int] | None = None) -> nn.Module:
    """A whole timm model in which each parameter matters: a layer scale of 1e-5 would hide what a block does."""
    model = timm.create_model(name, pretrained=False, **({} if size is None else {"img_size": size})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def extractor_of(model: nn.Module, name: str, folder: Path, **kwargs: object) -> FeatureExtractor:
    torch.save(model.state_dict(), folder / "weights.pth")
    return FeatureExtractor(name, weights=folder / "weights.pth", **kwargs)


@pytest.mark.parametrize(
    ("name", "prefix", "patch_size"),
    [
        (VIT, 1, 16),
        ("vit_small_patch14_reg4_dinov2", 5, 14),
        ("vit_small_patch16_dinov3", 5, 16),
        ("cait_xxs24_224", 0, 16),
    ],
)
def test_maps_are_the_patch_tokens_without_the_prefix(name: str, prefix: int, patch_size: int, tmp_path: Path) -> None:
    """Against what the blocks of timm's whole model give, token by token, and its own maps."""
    size, chosen = (3 * patch_size, 2 * patch_size), [0, 2]
    model = randomised(name, size)
    extractor = extractor_of(model, name, tmp_path, layers=["blocks.0", "blocks.2"], image_size=size)
    tokens: list[Tensor] = []
    for index in chosen:
        model.blocks[index].register_forward_hook(lambda block, inputs, output: tokens.append(output))
    images = torch.randn(3, 3, *size)
    with torch.no_grad():
        expected = model.forward_intermediates(images, indices=chosen, intermediates_only=True)
    maps = extractor(images).split(extractor.channels, dim=1)
    for got, timms, all_tokens in zip(maps, expected, tokens, strict=True):
        torch.testing.assert_close(got, timms, rtol=1e-4, atol=1e-4)
        assert all_tokens.shape[1] == prefix + 3 * 2
        for row, column in product(range(3), range(2)):
            torch.testing.assert_close(
                got[:, :, row, column], all_tokens[:, prefix + 2 * row + column], rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize(
    ("name", "size"), [("swin_tiny_patch4_window7_224", (64, 96)), ("convnext_atto", None), ("mobilevit_xxs", None)]
)
def test_hierarchies_are_stacked_by_stride(name: str, size: tuple[int, int] | None, tmp_path: Path) -> None:
    """Swin's maps have their channels last; the names of ConvNeXt's weights are others in timm's own extractor."""
    model = randomised(name, size)
    extractor = extractor_of(model, name, tmp_path, image_size=size)
    images = torch.randn(1, 3, 64, 96)
    strides = [layer["reduction"] for layer in model.feature_info]
    with torch.no_grad():
        expected = model.forward_intermediates(
            images, indices=[strides.index(stride) for stride in (4, 8, 16)], intermediates_only=True
        )
    for got, timms in zip(extractor(images).split(extractor.channels, dim=1), expected, strict=True):
        resized = nn.functional.interpolate(timms, size=(4, 6), mode="bilinear")
        torch.testing.assert_close(got, resized, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("strides", "chosen"),
    [
        ([16] * 12, [2, 5, 8]),
        ([14] * 24, [5, 11, 17]),
        ([2, 4, 8, 16, 32], [1, 2, 3]),
        ([4, 4, 8, 8, 16, 32], [1, 3, 4]),
        ([32], [0]),
    ],
)
def test_default_layers(strides: list[int], chosen: list[int]) -> None:
    assert default_layers(strides) == chosen


def test_the_default_size_is_the_one_that_the_backbone_was_trained_at() -> None:
    sizes = {VIT: 224, DINO: 518, "vit_small_patch16_dinov3": 256, "swin_tiny_patch4_window7_224": 224}
    for name, side in sizes.items():
        config = get_data_config(name)
        assert (config.image_size, config.fixed) == ((side, side), True)
    config = get_data_config("resnet18.tv_in1k")
    assert config == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (256, 256), False)
    assert [get_image_size(DINO, size) for size in (None, 98, [98, 70])] == [(518, 518), (98, 98), (98, 70)]


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        (DINO, 100, f"image_size is 100x100, and '{DINO}' takes sides that are multiples of 14: choose 98 or 112."),
        (DINO, (100, 200), r"is 100x200, .* multiples of 14: choose \[98, 196\] or \[112, 210\]."),
        (VIT, 10, r"is 10x10, .* multiples of 16: choose 16."),
        ("swin_tiny_patch4_window7_224", 80, r"is 80x80, .* multiples of 32: choose 64 or 96."),
    ],
)
def test_sizes_that_a_backbone_cannot_take(name: str, size: object, message: str) -> None:
    with pytest.raises(WTFlowError, match=message):
        FeatureExtractor(name, pre_trained=False, image_size=size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side", "stride", "channels"),
    [
        ("eva02_tiny_patch14_224", 56, 14, 3 * 192),
        ("xcit_nano_12_p16_224", 64, 16, 3 * 128),
        ("mixer_s32_224", 64, 32, 3 * 512),
        ("maxvit_tiny_tf_224", 64, 16, 64 + 128 + 256),
        ("crossvit_tiny_240", 240, 17, 192),
    ],
)
def test_other_families_give_maps(name: str, side: int, stride: int, channels: int) -> None:
    features = FeatureExtractor(name, pre_trained=False, image_size=side)(torch.randn(1, 3, side, side))
    assert features.shape == (1, channels, side // stride, side // stride)
    assert features.isfinite().all()


@pytest.mark.parametrize(
    ("name", "layer", "theirs", "ours"),
    [
        (VIT, "blocks.1", (48, 48), (32, 64)),
        (DINO, "blocks.1", (70, 70), (42, 28)),
        ("swin_tiny_patch4_window7_224", "layers.1", (224, 224), (64, 96)),
        ("vit_small_patch16_dinov3", "blocks.1", (48, 48), (32, 64)),
    ],
)
def test_weights_file_of_another_grid(name: str, layer: str, theirs: object, ours: object, tmp_path: Path) -> None:
    """Positions are resampled as timm resamples those of a file."""
    path = tmp_path / "weights.pth"
    torch.save(randomised(name, theirs).state_dict(), path)
    logging.getLogger("timm").setLevel(logging.ERROR)
    there = {"file": str(path), "custom_load": False}  # until 1.0.30 timm took any file of some models for a .npz
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=there, img_size=ours).eval()
    extractor = FeatureExtractor(name, [layer], weights=path, image_size=ours)
    images = torch.randn(1, 3, *ours)
    with torch.no_grad():
        (expected,) = model.forward_intermediates(images, indices=[int(layer[-1])], intermediates_only=True)
    torch.testing.assert_close(extractor(images), expected, rtol=1e-4, atol=1e-4)


def test_metas_own_file(tmp_path: Path) -> None:
    """DINOv2 as Meta publishes it has other names, a mask token, and a position for the class token."""
    name = "vit_small_patch14_reg4_dinov2"
    model = randomised(name, (42, 28))
    state = model.state_dict()
    theirs = {{"reg_token": "register_tokens"}.get(key, key): value for key, value in state.items()}
    # timm adds the position to the class token.
    theirs |= {
        "mask_token": torch.zeros(1, 384),
        "pos_embed": torch.cat([state["cls_token"] * 0, state["pos_embed"]], 1),
    }
    torch.save(theirs, tmp_path / "dinov2.pth")
    images = torch.randn(1, 3, 42, 28)
    with torch.no_grad():
        (expected,) = model.forward_intermediates(images, indices=[1], intermediates_only=True)
    extractor = FeatureExtractor(name, ["blocks.1"], weights=tmp_path / "dinov2.pth", image_size=(42, 28))
    torch.testing.assert_close(extractor(images), expected, rtol=1e-4, atol=1e-4)


def test_weights_of_another_transformer(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save(timm.create_model("vit_tiny_patch16_224", pretrained=False).state_dict(), path)
    with pytest.raises(WTFlowError, match=rf"other.pth' does not fit backbone '{DINO}': it .* '\w+' \(\d+ of \d+ tens"):
        FeatureExtractor(DINO, weights=path, image_size=70)


def test_int8_and_folding_leave_transformers_alone() -> None:
    with pytest.raises(WTFlowError, match=r"INT8_PTQ supports CNN backbones only, .* has 1: export it in FP16 or"):
        quantize(None, None, 1)
    network = timm.create_model(VIT, pretrained=False, features_only=True, img_size=32).eval()
    assert fold_batch_norms(network, torch.rand(1, 3, 32, 32)) is network
