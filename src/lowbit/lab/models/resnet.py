"""ResNets for small images (He, Zhang, Ren, Sun, 2016, arXiv 1512.03385, section 4.2).

3 stages of n blocks with 16, 32, 64 channels; depth = 6 n + 2. Shortcuts are the paper's option A: where the
shape changes, every second pixel is taken and the new channels are zero, so shortcuts have no parameters.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lowbit.lab.models.init import he_normal
from lowbit.lab.models.registry import image_shape, model

__all__ = ["BasicBlock", "ResNet", "resnet20", "resnet32", "resnet56"]


class BasicBlock(nn.Module):
    """y = ReLU(BN(conv(ReLU(BN(conv(x))))) + shortcut(x)); x: (batch, inputs, h, w)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act2 = nn.ReLU()
        self.stride, self.extra = stride, outputs - inputs

    def shortcut(self, x: Tensor) -> Tensor:
        """Option A: subsample, and pad the channels with zeros."""
        if self.stride == 1 and self.extra == 0:
            return x
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network of `6 * blocks + 2` layers for images of at least 8x8 pixels; He initialisation.

    Args:
        input_shape: (channels, height, width).
        classes: number of outputs.
        blocks: residual blocks in each of the three stages.
        width: channels of the first stage; the others have 2 and 4 times as many.
    """

    def __init__(self, input_shape: tuple[int, ...], classes: int, blocks: int, width: int = 16) -> None:
        super().__init__()
        channels, _, _ = image_shape(f"resnet{6 * blocks + 2}", input_shape)
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.act = nn.ReLU()
        stages: list[nn.Module] = []
        inputs = width
        for stage in range(3):
            outputs = width * 2**stage
            for block in range(blocks):
                stages.append(BasicBlock(inputs, outputs, stride=2 if stage > 0 and block == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, channels, height, width), floating -> logits (batch, classes)."""
        return self.fc(self.pool(self.blocks(self.act(self.bn(self.conv(x))))).flatten(1))


@model("resnet20")
def resnet20(input_shape: tuple[int, ...], classes: int, width: int = 16) -> ResNet:
    """20 layers, 0.27 M parameters on CIFAR-10."""
    return ResNet(input_shape, classes, 3, width)


@model("resnet32")
def resnet32(input_shape: tuple[int, ...], classes: int, width: int = 16) -> ResNet:
    """32 layers, 0.46 M parameters on CIFAR-10."""
    return ResNet(input_shape, classes, 5, width)


@model("resnet56")
def resnet56(input_shape: tuple[int, ...], classes: int, width: int = 16) -> ResNet:
    """56 layers, 0.85 M parameters on CIFAR-10."""
    return ResNet(input_shape, classes, 9, width)
