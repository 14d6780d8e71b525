"""Latents on disk: memory-mapped fp16 shards of VAE moments, and batches drawn from them.

A shard is a .npy array (n, views, 2, C, H, W): views are the image and, where the data set says so, its mirror image;
then mean and standard deviation of the scaled latents' posterior.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float16, Int
from torch import Tensor

from dod_models import artifact, draws

SCHEMA = "latents/1"
Moments = Float[np.ndarray, "n views 2 C H W"]


def shard_name(index: int) -> str:
    """File name of shard `index`."""
    return f"shard-{index:05d}.npy"


class LatentShards:
    """The latents of a training split; reading a row touches only its pages of the memory-mapped shard."""

    def __init__(self, folder: Path, *, check: bool = True) -> None:
        """Open a finished stage `latents`; `check` all digests, which one of several processes is enough to do."""
        manifest = artifact.verify(folder, schema=SCHEMA) if check else artifact.read_manifest(folder, schema=SCHEMA)
        about = manifest["about"]
        self.digest = artifact.sha256_file(folder / artifact.MANIFEST)
        self.count, self.num_classes, self.views = about["count"], about["classes"], about["views"]
        self.shape: tuple[int, int, int] = tuple(about["latent_shape"])
        self.shard_size: int = about["shard_size"]
        self.labels = torch.from_numpy(np.load(folder / "labels.npy"))
        shards = range(-(-self.count // self.shard_size))
        # Plain arrays over the maps: indexing a np.memmap costs more than the read.
        self.shards: list[Moments] = [np.asarray(np.load(folder / shard_name(i), mmap_mode="r")) for i in shards]

    def __len__(self) -> int:
        return int(self.count)

    def gather(self, indices: Sequence[int], views: Sequence[int]) -> Float16[np.ndarray, "n 2 C H W"]:
        """Mean and standard deviation of one view of each image."""
        rows = [(*divmod(index, self.shard_size), view) for index, view in zip(indices, views, strict=True)]
        joined = np.concatenate([self.shards[shard][row, view] for shard, row, view in rows])
        return joined.reshape(len(rows), 2, *self.shape)


class TrainingDraws:
    """Everything random about training sample number i, as a function of (seed, i) alone.

    `latents` are drawn from the posterior of one view of the image; `keep` are the rows of the batch that are
    conditioned on their prior; `labels` hold the null class where the label is dropped.
    """

    latents: Float[Tensor, "B C H W"]
    noise: Float[Tensor, "B C H W"]
    normal: Float[Tensor, " B"]  # t = sigmoid(normal)
    labels: Int[Tensor, " B"]
    keep: Int[Tensor, " K"]

    def __init__(
        self,
        shards: LatentShards,
        samples: range,
        *,
        seed: int,
        label_drop: float,
        prior_drop: float,
        exact_share: bool,
    ) -> None:
        indices, views, drawn, noise, normal, labels, keep = [], [], [], [], [], [], []
        for place, sample in enumerate(samples):
            epoch, position = divmod(sample, len(shards))
            index = int(epoch_order(seed, epoch, len(shards))[position])
            rng = draws.generator(seed, "train", sample)
            indices.append(index)
            views.append(int(rng.integers(shards.views)))
            drawn.append(rng.standard_normal(shards.shape, dtype=np.float32))
            noise.append(rng.standard_normal(shards.shape, dtype=np.float32))
            normal.append(rng.standard_normal(dtype=np.float32))
            label_u, prior_u = rng.random(2)
            labels.append(shards.num_classes if label_u < label_drop else int(shards.labels[index]))
            if evenly_kept(sample, prior_drop) if exact_share else prior_u >= prior_drop:
                keep.append(place)
        moments = shards.gather(indices, views)
        self.latents = torch.from_numpy(moments[:, 0] + moments[:, 1] * np.stack(drawn))  # float32, as the normals are
        self.noise = torch.from_numpy(np.stack(noise))
        self.normal, self.labels = torch.tensor(normal), torch.tensor(labels)
        self.keep = torch.tensor(keep, dtype=torch.long)


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The epoch's permutation, kept because a step asks for it once per sample."""
    return draws.permutation(seed, epoch, size)


def evenly_kept(sample: int, drop: float) -> bool:
    """Whether sample number `sample` keeps its prior when an exact share 1 - drop does, spread evenly."""
    keep = 1 - drop
    return int((sample + 1) * keep + 1e-9) > int(sample * keep + 1e-9)
