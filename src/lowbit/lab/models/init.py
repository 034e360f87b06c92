"""Initial weights, each from the paper that introduced them. In place, for a whole model."""

from __future__ import annotations

import math

from torch import nn

__all__ = ["he_normal", "transformer_normal"]


def he_normal(model: nn.Module) -> None:
    """Normal with variance 2 / fan_in, biases 0 (He et al., 2015, arXiv 1502.01852, equation 10)."""
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def transformer_normal(model: nn.Module, depth: int, std: float = 0.02) -> None:
    """Normal with `std` for products and embeddings, biases 0; the projections that end a residual branch are
    divided by sqrt(2 * depth), the number of such branches (GPT-2, Radford et al., 2019, section 2.3).

    A branch ends in `out_proj` of an attention or in a layer named `down`.
    """
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Embedding)):
            nn.init.normal_(layer.weight, std=std)
        if isinstance(layer, nn.MultiheadAttention):
            nn.init.normal_(layer.in_proj_weight, std=std)
            nn.init.zeros_(layer.in_proj_bias)
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
    for name, weight in model.named_parameters():
        if name.endswith(("out_proj.weight", "down.weight")):
            nn.init.normal_(weight, std=std / math.sqrt(2 * depth))
