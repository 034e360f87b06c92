"""A multilayer perceptron: flattens anything."""

from __future__ import annotations

import math

from torch import Tensor, nn

from lowbit.lab.models.init import he_normal
from lowbit.lab.models.registry import model

__all__ = ["MLP"]


@model("mlp")
class MLP(nn.Module):
    """Linear - (BN) - ReLU for each number in `hidden`, then the classifier; He initialisation.

    Args:
        input_shape: any shape; it is flattened.
        classes: number of outputs.
        hidden: widths of the hidden layers.
        batch_norm: a BatchNorm1d before each ReLU, as networks of binary weights need.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        classes: int,
        hidden: tuple[int, ...] = (256, 256),
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        width = math.prod(input_shape)
        for size in hidden:
            layers.append(nn.Linear(width, size))
            if batch_norm:
                layers.append(nn.BatchNorm1d(size))
            layers.append(nn.ReLU())
            width = size
        layers.append(nn.Linear(width, classes))
        self.layers = nn.Sequential(*layers)
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, *input_shape), floating -> logits (batch, classes)."""
        return self.layers(x)
