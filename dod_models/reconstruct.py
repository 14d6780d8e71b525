"""Reconstruction: stage 2 with real images' priors, compared with these very images (Fig. 4 left, Tables 2 and 3)."""

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from tqdm import tqdm

from dod_models import artifact
from dod_models.codec import SCHEMA as CODEC_SCHEMA
from dod_models.codec import Codec, batch_size
from dod_models.evaluate import check_count, covariance_root, frechet_distance, psnr, ssim
from dod_models.evaluator import Evaluator
from dod_models.features import MeanCov
from dod_models.flow import Latent
from dod_models.images import ImageFolder
from dod_models.model import DoD, Labels
from dod_models.sample import Evaluations, SampleConfig, sample_stage

Pixels = UInt8[np.ndarray, "_ H W C"]


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

    def blocks(self) -> Iterator[Pixels]:
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


class Reconstruction:
    """Reconstructs images, and compares them with the originals in an evaluator's features."""

    def __init__(self, originals: Originals, evaluator: Evaluator) -> None:
        self.originals, self.evaluator = originals, evaluator

    def moments(self, blocks: Iterable[Pixels]) -> MeanCov:
        """Mean and covariance of these images' features; ValueError where they are too few for an rFID."""
        parts = (part.features for part in self.evaluator.parts(blocks))
        first = next(parts)
        found = MeanCov(first.shape[1])
        for part in chain([first], parts):
            found.update(part)
        check_count(found.count, found.width)
        return found

    @cached_property
    def real(self) -> tuple[MeanCov, np.ndarray]:
        """Mean and covariance of the originals' features, and the covariance's root."""
        found = self.moments(self.originals.blocks())
        return found, covariance_root(found.covariance)

    def sample(self, model: DoD, config: SampleConfig, *, title: str) -> tuple[Latent, Evaluations]:
        """Stage 2 from the originals' own latents, under their classes, and the evaluations that it took."""
        labels, previous = self.originals.labels, self.originals.latents
        return sample_stage(model, config, stage=2, labels=labels, previous=previous, title=title)

    def compare(self, latents: Latent, *, title: str) -> dict[str, float]:
        """rFID against the originals, and means over the images of PSNR (dB) and SSIM, block by block in memory."""
        peaks: list[float] = []
        structures: list[float] = []

        def rebuilt() -> Iterator[Pixels]:
            with tqdm(total=len(latents), desc=title, unit="image") as bar:
                pairs = zip(self.originals.codec.decode_all(latents), self.originals.blocks(), strict=True)
                for found, wanted in pairs:
                    peaks.extend(psnr(found, wanted))
                    structures.extend(ssim(found, wanted))
                    yield found
                    bar.update(len(found))

        found, (real, root) = self.moments(rebuilt()), self.real
        distance = frechet_distance(found.mean, found.covariance, real.mean, real.covariance, root2=root)
        return {"rfid": distance, "psnr": float(np.mean(peaks)), "ssim": float(np.mean(structures))}
