"""Plain PyTorch models, one family per file, without any quantization code.

Rules that let a library change them afterwards: every nonlinearity is a module of its own, every matrix
product is an `nn.Linear`, `nn.Conv2d` or `nn.MultiheadAttention` (called with `need_weights=False`), nothing
works in place.
"""

from lowbit.lab.models import gpt, lenet, mlp, mobilenet, resnet, seq2seq, vgg, vit  # noqa: F401  (they register)
from lowbit.lab.models.registry import MODELS, build, model

__all__ = ["MODELS", "build", "model"]
