"""`listings/DATASET.json`: what lies in a data set's folder or s3:// prefix, as of the last `dod scan`.

Stage `dataset` depends on it, so new or changed images make a new version of the data. It names their contents, by
digest in a folder and by ETag in S3, and no times: two clones that see the same images have the same file. What was
hashed once is remembered under `.state/`, by size and time, so that a scan of what is known reads no image.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pydantic import NonNegativeInt
from tqdm import tqdm

from dod_models import artifact
from dod_models.config import S3, Frozen
from dod_models.images import in_order
from dod_models.layout import KIT, SPLITS, TRAIN, VAL, belongs, is_image
from dod_pipeline.config import DataSet, Params
from dod_pipeline.s3 import reaching
from dod_pipeline.turns import turn

LISTINGS = Path("listings")
CACHE = Path(".state", "listings")


class Listing(Frozen):
    """The file."""

    state: str  # "scanned"; else why not
    root: str | None = None
    files: NonNegativeInt | None = None
    bytes: NonNegativeInt | None = None
    sha256: str | None = None  # over a line for each file, in order: path, size, and sha256 or ETag


UNWATCHED = Listing(state="not scanned: new images go unnoticed")
SHIPPED = Listing(state="not scanned: a package ships these images")


class File(NamedTuple):
    """A file of a data set."""

    path: str  # relative to the root
    size: int  # bytes
    time: int  # of its last change, nanoseconds


def file_of(key: str) -> Path:
    """Where a data set's listing stands."""
    return LISTINGS / f"{key}.json"


def find(key: str) -> Listing | None:
    """The listing of a data set, as it stands."""
    path = file_of(key)
    return Listing.load(str(path)) if path.is_file() else None


def scan(key: str, data: DataSet) -> Listing:
    """Look at the images as they are now; a FileNotFoundError where they should lie. Writes no listing."""
    root = data.dataset.get("root")
    if data.dataset.get("source", "folder") != "folder":
        return SHIPPED
    if root is None:
        raise ValueError(f"datasets.{key}.dataset.root: missing; it names the folder, or s3:// prefix, of the images")
    sizes, digest = [], hashlib.sha256()
    for path, size, content in in_bucket(root) if root.startswith(S3) else in_folder(key, Path(root)):
        sizes.append(size)
        digest.update(json.dumps([path, size, content]).encode() + b"\n")
    if not sizes:
        raise FileNotFoundError(f"{root}: no images there; put them there, or correct datasets.{key}.dataset.root")
    return Listing(state="scanned", root=root, files=len(sizes), bytes=sum(sizes), sha256=digest.hexdigest())


def update(key: str, data: DataSet) -> tuple[Listing, bool]:
    """Scan, and write the listing unless it says so already; whether it was written."""
    found = scan(key, data)
    with turn(f"listing-{key}"):
        is_new = found != find(key)
        if is_new:
            artifact.write_json(file_of(key), found.model_dump())
    return found, is_new


def ensure(params: Params, experiments: Sequence[str]) -> None:
    """Scan their data sets that have no listing, or that of another place, for DVC to have what it wants."""
    for key in sorted({params.experiments[name].data for name in experiments if name in params.experiments}):
        known, data = find(key), params.datasets[key]
        if known is None or known.root not in (None, data.dataset.get("root")):
            update(key, data)


def advise(key: str) -> None:
    """Say how new images are noticed, where they are not."""
    if find(key) == UNWATCHED:
        print(f"{file_of(key)}: {UNWATCHED.state}; `dod scan {key}` looks for them", flush=True)


def in_bucket(url: str) -> Iterator[tuple[str, int, str]]:
    """Name, size and ETag of each object that belongs to the data set, in order."""
    with reaching(url) as bucket:
        bar = tqdm(bucket.objects(), desc=f"list {url}", unit="object")
        listed = sorted(o for o in bar if belongs(o.name))
    yield from ((o.name, o.size, o.etag) for o in listed)


def in_folder(key: str, root: Path) -> Iterator[tuple[str, int, str]]:
    """Path, size and sha256 of each file that belongs to the data set, in order; only unknown ones are read."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: there is no such folder; correct datasets.{key}.dataset.root in params.yaml")
    files, known = sorted(files_below(root)), dict(remembered(key))
    new = [file for file in files if file not in known]
    (CACHE / key).parent.mkdir(parents=True, exist_ok=True)
    with (CACHE / key).open("a") as notes:
        bar = tqdm(new, desc=f"hash new files of {key}", unit="file", disable=not new)
        for file, digest in zip(bar, in_order(partial(sha256, root), new), strict=True):
            known[file] = digest
            notes.write("\n" + json.dumps([*file, digest]))
    yield from ((file.path, file.size, known[file]) for file in files)


def sha256(root: Path, file: File) -> str:
    """The digest of a file's content."""
    return artifact.sha256_file(root / file.path)


def remembered(key: str) -> Iterator[tuple[File, str]]:
    """Digests of files that were hashed before. A line that was cut off by a kill doesn't count."""
    for line in (CACHE / key).read_text().splitlines() if (CACHE / key).exists() else []:
        try:
            path, size, time, digest = json.loads(line)
        except ValueError:
            continue
        yield File(path, size, time), digest


def files_below(root: Path) -> Iterator[File]:
    """Those that `dod_models.layout` would read: images in ROOT/SPLIT/CLASS, and archives."""
    for name in (TRAIN, VAL, KIT):
        if (root / name).is_file():
            yield described(root / name, root)
    for split in SPLITS:
        for path in sorted((root / split).iterdir()) if (root / split).is_dir() else []:
            if path.is_dir():
                with os.scandir(path) as entries:
                    yield from (described(Path(e.path), root) for e in entries if is_image(e.name))
            elif path.suffix == ".tar":
                yield described(path, root)


def described(path: Path, root: Path) -> File:
    """A file's place, size and time."""
    stat = path.stat()
    return File(path.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns)
