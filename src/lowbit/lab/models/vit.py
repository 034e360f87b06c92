"""A small vision transformer (Dosovitskiy et al., 2021, arXiv 2010.11929; DeiT: arXiv 2012.12877)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.lab.models.blocks import Block, check_heads
from lowbit.lab.models.registry import image_shape, model

__all__ = ["ViT"]


@model("vit_tiny")
class ViT(nn.Module):
    """Patches, a class token, learned positions, pre-norm blocks with GELU, a linear head on the class token.

    Width and heads are DeiT-Ti's; the depth is half of its 12, enough for 32x32 images. Weights are drawn as
    in
    DeiT: normal with std 0.02 cut at two std, biases 0; the patch product has std 1 / sqrt(fan_in).

    Args:
        input_shape: (channels, height, width), multiples of `patch`.
        classes: number of outputs.
        patch: side of a patch; None takes 4, and 2 for images below 16 pixels.
        dim: width; depth: blocks; heads: attention heads; dropout: on each branch.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        classes: int,
        patch: int | None = None,
        dim: int = 192,
        depth: int = 6,
        heads: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_heads("vit_tiny", dim, heads)
        channels, height, width = image_shape("vit_tiny", input_shape)
        if patch is None:
            patch = 4 if min(height, width) >= 16 else 2
        if patch < 1 or height % patch or width % patch:
            raise ValueError(f"vit_tiny: {input_shape} doesn't divide into {patch}x{patch} patches; set patch")
        tokens = (height // patch) * (width // patch) + 1
        self.patches = nn.Conv2d(channels, dim, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.zeros(1, tokens, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, nn.GELU(), dropout=dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif weight.ndim > 1:  # everything but the gains of the LayerNorms
                std = 0.02 if weight.ndim != 4 else (channels * patch * patch) ** -0.5
                nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, channels, height, width), floating -> logits (batch, classes)."""
        x = self.patches(x).flatten(2).transpose(1, 2)  # (batch, tokens, dim)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])
