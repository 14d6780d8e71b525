"""Exponential moving averages of a model's weights."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Ema:
    """One averaged copy: w <- decay * w + (1 - decay) * model, after every step.

    Of a model whose weights are sharded over processes, each process averages its own shards.
    """

    def __init__(self, model: nn.Module, *, decay: float, warm_up: bool) -> None:
        """With `warm_up` the decay of step i (from 0) is min(decay, (1 + i) / (10 + i)), for short trainings."""
        self.decay, self.warm_up = decay, warm_up
        self.weights: dict[str, Tensor] = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the model's weights after step `step` (counted from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warm_up else self.decay
        torch._foreach_lerp_(local(self.weights.values()), local(model.parameters()), 1 - decay)


# A sharded tensor, a DTensor, is told by its methods: to import that class takes a second.


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's shards, or the whole tensors where they are not sharded."""
    return [getattr(tensor, "to_local", tensor.detach)() for tensor in tensors]


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process has a part of the tensor."""
    return hasattr(tensor, "full_tensor")


def joined(tensor: Tensor) -> Tensor:
    """The whole tensor, which takes all processes where it is sharded."""
    found: Tensor = getattr(tensor, "full_tensor", lambda: tensor)()
    return found
