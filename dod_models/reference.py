"""Stage `reference`: train the feature net on the data's own train split, and extract the real images' features.

Its numbers compare checkpoints of one data set with each other; they are not Inception's (EVALUATION.md).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from safetensors.torch import save_file
from torch import Tensor
from tqdm import trange

from dod_models import artifact, draws
from dod_models.config import Frozen
from dod_models.features import EXTRACTOR_FILE, SCHEMA, Extractor, SmallNet
from dod_models.images import ImageFolder
from dod_models.pixels import to_signal


class ReferenceConfig(Frozen):
    """The images' size and the training of the feature net."""

    image_size: PositiveInt = 32  # pixels
    channels: PositiveInt = 1  # 1 grey, 3 RGB
    num_images: PositiveInt | None = None  # of the train split, evenly spaced in the index; they are held in memory
    epochs: PositiveInt = 14
    batch_size: PositiveInt = 64
    learning_rate: PositiveFloat = 4e-3  # peak of the one-cycle schedule
    max_shift: int = Field(2, ge=0)  # pixels, augmentation
    noise: float = Field(0.1, ge=0)  # standard deviation on [-1, 1], augmentation
    seed: int = Field(0, ge=0)


def augment(signal: Tensor, rng: np.random.Generator, *, max_shift: int, noise: float) -> Tensor:
    """Shift the whole batch by a few pixels, and add Gaussian noise."""
    down, right = rng.integers(-max_shift, max_shift + 1, size=2)
    shifted = signal.roll((int(down), int(right)), dims=(2, 3))
    return shifted + noise * torch.from_numpy(rng.standard_normal(signal.shape, dtype=np.float32))


def train_net(config: ReferenceConfig, pixels: np.ndarray, labels: Tensor, num_classes: int) -> SmallNet:
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


def build_reference(config: ReferenceConfig, *, dataset: Path, out: Path) -> dict[str, Any]:
    """Make the extractor and the feature sets `train` and `val` of the real images; return its held-out accuracy."""
    with artifact.writing(out, schema=SCHEMA, config=config.digest) as folder:
        train, val = (ImageFolder(dataset, split) for split in ("train", "val"))
        rows, size, channels = train.spread(config.num_images), config.image_size, config.channels
        blocks = list(train.blocks(size=size, channels=channels, rows=rows))
        num_classes = len(train.classes)
        labels = {"train": torch.from_numpy(train.labels[rows]), "val": torch.from_numpy(val.labels)}
        net = train_net(config, np.concatenate(blocks), labels["train"], num_classes)
        save_file(net.state_dict(), folder.path / EXTRACTOR_FILE)
        extractor = Extractor(net, artifact.sha256_file(folder.path / EXTRACTOR_FILE))
        accuracy = {}
        for split, images in (("train", blocks), ("val", val.blocks(size=size, channels=channels))):
            found = extractor(images)
            found.save(folder.path / f"{split}.safetensors")
            hits = found.logits.argmax(dim=1) == labels[split]
            accuracy[split] = hits.double().mean().item()
        folder.about = {
            "channels": config.channels,
            "classes": num_classes,
            "image_size": config.image_size,
            "extractor": {"name": extractor.name, "digest": extractor.digest},
            "dataset": artifact.sha256_file(dataset / artifact.MANIFEST),
        }
    return {"accuracy": accuracy["val"], "train_accuracy": accuracy["train"]}
