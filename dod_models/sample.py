"""Sampling a DoD: guidance, solvers, and the stages `stage1` and `stage2` (section 3.2).

Sample i has noise and label of its own, a function of (seed, stage, i), and micro-batches start at fixed indices and
are padded to full size: with Euler, sample i is bit-equal whatever the number of samples and processes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field, PositiveInt
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchdiffeq import odeint
from tqdm import tqdm

from dod_models import artifact, draws, picture
from dod_models.blocks import Tokens
from dod_models.checkpoint import load_checkpoint
from dod_models.codec import Codec, device
from dod_models.config import Frozen
from dod_models.flow import Latent, Velocity
from dod_models.model import DoD, Labels

SCHEMA = "samples/1"
SAMPLES_FILE = "samples.safetensors"
GUIDED_CHANNELS = 3  # "first3": the peers guide the first three of four latent channels


class SampleConfig(Frozen):
    """One stage's sampling."""

    num_samples: PositiveInt = 50_000
    solver: Literal["euler", "dopri5"] = "dopri5"
    num_steps: PositiveInt = 30  # Euler steps; dopri5 chooses its own
    guidance: float = Field(1.0, ge=0)  # CFG scale; 1 = off
    null_branch: Literal["both", "label", "prior"] = "both"  # what the unconditional half drops
    channels: Literal["first3", "all"] = "first3"  # latent channels that are guided
    ema_decay: float = 0.999  # which averaged weights
    batch_size: PositiveInt = 250  # samples through the network at a time
    seed: int = Field(0, ge=0)


class Samples(NamedTuple):
    """Scaled latents of finished samples, and their classes."""

    latents: Float[Tensor, "N C H W"]
    labels: Int[Tensor, " N"]

    @classmethod
    def load(cls, folder: Path) -> "Samples":
        """Read a finished sampling stage, its digest checked."""
        artifact.verify(folder, schema=SCHEMA, only=SAMPLES_FILE)
        tensors = load_file(folder / SAMPLES_FILE)
        return cls(tensors["latents"], tensors["labels"])


class GuidedVelocity:
    """uncond + scale * (cond - uncond), and a count of the network's evaluations.

    `sample` is the embedded prior (None in stage 1). The null branch (null label, S) is exact for any batch: it is a
    pass of its own, with one condition per sample instead of one per token.
    """

    def __init__(self, model: DoD, labels: Labels, sample: Tokens | None, config: SampleConfig) -> None:
        self.model, self.labels, self.sample = model, labels, sample
        self.scale = config.guidance
        self.guided = GUIDED_CHANNELS if config.channels == "first3" else model.config.channels
        null_labels = torch.full_like(labels, model.config.num_classes)
        self.null_labels = labels if config.null_branch == "prior" else null_labels
        self.null_sample = sample if config.null_branch == "label" else None
        if config.guidance != 1 and config.null_branch == "prior" and sample is None:
            raise ValueError("null_branch 'prior' drops nothing in stage 1; use 'both', or guidance 1")
        self.evaluations = 0

    def __call__(self, x: Latent, t: Float[Tensor, " B"]) -> Latent:
        self.evaluations += 1
        conditional = self.model.velocity(x, t, self.labels, self.sample)
        if self.scale == 1:
            return conditional
        self.evaluations += 1
        free = self.model.velocity(x, t, self.null_labels, self.null_sample)
        guided = free + self.scale * (conditional - free)
        return torch.cat([guided[:, : self.guided], conditional[:, self.guided :]], dim=1)


def per_sample_norm(difference: Tensor) -> Tensor:
    """dopri5's error norm: the largest root mean square of any sample, so that each one meets the tolerance."""
    return difference.flatten(1).square().mean(dim=1).max().sqrt()


def integrate(velocity: Velocity, noise: Latent, *, solver: str, num_steps: int) -> Latent:
    """Integrate from noise (t = 0) to data (t = 1). Euler calls `velocity` exactly `num_steps` times."""

    def derivative(t: Tensor, x: Tensor) -> Tensor:
        return velocity(x, t.expand(len(x)))

    if solver == "euler":
        times = torch.linspace(0, 1, num_steps + 1, device=noise.device)
        path = odeint(derivative, noise, times, method="euler")
    else:
        times = torch.tensor([0.0, 1.0], device=noise.device)
        options = {"norm": per_sample_norm}
        path = odeint(derivative, noise, times, method="dopri5", atol=1e-6, rtol=1e-3, options=options)
    end: Tensor = path[-1]
    return end


def micro_batches(total: int, size: int) -> Iterator[tuple[range, int]]:
    """Index ranges of full size, and how many of each are wanted: the last is padded with further indices."""
    for start in range(0, total, size):
        yield range(start, start + size), min(size, total - start)


@torch.inference_mode()
def sample_stage(
    model: DoD, config: SampleConfig, *, stage: int, labels: Labels, previous: Latent | None
) -> tuple[Latent, float]:
    """Run one stage for every label; from stage 2 on `previous` holds the latents of the stage before.

    Returns the latents and the network evaluations per sample.
    """
    device, parts, evaluations = model.no_sample.device, [], 0
    for rows, wanted in tqdm(list(micro_batches(len(labels), config.batch_size)), desc=f"stage {stage}", unit="batch"):
        inside = torch.tensor([min(i, len(labels) - 1) for i in rows])
        noise = draws.noise_for(config.seed, f"stage{stage}", list(rows), model.config.latent_shape).to(device)
        prior = None if previous is None else model.embed_sample(previous[inside].to(device))
        velocity = GuidedVelocity(model, labels[inside].to(device), prior, config)
        end = integrate(velocity, noise, solver=config.solver, num_steps=config.num_steps)
        parts.append(end[:wanted].cpu())
        evaluations += velocity.evaluations * wanted
    latents = torch.cat(parts)
    if not bool(latents.isfinite().all()):
        raise FloatingPointError(
            f"stage {stage}: latents are not finite; lower guidance ({config.guidance}) or train longer"
        )
    return latents, evaluations / len(labels)


def build_stage(
    config: SampleConfig, *, checkpoint: Path, codec: Path, out: Path, previous: Path | None = None
) -> dict[str, Any]:
    """Stage `stage1`, or with the samples of a stage in `previous` the next one (eq. 5).

    Writes latents and a grid, in which the stage before stands above this one.

    `evaluations` in the manifest are of the network, per sample, those of the earlier stages included.
    """
    model, _ = load_checkpoint(checkpoint, decay=config.ema_decay)
    stage, spent, before = 1, 0.0, None
    labels = draws.labels_for(config.seed, range(config.num_samples), model.config.num_classes)
    if previous is not None:
        about = artifact.read_manifest(previous, schema=SCHEMA)["about"]
        stage, spent, (before, labels) = about["stage"] + 1, about["evaluations"], Samples.load(previous)
    if len(labels) != config.num_samples:
        raise ValueError(f"{previous} holds {len(labels)} samples, num_samples is {config.num_samples}; make it again")
    with artifact.writing(out, schema=SCHEMA, config=config.digest) as folder:
        latents, evaluations = sample_stage(model.to(device()), config, stage=stage, labels=labels, previous=before)
        save_file({"latents": latents, "labels": labels}, folder.path / SAMPLES_FILE)
        shown = [] if before is None else [(f"stage {stage - 1}", before)]
        draw_grid(folder.path / "grid.png", [*shown, (f"stage {stage}", latents)], labels, Codec.load(codec))
        facts = {"stage": stage, "evaluations": spent + evaluations}
        folder.about = {
            **facts,
            "sampling": config.model_dump(mode="json"),
            "weights": artifact.sha256_file(checkpoint / artifact.MANIFEST),
            "previous": previous and artifact.sha256_file(previous / artifact.MANIFEST),
        }
    return {**facts, "num_samples": len(labels)}


def draw_grid(
    path: Path, stages: list[tuple[str, Latent]], labels: Labels, codec: Codec, *, per_class: int = 4
) -> None:
    """A picture with a column per class (ten at most); for each sample the stages stand under each other."""
    classes = labels.unique()[:10].tolist()
    chosen = {c: (labels == c).nonzero()[:per_class, 0] for c in classes}
    rows = []
    for place in range(per_class):
        picks = [found[place].item() if place < len(found) else None for found in chosen.values()]
        for title, latents in stages:
            images = [None if i is None else codec.decode(latents[int(i)][None])[0] for i in picks]
            rows.append((title, images))
    picture.save_grid(path, rows, columns=[str(c) for c in classes], group=len(stages))
