"""Linear probe of the LEM: how well one linear layer tells the classes apart by L-hat, the compressed prior (Table 2).

The paper says no more than "linear probing". Features here are all numbers of L-hat, N tokens of d_e each, for the
posterior means of an image's latents; they are standardized, the LEM stays as it is.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.lib.format import open_memmap
from pydantic import Field, PositiveFloat, PositiveInt
from tqdm import tqdm

from dod_models import draws
from dod_models.codec import device
from dod_models.config import Frozen
from dod_models.data import LatentShards
from dod_models.flow import Latent
from dod_models.model import LatentEmbeddingModule

BLOCK = 1000  # images at a time
# Multiply-adds of one pass over the training features, up to which scikit-learn holds them in memory and goes over them
# some hundred times: a minute. ImageNet's under 32 tokens of 16 numbers take 6.6e11.
EXACT = 1e9


class ProbeConfig(Frozen):
    """How the linear layer is fitted; all but `solver` is for minibatches."""

    solver: Literal["exact", "minibatch"] | None = None  # None: exact (scikit-learn) where it takes about a minute
    epochs: PositiveInt = 30
    batch_size: PositiveInt = 1024  # images
    learning_rate: PositiveFloat = 1e-2  # at the start; falls to 0 as a cosine
    seed: int = Field(0, ge=0)


class Features(NamedTuple):
    """Features of images, which may lie in a memory-mapped file, and their classes."""

    rows: Float[np.ndarray, "N D"]
    labels: Int[np.ndarray, " N"]


def means(shards: LatentShards) -> Iterator[Latent]:
    """The posterior means of the training images' latents, block by block; of mirror images none."""
    for start in range(0, len(shards), BLOCK):
        indices = range(start, min(start + BLOCK, len(shards)))
        yield torch.from_numpy(shards.gather(indices, [0] * len(indices))[:, 0].astype(np.float32))


@torch.inference_mode()
def extract(
    lem: LatentEmbeddingModule, latents: Iterable[Latent], *, labels: np.ndarray, path: Path, title: str
) -> Features:
    """L-hat of every image, flattened, in a new file at `path`, of which little is in memory at a time."""
    width = lem.config.lem.num_tokens * lem.config.lem.token_width
    rows, done = open_memmap(path, "w+", np.float32, (len(labels), width)), 0
    with tqdm(total=len(labels), desc=title, unit="image") as bar:
        for block in latents:
            found = lem.encode(block.to(lem.position.device)).flatten(1).float().cpu().numpy()
            rows[done : done + len(found)] = found
            done += len(found)
            bar.update(len(found))
    return Features(rows, labels)


def top1(config: ProbeConfig, train: Features, test: Features, *, num_classes: int, title: str) -> float:
    """Share of the test images whose class a linear layer, fitted to the training images, ranks first."""
    solver = config.solver or ("exact" if train.rows.size * num_classes <= EXACT else "minibatch")
    if solver == "exact":
        return exact(train, test)
    return minibatch(config, train, test, num_classes=num_classes, title=title)


def exact(train: Features, test: Features) -> float:
    """By logistic regression with scikit-learn's default penalty, all features in memory."""
    from sklearn.linear_model import LogisticRegression  # late, as below: two seconds of every sweep
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train.rows)
    fitted = LogisticRegression(max_iter=2000).fit(scaler.transform(train.rows), train.labels)
    return float(fitted.score(scaler.transform(test.rows), test.labels))


def minibatch(config: ProbeConfig, train: Features, test: Features, *, num_classes: int, title: str) -> float:
    """By Adam on minibatches, which alone are read into memory; from zero weights, for the loss is convex."""
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    for start in range(0, len(train.rows), BLOCK):
        scaler.partial_fit(train.rows[start : start + BLOCK])

    def signal(rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(scaler.transform(rows)).to(device())

    layer = torch.nn.Linear(train.rows.shape[1], num_classes, device=device())
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.Adam(layer.parameters(), config.learning_rate)
    steps = -(-len(train.rows) // config.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs * steps)
    for epoch in tqdm(range(config.epochs), desc=title, unit="epoch"):
        for chosen in np.array_split(draws.permutation(config.seed, epoch, len(train.rows)), steps):
            picked = np.sort(chosen)  # as they lie in the file
            loss = F.cross_entropy(
                layer(signal(train.rows[picked])), torch.from_numpy(train.labels[picked]).to(device())
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if not loss.isfinite():
            raise FloatingPointError(f"probe: the loss is {loss.item()}; lower probe.learning_rate")
    hits = 0
    with torch.inference_mode():
        for start in range(0, len(test.rows), BLOCK):
            found = layer(signal(test.rows[start : start + BLOCK])).argmax(dim=1).cpu().numpy()
            hits += int((found == test.labels[start : start + BLOCK]).sum())
    return hits / len(test.rows)
