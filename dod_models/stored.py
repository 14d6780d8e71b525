"""A finished sampling stage's samples, read in slices: the latents of 50,000 take 800 MB, their pictures 10 GB."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor

from dod_models import artifact
from dod_models.codec import Codec, batch_size
from dod_models.sample import SAMPLES_FILE, SCHEMA


class StoredSamples:
    """Latents and labels on disk, their digest checked; `about` is what the manifest states of them."""

    def __init__(self, folder: Path) -> None:
        self.about = artifact.verify(folder, schema=SCHEMA, only=SAMPLES_FILE)["about"]
        self.folder, self.path = folder, folder / SAMPLES_FILE
        with safe_open(self.path, framework="pt") as file:
            self.count, *shape = file.get_slice("latents").get_shape()
        self.side = int(shape[-1])

    def latents(self, rows: range) -> Float[Tensor, "n C H W"]:
        """Scaled latents of consecutive samples."""
        with safe_open(self.path, framework="pt") as file:
            found: Tensor = file.get_slice("latents")[rows.start : rows.stop]
        return found

    def labels(self) -> Int[Tensor, " N"]:
        """Classes of all samples."""
        with safe_open(self.path, framework="pt") as file:
            found: Tensor = file.get_tensor("labels")
        return found

    def batch(self, codec: Codec) -> int:
        """How many of them the codec decodes at a time."""
        return batch_size(self.side * codec.factor)

    def decoded(self, codec: Codec, rows: range) -> Iterator[np.ndarray]:
        """Images of consecutive samples, uint8 (n, H, W, C), in batches; equal to the bit if `rows` starts with one."""
        step = self.batch(codec)
        return (codec.decode(self.latents(rows[start : start + step])) for start in range(0, len(rows), step))
