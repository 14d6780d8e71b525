"""Images behind an index: read where they lie, in folders or unopened tar archives, checked, cropped to model size."""

import hashlib
import io
import json
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from dod_models import artifact
from dod_models.config import local_copy

SCHEMA = "dataset/1"
BLOCK = 100  # images in memory at a time

# ImageNet has photographs with broken EXIF, of which Pillow warns. Nothing of it is used: ADM ignores orientation too.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")

Item = TypeVar("Item")
Result = TypeVar("Result")


class Place(NamedTuple):
    """Where the bytes of an image lie: in a file of their own, or in an archive."""

    path: str  # of the file, relative to the root
    member: str | None = None  # name in the archive
    offset: int = 0  # bytes
    size: int = -1  # bytes; -1: the rest of the file

    @property
    def name(self) -> str:
        """The path, with the member's name where the path is an archive's."""
        return self.path if self.member is None else f"{self.path}/{self.member}"

    def read(self, root: Path) -> bytes:
        """The image's file."""
        with (root / self.path).open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class Entry(NamedTuple):
    """One image of the index."""

    path: str  # relative to the root
    label: int
    width: int  # pixels
    height: int  # pixels
    sha256: str
    member: str | None = None  # these three only for an image in an archive, see Place
    offset: int = 0
    size: int = -1

    @property
    def place(self) -> Place:
        """Where the image lies."""
        return Place(self.path, self.member, self.offset, self.size)

    def line(self) -> str:
        """The entry as JSON, without what a file of its own has no need of."""
        values = self._asdict()
        return json.dumps(values if self.member is not None else dict(list(values.items())[:5]))


def in_order(function: Callable[[Item], Result], items: Iterable[Item], *, ahead: int = BLOCK) -> Iterator[Result]:
    """The function's results in the items' order, by threads, which are `ahead` items ahead at most.

    Threads, as Pillow and hashlib let go of the interpreter's lock while they work.
    """
    with ThreadPoolExecutor() as pool:
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class ImageFolder:
    """The images of a data set's split, read through its index."""

    def __init__(self, dataset: Path, split: str) -> None:
        manifest = artifact.verify(dataset, schema=SCHEMA, only=f"{split}.jsonl")
        self.dataset, self.stated = dataset, manifest["about"]["root"]
        self.classes: list[str] = artifact.read_json(dataset / "classes.json")
        with (dataset / f"{split}.jsonl").open() as lines:
            self.entries = [Entry(**json.loads(line)) for line in lines]

    def __len__(self) -> int:
        return len(self.entries)

    @cached_property
    def root(self) -> Path:
        """Where they lie; who only counts them need not have them."""
        return self.dataset / "images" if self.stated is None else local_copy(self.stated)

    @property
    def labels(self) -> np.ndarray:
        """int64 class numbers in the order of the index."""
        return np.array([entry.label for entry in self.entries], dtype=np.int64)

    def spread(self, count: int | None) -> Sequence[int]:
        """`count` places of the index at even distances; all where it has no more, or `count` is None."""
        if count is None or count >= len(self):
            return range(len(self))
        return [i * len(self) // count for i in range(count)]

    def read(self, index: int, *, size: int, channels: int) -> np.ndarray:
        """Image `index` as uint8 (size, size, channels), cropped; ValueError if it changed since the index was made."""
        entry = self.entries[index]
        data = entry.place.read(self.root)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise ValueError(
                f"{self.root / entry.place.name}: changed since it was indexed; "
                "index it again: `dvc repro --force dataset@KEY`"
            )
        with Image.open(io.BytesIO(data)) as image:
            return center_crop(image.convert("L" if channels == 1 else "RGB"), size)

    def blocks(
        self, *, size: int, channels: int, rows: Sequence[int] | None = None, count: int = BLOCK
    ) -> Iterator[np.ndarray]:
        """These rows of the index (all by default) as uint8 (n, size, size, channels), n = count but for the last.

        The next block is read while the caller works on this one.
        """
        wanted = range(len(self)) if rows is None else rows
        images = in_order(partial(self.read, size=size, channels=channels), wanted, ahead=2 * count)
        for _ in range(0, len(wanted), count):
            yield np.stack(list(islice(images, count)))


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's crop: halve with BOX while at least twice too large, BICUBIC the short side to `size`, crop the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    shape = (round(image.width * scale), round(image.height * scale))
    image = image.resize(shape, Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    top, left = (image.height - size) // 2, (image.width - size) // 2
    return pixels[top : top + size, left : left + size].reshape(size, size, -1)
