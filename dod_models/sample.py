"""Sampling a DoD: guidance, solvers, one stage (section 3.2), and what `multistage` makes of it on disk.

Sample i has noise and label of its own, a function of (seed, stage, i), and micro-batches start at fixed indices and
are padded to full size: with Euler, sample i is bit-equal whatever the number of samples and processes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field, PositiveFloat, PositiveInt, field_validator
from safetensors.torch import load_file
from torch import Tensor
from torchdiffeq import odeint
from tqdm import tqdm

from dod_models import artifact, draws, picture
from dod_models.blocks import Tokens
from dod_models.codec import Codec
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

    @classmethod
    def mean(cls, sums: "list[Evaluations]", count: int) -> "Evaluations":
        """Those of `count` samples, from sums over some of them each; whole numbers, so their order is no matter."""
        return cls(sum(one.conditional for one in sums) / count, sum(one.null for one in sums) / count)


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


def micro_batches(rows: range, size: int) -> Iterator[tuple[range, int]]:
    """Index ranges of full size, and how many of each are wanted: the last is padded with further indices."""
    for start in rows[::size]:
        yield range(start, start + size), min(size, rows.stop - start)


@torch.inference_mode()
def sample_rows(
    model: DoD,
    config: SampleConfig,
    *,
    stage: int,
    labels: Labels,
    previous: Latent | None,
    rows: range,
    bar: "tqdm[Any]",
) -> tuple[Float[Tensor, "n C H W"], Evaluations]:
    """`sample_stage` for these of its samples, the first of which begins a micro-batch; evaluations are summed."""
    device, parts, conditional, null = model.no_sample.device, [], 0, 0
    for batch, wanted in micro_batches(rows, config.batch_size):
        inside = torch.tensor([min(i, len(labels) - 1) for i in batch])
        noise = draws.noise_for(config.seed, f"stage{stage}", list(batch), model.config.latent_shape).to(device)
        prior = None if previous is None else model.embed_sample(previous[inside].to(device))
        velocity = GuidedVelocity(model, labels[inside].to(device), prior, config)
        end = integrate(velocity, noise, config)
        parts.append(end[:wanted].cpu())
        conditional += velocity.conditional_calls * wanted
        null += velocity.null_calls * wanted
        bar.update(wanted)
    latents = torch.cat(parts)
    if not bool(latents.isfinite().all()):
        raise FloatingPointError(
            f"stage {stage}: latents are not finite; lower guidance ({config.guidance}) or train longer"
        )
    return latents, Evaluations(conditional, null)


def sample_stage(
    model: DoD, config: SampleConfig, *, stage: int, labels: Labels, previous: Latent | None, title: str | None = None
) -> tuple[Latent, Evaluations]:
    """Run one stage for every label; from stage 2 on `previous` holds the latents of the stage before.

    Returns the latents, and the stage's evaluations of the network per sample (dopri5: the mean over micro-batches).
    `title` stands before the progress bar, by default the stage.
    """
    count, title = len(labels), title or f"stage {stage}"
    with packed_weights(model), tqdm(total=count, desc=title, unit="image") as bar:
        latents, spent = sample_rows(
            model, config, stage=stage, labels=labels, previous=previous, rows=range(count), bar=bar
        )
    return latents, Evaluations.mean([spent], count)


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
