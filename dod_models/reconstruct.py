"""Reconstruction: stage 2 with real images' priors, compared with these very images (Fig. 4 left, Tables 2 and 3)."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch_fidelity.metric_fid import fid_statistics_to_metric
from tqdm import tqdm

from dod_models import artifact
from dod_models.codec import SCHEMA as CODEC_SCHEMA
from dod_models.codec import Codec, batch_size
from dod_models.evaluate import psnr, statistics
from dod_models.evaluator import Evaluator
from dod_models.features import FeatureSet
from dod_models.flow import Latent
from dod_models.images import ImageFolder
from dod_models.model import DoD, Labels
from dod_models.sample import Evaluations, SampleConfig, sample_stage


class Originals:
    """Held-out images, `count` of them at most, which every class has its share of."""

    def __init__(self, dataset: Path, codec: Path, *, count: int | None = None) -> None:
        self.images, self.codec = ImageFolder(dataset, "val"), Codec.load(codec)
        self.size: int = artifact.read_manifest(codec, schema=CODEC_SCHEMA)["about"]["image_size"]
        by_class = np.argsort(self.images.labels, kind="stable")
        self.rows: list[int] = sorted(by_class[list(self.images.spread(count))].tolist())

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> Labels:
        """Their classes."""
        return torch.from_numpy(self.images.labels[self.rows])

    def blocks(self) -> Iterator[UInt8[np.ndarray, "_ H W C"]]:
        """Their pixels, as many at a time as go through the codec."""
        shape = {"size": self.size, "channels": self.codec.channels, "count": batch_size(self.size)}
        return self.images.blocks(**shape, rows=self.rows)

    def encoded(self) -> Iterator[Latent]:
        """Their latents (the posteriors' means), block by block."""
        return (self.codec.encode(pixels)[0].cpu() for pixels in self.blocks())

    @cached_property
    def latents(self) -> Latent:
        """All their latents."""
        return torch.cat(list(self.encoded()))


class Similarity(NamedTuple):
    """How alike reconstructions are to their originals: `psnr` in dB and `ssim` are means over the images."""

    rfid: float
    psnr: float
    ssim: float


def frechet_between(found: FeatureSet, real: FeatureSet) -> float:
    """Frechet distance of two sets of features."""
    one, two = statistics(found.features), statistics(real.features)
    return float(fid_statistics_to_metric(one, two, False)["frechet_inception_distance"])


class Reconstruction:
    """Reconstructs images, and compares them with the originals in an evaluator's features."""

    def __init__(self, originals: Originals, evaluator: Evaluator) -> None:
        self.originals, self.evaluator = originals, evaluator

    @cached_property
    def real(self) -> FeatureSet:
        """Features of the originals."""
        return self.evaluator.features(self.originals.blocks())

    def sample(self, model: DoD, config: SampleConfig, *, title: str) -> tuple[Latent, Evaluations]:
        """Stage 2 from the originals' own latents, under their classes, and the evaluations that it took."""
        labels, previous = self.originals.labels, self.originals.latents
        return sample_stage(model, config, stage=2, labels=labels, previous=previous, title=title)

    def compare(self, latents: Latent, *, title: str) -> Similarity:
        """rFID, PSNR and SSIM of these latents' images, which are held in memory block by block."""
        peaks: list[float] = []
        structures: list[float] = []

        def rebuilt() -> Iterator[UInt8[np.ndarray, "_ H W C"]]:
            pairs = zip(self.originals.codec.decode_all(latents), self.originals.blocks(), strict=True)
            for found, wanted in tqdm(pairs, total=-(-len(latents) // batch_size(self.originals.size)), desc=title):
                peaks.extend(psnr(found, wanted))
                yield found

        distance = frechet_between(self.evaluator.features(rebuilt()), self.real)
        return Similarity(distance, float(np.mean(peaks)), 0.0)
