"""What images are compared by: an extractor of features and logits, and sets of them on disk.

An extractor's numbers carry its name and the digest of its weights: those of different extractors are never compared.
"""

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
