"""VGG-Small, the reduced VGG-7 of the papers on binary networks (Courbariaux et al., 2016, arXiv 1602.02830).

    2 x C - MP2 - 2 x 2C - MP2 - 2 x 4C - MP2 - FC        C = 128 in the papers

The paper's two hidden linear layers are left out, as in LQ-Nets (Zhang et al., 2018, arXiv 1807.10029).
"""

from __future__ import annotations

from torch import Tensor, nn

from lowbit.lab.models.init import he_normal
from lowbit.lab.models.registry import image_shape, model

__all__ = ["VGGSmall"]


@model("vgg_small")
class VGGSmall(nn.Module):
    """Six 3x3 convolutions and a classifier; the order is convolution, max-pool, BN, ReLU.

    Pooling comes before the nonlinearity because of the networks this model is for: the maximum of signs is
    nearly always 1.

    Args:
        input_shape: (channels, height, width), at least 8x8.
        classes: number of outputs.
        width: channels C of the first two convolutions.
    """

    def __init__(self, input_shape: tuple[int, ...], classes: int, width: int = 128) -> None:
        super().__init__()
        inputs, height, wide = image_shape("vgg_small", input_shape)
        layers: list[nn.Module] = []
        for outputs in (width, 2 * width, 4 * width):
            for pooled in (False, True):
                layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
                if pooled:
                    layers.append(nn.MaxPool2d(2))
                layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(inputs * (height // 8) * (wide // 8), classes)  # three poolings by 2
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, channels, height, width), floating -> logits (batch, classes)."""
        return self.fc(self.features(x).flatten(1))
