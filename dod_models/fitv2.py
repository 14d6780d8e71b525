"""Command `fitv2`: a released checkpoint of FiTv2, the paper's backbone, as a checkpoint of ours.

Under S alone, with S = 0, our backbone is FiTv2. Names differ, and some of our layers are several of FiTv2's, stacked.
The names are those of https://github.com/whlzy/FiT at fe40110 (`fit/model/fit_model.py`, `fit/model/modules.py`) with
`configs/fitv2/config_fitv2_xl.yaml`, and of timm's SwiGLU, in which `fc1_g` is the gate. Every Linear there has a bias,
no norm has weights, and modulation comes in the order shift, scale, gate of attention, then of the MLP: as ours.
"""

import logging
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dod_models import artifact, draws
from dod_models.checkpoint import save_checkpoint
from dod_models.config import Frozen
from dod_models.model import DoD, ModelConfig

log = logging.getLogger(__name__)

# Our layer -> FiTv2's layers, whose rows it holds one after the other.
LAYERS: dict[str, tuple[str, ...]] = {
    "patch_embed": ("x_embedder.proj",),
    "time_embed.mlp.0": ("t_embedder.mlp.0",),
    "time_embed.mlp.2": ("t_embedder.mlp.2",),
    "final.out": ("final_layer.linear",),
}
BLOCK: dict[str, tuple[str, ...]] = {  # the same below `blocks.N`
    "attention.qkv": ("attn.qkv",),
    "attention.out": ("attn.proj",),
    "mlp.gate_value": ("mlp.fc1_g", "mlp.fc1_x"),
    "mlp.out": ("mlp.fc2",),
    "lora_up": ("adaLN_modulation.2",),
}
TABLE = {"label_embed.table.weight": ("y_embedder.embedding_table.weight",)}  # the last row is the null label in both
MODULATION = ("global_adaLN_modulation.1", "final_layer.adaLN_modulation.1")  # of `modulation`, and then
LOW_RANK = "adaLN_modulation.1"  # of every block
BUFFERS = "rel_pos_embed."  # frequencies of the 2-D RoPE, which follow from the size
SHOWN = 5  # names in a message


class Fitv2Config(Frozen):
    """What the file holds, and how the rest is drawn."""

    model: ModelConfig  # of FiTv2's depth, width and heads
    ema_decay: float = Field(0.9999, gt=0, lt=1)  # of the file's averaged weights: train_fitv2.py's default
    seed: int = Field(0, ge=0)  # of what FiTv2 has not: the LEM and the sample embedder


def sources(depth: int) -> dict[str, tuple[str, ...]]:
    """Each tensor of our backbone under S -> FiTv2's tensors, to be stacked along dimension 0."""
    layers = dict(LAYERS)
    layers["modulation"] = (*MODULATION, *(f"blocks.{i}.{LOW_RANK}" for i in range(depth)))
    for i in range(depth):
        for ours, theirs in BLOCK.items():
            layers[f"blocks.{i}.{ours}"] = tuple(f"blocks.{i}.{name}" for name in theirs)
    kinds = ("weight", "bias")
    found = {
        f"{ours}.{kind}": tuple(f"{n}.{kind}" for n in theirs) for ours, theirs in layers.items() for kind in kinds
    }
    return found | TABLE


def from_fitv2(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our backbone's tensors, of S = 0, from FiTv2's; ValueError that names every tensor out of place.

    Each of FiTv2's tensors is used exactly once; only the buffers of its RoPE are left out.
    """
    check_depth(tensors, config.depth)
    mapping = sources(config.depth)
    wanted = {name for names in mapping.values() for name in names}
    given = {name for name in tensors if not name.startswith(BUFFERS)}
    for what, odd in (("lacks", wanted - given), ("has, and FiTv2 has not,", given - wanted)):
        if odd:
            raise ValueError(f"the file {what} {listed(odd)}; give a checkpoint of whlzy/FiT's FiTv2 at 256 pixels")
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in DoD(config).named_parameters()}
    found = {"no_sample": torch.zeros(shapes["no_sample"])}
    for ours, names in mapping.items():
        parts, shape = [tensors[name] for name in names], shapes[ours]
        if {part.shape[1:] for part in parts} != {shape[1:]} or sum(part.numel() for part in parts) != shape.numel():
            raise ValueError(
                f"{' + '.join(names)}: shape {', '.join(str(tuple(part.shape)) for part in parts)}, our {ours} has "
                f"{tuple(shape)}; set model.width, model.num_classes, model.patch and model.channels to the file's"
            )
        found[ours] = torch.cat(parts)
    return found


def check_depth(tensors: dict[str, Tensor], depth: int) -> None:
    """ValueError that says which depth to set, where the file has blocks and their number is another."""
    blocks = {int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
    if blocks and max(blocks) + 1 != depth:
        raise ValueError(f"the file has {max(blocks) + 1} blocks, model.depth is {depth}; set it to {max(blocks) + 1}")


def listed(names: set[str]) -> str:
    """The first names, and how many there are beyond."""
    first = ", ".join(sorted(names)[:SHOWN])
    return first + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def read(weights: Path) -> dict[str, Tensor]:
    """The tensors of a file in safetensors' or torch's format, whatever its name, without running code in it."""
    try:
        return load_file(weights)
    except SafetensorError:
        pass  # FiTv2's own loader expects files named .safetensors that torch.save wrote
    try:
        found = torch.load(weights, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"neither safetensors nor torch's tensors alone: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError("not a state dict of tensors; save the model's `state_dict()` alone")
    return found


def convert(config: Fitv2Config, *, weights: Path, out: Path) -> dict[str, Any]:
    """Write the checkpoint `out`: FiTv2's weights with S = 0, and a LEM and sample embedder that have learned nothing.

    Returns the number of FiTv2's parameters and the file's sha256, which the checkpoint's manifest states too.
    """
    try:
        tensors = {name: tensor.float() for name, tensor in read(weights).items()}
        backbone = from_fitv2(tensors, config.model)
    except ValueError as error:
        raise ValueError(f"{weights}: {error}") from None
    left_out = sorted(name for name in tensors if name.startswith(BUFFERS))
    if left_out:
        log.info(f"fitv2: left out, for they follow from the size: {', '.join(left_out)}")
    with draws.seeded(config.seed, "model"):
        fresh = DoD(config.model).state_dict()
    about = {"fitv2": artifact.sha256_file(weights), "left_out": left_out, "seed": config.seed}
    save_checkpoint(out, {config.ema_decay: fresh | backbone}, config.model, about=about)
    used = sum(tensor.numel() for name, tensor in tensors.items() if name not in left_out)
    return {"parameters": used, "sha256": about["fitv2"]}
