"""The small feature net: a classifier trained on the data's own train split, where Inception's weights are not at hand.

Its numbers compare checkpoints of one data set with each other; they are not Inception's (EVALUATION.md).
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from pydantic import Field, PositiveFloat, PositiveInt
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import trange

from dod_models import draws
from dod_models.config import Frozen
from dod_models.features import SPATIAL_CHANNELS, Extractor, FeatureSet
from dod_models.pixels import to_signal

NAME = "small-net-64"
WIDTHS = (32, 48, 64, 64)
SPATIAL_SIDE = 4  # places of the last map along a side, at most, that sFID sees


class SmallNetConfig(Frozen):
    """The images' channels and the training of the feature net."""

    channels: PositiveInt = 1  # 1 grey, 3 RGB
    epochs: PositiveInt = 14
    batch_size: PositiveInt = 64
    learning_rate: PositiveFloat = 4e-3  # peak of the one-cycle schedule
    max_shift: int = Field(2, ge=0)  # pixels, augmentation
    noise: float = Field(0.1, ge=0)  # standard deviation on [-1, 1], augmentation
    seed: int = Field(0, ge=0)


class SmallNet(nn.Module):
    """Four convolutions and a global average pool: bounded features, lest guidance be scored as harm."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width_in = channels
        for index, width in enumerate(WIDTHS):
            stride = 1 if index == 2 else 2
            layers += [nn.Conv2d(width_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            width_in = width
        self.convolutions = nn.Sequential(*layers)
        self.dropout = nn.Dropout(0.2)
        self.classify = nn.Linear(width_in, num_classes)

    def forward(self, signal: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        logits: Tensor = self.classify(self.dropout(self.convolutions(signal).mean(dim=(2, 3))))
        return logits


class SmallNetExtractor(Extractor):
    """Pooled activations of the last map, and for sFID its first channels at up to 4 x 4 places: 112 numbers."""

    name = NAME

    def __init__(self, net: SmallNet, digest: str) -> None:
        self.net = net.eval().requires_grad_(False)
        self.digest = digest

    @classmethod
    def load(cls, weights: Path, digest: str) -> "SmallNetExtractor":
        """Read the net's safetensors, which say how many channels and classes it has."""
        state = load_file(weights)
        net = SmallNet(state["convolutions.0.weight"].shape[1], len(state["classify.bias"]))
        net.load_state_dict(state)
        return cls(net, digest)

    @torch.inference_mode()
    def part(self, pixels: UInt8[np.ndarray, "B H W C"]) -> FeatureSet:
        """Features of a batch of images."""
        maps = self.net.convolutions(to_signal(pixels))
        pooled = maps.mean(dim=(2, 3))
        places = F.adaptive_avg_pool2d(maps[:, :SPATIAL_CHANNELS], min(SPATIAL_SIDE, maps.shape[-1]))
        return FeatureSet(pooled, places.permute(0, 2, 3, 1).flatten(1), self.net.classify(pooled))


def augment(signal: Tensor, rng: np.random.Generator, *, max_shift: int, noise: float) -> Tensor:
    """Shift the whole batch by a few pixels, and add Gaussian noise."""
    down, right = rng.integers(-max_shift, max_shift + 1, size=2)
    shifted = signal.roll((int(down), int(right)), dims=(2, 3))
    return shifted + noise * torch.from_numpy(rng.standard_normal(signal.shape, dtype=np.float32))


def train_net(config: SmallNetConfig, pixels: np.ndarray, labels: Tensor, num_classes: int) -> SmallNet:
    """Train the classifier whose pooled activations are the features, on uint8 images (N, H, W, C)."""
    with draws.seeded(config.seed, "feature net"):
        net = SmallNet(config.channels, num_classes)
        steps_per_epoch = len(pixels) // config.batch_size or 1
        optimizer = torch.optim.AdamW(net.parameters(), config.learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, config.learning_rate, total_steps=config.epochs * steps_per_epoch
        )
        for epoch in trange(config.epochs, desc="feature net", unit="epoch"):
            order = draws.permutation(config.seed, epoch, len(pixels))
            rng = draws.generator(config.seed, "augment", epoch)
            for step in range(steps_per_epoch):
                rows = order[step * config.batch_size : (step + 1) * config.batch_size]
                images = augment(to_signal(pixels[rows]), rng, max_shift=config.max_shift, noise=config.noise)
                loss = F.cross_entropy(net(images), labels[rows], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return net
