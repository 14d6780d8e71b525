"""Stage `latents`: encode the training images, and their mirror images where asked, into memory-mapped shards.

A shard is the unit of work: one of several processes encodes every so many of them, a killed run goes on with those
that lack. Its bytes depend on its images alone, which go through the codec in batches that start where the shard does,
on one thread of a CPU. More of its cores are for more processes.
"""

import hashlib
import logging
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import PositiveInt
from tqdm import tqdm

from dod_models import artifact
from dod_models.codec import SCHEMA as CODEC_SCHEMA
from dod_models.codec import Codec, batch_size
from dod_models.config import Frozen, Process, this_process
from dod_models.data import SCHEMA, shard_name
from dod_models.images import SCHEMA as DATASET_SCHEMA
from dod_models.images import ImageFolder
from dod_models.shards import Shards, one_thread

log = logging.getLogger(__name__)


class EncodeConfig(Frozen):
    """How the latents are laid out."""

    mirror: bool = True  # store the mirror image too; digits have none
    shard_size: PositiveInt = 4096  # images in a shard


class Sums(NamedTuple):
    """Of the posterior means in a shard, in float64."""

    total: float
    squares: float
    numbers: int


def encode_batch(codec: Codec, pixels: np.ndarray, *, mirror: bool) -> np.ndarray:
    """uint8 (n, H, W, C) -> fp16 moments (n, views, 2, c, h, w)."""
    views = [pixels, np.ascontiguousarray(pixels[:, :, ::-1])] if mirror else [pixels]
    moments = [np.stack([m.cpu().numpy() for m in codec.encode(view)], axis=1) for view in views]
    stacked = np.stack(moments, axis=1)
    if not np.isfinite(stacked).all() or np.abs(stacked).max() > np.finfo(np.float16).max:
        raise ValueError(
            "latents: the codec gave numbers that fp16 can't hold; train it again with a lower learning rate"
        )
    return stacked.astype(np.float16)


class Work:
    """The images' latents under work, in shards."""

    def __init__(self, folder: Path, count: int, images: ImageFolder, config: EncodeConfig) -> None:
        self.shards, self.count, self.images, self.config = Shards(folder), count, images, config

    def __len__(self) -> int:
        """How many shards there are."""
        return self.count

    def rows(self, shard: int) -> range:
        """The images of a shard."""
        return range(len(self.images))[shard * self.config.shard_size :][: self.config.shard_size]

    def has(self, shard: int) -> bool:
        """Whether a shard is there and whole."""
        return self.shards.has(shard_name(shard))

    def sums(self, shard: int) -> Sums:
        """What is known of a whole shard's numbers."""
        return Sums(*self.shards.stated(shard_name(shard))["sums"])

    def save(self, shard: int, moments: np.ndarray) -> None:
        """Put a shard in place."""
        means = moments[:, :, 0].astype(np.float64)
        sums = Sums(float(means.sum()), float((means**2).sum()), means.size)
        self.shards.save(shard_name(shard), partial(save_array, moments), sums=sums)


def save_array(array: np.ndarray, path: Path) -> None:
    """np.save, which would add a suffix to a path."""
    with path.open("wb") as file:
        np.save(file, array)


def encode(work: Work, codec: Codec, process: Process, *, size: int) -> None:
    """Encode those of the process's shards that lack."""
    shards = range(process.rank, len(work), process.world)
    wanted = [shard for shard in shards if not work.has(shard)]
    count = sum(len(work.rows(shard)) for shard in shards)
    done = count - sum(len(work.rows(shard)) for shard in wanted)
    if 0 < done < count:
        log.info(f"latents: going on from {done} of {count} images")
    title = "encode" if process.world == 1 else f"encode, process 1 of {process.world}"
    shape = {"size": size, "channels": codec.channels, "count": batch_size(size)}
    with tqdm(total=count, initial=done, desc=title, unit="image", disable=process.rank > 0) as bar:
        for shard in wanted:
            batches = []
            for pixels in work.images.blocks(**shape, rows=work.rows(shard)):
                batches.append(encode_batch(codec, pixels, mirror=work.config.mirror))
                bar.update(len(pixels))
            work.save(shard, np.concatenate(batches))


def shards_of(config: EncodeConfig, *, dataset: Path, codec: Path, state: Path) -> tuple[Path, int]:
    """Where the shards of this stage lie, keyed by config, codec and data set, and how many there are."""
    inputs = [artifact.digest_of(folder) for folder in (dataset, codec)]
    key = hashlib.sha256("/".join([config.digest, *inputs]).encode()).hexdigest()[:32]
    count: int = artifact.read_manifest(dataset, schema=DATASET_SCHEMA)["about"]["train"]
    return state / key, -(-count // config.shard_size)


def build_latents(config: EncodeConfig, *, dataset: Path, codec: Path, out: Path, state: Path) -> dict[str, Any]:
    """Write shards and labels of the train split; return count, mean and standard deviation of the latents' means.

    Work in progress lies under `state`, keyed by config, codec and data set. Of several processes each one encodes its
    share and returns nothing; a process on its own encodes what lacks and puts `out` together, to the same bytes.
    """
    loaded, images = Codec.load(codec), ImageFolder(dataset, "train")
    size = artifact.read_manifest(codec, schema=CODEC_SCHEMA)["about"]["image_size"]
    folder, count = shards_of(config, dataset=dataset, codec=codec, state=state)
    process = this_process()
    alone = process.world == 1
    with artifact.locked(folder / ("out" if alone else f"process-{process.rank}")):
        work = Work(folder, count, images, config)
        with one_thread():
            encode(work, loaded, process, size=size)
        if not alone:
            return {}
        artifact.forget_finished(state, but=folder.name)
        side = size // loaded.factor
        about = {
            "count": len(images),
            "classes": len(images.classes),
            "views": 1 + config.mirror,
            "latent_shape": [loaded.latent_channels, side, side],
            "shard_size": config.shard_size,
            "codec": artifact.sha256_file(codec / artifact.MANIFEST),
        }
        work.shards.save("labels.npy", partial(save_array, images.labels))
        artifact.describe(work.shards.out, schema=SCHEMA, config=config.digest, about=about)
        artifact.publish(work.shards.out, out)
    return {"count": len(images), **summary([work.sums(shard) for shard in range(len(work))])}


def summary(shards: list[Sums]) -> dict[str, float]:
    """Mean and standard deviation, summed in the order of the shards, whoever encoded them."""
    total, squares, numbers = 0.0, 0.0, 0
    for sums in shards:
        total, squares, numbers = total + sums.total, squares + sums.squares, numbers + sums.numbers
    mean = total / numbers
    return {"mean": mean, "std": (squares / numbers - mean**2) ** 0.5}
