"""Sampling a DoD: guidance, solvers, and the stages `stage1` and `stage2` (section 3.2).

Sample i has noise and label of its own, a function of (seed, stage, i), and micro-batches start at fixed indices and
are padded to full size: with Euler, sample i is bit-equal whatever the number of samples and processes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field, PositiveFloat, PositiveInt, field_validator
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
from dod_models.packed import packed_weights

SCHEMA = "samples/2"
SAMPLES_FILE = "samples.safetensors"
GUIDED_CHANNELS = 3  # "first3": the peers guide the first three of four latent channels
ALWAYS = (0.0, 1.0)


class SampleConfig(Frozen):
    """One stage's sampling."""

    num_samples: PositiveInt = 50_000
    solver: Literal["euler", "dopri5"] = "dopri5"
    num_steps: PositiveInt = 30  # Euler steps; dopri5 chooses its own
    rtol: PositiveFloat = 1e-3  # of dopri5; this and the next are SiT's, the paper states none
    atol: PositiveFloat = 1e-6
    guidance: float = Field(1.0, ge=0)  # CFG scale; 1 = off
    guidance_interval: tuple[float, float] = ALWAYS  # guide where low <= t < high; t is 0 at noise and 1 at data
    null_branch: Literal["both", "label", "prior"] = "both"  # what the unconditional half drops
    channels: Literal["first3", "all"] = "first3"  # latent channels that are guided
    ema_decay: float = 0.999  # which averaged weights
    batch_size: PositiveInt = 250  # samples through the network at a time
    seed: int = Field(0, ge=0)

    @field_validator("guidance_interval")
    @classmethod
    def check_interval(cls, interval: tuple[float, float]) -> tuple[float, float]:
        """The interval is one, within [0, 1]."""
        low, high = interval
        if not 0 <= low < high <= 1:
            raise ValueError("give (low, high) with 0 <= low < high <= 1; guidance 1 switches guidance off")
        return interval


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


class Evaluations(NamedTuple):
    """How often the network was evaluated for a sample: with its condition, and for guidance without it."""

    conditional: float
    null: float

    @property
    def total(self) -> float:
        return self.conditional + self.null


class GuidedVelocity:
    """null + scale * (conditional - null) within the interval of guidance, and counts of the network's evaluations.

    `sample` is the embedded prior (None in stage 1). The null branch (null label, S) is exact for any batch: it is a
    pass of its own, with one condition per sample instead of one per token. Outside the interval (Kynkäänniemi et al.,
    2024, arXiv 2404.07724) the conditional velocity stands alone, at one evaluation. All rows must have one time.
    """

    def __init__(self, model: DoD, labels: Labels, sample: Tokens | None, config: SampleConfig) -> None:
        self.model, self.labels, self.sample = model, labels, sample
        self.scale, self.interval = config.guidance, config.guidance_interval
        self.guided = GUIDED_CHANNELS if config.channels == "first3" else model.config.channels
        null_labels = torch.full_like(labels, model.config.num_classes)
        self.null_labels = labels if config.null_branch == "prior" else null_labels
        self.null_sample = sample if config.null_branch == "label" else None
        if config.guidance != 1 and config.null_branch == "prior" and sample is None:
            raise ValueError("null_branch 'prior' drops nothing in stage 1; use 'both', or guidance 1")
        self.conditional_calls = self.null_calls = 0

    def is_guided(self, t: Float[Tensor, " B"]) -> bool:
        """Whether guidance applies at this time."""
        if self.scale == 1 or self.interval == ALWAYS:
            return self.scale != 1
        low, high = self.interval
        now = round(float(t[0]), 6)  # Euler's times are float32: 0.7 would fall outside of (0.7, 1)
        return low <= now and (now < high or high == 1)

    def __call__(self, x: Latent, t: Float[Tensor, " B"]) -> Latent:
        self.conditional_calls += 1
        conditional = self.model.velocity(x, t, self.labels, self.sample)
        if not self.is_guided(t):
            return conditional
        self.null_calls += 1
        free = self.model.velocity(x, t, self.null_labels, self.null_sample)
        guided = free + self.scale * (conditional - free)
        return torch.cat([guided[:, : self.guided], conditional[:, self.guided :]], dim=1)


def per_sample_norm(difference: Tensor) -> Tensor:
    """dopri5's error norm: the largest root mean square of any sample, so that each one meets the tolerance."""
    return difference.flatten(1).square().mean(dim=1).max().sqrt()


def integrate(velocity: Velocity, noise: Latent, config: SampleConfig) -> Latent:
    """Integrate from noise (t = 0) to data (t = 1). Euler calls `velocity` exactly `num_steps` times."""

    def derivative(t: Tensor, x: Tensor) -> Tensor:
        return velocity(x, t.expand(len(x)))

    if config.solver == "euler":
        times = torch.linspace(0, 1, config.num_steps + 1, device=noise.device)
        path = odeint(derivative, noise, times, method="euler")
    else:
        times = torch.tensor([0.0, 1.0], device=noise.device)
        options = {"norm": per_sample_norm}
        path = odeint(derivative, noise, times, method="dopri5", atol=config.atol, rtol=config.rtol, options=options)
    end: Tensor = path[-1]
    return end


def micro_batches(total: int, size: int) -> Iterator[tuple[range, int]]:
    """Index ranges of full size, and how many of each are wanted: the last is padded with further indices."""
    for start in range(0, total, size):
        yield range(start, start + size), min(size, total - start)


@torch.inference_mode()
def sample_stage(
    model: DoD, config: SampleConfig, *, stage: int, labels: Labels, previous: Latent | None, title: str | None = None
) -> tuple[Latent, Evaluations]:
    """Run one stage for every label; from stage 2 on `previous` holds the latents of the stage before.

    Returns the latents, and the stage's evaluations of the network per sample (dopri5: the mean over micro-batches).
    `title` stands before the progress bar, by default the stage.
    """
    device, parts, conditional, null = model.no_sample.device, [], 0, 0
    batches = list(micro_batches(len(labels), config.batch_size))
    with packed_weights(model):
        for rows, wanted in tqdm(batches, desc=title or f"stage {stage}", unit="batch"):
            inside = torch.tensor([min(i, len(labels) - 1) for i in rows])
            noise = draws.noise_for(config.seed, f"stage{stage}", list(rows), model.config.latent_shape).to(device)
            prior = None if previous is None else model.embed_sample(previous[inside].to(device))
            velocity = GuidedVelocity(model, labels[inside].to(device), prior, config)
            end = integrate(velocity, noise, config)
            parts.append(end[:wanted].cpu())
            conditional += velocity.conditional_calls * wanted
            null += velocity.null_calls * wanted
    latents = torch.cat(parts)
    if not bool(latents.isfinite().all()):
        raise FloatingPointError(
            f"stage {stage}: latents are not finite; lower guidance ({config.guidance}) or train longer"
        )
    return latents, Evaluations(conditional / len(labels), null / len(labels))


def build_stage(
    config: SampleConfig, *, checkpoint: Path, codec: Path, out: Path, previous: Path | None = None
) -> dict[str, Any]:
    """Stage `stage1`, or with the samples of a stage in `previous` the next one (eq. 5).

    Writes latents and a grid, in which the stage before stands above this one.

    In the manifest and the facts, of the network and per sample: `evaluations` counts those of all stages so far,
    `stage_evaluations` this stage's own, `null_evaluations` those of its own that guidance made without condition.
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
        latents, own = sample_stage(model.to(device()), config, stage=stage, labels=labels, previous=before)
        save_file({"latents": latents, "labels": labels}, folder.path / SAMPLES_FILE)
        shown = [] if before is None else [(f"stage {stage - 1}", before)]
        draw_grid(folder.path / "grid.png", [*shown, (f"stage {stage}", latents)], labels, Codec.load(codec))
        facts = {
            "stage": stage,
            "evaluations": spent + own.total,
            "stage_evaluations": own.total,
            "null_evaluations": own.null,
        }
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
