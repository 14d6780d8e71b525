"""Command `generate`: a picture of chosen classes through any number of stages."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, PositiveInt

from dod_models import picture
from dod_models.checkpoint import load_checkpoint
from dod_models.codec import Codec, device
from dod_models.config import Frozen
from dod_models.sample import SampleConfig, sample_stage


class GenerateConfig(Frozen):
    """Classes, stages, and how each stage samples."""

    classes: tuple[int, ...] = Field(min_length=1)  # class numbers, one column each
    num_stages: PositiveInt = 2
    per_class: PositiveInt = 4
    stage1: SampleConfig
    stage2: SampleConfig  # of every later stage too


def generate(config: GenerateConfig, *, checkpoint: Path, codec: Path, out: Path) -> dict[str, Any]:
    """Sample `per_class` images of each class, and write the grid `out`: every sample's stages under each other."""
    model, _ = load_checkpoint(checkpoint, decay=config.stage1.ema_decay)
    model.to(device())
    wrong = [c for c in config.classes if not 0 <= c < model.config.num_classes]
    if wrong:
        raise ValueError(f"--class {wrong[0]}: the model knows classes 0 to {model.config.num_classes - 1}")
    decoder, columns = Codec.load(codec), len(config.classes)
    labels = torch.tensor(config.classes).repeat(config.per_class)
    latents, rows = None, []
    for stage in range(1, config.num_stages + 1):
        settings = config.stage1 if stage == 1 else config.stage2
        latents, _ = sample_stage(model, settings, stage=stage, labels=labels, previous=latents)
        images = np.concatenate(list(decoder.decode_all(latents)))
        grid = [list(images[i * columns : (i + 1) * columns]) for i in range(config.per_class)]
        rows.append([(f"stage {stage}", images_of_row) for images_of_row in grid])
    interleaved = [row for sample_rows in zip(*rows, strict=True) for row in sample_rows]
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save_grid(out, interleaved, columns=[str(c) for c in config.classes], group=config.num_stages)
    return {"picture": str(out), "samples": len(labels)}
