"""Files and folders by content, in S3 under the names that DVC's remote gives them: what DVC has pushed is there.

A content is a list of files with their md5, which is a name here and no proof: stages check the sha256 of manifests.
"""

import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import NonNegativeInt, StringConstraints, field_validator

from dod_models.artifact import DamagedError
from dod_models.config import Frozen
from dod_models.images import in_order
from dod_pipeline.s3 import Bucket

FOLDER = "dvc"  # below the storage's URL: DVC's remote
ITSELF = "."  # the path of a content that is a single file
AHEAD = 16  # transfers at a time
UNUSED = 3600.0  # seconds after which a file of a cache may go


def check_below(path: str) -> str:
    """ValueError for a path that leads out of its folder."""
    if path.startswith("/") or {"", ".", ".."} & set(path.split("/")):
        raise ValueError("must be a path below its folder")
    return path


class File(Frozen):
    """A file of a content."""

    path: str  # relative to the folder, or ITSELF
    md5: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    size: NonNegativeInt

    @field_validator("path")
    @classmethod
    def check_path(cls, path: str) -> str:
        """It leads nowhere else."""
        return path if path == ITSELF else check_below(path)

    @property
    def object(self) -> str:
        """Its name in DVC's remote."""
        return f"files/md5/{self.md5[:2]}/{self.md5[2:]}"


Content = tuple[File, ...]


def content_of(path: Path) -> Content:
    """What a file or a folder holds, hidden files and work in progress left out."""
    if path.is_file():
        return (described(path, ITSELF),)
    found = (p.relative_to(path) for p in path.rglob("*") if p.is_file())
    names = sorted(p.as_posix() for p in found if not any(part.startswith(".") for part in p.parts))
    return tuple(in_order(lambda name: described(path / name, name), names, ahead=AHEAD))


def described(path: Path, name: str) -> File:
    """A file's digest and size."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    return File(path=name, md5=digest, size=path.stat().st_size)


def place(root: Path, file: File) -> Path:
    """Where a file of a content lies below `root`."""
    return root if file.path == ITSELF else root / file.path


def push(bucket: Bucket, root: Path, content: Content) -> int:
    """Upload the files that the bucket lacks; how many those were."""
    return sum(in_order(partial(push_one, bucket, root), unique(content), ahead=AHEAD))


def push_one(bucket: Bucket, root: Path, file: File) -> bool:
    """Upload a file unless one of its digest and size is there."""
    known = bucket.find(file.object)
    if known is not None and known.size == file.size:
        return False
    bucket.upload(place(root, file), file.object)
    return True


def pull(bucket: Bucket, content: Content, target: Path, *, cache: Path) -> None:
    """Make `target` hold the content, out of a cache that is filled from the bucket: hard links, not to be written to.

    One process at a time fills a cache. What was used longest ago goes where there is no room.
    """
    lack = []
    for file in unique(content):
        if is_kept(file, cache):
            os.utime(cache / file.object)
        else:
            lack.append(file)
    make_room(cache, sum(file.size for file in lack))
    for _ in in_order(partial(keep, bucket, cache=cache), lack, ahead=AHEAD):
        pass
    for file in content:
        path = place(target, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.link(cache / file.object, path)


def is_kept(file: File, cache: Path) -> bool:
    """Whether the cache has a file."""
    path = cache / file.object
    return path.is_file() and path.stat().st_size == file.size


def make_room(cache: Path, size: int) -> None:
    """Remove files that nobody has linked and that were used longest ago, until so many bytes are free; OSError where
    that doesn't suffice."""
    cache.mkdir(parents=True, exist_ok=True)
    room = shutil.disk_usage(cache).free
    known = [(path.stat(), path) for path in cache.glob("files/md5/*/*")] if room < size else []
    for stat, path in sorted(known, key=lambda item: item[0].st_mtime):
        if room < size and stat.st_nlink == 1 and stat.st_mtime < time.time() - UNUSED:
            path.unlink(missing_ok=True)
            room += stat.st_size
    if room < size:
        raise OSError(f"{cache}: {size:,} bytes to fetch, {room:,} bytes are free; make room or set DOD_CACHE")


def keep(bucket: Bucket, file: File, *, cache: Path) -> None:
    """Fetch a file to the cache."""
    path = cache / file.object
    beside = path.with_name(f".{uuid.uuid4().hex}.partial")
    fetch(bucket, file, beside)
    beside.chmod(0o444)
    os.replace(beside, path)


def fetch(bucket: Bucket, file: File, path: Path) -> None:
    """Fetch a file to its place; DamagedError if it isn't there, or isn't what its name says."""
    known = bucket.find(file.object)
    if known is None:
        raise DamagedError(f"{bucket.url}/{file.object}: not there, for {file.path}; run the stage that makes it again")
    path.parent.mkdir(parents=True, exist_ok=True)
    bucket.download(known, path)
    if (found := described(path, file.path)) != file:
        path.unlink()
        raise DamagedError(
            f"{bucket.url}/{file.object}: its md5 is {found.md5}, which is not its name: replaced or damaged there; "
            f"remove it (`aws s3 rm {bucket.url}/{file.object}`) and run the stage that makes it again"
        )


def unique(content: Iterable[File]) -> list[File]:
    """One file for each digest."""
    return list({file.md5: file for file in content}.values())


def clear(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
