"""Tar archives, never extracted: where each file's bytes lie, so that one file is read by one seek."""

import tarfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

END = bytes(tarfile.BLOCKSIZE)  # an archive ends with blocks of zeros


class Member(NamedTuple):
    """A regular file in an archive."""

    name: str
    offset: int  # bytes, from the start of the file that holds the archive
    size: int  # bytes


def members(path: Path, *, start: int = 0, end: int | None = None) -> list[Member]:
    """The regular files of the uncompressed archive in bytes `start` to `end` (of all by default) of a file.

    Only headers are read. ValueError where the archive is damaged or cut short, at whatever place, or unsafe.
    """
    end = path.stat().st_size if end is None else end
    found: list[Member] = []
    with path.open("rb") as file:
        file.seek(start)
        place = start
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (item := tar.next()) is not None:
                    place = item.offset_data
                    check_member(path, item)
                    if item.isreg():
                        found.append(Member(item.name, place, item.size))
                place = tar.offset
            file.seek(place)
            if place + len(END) > end or file.read(len(END)) != END:  # tarfile takes damage for the end
                raise tarfile.ReadError("no header and no end of the archive")
        except tarfile.TarError as error:
            raise ValueError(
                f"{path}: not a whole, uncompressed tar archive: {error} at byte {place}, after {len(found)} files; "
                "copy or download it again, and compare its md5 with the publisher's"
            ) from None
    return found


def check_member(path: Path, item: tarfile.TarInfo) -> None:
    """ValueError for a member that is no plain file or folder, or whose name leads out of the archive."""
    name = PurePosixPath(item.name)
    if not (item.isreg() or item.isdir()) or item.issparse() or name.is_absolute() or ".." in name.parts:
        raise ValueError(
            f"{path}: member {item.name!r} is a link, a device, a sparse file, or named to lie outside; "
            "this is not the archive of a class of images"
        )
