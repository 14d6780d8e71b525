"""Latents on disk: memory-mapped fp16 shards of VAE moments, and batches drawn from them.

A shard is a .npy array (n, views, 2, C, H, W): views are the image and, where the data set says so, its mirror image;
then mean and standard deviation of the scaled latents' posterior.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

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


class Batch(NamedTuple):
    """What a forward pass in training needs, of some rows of the draws; `keep` counts among these rows."""

    latents: Float[Tensor, "B C H W"]
    noise: Float[Tensor, "B C H W"]
    normal: Float[Tensor, " B"]
    labels: Int[Tensor, " B"]
    keep: Int[Tensor, " K"]

    def to(self, device: torch.device) -> "Batch":
        """A copy on the device; a GPU copies from pinned memory, for which nothing waits."""
        if device.type != "cuda":
            return Batch(*(x.to(device) for x in self))
        return Batch(*(x.pin_memory().to(device, non_blocking=True) for x in self))


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
    images: np.ndarray  # (B,), int64: which images of the latents

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
        self.images = image_indices(samples, seed=seed, size=len(shards))
        views, posterior, noise, normal, labels, keep = [], [], [], [], [], []
        for place, (sample, index) in enumerate(zip(samples, self.images.tolist(), strict=True)):
            rng = draws.generator(seed, "train", sample)
            views.append(int(rng.integers(shards.views)))
            posterior.append(rng.standard_normal(shards.shape, dtype=np.float32))
            noise.append(rng.standard_normal(shards.shape, dtype=np.float32))
            normal.append(rng.standard_normal(dtype=np.float32))
            label_u, prior_u = rng.random(2)
            labels.append(shards.num_classes if label_u < label_drop else int(shards.labels[index]))
            if evenly_kept(sample, prior_drop) if exact_share else prior_u >= prior_drop:
                keep.append(place)
        moments = shards.gather(self.images.tolist(), views)
        self.latents = torch.from_numpy(moments[:, 0] + moments[:, 1] * np.stack(posterior))  # float32, as the normals
        self.noise = torch.from_numpy(np.stack(noise))
        self.normal, self.labels = torch.tensor(normal), torch.tensor(labels)
        self.keep = torch.tensor(keep, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.images)

    def parts(self, size: int | None) -> list[Batch]:
        """Micro-batches of `size` rows, the last one perhaps smaller; None for a single one."""
        size, found = size or len(self), []
        for first in range(0, len(self), size):
            rows = slice(first, first + size)
            keep = self.keep[(self.keep >= first) & (self.keep < first + size)] - first
            found.append(Batch(self.latents[rows], self.noise[rows], self.normal[rows], self.labels[rows], keep))
        return found


def image_indices(samples: range, *, seed: int, size: int) -> np.ndarray:
    """The image of each training sample, of `size` images: epoch by epoch, every one once in each."""
    places = (divmod(sample, size) for sample in samples)
    return np.array([epoch_order(seed, epoch, size)[position] for epoch, position in places], dtype=np.int64)


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The epoch's permutation, kept because a step asks for it once per sample."""
    return draws.permutation(seed, epoch, size)


def evenly_kept(sample: int, drop: float) -> bool:
    """Whether sample number `sample` keeps its prior when an exact share 1 - drop does, spread evenly."""
    keep = 1 - drop
    return int((sample + 1) * keep + 1e-9) > int(sample * keep + 1e-9)


def draws_ahead(
    draw: Callable[[int], TrainingDraws], steps: range, *, depth: int = 2
) -> Generator[TrainingDraws, None, None]:
    """`draw(step)` of every step in order. A thread draws the next ones, while what was yielded is computed with.

    At most `depth` are in memory. An error in `draw` is raised when its step is due.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="draws") as pool:
        due = iter(steps)
        ahead = deque(pool.submit(draw, step) for step in islice(due, depth))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(draw, step) for step in islice(due, 1))
