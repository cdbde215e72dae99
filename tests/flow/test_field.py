"""Vector fields: sizes, receptive fields, time dependence."""

import math
from itertools import product

import pytest
import torch

from anomalib_wtflow.flow.field import (
    FIELDS,
    LayerwiseField,
    PointwiseField,
    TimeEmbedding,
    UNetField,
    get_field,
    pointwise_width,
    stacked,
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
    h = apply(field.stem, x) + apply(field.outer[0], silu(apply(field.inner[0], x) + times[0]))
    h = h + apply(field.outer[1], silu(apply(field.inner[1], h) + times[1]))
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


DETAIL = [3, 2, 1]
CHANNELS = [2, 1, 4]


def fine_map(x: torch.Tensor, channels: int, r: int) -> torch.Tensor:
    """The map at finer positions, by explicit loops: channel c of position (i, j) in a cell is ``c r^2 + i r + j``."""
    fine = x.new_empty(len(x), channels, r * x.shape[2], r * x.shape[3])
    for c, i, j in product(range(channels), range(r), range(r)):
        for row, column in product(range(x.shape[2]), range(x.shape[3])):
            fine[:, c, r * row + i, r * column + j] = x[:, (c * r + i) * r + j, row, column]
    return fine


@pytest.mark.parametrize("name", list(FIELDS))
def test_networks_work_at_finer_positions(name: str) -> None:
    """Each network's velocity at the map of its finer positions, put back where they came from."""
    field = get_field(name, CHANNELS, width=8, depth=1, detail=DETAIL).double().eval()
    sizes = [2 * 9, 1 * 4, 4]
    assert stacked(CHANNELS, DETAIL) == sizes
    x, t = torch.randn(2, sum(sizes), 8, 9, dtype=torch.float64), torch.tensor([0.2, 0.7], dtype=torch.float64)
    with torch.no_grad():
        velocities = field(x, t).split(sizes, dim=1)
        for network, layer, v, c, r in zip(
            field.fields, x.split(sizes, dim=1), velocities, CHANNELS, DETAIL, strict=True
        ):
            torch.testing.assert_close(fine_map(v, c, r), network(fine_map(layer, c, r), t))


def test_pointwise_networks_see_each_finer_position_by_itself() -> None:
    """A loop over the finer positions of each layer, without any map of them."""
    field = get_field("pointwise", CHANNELS, width=8, detail=DETAIL).double()
    sizes = stacked(CHANNELS, DETAIL)
    x, t = torch.randn(2, sum(sizes), 3, 4, dtype=torch.float64), torch.tensor([0.2, 0.7], dtype=torch.float64)
    expected = torch.empty_like(x)
    for network, first, c, r in zip(field.fields, (0, 18, 22), CHANNELS, DETAIL, strict=True):
        for k in range(r * r):
            channels = [first + channel * r * r + k for channel in range(c)]
            expected[:, channels] = network(x[:, channels], t)
    torch.testing.assert_close(field(x, t), expected)


def test_velocity_at_points_is_that_of_the_map() -> None:
    """Any positions of each layer, in any order, with the map's own velocity there."""
    field = get_field("pointwise", CHANNELS, width=8, detail=DETAIL).double()
    sizes = stacked(CHANNELS, DETAIL)
    x, t = torch.randn(2, sum(sizes), 3, 4, dtype=torch.float64), torch.tensor([0.2, 0.7], dtype=torch.float64)
    shown, expected = [], []
    for layer, v, c, r in zip(x.split(sizes, 1), field(x, t).split(sizes, 1), CHANNELS, DETAIL, strict=True):
        positions = torch.randint(12 * r * r, (5,))
        shown.append(fine_map(layer, c, r).flatten(2)[:, :, positions])
        expected.append(fine_map(v, c, r).flatten(2)[:, :, positions])
    points = torch.cat(shown, dim=1)[..., None]
    torch.testing.assert_close(field.points(points, t), torch.cat(expected, dim=1)[..., None])
    single = get_field("pointwise", [3], width=8)
    some = torch.randn(2, 3, 5, 1)
    assert torch.equal(single.points(some, torch.tensor([0.3])), single(some, torch.tensor([0.3])))


def test_no_detail_is_one() -> None:
    fields = [PointwiseField(2, width=8), PointwiseField(3, width=8)]
    x, t = torch.randn(2, 5, 4, 4), torch.rand(2)
    assert torch.equal(LayerwiseField(fields, [2, 3])(x, t), LayerwiseField(fields, [2, 3], [1, 1])(x, t))


def test_widths_of_their_own() -> None:
    """32 round(sqrt(C)) from 64 to 384, and 96 at finer positions; 48 for every U-Net; what is given goes for all."""
    assert [pointwise_width(channels) for channels in (1, 4, 24, 40, 112, 144, 1024)] == [
        64,
        64,
        160,
        192,
        352,
        384,
        384,
    ]
    for name, width, expected in (
        ("pointwise", None, [96, 64]),
        ("unet", None, [48, 48]),
        ("pointwise", 16, [16] * 2),
    ):
        field = get_field(name, [2, 3], width, detail=[2, 1])
        assert [network.stem.out_channels for network in field.fields] == expected
