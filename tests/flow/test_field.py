"""Vector fields: sizes, receptive fields, time dependence."""

import math

import pytest
import torch

from anomalib_wtflow.flow.field import (
    FIELDS,
    PointwiseField,
    TimeEmbedding,
    UNetField,
    get_field,
    pointwise_width,
)


def parameters(field: torch.nn.Module) -> int:
    return sum(p.numel() for p in field.parameters())


def test_paper_size() -> None:
    """method.md counts about 763 M parameters for C = 1024, b = 768."""
    with torch.device("meta"):
        assert parameters(UNetField(1024, 768)) == 763_167_232


def test_pointwise_size() -> None:
    channels, width = 152, 256
    ends = (channels + 1) * width + (width + 1) * channels
    block = (channels + 1) * width + 2 * (width + 1) * width
    assert parameters(PointwiseField(channels, width, depth=1)) == ends + block
    assert parameters(PointwiseField(channels, width, depth=3)) == ends + block + 2 * 3 * (width + 1) * width


def test_pointwise_formula() -> None:
    """Written out with matrices, for two blocks; convolutions and matrix products agree."""
    field = PointwiseField(3, width=4, depth=2).double()
    x, t = torch.randn(2, 3, 2, 5, dtype=torch.float64), torch.tensor([0.2, 0.7], dtype=torch.float64)
    embedding = field.time_embedding(t).double()

    def apply(conv: torch.nn.Conv2d, z: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(z, conv.weight, conv.bias)

    def silu(z: torch.Tensor) -> torch.Tensor:
        return z / (1 + (-z).exp())

    times = [time(embedding)[:, :, None, None] for time in field.time]
    linear, inner = apply(field.stem, x).split(4, dim=1)
    h = linear + apply(field.outer[0], silu(inner + times[0]))
    h = h + apply(field.outer[1], silu(apply(field.inner[0], h) + times[1]))
    torch.testing.assert_close(field(x, t), apply(field.head, silu(h)))


def test_time_embedding() -> None:
    embedding = TimeEmbedding(4)(torch.tensor([0.0, 0.002]))
    torch.testing.assert_close(embedding[0], torch.tensor([0.0, 0, 1, 1]))
    expected = [math.sin(2), math.sin(2e-4), math.cos(2), math.cos(2e-4)]
    torch.testing.assert_close(embedding[1], torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_pointwise_sees_one_position() -> None:
    field = PointwiseField(5, width=8)
    x, t = torch.randn(2, 5, 4, 3), torch.tensor([0.2, 0.7])
    order = torch.randperm(12)
    shuffled = x.flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(field(shuffled, t), field(x, t).flatten(2)[..., order].view_as(x))


def test_unet_sees_its_neighbourhood() -> None:
    field = UNetField(3, width=4).eval()
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    field(x, torch.tensor([0.5]))[0, :, 3, 3].sum().backward()
    assert (x.grad.abs().sum(1) > 0).float().mean() > 0.9


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("size", [(4, 4), (5, 7), (8, 12), (31, 16)])
def test_any_size(name: str, size: tuple[int, int]) -> None:
    field = get_field(name, [3], width=8, depth=1).eval()
    x = torch.randn(2, 3, *size)
    early, late = field(x, torch.zeros(2)), field(x, torch.ones(2))
    assert early.shape == x.shape
    assert not torch.allclose(early, late)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="Unknown network 'transformer': choose one of pointwise, unet"):
        get_field("transformer", [3])


@pytest.mark.parametrize("name", list(FIELDS))
def test_layers_have_networks_of_their_own(name: str) -> None:
    field = get_field(name, [2, 3], width=8, depth=1).eval()
    x, t = torch.randn(2, 5, 8, 8), torch.rand(2)
    with torch.no_grad():
        v = field(x, t)
        torch.testing.assert_close(v[:, :2], field.fields[0](x[:, :2], t))
        torch.testing.assert_close(v[:, 2:], field.fields[1](x[:, 2:], t))
    assert field.pointwise == (name == "pointwise")
    assert field.min_size == field.fields[0].min_size
    assert not hasattr(get_field(name, [3], width=8), "fields")


def test_widths_of_their_own() -> None:
    """32 round(sqrt(C)) from 64 to 384; 48 for every U-Net; a given width holds for all."""
    assert [pointwise_width(channels) for channels in (1, 4, 24, 40, 112, 144, 1024)] == [
        64,
        64,
        160,
        192,
        352,
        384,
        384,
    ]
    for name, width, expected in (("pointwise", None, [64, 64]), ("unet", None, [48, 48]), ("pointwise", 16, [16, 16])):
        field = get_field(name, [2, 3], width)
        assert [network.head.in_channels for network in field.fields] == expected
