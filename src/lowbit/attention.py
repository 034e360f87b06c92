"""Attention with quantized products: projections as linear layers, and, where the recipe's `layers` names `attention`,
the two products `scores = q k^T` and `context = softmax(scores) v`. Softmax stays in float.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import LayerQuant, QMatmul, Quantized
from .products import LinearProduct

__all__ = ["QMultiheadAttention", "scaled_dot_product_attention"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
PRODUCTS = ("scores", "context")


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    scores: QMatmul | None = None,
    context: QMatmul | None = None,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` written as two matrix products, each quantized where given.

    Args:
        query: (..., L, d); key: (..., S, d); value: (..., S, dv).
        attn_mask: broadcastable to (..., L, S); boolean (True takes part) or added to the scores.
        scores, context: the quantized products; None multiplies in float.

    Returns:
        (..., L, dv) in the type of `query`.

    Raises:
        ValueError: both a mask and `is_causal`, or heads that can't be shared evenly.
    """
    if is_causal and attn_mask is not None:
        raise ValueError("give attn_mask or is_causal, not both")
    if enable_gqa:
        key, value = (share_heads(t, query.shape[-3]) for t in (key, value))
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return attend(query, key, value, attn_mask, dropout_p, factor, scores, context)[0].to(query.dtype)


def share_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values (..., fewer heads, S, d), each repeated for its group of query heads."""
    if heads % x.shape[-3]:
        raise ValueError(f"{heads} query heads can't share {x.shape[-3]} heads of keys and values evenly")
    return x.repeat_interleave(heads // x.shape[-3], -3)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    factor: float,
    scores: QMatmul | None,
    context: QMatmul | None,
) -> tuple[Tensor, Tensor]:
    """The two products with softmax and dropout between them; also the weights that multiply the values."""
    logits = (query @ key.mT if scores is None else scores(query, key.mT)) * factor
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    weights = F.dropout(_softmax(logits), dropout_p).to(value.dtype)
    return (weights @ value if context is None else context(weights, value)), weights


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

    def grads(self) -> tuple[Tensor | None, ...]:
        """Gradients of the four weights, in the order of `parts`."""
        packed = self.in_proj_weight if self._qkv_same_embed_dim else None
        qkv: tuple[Tensor | None, ...] = (None,) * 3
        if packed is None:
            qkv = (self.q_proj_weight.grad, self.k_proj_weight.grad, self.v_proj_weight.grad)
        elif packed.grad is not None:
            qkv = packed.grad.chunk(3)
        return (*qkv, self.out_proj.weight.grad)

    def _project(
        self,
        name: str,
        x: Tensor,
        parts: dict[str, tuple[Tensor, Tensor | None]],
        memo: dict[str, Any] | None = None,
    ) -> Tensor:
        weight, bias = parts[name]
        if name not in self.projections:
            return F.linear(x, weight, bias)
        return self.projections[name](LinearProduct(x.shape, weight.shape), x, weight, bias, memo)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            one, two = query is key, key is value
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
            key = query if one else key
            value = key if two else value
        parts = self.parts()
        n, length, _ = query.shape
        memo: dict[str, Any] | None = (
            {} if query is key or key is value else None
        )  # self-attention encodes its input once
        q, k, v = (
            self._project(p, t, parts, memo).reshape(n, t.shape[1], self.num_heads, self.head_dim).transpose(1, 2)
            for p, t in zip(PROJECTIONS[:3], (query, key, value), strict=True)
        )
        mask = self._mask(attn_mask, key_padding_mask, n, q)
        if is_causal and attn_mask is None:
            raise ValueError("nn.MultiheadAttention needs attn_mask when is_causal is set, as PyTorch's own does")
        scores: Any = self.products["scores"] if "scores" in self.products else None
        context: Any = self.products["context"] if "context" in self.products else None
        dropout = self.dropout if self.training else 0.0
        if scores is None and context is None and not need_weights:
            y, weights = F.scaled_dot_product_attention(q, k, v, mask, dropout), None
        else:
            y, weights = attend(q, k, v, mask, dropout, 1 / math.sqrt(self.head_dim), scores, context)
        y = self._project("out_proj", y.transpose(1, 2).reshape(n, length, self.embed_dim), parts)
        y = y if batched else y.squeeze(0)
        if batched and not self.batch_first:
            y = y.transpose(0, 1)
        if not need_weights or weights is None:
            return y, None
        weights = weights.mean(1) if average_attn_weights else weights
        return y, weights if batched else weights.squeeze(0)

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
    if type(module).forward is not nn.MultiheadAttention.forward:
        return f"{type(module).__name__} overrides the forward of MultiheadAttention"
    if module.bias_k is not None or module.add_zero_attn:
        return "nn.MultiheadAttention with add_bias_kv or add_zero_attn has no quantized version"
    return None


def convert(module: nn.MultiheadAttention, projections: dict[str, LayerQuant], products: dict[str, LayerQuant]) -> None:
    """Change `module` in place into a `QMultiheadAttention`."""
    cls = type(module)
    plain = cls is nn.MultiheadAttention
    module.__class__ = QMultiheadAttention if plain else type(f"Q{cls.__name__}", (QMultiheadAttention, cls), {})
    module.projections = nn.ModuleDict(projections)
    module.products = nn.ModuleDict({k: QMatmul(v) for k, v in products.items()})
