"""Attention of Hugging Face models: its two products, quantized where the recipe's `layers` names `attention`.

Models of transformers 5 hand query, key, value and mask to a function that the configuration names
(`config._attn_implementation`). `apply` gives each attention module its pair of quantized products and the model's
configuration the name `lowbit`; the function below uses the pair, and multiplies in float for a module without one, as
the implementation `eager` does. The configuration object is changed in place: another model built from the same object
then runs float attention through this function too.

transformers is imported only once a model has such a module.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .attention import attend, share_heads
from .layers import LayerQuant, QMatmul

__all__ = ["attention_forward", "convert", "has_interface", "own_attention"]

NAME = "lowbit"
UNKNOWN = ("softcap", "s_aux", "position_bias", "cache")
"""What some models pass beside the mask, and this function doesn't compute."""


def _names(module: nn.Module) -> frozenset[str]:
    """Global names and attributes in the forward of a module's class."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return frozenset(() if code is None else code.co_names)


def has_interface(module: nn.Module) -> bool:
    """Whether a module's attention goes through the function that its configuration names."""
    return "ALL_ATTENTION_FUNCTIONS" in _names(module) and hasattr(getattr(module, "config", None), "to_dict")


def own_attention(module: nn.Module) -> str | None:
    """A reason, for modules that compute attention in a way that can't be converted."""
    names, cls = _names(module), type(module)
    if "scaled_dot_product_attention" in names:
        return f"{cls.__name__} calls a function for its attention products; use nn.MultiheadAttention"
    if cls.__module__.startswith("transformers.") and "Attention" in cls.__name__ and names & {"matmul", "bmm"}:
        return f"{cls.__name__} multiplies by itself instead of through the attention interface"
    return None


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """Attention as transformers asks for it.

    Args:
        query: (N, heads, L, d); key, value: (N, heads or fewer, S, d).
        attention_mask: added to the scores, or boolean (True takes part).
        is_causal: counts only without a mask; None asks the module.

    Returns:
        (N, L, heads, d) and the weights (N, heads, L, S).

    Raises:
        ValueError: the model asks for something this function doesn't compute, such as capped scores.
    """
    if unknown := [name for name in UNKNOWN if others.get(name) is not None]:
        raise ValueError(
            f"{type(module).__name__} passes {unknown[0]!r} to its attention, which has no quantized "
            "version; leave 'attention' out of the recipe's layers"
        )
    key, value = (share_heads(t, query.shape[1]) if t.shape[1] != query.shape[1] else t for t in (key, value))
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if attention_mask is None and causal and query.shape[2] > 1:
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    products: Any = getattr(module, "products", {})
    scores = products["scores"] if "scores" in products else None
    context = products["context"] if "context" in products else None
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    y, weights = attend(query, key, value, attention_mask, dropout if module.training else 0.0, factor, scores, context)
    return y.transpose(1, 2).contiguous(), weights


def convert(module: nn.Module, products: dict[str, LayerQuant], undo: list[Callable[[], None]]) -> None:
    """Give an attention module its quantized products and its configuration our function.

    Raises:
        ValueError: the module has something else named `products`.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    if hasattr(module, "products"):
        raise ValueError(
            f"{type(module).__name__} has an attribute 'products' of its own; leave 'attention' out of "
            "the recipe's layers"
        )
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, eager_mask)  # without one transformers would pass no mask at all
    module.products = nn.ModuleDict({k: QMatmul(v) for k, v in products.items()})
    undo.append(lambda: delattr(module, "products"))
    config: Any = module.config
    before = config._attn_implementation
    # the property itself would also set the configurations inside this one
    config._attn_implementation_internal = NAME
    undo.append(lambda: setattr(config, "_attn_implementation_internal", before))
