"""Stage `reference`: the feature extractor, and what it makes of the real images.

Inception with ADM's published statistics gives numbers that compare with other papers'; with our own training images
they differ a little from those. The small net's compare checkpoints of one data set with each other only.
"""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt, model_validator
from safetensors.torch import save_file
from tqdm import tqdm

from dod_models import artifact, draws, inception, npz, small_net
from dod_models.config import local_copy
from dod_models.evaluate import check_count
from dod_models.evaluator import EXTRACTOR_FILE, HELD_OUT_FILE, MOMENTS_FILE, REAL_FILE, Moments, Real
from dod_models.features import SCHEMA, Extractor, FeatureSet, MeanCov, joined
from dod_models.images import BLOCK, ImageFolder

log = logging.getLogger(__name__)

SOME = 10_000  # real images whose features are kept for precision, recall and KID: as many as ADM publishes
STATISTICS = "VIRTUAL_imagenet256_labeled.npz"
STATISTICS_URL = f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/{STATISTICS}"
SHA256_PATTERN = "^[0-9a-f]{64}$"


class ReferenceConfig(small_net.SmallNetConfig):
    """Which extractor, which real images, and how the small net is trained."""

    extractor: Literal["small-net", "inception"] = "small-net"
    weights: str | None = None  # Inception's: file, folder or s3://BUCKET/PREFIX; None: torch hub's cache
    weights_sha256: str = Field(inception.SHA256, pattern=SHA256_PATTERN)
    statistics: str | None = None  # ADM's npz: file, folder or s3://BUCKET/PREFIX; None: the train split's own
    statistics_sha256: str | None = Field(None, pattern=SHA256_PATTERN)  # None: recorded, not required
    image_size: PositiveInt = 32  # pixels
    num_images: PositiveInt | None = None  # of the train split, evenly spaced in the index; a small net holds them all

    @model_validator(mode="after")
    def check_statistics(self) -> "ReferenceConfig":
        """ADM's statistics are Inception's."""
        if self.extractor == "small-net" and (self.statistics or self.weights):
            raise ValueError("weights and statistics are Inception's; set extractor: inception, or remove them")
        return self


class Split:
    """Images of a split at the reference's size, in blocks, as often as asked."""

    def __init__(self, images: ImageFolder, config: ReferenceConfig, *, count: int | None = None) -> None:
        self.images, self.config, self.rows = images, config, images.spread(count)
        self.count = len(self.rows)

    @property
    def labels(self) -> torch.Tensor:
        """Their classes."""
        return torch.from_numpy(self.images.labels[self.rows])

    def __len__(self) -> int:
        """How many blocks there are."""
        return -(-self.count // BLOCK)

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.images.blocks(size=self.config.image_size, channels=self.config.channels, rows=self.rows)


def build_reference(config: ReferenceConfig, *, dataset: Path, out: Path) -> dict[str, Any]:
    """Make the extractor, the moments of the real images, and the feature sets `train` (some) and `val` (all).

    Returns the small net's accuracy on both sets.
    """
    with artifact.writing(out, schema=SCHEMA, config=config.digest) as folder:
        images = ImageFolder(dataset, "train")
        train, val = Split(images, config, count=config.num_images), Split(ImageFolder(dataset, "val"), config)
        facts, origin = {}, {}
        if config.extractor == "small-net":
            blocks = list(train)
            net = small_net.train_net(config, np.concatenate(blocks), train.labels, len(images.classes))
            save_file(net.state_dict(), folder.path / EXTRACTOR_FILE)
            digest = artifact.sha256_file(folder.path / EXTRACTOR_FILE)
            extractor: Extractor = small_net.SmallNetExtractor(net, digest)
            real, some = measured(extractor, blocks, kept=some_of(train.count))
            facts["train_accuracy"] = accuracy(some, train.labels[some_of(train.count)])
        else:
            state = inception.read_weights(inception.find_weights(config.weights), sha256=config.weights_sha256)
            save_file(state, folder.path / EXTRACTOR_FILE)
            extractor = inception.Inception(state, config.weights_sha256)
            if config.statistics is None:
                real, some = measured(extractor, train, kept=some_of(train.count))
            else:
                path = find_statistics(config.statistics)
                origin["statistics"] = checked_digest(path, config.statistics_sha256)
                real, some = published(extractor, path, size=config.image_size)
        real.save(folder.path / MOMENTS_FILE)
        some.save(folder.path / REAL_FILE)
        held_out = extractor(iter(tqdm(val, desc="features of held-out images", unit="block")))
        held_out.save(folder.path / HELD_OUT_FILE)
        if config.extractor == "small-net":
            facts["accuracy"] = accuracy(held_out, val.labels)
        folder.about = {
            "image_size": config.image_size,
            "extractor": {"name": extractor.name, "digest": extractor.digest},
            "dataset": artifact.sha256_file(dataset / artifact.MANIFEST),
            **origin,
        }
    return facts


def accuracy(found: FeatureSet, labels: torch.Tensor) -> float:
    """The share of images whose class the net tells."""
    return (found.logits.argmax(dim=1) == labels).double().mean().item()


def some_of(count: int) -> np.ndarray:
    """Which of the real images' features are kept: all, or a fixed random choice."""
    return np.sort(draws.permutation(0, 0, count)[:SOME])


def measured(extractor: Extractor, blocks: Iterable[np.ndarray], *, kept: np.ndarray) -> tuple[Real, FeatureSet]:
    """Moments of all images, one block of which is held at a time, and the features of those at the places `kept`."""
    moments: list[MeanCov] = []
    some, start = [], 0
    for pixels in tqdm(blocks, desc="features of real images", unit="block"):
        part = extractor.part(pixels)
        moments = moments or [MeanCov(values.shape[1]) for values in (part.features, part.spatial)]
        for moment, values in zip(moments, (part.features, part.spatial), strict=True):
            moment.update(values)
        inside = kept[(kept >= start) & (kept < start + len(pixels))] - start
        some.append(FeatureSet(*(values[inside] for values in part)))
        start += len(pixels)
    check_count(start, max(moment.width for moment in moments))
    pooled, spatial = (Moments.of(moment.mean, moment.covariance) for moment in moments)
    found = joined(some)
    return Real(pooled, spatial, found.features), found


def published(extractor: Extractor, path: Path, *, size: int) -> tuple[Real, FeatureSet]:
    """ADM's statistics of all training images, and the features of the images beside them; ValueError for others."""
    wide, places = inception.WIDTH, inception.SPATIAL_WIDTH
    arrays = {
        name: npz.find(path, name, shape=shape, dtype=np.floating).read().astype(np.float64)
        for name, shape in (("mu", (wide,)), ("sigma", (wide, wide)), ("mu_s", (places,)), ("sigma_s", (places,) * 2))
    }
    images = npz.find(path, "arr_0", shape=(None, size, size, 3), dtype=np.uint8)
    total = -(-images.shape[0] // BLOCK)
    some = extractor(iter(tqdm(images.blocks(BLOCK), desc="features of published images", unit="block", total=total)))
    pooled, spatial = Moments.of(arrays["mu"], arrays["sigma"]), Moments.of(arrays["mu_s"], arrays["sigma_s"])
    return Real(pooled, spatial, some.features), some


def find_statistics(path: str) -> Path:
    """ADM's npz: the file, or its place in a folder or s3:// prefix; FileNotFoundError says where it comes from."""
    place = local_copy(path)
    found = place / STATISTICS if place.is_dir() else place
    if not found.is_file():
        raise FileNotFoundError(
            f"reference.statistics: {path}: no file {found}. It is published at {STATISTICS_URL}: save it there, set "
            "reference.statistics to its file, folder or s3://BUCKET/PREFIX, or remove the setting to compare with "
            "the training images themselves"
        )
    return found


def checked_digest(path: Path, stated: str | None) -> str:
    """The file's sha256; ValueError if another is required."""
    digest = artifact.sha256_file(path)
    if stated not in (None, digest):
        raise ValueError(
            f"{path}: sha256 is {digest}, reference.statistics_sha256 says {stated}: this is another file, or a "
            "damaged one; fetch it again, or correct the setting"
        )
    if stated is None:
        log.info(f"reference: sha256 of {path.name} is {digest}; reference.statistics_sha256 would pin it")
    return digest
