"""What images are compared by: an extractor of features and logits, and sets of them on disk.

An extractor's numbers carry its name and the digest of its weights: those of different extractors are never compared.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dod_models import artifact, draws
from dod_models.pixels import to_signal

SCHEMA = "reference/1"
EXTRACTOR_FILE = "extractor.safetensors"
ROWS_AT_ONCE = 4096  # of MeanCov.update: 67 MB at width 2048


class FeatureSet(NamedTuple):
    """Features and class logits of N images."""

    features: Float[Tensor, "N D"]
    logits: Float[Tensor, "N K"]

    def save(self, path: Path) -> None:
        save_file({"features": self.features.contiguous(), "logits": self.logits.contiguous()}, path)

    @classmethod
    def load(cls, folder: Path, name: str, *, schema: str) -> "FeatureSet":
        """Read NAME from a finished output folder, its digest checked."""
        artifact.verify(folder, schema=schema, only=name)
        tensors = load_file(folder / name)
        return cls(tensors["features"], tensors["logits"])

    def mixed(self, count: int | None = None) -> "FeatureSet":
        """`count` images (all by default) in a fixed random order: the inception score fails on class-sorted sets."""
        order = draws.permutation(0, 0, len(self.features))[:count]
        return FeatureSet(self.features[order], self.logits[order])


class SmallNet(nn.Module):
    """Four convolutions and a global average pool: bounded features, lest guidance be scored as harm."""

    NAME = "small-net-64"
    WIDTHS = (32, 48, 64, 64)

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width_in = channels
        for index, width in enumerate(self.WIDTHS):
            stride = 1 if index == 2 else 2
            layers += [nn.Conv2d(width_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            width_in = width
        self.convolutions = nn.Sequential(*layers)
        self.dropout = nn.Dropout(0.2)
        self.classify = nn.Linear(width_in, num_classes)

    def features(self, signal: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        """Pooled features of images in [-1, 1]."""
        pooled: Tensor = self.convolutions(signal).mean(dim=(2, 3))
        return pooled

    def forward(self, signal: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        logits: Tensor = self.classify(self.dropout(self.features(signal)))
        return logits


class Extractor:
    """A trained net with its name and the sha256 of its weights."""

    def __init__(self, net: SmallNet, digest: str) -> None:
        self.net = net.eval().requires_grad_(False)
        self.name, self.digest = net.NAME, digest

    @classmethod
    def load(cls, reference: Path) -> "Extractor":
        """Read the extractor of a finished stage `reference`."""
        manifest = artifact.verify(reference, schema=SCHEMA, only=EXTRACTOR_FILE)
        net = SmallNet(manifest["about"]["channels"], manifest["about"]["classes"])
        net.load_state_dict(load_file(reference / EXTRACTOR_FILE))
        return cls(net, manifest["files"][EXTRACTOR_FILE]["sha256"])

    @torch.inference_mode()
    def __call__(self, batches: Iterable[UInt8[np.ndarray, "_ H W C"]]) -> FeatureSet:
        """Features and logits of all images of all batches, in order."""
        features, logits = [], []
        for pixels in batches:
            signal = to_signal(pixels)
            features.append(self.net.features(signal))
            logits.append(self.net.classify(features[-1]))
        return FeatureSet(torch.cat(features), torch.cat(logits))


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

    def state(self) -> dict[str, np.ndarray]:
        """All that `restore` needs, by name, for a file or another machine."""
        return {
            "count": np.array(self.count),
            "origin": self._origin,
            "shift": self._shift,
            "scatter": self._scatter,
        }

    @classmethod
    def restore(cls, state: dict[str, np.ndarray]) -> "MeanCov":
        """What gave this state, to the bit."""
        found = cls(len(state["origin"]))
        found.count = int(state["count"])
        found._origin, found._shift, found._scatter = (state[name].copy() for name in ("origin", "shift", "scatter"))
        return found

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
