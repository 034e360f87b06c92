"""The transformer block that vit_tiny, gpt_tiny and seq2seq share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Block", "FeedForward", "causal_mask", "check_heads"]


def check_heads(name: str, dim: int, heads: int) -> None:
    """Refuse a width that the heads can't share.

    Raises:
        ValueError: `heads` does not divide `dim`.
    """
    if heads < 1 or dim % heads:
        raise ValueError(f"{name}: dim must be a multiple of heads; got dim={dim}, heads={heads}")


def causal_mask(length: int) -> Tensor:
    """(length, length) bool, True where query i must not see key j: j > i."""
    return torch.ones(length, length, dtype=torch.bool).triu(1)


class FeedForward(nn.Module):
    """down(act(up(x))) with four times the width in between; x: (batch, tokens, dim)."""

    def __init__(self, dim: int, act: nn.Module) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 4 * dim)
        self.act = act
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    """Pre-norm: x + attention(LN(x)), then optionally x + attention(LN(x), memory), then x +
    feed-forward(LN(x)).

    Args:
        dim: width.
        heads: attention heads, a divisor of `dim`.
        act: nonlinearity of the feed-forward part, a module of its own for every block.
        cross: also attend to a memory (the decoder of a sequence-to-sequence model).
        dropout: on the output of each branch.
    """

    def __init__(self, dim: int, heads: int, act: nn.Module, cross: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.drop1 = nn.Dropout(dropout)
        if cross:
            self.norm2 = nn.LayerNorm(dim)
            self.cross = nn.MultiheadAttention(dim, heads, batch_first=True)
            self.drop2 = nn.Dropout(dropout)
        self.norm3 = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, act)
        self.drop3 = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        padding: Tensor | None = None,
        memory: Tensor | None = None,
        memory_padding: Tensor | None = None,
    ) -> Tensor:
        """x: (batch, tokens, dim) -> the same shape.

        mask: (tokens, tokens) bool, True hides; padding: (batch, tokens) bool, True hides a key;
        memory: (batch, other tokens, dim) and its padding, for blocks built with `cross`.
        """
        a = self.norm1(x)
        a, _ = self.attention(a, a, a, attn_mask=mask, key_padding_mask=padding, need_weights=False)
        x = x + self.drop1(a)
        if memory is not None:
            a, _ = self.cross(self.norm2(x), memory, memory, key_padding_mask=memory_padding, need_weights=False)
            x = x + self.drop2(a)
        return x + self.drop3(self.feed_forward(self.norm3(x)))
