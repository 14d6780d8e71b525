"""What images are compared by: an extractor of features and logits, and sets of them on disk.

An extractor's numbers carry its name and the digest of its weights: those of different extractors are never compared.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor

from dod_models import artifact, draws

SCHEMA = "reference/2"
SPATIAL_CHANNELS = 7  # of a map of activations, for sFID: as many as ADM's suite takes


class FeatureSet(NamedTuple):
    """Of N images: pooled features, spatial features (for sFID: places by channels, flattened), and class logits."""

    features: Float[Tensor, "N D"]
    spatial: Float[Tensor, "N S"]
    logits: Float[Tensor, "N K"]

    def save(self, path: Path) -> None:
        save_file({name: values.contiguous() for name, values in self._asdict().items()}, path)

    @classmethod
    def read(cls, path: Path) -> "FeatureSet":
        """Read a file that `save` wrote."""
        return cls(**load_file(path))

    @classmethod
    def load(cls, folder: Path, name: str, *, schema: str) -> "FeatureSet":
        """Read NAME from a finished output folder, its digest checked."""
        artifact.verify(folder, schema=schema, only=name)
        return cls.read(folder / name)

    def mixed(self, count: int | None = None) -> "FeatureSet":
        """`count` images (all by default) in a fixed random order: the inception score fails on class-sorted sets."""
        order = draws.permutation(0, 0, len(self.features))[:count]
        return FeatureSet(*(values[order] for values in self))


def joined(parts: Iterable[FeatureSet]) -> FeatureSet:
    """The sets' images in order."""
    columns = [list(column) for column in zip(*parts, strict=True)]
    return FeatureSet(*(torch.cat(columns.pop(0)) for _ in FeatureSet._fields))  # pop: a column is held twice, not all


class Extractor(ABC):
    """A net that features are taken from: its name, the sha256 of its weights, and what it makes of images."""

    name: str
    digest: str

    @abstractmethod
    def part(self, pixels: UInt8[np.ndarray, "B H W C"]) -> FeatureSet:
        """Features of a batch of images, on the CPU."""

    def __call__(self, batches: Iterable[UInt8[np.ndarray, "_ H W C"]]) -> FeatureSet:
        """Features of all images of all batches, in order."""
        return joined(self.part(pixels) for pixels in batches)
