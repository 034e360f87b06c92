"""A small causal language model of the GPT-2 family (Radford et al., 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.lab.models.blocks import Block, causal_mask, check_heads
from lowbit.lab.models.init import transformer_normal
from lowbit.lab.models.registry import model

__all__ = ["GPT"]


@model("gpt_tiny")
class GPT(nn.Module):
    """Token and position embeddings, pre-norm blocks with GELU, a causal mask, a linear head.

    Initial weights are GPT-2's. The head has a weight of its own, where GPT-2 shares the embedding's: a
    product's weight can then be quantized without touching a table that is only looked up.

    Args:
        input_shape: (block,), the longest context.
        classes: size of the vocabulary.
        dim: width; depth: blocks; heads: attention heads; dropout: on embeddings and on each branch.
    """

    mask: Tensor

    def __init__(
        self,
        input_shape: tuple[int, ...],
        classes: int,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if len(input_shape) != 1:
            raise ValueError(f"gpt_tiny takes token windows of shape (block,); got {input_shape}: use a text source")
        check_heads("gpt_tiny", dim, heads)
        (block,) = input_shape
        self.tokens = nn.Embedding(classes, dim)
        self.positions = nn.Embedding(block, dim)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, nn.GELU(), dropout=dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes, bias=False)
        self.register_buffer("mask", causal_mask(block), persistent=False)
        transformer_normal(self, depth)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, tokens <= block), int64 -> logits of each next token (batch, tokens, classes).

        Raises:
            ValueError: more tokens than `block`.
        """
        length = x.shape[1]
        if length > len(self.mask):
            raise ValueError(f"gpt_tiny was built for {len(self.mask)} tokens; got {length}: cut the context")
        x = self.drop(self.tokens(x) + self.positions(torch.arange(length, device=x.device)))
        for block in self.blocks:
            x = block(x, mask=self.mask[:length, :length])
        return self.head(self.norm(x))
