"""Folded networks against the networks that they come from."""

import pytest
import timm
import torch
from torch import nn

from anomalib_wtflow.features.folding import fold_batch_norms


def randomise(network: nn.Module) -> nn.Module:
    """Give batch normalisations statistics and weights that matter."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor, 0.5, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network.eval()


@pytest.mark.parametrize(("name", "left"), [("tf_efficientnet_lite0", 0), ("resnet10t", 0), ("densenet121", 62)])
def test_same_features_without_the_norms(name: str, left: int) -> None:
    """DenseNet normalises before it convolves: there only the norm behind a convolution can go."""
    network = randomise(timm.create_model(name, pretrained=False, features_only=True))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        folded = fold_batch_norms(network, images)
        other = torch.randn(1, 3, 96, 64)
        for got, expected in zip(folded(other), network(other), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    norms = [sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) for net in (network, folded)]
    assert norms[0] > norms[1] == left


class Shared(nn.Module):
    """A convolution whose output is also used without its normalisation: folding would change it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        h = self.conv(x)
        return [h + self.norm(h)]


def test_what_cannot_be_folded_stays() -> None:
    network = randomise(Shared())
    assert fold_batch_norms(network, torch.randn(1, 3, 8, 8)) is network
