"""MobileNetV2 (Sandler et al., 2018, arXiv 1801.04381) for 32x32 images.

The table of the paper with two strides changed, as is usual at this size: the stem and the first stage of
expansion 6 keep the resolution, so the last maps are 4x4 for 32x32 images.
"""

from __future__ import annotations

from torch import Tensor, nn

from lowbit.lab.models.registry import image_shape, model

__all__ = ["InvertedResidual", "MobileNetV2"]

# expansion, channels, blocks, stride of the first block: table 2 of the paper, strides for 32x32
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def rounded(channels: float) -> int:
    """The nearest multiple of 8, at least 8 and at least 90 % of `channels` (the reference code's rule)."""
    near = max(8, int(channels + 4) // 8 * 8)
    return near if near >= 0.9 * channels else near + 8


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution without bias that keeps the size (but for its stride), and its BN."""
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; the input is added where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [*conv_bn(inputs, hidden, 1), nn.ReLU6()]
        layers += [
            *conv_bn(hidden, hidden, 3, stride, groups=hidden),
            nn.ReLU6(),
            *conv_bn(hidden, outputs, 1),
        ]
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + y if self.residual else y


@model("mobilenetv2")
class MobileNetV2(nn.Module):
    """MobileNetV2 for small images, 2.2 M parameters on CIFAR-10 at width 1.

    The paper gives no initial weights; these are the reference code's: He normal by fan_out for convolutions
    (so that depthwise layers keep the gradient's size), 0.01 for the classifier.

    Args:
        input_shape: (channels, height, width), at least 8x8.
        classes: number of outputs.
        width: multiplier of all channel counts; the last convolution never shrinks below 1280, as in the
            paper.
    """

    def __init__(self, input_shape: tuple[int, ...], classes: int, width: float = 1.0) -> None:
        super().__init__()
        channels, _, _ = image_shape("mobilenetv2", input_shape)
        inputs = rounded(32 * width)
        layers: list[nn.Module] = [*conv_bn(channels, inputs, 3), nn.ReLU6()]
        for expansion, base, blocks, stride in STAGES:
            for block in range(blocks):
                outputs = rounded(base * width)
                layers.append(InvertedResidual(inputs, outputs, stride if block == 0 else 1, expansion))
                inputs = outputs
        last = rounded(1280 * max(1.0, width))
        layers += [*conv_bn(inputs, last, 1), nn.ReLU6()]
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(last, classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, channels, height, width), floating -> logits (batch, classes)."""
        return self.fc(self.pool(self.features(x)).flatten(1))
