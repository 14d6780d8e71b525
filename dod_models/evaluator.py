"""The evaluator of a data set, as stage `reference` left it: its feature net, and what the real images gave."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor

from dod_models import artifact, inception, small_net
from dod_models.codec import Codec
from dod_models.evaluate import (
    check_count,
    covariance_root,
    frechet_distance,
    inception_score,
    jackknife_error,
    kernel_distance,
    precision_recall,
)
from dod_models.features import SCHEMA, Extractor, FeatureSet, MeanCov, joined, mixed
from dod_models.flow import Latent
from dod_models.shards import one_thread

log = logging.getLogger(__name__)

EXTRACTOR_FILE, MOMENTS_FILE, REAL_FILE, HELD_OUT_FILE = (
    f"{name}.safetensors" for name in ("extractor", "moments", "train", "val")
)
INCEPTION_SCORE_SPLITS = 10
NEIGHBOURHOOD = 3  # k of precision and recall
KERNEL_SUBSETS, KERNEL_SUBSET_SIZE = 100, 1000  # of KID, as its authors and torch-fidelity take it
JACKKNIFE_BLOCKS = 10


class Moments(NamedTuple):
    """Mean and covariance of the real images' features, in float64, and R with R R^T = covariance."""

    mean: Float[np.ndarray, " D"]
    covariance: Float[np.ndarray, "D D"]
    root: Float[np.ndarray, "D r"]

    @classmethod
    def of(cls, mean: np.ndarray, covariance: np.ndarray) -> "Moments":
        """The root is computed once, for all distances to these moments."""
        return cls(mean, covariance, covariance_root(covariance))

    def distance(self, other: MeanCov) -> float:
        """Frechet distance of other images from these."""
        return frechet_distance(other.mean, other.covariance, self.mean, self.covariance, root2=self.root)


class Real(NamedTuple):
    """What the real images gave: moments of all of them, and the features of some for precision, recall and KID."""

    pooled: Moments
    spatial: Moments
    some: Float[Tensor, "M D"]

    def save(self, path: Path) -> None:
        """Write the moments; the features of some images are a set of their own."""
        kinds = {"pooled": self.pooled, "spatial": self.spatial}
        arrays = {f"{kind}.{name}": v for kind, moments in kinds.items() for name, v in moments._asdict().items()}
        save_file({name: np.ascontiguousarray(values) for name, values in arrays.items()}, path)

    @classmethod
    def load(cls, reference: Path) -> "Real":
        """Read a finished stage `reference`."""
        artifact.verify(reference, schema=SCHEMA, only=MOMENTS_FILE)
        arrays = load_file(reference / MOMENTS_FILE)
        pooled, spatial = (
            Moments(*(arrays[f"{kind}.{name}"] for name in Moments._fields)) for kind in ("pooled", "spatial")
        )
        return cls(pooled, spatial, FeatureSet.load(reference, REAL_FILE, schema=SCHEMA).features)


class Gathered(NamedTuple):
    """What a score needs of N images: beside their features and logits, the moments of their spatial features."""

    features: Float[Tensor, "N D"]
    spatial: MeanCov
    logits: Float[Tensor, "N K"]

    @classmethod
    def of(cls, parts: Iterable[FeatureSet], *, count: int, places: np.ndarray | None = None) -> "Gathered":
        """`count` images that come in parts, of which one at a time is held whole.

        `places` says where each image that comes is to stand, by default in order; places from `count` on are left out.
        """
        features, spatial, logits, done = torch.empty(0), MeanCov(0), torch.empty(0), 0
        for part in parts:
            if not done:
                features, logits = (part[i].new_empty(count, part[i].shape[1]) for i in (0, 2))
                spatial = MeanCov(part.spatial.shape[1])
            come = np.arange(done, done + len(part.features))
            place = come if places is None else places[come]
            kept = place < count
            features[place[kept]], logits[place[kept]] = part.features[kept], part.logits[kept]
            spatial.update(part.spatial[kept])
            done += len(come)
        assert spatial.count == count
        return cls(features, spatial, logits)

    @classmethod
    def mixed(cls, path: Path, *, count: int | None = None) -> "Gathered":
        """At most `count` images of a stored set, in the order of `features.mixed`."""
        with safe_open(path, framework="pt") as file:
            total = file.get_slice("features").get_shape()[0]
        return cls.of(FeatureSet.slices(path), count=min(count or total, total), places=mixed(total))

    def blocks(self) -> list[MeanCov]:
        """Moments of the features in equal blocks, for the jackknife."""
        blocks = [MeanCov(self.features.shape[1]) for _ in range(JACKKNIFE_BLOCKS)]
        for block, rows in zip(blocks, self.features.tensor_split(JACKKNIFE_BLOCKS), strict=True):
            block.update(rows)
        return blocks


def merged(blocks: Sequence[MeanCov]) -> MeanCov:
    """Moments of all rows of all blocks."""
    every = MeanCov(blocks[0].width)
    for block in blocks:
        every.merge(block)
    return every


class Evaluator:
    """Scores sets of images against the reference."""

    def __init__(self, extractor: Extractor, real: Real) -> None:
        self.extractor, self.real = extractor, real

    @classmethod
    def load(cls, reference: Path) -> "Evaluator":
        """Read a finished stage `reference`, its digests checked."""
        return cls(load_extractor(reference), Real.load(reference))

    def parts(self, batches: Iterable[UInt8[np.ndarray, "_ H W C"]]) -> Iterator[FeatureSet]:
        """Features batch by batch, which come and are taken on one thread: the same bits whatever stage asks."""
        parts = map(self.extractor.part, batches)
        while True:
            with one_thread():
                part = next(parts, None)
            if part is None:
                return
            yield part

    def features(self, batches: Iterable[UInt8[np.ndarray, "_ H W C"]]) -> FeatureSet:
        """Features of all images of all batches, in order."""
        return joined(self.parts(batches))

    def gathered(self, codec: Codec, latents: Latent, count: int, *, name: str) -> Gathered:
        """What a score needs of the first `count` samples, decoded in blocks; ValueError if there are fewer."""
        check_samples(len(latents), count, name=name)
        return Gathered.of(self.parts(codec.decode_all(latents[:count])), count=count)

    def distance(self, found: Gathered) -> float:
        """FID alone, to the bit as `score` has it."""
        check_count(*found.features.shape)
        return self.real.pooled.distance(merged(found.blocks()))

    def score(self, found: Gathered) -> dict[str, float]:
        """Every metric of a set of images against the reference, by name.

        They must not be sorted by class: the inception score is computed without a shuffle, as ADM does.
        """
        check_count(len(found.features), max(found.features.shape[1], found.spatial.width))
        blocks = found.blocks()
        return {
            "fid": self.real.pooled.distance(merged(blocks)),
            "fid_error": jackknife_error(blocks, self.real.pooled.distance),
            "sfid": self.real.spatial.distance(found.spatial),
            **self.other_scores(found),
        }

    def score_held_out(self, found: Gathered, *, name: str) -> dict[str, float]:
        """`score`; of too few images, of which a team may have no more, without FID, its error and sFID."""
        count, width = len(found.features), max(found.features.shape[1], found.spatial.width)
        if count > width:
            return self.score(found)
        log.warning(f"{name}: {count} images for {width} features: no FID and no sFID, which would take {width + 1}")
        return self.other_scores(found)

    def other_scores(self, found: Gathered) -> dict[str, float]:
        """The metrics that need no covariance."""
        size = min(KERNEL_SUBSET_SIZE, len(found.features), len(self.real.some))
        shares = precision_recall(found.features, self.real.some, NEIGHBOURHOOD)
        return {
            "kid": kernel_distance(found.features, self.real.some, size, KERNEL_SUBSETS, 0),
            "inception_score": inception_score(found.logits, INCEPTION_SCORE_SPLITS, False),
            "precision": shares.precision,
            "recall": shares.recall,
        }


def check_samples(found: int, count: int, *, name: str) -> None:
    """ValueError if there are fewer samples than are to be scored."""
    if found < count:
        raise ValueError(f"{name}: {found} samples, evaluation.num_samples is {count}; sample more, or ask for fewer")


def load_extractor(reference: Path) -> Extractor:
    """Read the extractor of a finished stage `reference`."""
    manifest = artifact.verify(reference, schema=SCHEMA, only=EXTRACTOR_FILE)
    kinds = {inception.NAME: inception.Inception.load, small_net.NAME: small_net.SmallNetExtractor.load}
    stated = manifest["about"]["extractor"]
    return kinds[stated["name"]](reference / EXTRACTOR_FILE, stated["digest"])
