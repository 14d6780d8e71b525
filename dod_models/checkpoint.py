"""Weights on disk: safetensors for tensors, JSON for the rest, every file under a digest.

A *checkpoint* holds averaged weights for use; a *resume state* holds what training needs to go on as if it had not
stopped.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dod_models import artifact
from dod_models.model import DoD, ModelConfig

log = logging.getLogger(__name__)

SCHEMA = "checkpoint/1"
STATE_SCHEMA = "state/2"
STATES_KEPT = 2


def weights_file(decay: float) -> str:
    """File name of the weights averaged with `decay`."""
    return f"ema-{decay}.safetensors"


def save_checkpoint(
    folder: Path, averages: dict[float, dict[str, Tensor]], config: ModelConfig, *, about: dict[str, Any]
) -> None:
    """Write one file of weights per EMA decay into `folder`."""
    with artifact.writing(folder, schema=SCHEMA, config=config.digest) as output:
        for decay, weights in averages.items():
            save_file(
                {name: w.detach().cpu().contiguous() for name, w in weights.items()}, output.path / weights_file(decay)
            )
        output.about = {**about, "model": config.model_dump(mode="json"), "decays": sorted(averages)}


def load_checkpoint(folder: Path, *, decay: float) -> tuple[DoD, dict[str, Any]]:
    """The model with the weights averaged at `decay`, digest checked, and the checkpoint's manifest."""
    manifest = artifact.read_manifest(folder, schema=SCHEMA)
    name = weights_file(decay)
    if name not in manifest["files"]:
        raise ValueError(f"{folder}: no weights averaged with decay {decay}; it has {manifest['about']['decays']}")
    artifact.verify(folder, schema=SCHEMA, only=name)
    config = ModelConfig.parse(manifest["about"]["model"], place=str(folder / artifact.MANIFEST))
    model = DoD(config)
    model.load_state_dict(load_file(folder / name))
    return model.eval().requires_grad_(False), manifest


def load_weights(path: Path, *, sha256: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file that must have this digest."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of weights; correct train.warm_start.path")
    found = artifact.sha256_file(path)
    if found != sha256:
        raise ValueError(f"{path}: sha256 is {found}, train.warm_start.sha256 says {sha256}; correct one of them")
    return load_file(path)


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, place: str) -> None:
    """ValueError that names the first tensor of `place` which is missing, unknown, or of another shape."""
    for name in sorted({*found, *expected}):
        if name not in found:
            raise ValueError(f"{place}: no tensor {name}, which this model has")
        if name not in expected:
            raise ValueError(f"{place}: tensor {name} is unknown to this model")
        if found[name].shape != expected[name].shape:
            shapes = f"{tuple(found[name].shape)}, this model's is {tuple(expected[name].shape)}"
            raise ValueError(f"{place}: tensor {name} has shape {shapes}")


def save_state(root: Path, step: int, tensors: dict[str, Tensor], *, config: str, about: dict[str, Any]) -> None:
    """Write the resume state of `step` below `root`; older ones go only after it was read back and verified."""
    folder = root / f"step-{step:09d}"
    with artifact.writing(folder, schema=STATE_SCHEMA, config=config) as output:
        save_file(tensors, output.path / "state.safetensors")
        output.about = {**about, "step": step}
    artifact.verify(folder, schema=STATE_SCHEMA)
    found = sorted(root.glob("step-*"))
    later = [other for other in found if other > folder]  # passed over as damaged, and would crowd this one out
    for old in [*found[: -STATES_KEPT - len(later)], *later]:
        shutil.rmtree(old)


def load_state(root: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and facts of the newest sound state below `root`, or None. A damaged one is named and passed over."""
    for folder in sorted(root.glob("step-*"), reverse=True):
        try:
            manifest = artifact.verify(folder, schema=STATE_SCHEMA)
            return load_file(folder / "state.safetensors"), manifest["about"]
        except (artifact.DamagedError, SafetensorError, OSError) as error:
            log.warning(f"resume state passed over: {error}")
    return None
