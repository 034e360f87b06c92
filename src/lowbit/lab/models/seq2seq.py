"""A small encoder-decoder transformer (Vaswani et al., 2017, arXiv 1706.03762)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lowbit.lab.models.blocks import Block, causal_mask, check_heads
from lowbit.lab.models.registry import model

__all__ = ["PAD", "Seq2Seq", "sinusoids"]

PAD = 0
"""The token that fills short sentences, as in the `pairs` data source."""


def sinusoids(length: int, dim: int) -> Tensor:
    """(length, dim): sin and cos of position / 10000^(2i / dim), interleaved (section 3.5)."""
    angle = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :dim]


@model("seq2seq")
class Seq2Seq(nn.Module):
    """Encoder and decoder of `depth` blocks each, one vocabulary and one embedding for both languages.

    As in the paper: embeddings times sqrt(dim), sinusoidal positions, ReLU, one embedding for both sides.
    Different: pre-norm blocks, which train without a long warm-up, and a head with a weight of its own.
    Initial weights: Glorot uniform for products, std 1 / sqrt(dim) for the embedding, as in the authors'
    code.

    Args:
        input_shape: (2, length), as the `pairs` data source gives it.
        classes: size of the shared vocabulary; token 0 is padding.
        dim: width; depth: blocks on each side; heads: attention heads; dropout: on embeddings and on each
            branch.
    """

    mask: Tensor
    positions: Tensor

    def __init__(
        self,
        input_shape: tuple[int, ...],
        classes: int,
        dim: int = 128,
        depth: int = 2,
        heads: int = 4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if len(input_shape) != 2 or input_shape[0] != 2:
            raise ValueError(
                f"seq2seq takes sentence pairs of shape (2, length); got {input_shape}: use a pairs source"
            )
        check_heads("seq2seq", dim, heads)
        length = input_shape[1]
        self.tokens = nn.Embedding(classes, dim)
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.ModuleList(Block(dim, heads, nn.ReLU(), dropout=dropout) for _ in range(depth))
        self.encoder_norm = nn.LayerNorm(dim)
        self.decoder = nn.ModuleList(Block(dim, heads, nn.ReLU(), cross=True, dropout=dropout) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes, bias=False)
        self.register_buffer("mask", causal_mask(length), persistent=False)
        self.register_buffer("positions", sinusoids(length, dim), persistent=False)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.normal_(self.tokens.weight, std=dim**-0.5)  # MultiheadAttention starts as Glorot uniform by itself

    def embed(self, tokens: Tensor) -> Tensor:
        """(batch, n) int64 -> (batch, n, dim)."""
        scale = math.sqrt(self.tokens.embedding_dim)
        return self.drop(self.tokens(tokens) * scale + self.positions[: tokens.shape[1]])

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """source: (batch, n) int64 -> memory (batch, n, dim) and its padding (batch, n), True where ignored.

        The first token is never ignored, so that an empty sentence has something to attend to.
        """
        padding = (source == PAD) & (torch.arange(source.shape[1], device=source.device) > 0)
        x = self.embed(source)
        for block in self.encoder:
            x = block(x, padding=padding)
        return self.encoder_norm(x), padding

    def decode(self, target: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        """target: (batch, m) int64 -> logits of each next token (batch, m, classes).

        Padding in the target needs no mask of its own: it only follows the sentence, where the causal mask
        hides it.
        """
        length = target.shape[1]
        x = self.embed(target)
        for block in self.decoder:
            x = block(x, mask=self.mask[:length, :length], memory=memory, memory_padding=padding)
        return self.head(self.decoder_norm(x))

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, 2, n <= length), int64: source and shifted target -> logits (batch, n, classes).

        Raises:
            ValueError: another shape.
        """
        if x.ndim != 3 or x.shape[1] != 2 or x.shape[2] > len(self.mask):
            raise ValueError(f"seq2seq was built for (batch, 2, up to {len(self.mask)}) tokens; got {tuple(x.shape)}")
        return self.decode(x[:, 1], *self.encode(x[:, 0]))
