"""Stage `latents`: encode the training images, and their mirror images where asked, into memory-mapped shards."""

from pathlib import Path
from typing import Any

import numpy as np
from pydantic import PositiveInt
from tqdm import tqdm

from dod_models import artifact
from dod_models.codec import SCHEMA as CODEC_SCHEMA
from dod_models.codec import Codec
from dod_models.config import Frozen
from dod_models.data import SCHEMA, shard_name
from dod_models.images import ImageFolder


class EncodeConfig(Frozen):
    """How the latents are laid out."""

    mirror: bool = True  # store the mirror image too; digits have none
    shard_size: PositiveInt = 4096  # images in a shard


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


def build_latents(config: EncodeConfig, *, dataset: Path, codec: Path, out: Path) -> dict[str, Any]:
    """Write shards and labels of the train split; return count, mean and standard deviation of the latents' means."""
    with artifact.writing(out, schema=SCHEMA, config=config.digest) as folder:
        loaded, images = Codec.load(codec), ImageFolder(dataset, "train")
        size = artifact.read_manifest(codec, schema=CODEC_SCHEMA)["about"]["image_size"]
        total, squares, numbers = 0.0, 0.0, 0
        bar = tqdm(total=len(images), desc="encode", unit="image")
        for shard, start in enumerate(range(0, len(images), config.shard_size)):
            stop = min(start + config.shard_size, len(images))
            batches = []
            for pixels in images.blocks(size=size, channels=loaded.channels, start=start, stop=stop):
                batches.append(encode_batch(loaded, pixels, mirror=config.mirror))
                bar.update(len(pixels))
            moments = np.concatenate(batches)
            np.save(folder.path / shard_name(shard), moments)
            means = moments[:, :, 0].astype(np.float64)
            total, squares, numbers = total + means.sum(), squares + (means**2).sum(), numbers + means.size
        bar.close()
        np.save(folder.path / "labels.npy", images.labels)
        side = size // loaded.factor
        folder.about = {
            "count": len(images),
            "classes": len(images.classes),
            "views": 1 + config.mirror,
            "latent_shape": [loaded.latent_channels, side, side],
            "shard_size": config.shard_size,
            "codec": artifact.sha256_file(codec / artifact.MANIFEST),
        }
    mean = total / numbers
    return {"count": len(images), "mean": mean, "std": (squares / numbers - mean**2) ** 0.5}
