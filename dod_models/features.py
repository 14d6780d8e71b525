"""What images are compared by: an extractor of features and logits, and sets of them on disk.

An extractor's numbers carry its name and the digest of its weights: those of different extractors are never compared.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dod_models import artifact, draws

SCHEMA = "reference/2"
ROWS_AT_ONCE = 4096  # of MeanCov.update and FeatureSet.slices: 67 MB at width 2048
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

    @classmethod
    def slices(cls, path: Path) -> Iterator["FeatureSet"]:
        """A file that `save` wrote, some rows at a time: all of 50,000 images take 1 GB."""
        with safe_open(path, framework="pt") as file:
            total = file.get_slice(cls._fields[0]).get_shape()[0]
        for start in range(0, total, ROWS_AT_ONCE):
            # Anew each time: pages of the file stay in memory as long as it is open.
            with safe_open(path, framework="pt") as file:
                yield cls(*(file.get_slice(name)[start : start + ROWS_AT_ONCE] for name in cls._fields))


def mixed(count: int) -> Int[np.ndarray, " N"]:
    """Each image's place in a fixed random order: the inception score fails on class-sorted sets."""
    return np.argsort(draws.permutation(0, 0, count))


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


class MeanCov:
    """Mean and covariance in float64 of rows that come in parts: equal to 1e-12 whatever the parts and their order.

    Chan, Golub & LeVeque (1983), "Algorithms for computing the sample variance", equation 2.1b. Rows are taken relative
    to the first one seen, since the difference of two means far from zero would lose the digits that the merge needs.
    """

    def __init__(self, width: int) -> None:
        self.width, self.count = width, 0
        self._origin = np.zeros(width)  # the first row
        self._shift = np.zeros(width)  # the mean, relative to it
        self._scatter = np.zeros((width, width))  # the sum of squares about the mean

    def update(self, rows: Float[np.ndarray, "N D"] | Float[Tensor, "N D"]) -> None:
        """Add rows of any float type; ValueError if their width is another or a value is not finite."""
        values = np.asarray(rows)
        if values.ndim != 2 or values.shape[1] != self.width:
            raise ValueError(f"rows of shape {values.shape} for a mean of width {self.width}; give (N, {self.width})")
        for begin in range(0, len(values), ROWS_AT_ONCE):
            self._add(values[begin : begin + ROWS_AT_ONCE].astype(np.float64))

    def merge(self, other: "MeanCov") -> None:
        """Add all rows that `other` has seen; ValueError if its width is another."""
        if other.width != self.width:
            raise ValueError(f"a mean of width {other.width} cannot join one of width {self.width}")
        if not self.count:
            self._origin = other._origin.copy()
        if other.count:
            self._absorb(other.count, other._origin - self._origin + other._shift, other._scatter)

    @property
    def mean(self) -> Float[np.ndarray, " D"]:
        """The mean of all rows; ValueError if there are none."""
        if not self.count:
            raise ValueError("the mean of no rows; update or merge first")
        return self._origin + self._shift

    @property
    def covariance(self) -> Float[np.ndarray, "D D"]:
        """Sums of squares divided by N - 1, symmetric to the bit; ValueError if there are fewer than 2 rows."""
        if self.count < 2:
            raise ValueError(f"the covariance of {self.count} row(s); it takes 2")
        return self._scatter / (self.count - 1)

    def _add(self, rows: Float[np.ndarray, "N D"]) -> None:
        if not np.isfinite(rows).all():
            raise ValueError("features are not finite; look at the images they come from")
        if not self.count:
            self._origin = rows[0].copy()
        rows -= self._origin
        mean = rows.mean(axis=0)
        rows -= mean
        self._absorb(len(rows), mean, rows.T @ rows)

    def _absorb(self, count: int, mean: Float[np.ndarray, " D"], scatter: Float[np.ndarray, "D D"]) -> None:
        total = self.count + count
        difference = mean - self._shift
        rooted = difference * math.sqrt(self.count * count / total)
        self._scatter += scatter
        self._scatter += np.outer(rooted, rooted)
        self._shift += difference * (count / total)
        self.count = total
