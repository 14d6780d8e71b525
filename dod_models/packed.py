"""Sampling on a CPU with weights that oneDNN has laid out for its matrix products, which is faster than MKL's.

benchmarks/2026-11-23-model.md has the figures. Training can't gain from it: there the weights change with each step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def linear(weight: Any, bias: Tensor | None, x: Tensor) -> Tensor:
    """x W^T + b, W as `_reorder_linear_weight` laid it out."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Within, the Linear layers of a float32 model on a CPU use a packed copy of their weights; elsewhere, nothing.

    The results agree to float32's last bits. A weight that changes within is not seen.
    """
    layers = []
    if torch.backends.mkldnn.is_available():
        layers = [m for m in model.modules() if type(m) is nn.Linear and is_plain(m.weight)]
    with torch.no_grad():
        for layer in layers:
            weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight, None)
            layer.__dict__["forward"] = partial(linear, weight, layer.bias)  # found before the class's
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def is_plain(weight: Tensor) -> bool:
    """Whether oneDNN's product takes this weight."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32
