"""Parameters and GFLOPs of a DoD, in the paper's convention and in true FLOPs.

Both are counted by running the model on the meta device, where no numbers are computed. The paper's Table 4 counts 1
for a multiply-add of a Linear layer and 4 (5 with affine weights) for each element of a LayerNorm, and leaves
attention's matrix products out. True FLOPs are torch's own count: 2 for a multiply-add, attention included.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dod_models.model import PRESETS, DoD, ModelConfig, count_parameters

# What the paper prints: millions of parameters in Table 1, GFLOPs in Table 4 (DoD-B alone). It charges stage 1 as much
# as stage 2, though S is one row for all tokens, and a step with it is cheaper.
PAPER: dict[str, dict[str, dict[str, float]]] = {
    "DoD-S": {"params": {"backbone": 27, "lem": 21, "total": 48}, "gflops": {}},
    "DoD-B": {
        "params": {"backbone": 105, "lem": 86, "total": 191},
        "gflops": {"stage1": 26.5, "stage2": 26.5, "lem": 24.6},
    },
    "DoD-XL": {"params": {"backbone": 527, "lem": 86, "total": 613}, "gflops": {}},
}


def paper_gflops(model: nn.Module, call: Callable[[], Tensor]) -> float:
    """GFLOPs of `call` in the convention of Table 4."""
    count = 0

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal count
        if isinstance(module, nn.Linear):
            count += output.numel() * module.in_features
        elif isinstance(module, nn.LayerNorm):
            count += inputs[0].numel() * (5 if module.elementwise_affine else 4)

    hooks = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, nn.Linear | nn.LayerNorm)]
    call()
    for hook in hooks:
        hook.remove()
    return count / 1e9


def true_gflops(model: nn.Module, call: Callable[[], Tensor]) -> float:
    """GFLOPs of `call` as torch counts them."""
    counter = FlopCounterMode(display=False)
    with counter:
        call()
    return counter.get_total_flops() / 1e9


def describe(config: ModelConfig) -> dict[str, Any]:
    """Parameters, and GFLOPs of one sample: a step of stage 1, an unguided step of stage 2, and the LEM once per stage.

    `lem` leaves the sample embedder out, which the paper counts with the backbone: it is part of `stage2`.
    """
    with torch.device("meta"):
        model = DoD(config)
        x, t, label = torch.empty(1, *config.latent_shape), torch.empty(1), torch.empty(1, dtype=torch.long)
        tokens = torch.empty(1, (config.latent_size // config.patch) ** 2, config.lem.width)
    calls: dict[str, Callable[[], Tensor]] = {
        "stage1": lambda: model.velocity(x, t, label),
        "stage2": lambda: model.velocity(x, t, label, model.sample_embed(tokens)),
        "lem": lambda: model.lem(x),
    }
    with torch.no_grad():
        return {
            "params": count_parameters(model),
            "gflops": {
                "paper": {name: paper_gflops(model, call) for name, call in calls.items()},
                "true": {name: true_gflops(model, call) for name, call in calls.items()},
            },
        }


class Spent(NamedTuple):
    """Evaluations of the network that one stage makes for a sample; `null_branch` is what the null ones drop."""

    conditional: float
    null: float = 0.0
    null_branch: str = "both"

    @classmethod
    def stated(cls, about: Mapping[str, Any]) -> "Spent":
        """As the manifest of a stage's samples has it, under `about`."""
        own, null = about["stage_evaluations"], about["null_evaluations"]
        return cls(own - null, null, about["sampling"]["null_branch"])


def per_sample(described: Mapping[str, Any], spent: Sequence[Spent], *, first: int = 1) -> list[dict[str, float]]:
    """GFLOPs of a sample after each stage with all before it, as `gflops_paper` and `gflops_true`.

    `described` is what `describe` returned, `spent` has an item for each stage from number `first` on. From stage 2 on
    the LEM sees the sample of the stage before once, and a null pass costs as much as one with the condition only
    where it keeps the prior. Table 4 has 795 for 30 steps of DoD-B's stage 1, charged like stage 2; ours are 654.
    """
    found: list[dict[str, float]] = []
    total = {f"gflops_{kind}": 0.0 for kind in described["gflops"]}
    for stage, own in enumerate(spent, first):
        for kind, counts in described["gflops"].items():
            step = counts["stage1" if stage == 1 else "stage2"]
            null = counts["stage2" if stage > 1 and own.null_branch == "label" else "stage1"]
            lem = counts["lem"] if stage > 1 else 0.0
            total[f"gflops_{kind}"] += lem + own.conditional * step + own.null * null
        found.append(dict(total))
    return found


def table() -> list[dict[str, Any]]:
    """`describe` for every preset, and under `stated` what the paper prints of it: parameters in millions, GFLOPs."""
    nothing: dict[str, dict[str, float]] = {"params": {}, "gflops": {}}
    return [
        {"name": name, **describe(ModelConfig.model_validate({"preset": name})), "stated": PAPER.get(name, nothing)}
        for name in PRESETS
    ]
