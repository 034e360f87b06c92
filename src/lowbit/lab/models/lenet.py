"""LeNet-5 (LeCun, Bottou, Bengio, Haffner, 1998, Proc. IEEE 86(11)), with ReLU and max-pooling."""

from __future__ import annotations

from torch import Tensor, nn

from lowbit.lab.models.init import he_normal
from lowbit.lab.models.registry import image_shape, model

__all__ = ["LeNet5"]

KERNEL = 5


@model("lenet5")
class LeNet5(nn.Module):
    """Two 5x5 convolutions with 2x2 max-pooling, then three linear layers.

    The original pads MNIST to 32x32. Here the first convolution pads by 2 when a side is below 32, so 28x28
    and 32x32 both reach 5x5 maps; the second pads by 2 when its input is below 14, so that 8x8 digits reach
    2x2 maps. ReLU and max-pooling replace the scaled tanh and the trained subsampling, and He initialisation
    replaces the uniform +-2.4 / fan_in that belongs to that tanh.

    Args:
        input_shape: (channels, height, width), at least 8x8.
        classes: number of outputs.
        channels: output channels of the two convolutions; (32, 64) with `hidden=(512,)` is the "LeNet-5" of
            the papers on ternary weights.
        hidden: widths of the linear layers before the classifier.
        norm: batch normalisation behind every layer, the last included, in the order of the papers on binary
            networks: convolution, max-pooling, normalisation, activation. Weights of few bits need it, whose
            size does not follow the fan-in.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        classes: int,
        channels: tuple[int, int] = (6, 16),
        hidden: tuple[int, ...] = (120, 84),
        norm: bool = False,
    ) -> None:
        super().__init__()
        inputs, *sides = image_shape("lenet5", input_shape)
        layers: list[nn.Module] = []
        for outputs, unpadded_from in zip(channels, (32, 14), strict=True):
            padding = 0 if min(sides) >= unpadded_from else KERNEL // 2
            layers.append(nn.Conv2d(inputs, outputs, KERNEL, padding=padding))
            if norm:
                layers += [nn.MaxPool2d(2), nn.BatchNorm2d(outputs), nn.ReLU()]
            else:
                layers += [nn.ReLU(), nn.MaxPool2d(2)]
            sides = [(side + 2 * padding - KERNEL + 1) // 2 for side in sides]
            inputs = outputs
        layers.append(nn.Flatten())
        width = inputs * sides[0] * sides[1]
        for size in hidden:
            layers += [nn.Linear(width, size), *([nn.BatchNorm1d(size)] if norm else []), nn.ReLU()]
            width = size
        layers += [nn.Linear(width, classes), *([nn.BatchNorm1d(classes)] if norm else [])]
        self.layers = nn.Sequential(*layers)
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, channels, height, width), floating -> logits (batch, classes)."""
        return self.layers(x)
