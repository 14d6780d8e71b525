"""Commands on a checkpoint: a picture of chosen classes, and its samples as a file for others."""

import json
from pathlib import Path
from typing import Any

from dod_models import cli as computations
from dod_pipeline import stages
from dod_pipeline.config import load_params


def generate(checkpoint: str, *, shape: dict[str, Any], seed: int, out: Path) -> int:
    """Sample with the checkpoint's own settings, and write the picture; returns the exit status."""
    params = load_params()
    stages.check_key(params, "stage1", checkpoint)
    inputs, _, _ = stages.paths(params, "stage1", checkpoint)
    settings = {}
    for name in ("stage1", "stage2"):
        job = stages.resolve(params, name, checkpoint)
        batch = min(len(shape["classes"]) * shape["per_class"], job.config.model_dump()["batch_size"])
        settings[name] = job.config.model_dump() | {"seed": seed, "batch_size": batch}
    return compute("generate", {**shape, **settings}, out, {name: inputs[name] for name in ("checkpoint", "codec")})


def export(checkpoint: str, *, stage: int, out: Path) -> int:
    """Write the images of a stage's finished samples as ADM's npz; returns the exit status."""
    params, name = load_params(), f"stage{stage}"
    stages.check_key(params, name, checkpoint)
    inputs, samples, _ = stages.paths(params, name, checkpoint)
    return compute("export", {}, out, {"samples": samples, "codec": inputs["codec"]})


def compute(command: str, config: dict[str, Any], out: Path, inputs: dict[str, Path]) -> int:
    """Run a computation that is no stage."""
    paths = [part for name, path in inputs.items() for part in (f"--{name}", str(path))]
    return computations.main([command, "--config", json.dumps(config), "--out", str(out), *paths])
