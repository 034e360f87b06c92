"""Layers that a method puts in place of others (`Recipe.swaps`): by name, so that a recipe stays plain data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backward import in_range
from .formats import ap2

__all__ = ["SWAPS", "HardTanh", "ShiftBatchNorm"]


class HardTanh(nn.Hardtanh):
    """`nn.Hardtanh` from -1 to 1 whose gradient lies in memory as x does. PyTorch's lies as the gradient that comes in,
    and in a channels-last network batch norm is slow with one that is contiguous, as an average pool leaves it."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return in_range(x, F.hardtanh(x.detach()), -1.0, 1.0, closed=False)


class _ShiftNorm(torch.autograd.Function):
    """y = ap2(gamma) * (x - mean) * ap2(istd) + beta; in training `mean` and `istd` are those of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, istd: Tensor, training: bool) -> Tensor:
        wide = (1, -1, *[1] * (x.ndim - 2))
        centred = x - mean.reshape(wide)
        inverse, slope = ap2(istd).reshape(wide), ap2(gamma).reshape(wide)
        ctx.save_for_backward(centred, inverse, slope)
        ctx.training = training
        return slope * (centred * inverse) + beta.reshape(wide)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,) = grads
        centred, inverse, slope = ctx.saved_tensors
        axes = [d for d in range(g.ndim) if d != 1]
        grad_gamma, grad_beta = (ap2(centred * inverse) * g).sum(axes), g.sum(axes)
        if ctx.training:
            shifted = ap2(centred)
            g = g - g.mean(axes, True) - shifted * inverse.square() * (shifted * g).mean(axes, True)
        return inverse * slope * g, grad_gamma, grad_beta, None, None, None


class ShiftBatchNorm(nn.Module):
    """Batch norm whose multiplications are shifts (Courbariaux et al. 2016, arXiv 1602.02830, algorithm 3), with
    ap2(x) the power of two nearest to x in the exponent and C = x - mean(x), over all axes but the second:

        var = mean(C ap2(C))        inv = ap2(1 / sqrt(var + eps))        y = ap2(gamma) C inv + beta

    Backward as the authors' release, c = ap2(C):

        dL/dx = inv ap2(gamma) (g - mean(g) - c inv^2 mean(c g))
        dL/dgamma = sum ap2(C inv) g             dL/dbeta = sum g

    The running values are those of the mean and of 1 / sqrt(var + eps) before ap2, r <- (1 - m) r + m * batch with
    m = 0.125. A checkpoint of an ordinary batch norm loads; its variance becomes 1 / sqrt(var + eps).
    """

    running_mean: Tensor
    running_istd: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.125) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_istd", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    @staticmethod
    def replacing(old: nn.Module) -> ShiftBatchNorm:
        """The shift-based version of a `nn.BatchNorm` layer, with its parameters and running values."""
        first = next(iter(old.state_dict().values()), torch.zeros(()))
        new = ShiftBatchNorm(old.num_features).to(first.device, first.dtype)  # type: ignore[arg-type]
        new.load_state_dict(old.state_dict(), strict=False)
        return new

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"ShiftBatchNorm needs (batch, {self.num_features}, ...); got {tuple(x.shape)}")
        y = x if x.dtype == torch.float64 else x.float()
        mean, istd = self.running_mean, self.running_istd
        if self.training:
            if x.numel() <= self.num_features:
                shape = tuple(x.shape)
                raise ValueError(f"batch norm needs more than one value per channel in training; got {shape}")
            with torch.no_grad():
                axes = [d for d in range(x.ndim) if d != 1]
                mean = y.mean(axes)
                centred = y - y.mean(axes, True)
                istd = ((centred * ap2(centred)).mean(axes) + self.eps).rsqrt()
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_istd.lerp_(istd.to(self.running_istd.dtype), self.momentum)
                self.num_batches_tracked += 1
        return _ShiftNorm.apply(
            y, self.weight.to(y.dtype), self.bias.to(y.dtype), mean.to(y.dtype), istd.to(y.dtype), self.training
        ).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        variance = state_dict.pop(f"{prefix}running_var", None)
        if variance is not None:
            state_dict[f"{prefix}running_istd"] = (variance + self.eps).rsqrt()
        super()._load_from_state_dict(state_dict, prefix, *args)


SWAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "Identity": lambda old: nn.Identity(),
    "ReLU": lambda old: nn.ReLU(),
    "Hardtanh": lambda old: HardTanh(),
    "BatchNorm1d": lambda old: nn.BatchNorm1d(old.num_features),  # type: ignore[arg-type]
    "BatchNorm2d": lambda old: nn.BatchNorm2d(old.num_features),  # type: ignore[arg-type]
    "GELU": lambda old: nn.GELU(),
    "SiLU": lambda old: nn.SiLU(),
    "ShiftBatchNorm": ShiftBatchNorm.replacing,
    "Dropout": lambda old: nn.Dropout(getattr(old, "p", 0.5)),
}
"""What may stand in a swap: name to a function that makes the new layer from the old one."""
