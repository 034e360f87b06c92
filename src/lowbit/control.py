"""What a model that a recipe was applied to carries beside its layers: the recipe, the step count, the loss scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .layers import LayerQuant
from .quantizer import Quantizer
from .recipe import Recipe, Stage

__all__ = ["Control", "Left", "control_of", "layers_of", "quantizers_of"]


@dataclasses.dataclass(frozen=True)
class Left:
    """A layer with weights that stayed in float, and why."""

    name: str
    type: str
    reason: str


class Control(nn.Module):
    """Registered with the first converted layer, so its buffers are part of the model's `state_dict` and a
    `nn.Sequential` gets no extra member; a model without one carries it as a plain attribute."""

    ATTRIBUTE = "_lowbit_control"
    step: Tensor
    loss_scale: Tensor
    good_steps: Tensor

    def __init__(self, recipe: Recipe, left: tuple[Left, ...], device: torch.device) -> None:
        super().__init__()
        self.recipe, self.left = recipe, left
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device))
        if recipe.loss_scale is not None:
            scale = torch.tensor(float(recipe.loss_scale.value), dtype=torch.float64, device=device)
            self.register_buffer("loss_scale", scale)
            self.register_buffer("good_steps", torch.zeros((), dtype=torch.int64, device=device))
        self.attached: int | None = None
        """id of this object once an optimizer is attached; a deep copy has another id and so is not attached."""

    @property
    def is_attached(self) -> bool:
        return self.attached == id(self)

    def stage(self) -> tuple[int | None, Stage | None]:
        """Index and stage of the schedule that holds at the present step; the last one that matches."""
        step = int(self.step) if self.recipe.schedule else 0
        for i in reversed(range(len(self.recipe.schedule))):
            stage = self.recipe.schedule[i]
            if stage.start <= step and (stage.stop is None or step < stage.stop):
                return i, stage
        return None, None

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        missing = args[2]
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]
        own = {prefix + n for n in self._buffers}  # a float checkpoint has none of them: no error
        missing[:] = [k for k in missing if k not in own]


def find_control(model: nn.Module) -> Control | None:
    """The control of a model, or None."""
    for module in model.modules():
        found = module if isinstance(module, Control) else module.__dict__.get(Control.ATTRIBUTE)
        if found is not None:
            return found
    return None


def control_of(model: nn.Module) -> Control:
    """The control of a model, also inside DDP or `torch.compile`.

    Raises:
        ValueError: no recipe was applied to the model.
    """
    found = find_control(model)
    if found is not None:
        return found
    raise ValueError("no recipe was applied to this model; call lowbit.apply(model, recipe) first")


def layers_of(model: nn.Module) -> dict[str, LayerQuant]:
    """The quantizers of each converted layer, by the layer's name."""
    return {m.name: m for m in model.modules() if isinstance(m, LayerQuant)}


def quantizers_of(model: nn.Module) -> Iterator[Quantizer]:
    """Every quantizer of a model."""
    return (m for m in model.modules() if isinstance(m, Quantizer))
