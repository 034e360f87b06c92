"""Attention with quantized products: projections as linear layers, and, where the recipe's `layers` names `attention`,
the two products `scores = q k^T` and `context = softmax(scores) v`. Softmax stays in float.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import LayerQuant, QMatmul, Quantized
from .products import LinearProduct

__all__ = ["QMultiheadAttention", "scaled_dot_product_attention"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
PRODUCTS = ("scores", "context")


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *, scores: QMatmul | None = None,
    context: QMatmul | None = None,
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.scaled_dot_product_attention` written as two matrix products, each quantized where given.

    Args:
        query: (..., L, d); key: (..., S, d); value: (..., S, dv).
        attn_mask: broadcastable to (..., L, S); boolean (True takes part) or added to the scores.
        scores, context: the quantized products; None multiplies in float.

    Returns:
        (..., L, dv) in the type of `query`.

    Raises:
        ValueError: both a mask and `is_causal`.
    """
    if is_causal and attn_mask is not None:
        raise ValueError("give attn_mask or is_causal, not both")
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = (query @ key.mT if scores is None else scores(query, key.mT)) * factor
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
    weights = F.dropout(_softmax(logits), dropout_p)
    return (weights @ value if context is None else context(weights, value)).to(query.dtype)


def _softmax(logits: Tensor) -> Tensor:
    # a row that attends to nothing is zero, as in PyTorch, not NaN
    blocked = torch.isneginf(logits).all(-1, keepdim=True)
    return logits.masked_fill(blocked, 0).softmax(-1).masked_fill(blocked, 0)


class QMultiheadAttention(Quantized, nn.MultiheadAttention):
    """`nn.MultiheadAttention` with quantized projections and, if asked for, quantized attention products."""

    projections: nn.ModuleDict
    """LayerQuant of q_proj, k_proj, v_proj and out_proj; a missing one stays float."""
    products: nn.ModuleDict
    """QMatmul of scores and context; empty where attention is left in float."""

    def parts(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Weight and bias of each projection; views of the packed parameter where PyTorch packs them."""
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases: tuple[Tensor | None, ...] = (None,) * 3
        if self.in_proj_bias is not None:
            biases = self.in_proj_bias.chunk(3)
        named: dict[str, tuple[Tensor, Tensor | None]] = dict(
            zip(PROJECTIONS[:3], zip(weights, biases, strict=True), strict=True)
        )
        return named | {"out_proj": (self.out_proj.weight, self.out_proj.bias)}

    def _project(self, name: str, x: Tensor, parts: dict[str, tuple[Tensor, Tensor | None]]) -> Tensor:
        weight, bias = parts[name]
        if name not in self.projections:
            return F.linear(x, weight, bias)
        return self.projections[name](LinearProduct(x.shape, weight.shape), x, weight, bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
                need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
                is_causal: bool = False) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        parts = self.parts()
        n, length, _ = query.shape
        q, k, v = (self._project(p, t, parts).reshape(n, t.shape[1], self.num_heads, -1).transpose(1, 2)
                   for p, t in zip(PROJECTIONS[:3], (query, key, value), strict=True))  # fmt: skip
        mask = self._mask(attn_mask, key_padding_mask, n, q)
        if is_causal and attn_mask is None:
            raise ValueError("nn.MultiheadAttention needs attn_mask when is_causal is set, as PyTorch's own does")
        scores = self.products["scores"] if "scores" in self.products else None
        context = self.products["context"] if "context" in self.products else None
        logits = (q @ k.mT if scores is None else scores(q, k.mT)) / math.sqrt(self.head_dim)
        if mask is not None:
            logits = logits + mask
        weights = _softmax(logits)
        dropped = F.dropout(weights, self.dropout, self.training)
        y = dropped @ v if context is None else context(dropped, v)
        y = self._project("out_proj", y.transpose(1, 2).reshape(n, length, self.embed_dim), parts)
        if average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            y, weights = y.squeeze(0), weights.squeeze(0)
        elif not self.batch_first:
            y = y.transpose(0, 1)
        return y, weights if need_weights else None

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, n: int, q: Tensor) -> Tensor | None:
        """PyTorch's two masks (True blocks) as one additive mask (N, heads or 1, L or 1, S)."""
        total = None
        for mask, kind in ((attn_mask, "attn"), (padding, "padding")):
            if mask is None:
                continue
            if mask.dtype == torch.bool:
                mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(mask, -math.inf)
            if kind == "padding":
                mask = mask.reshape(n, 1, 1, -1)
            elif mask.dim() == 3:
                mask = mask.reshape(n, self.num_heads, *mask.shape[1:])
            total = mask if total is None else total + mask
        return total


def refusal(module: nn.MultiheadAttention) -> str | None:
    """Why a module can't be converted, if it can't."""
    if module.bias_k is not None or module.add_zero_attn:
        return "nn.MultiheadAttention with add_bias_kv or add_zero_attn has no quantized version"
    return None


def convert(module: nn.MultiheadAttention, projections: dict[str, LayerQuant],
            products: dict[str, LayerQuant]) -> None:  # fmt: skip
    """Change `module` in place into a `QMultiheadAttention`."""
    module.__class__ = QMultiheadAttention
    module.projections = nn.ModuleDict(projections)
    module.products = nn.ModuleDict({k: QMatmul(v) for k, v in products.items()})
