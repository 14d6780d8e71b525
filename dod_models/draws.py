"""Random numbers as a function of what they are for: (seed, purpose, index) and nothing else.

Every sample has a generator of its own, so a draw is bit-equal whatever the batch, process or machine count. The key is
128 bits of sha256 into numpy's Philox: torch's CPU generator keeps only the low 32 bits of its seed, where the noises
of 100,000 samples would be expected to collide once.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


def generator(seed: int, purpose: str, index: int) -> np.random.Generator:
    """The generator of item `index` of `purpose` ("train", "stage1", ...) under `seed`."""
    key = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def noise_for(seed: int, purpose: str, indices: Sequence[int], shape: tuple[int, int, int]) -> Float[Tensor, "B C H W"]:
    """Standard normal noise of `shape` for each index."""
    rows = [generator(seed, purpose, i).standard_normal(shape, dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows))


def labels_for(seed: int, indices: Sequence[int], num_classes: int) -> Int[Tensor, " B"]:
    """A class drawn uniformly for each index (EVALUATION.md: class-sorted samples break the inception score)."""
    return torch.tensor([int(generator(seed, "labels", i).integers(num_classes)) for i in indices])


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order in which training epoch `epoch` visits `size` samples."""
    return generator(seed, "order", epoch).permutation(size)


@contextmanager
def seeded(seed: int, purpose: str) -> Iterator[torch.Generator]:
    """Seed torch's global CPU generator, which layers start from, for `purpose`, and restore it after the block."""
    value = int(generator(seed, purpose, 0).integers(2**32))
    with torch.random.fork_rng(devices=[]):
        yield torch.manual_seed(value)
