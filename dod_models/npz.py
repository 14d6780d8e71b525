"""Arrays in npz files, block by block: ADM's batches of samples take 10 GB, and are never held whole.

The format is numpy's: a zip archive with a .npy file for each array. What only a pickle could hold is refused.
"""

import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SUFFIX = ".npy"  # of a member; the rest of its name is the array's
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what a damaged archive raises into a ValueError that names it."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: not a whole npz file ({error}); fetch it again, or write it again") from None


class StoredArray(NamedTuple):
    """An array of an npz file, not read yet."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    by_columns: bool  # Fortran's order

    def blocks(self, count: int) -> Iterator[np.ndarray]:
        """Rows in order, `count` at a time; ValueError where the file is damaged."""
        if self.by_columns:
            raise ValueError(f"{self.path}: {self.name} is stored by columns; write it in C order")
        with explained(self.path), zipfile.ZipFile(self.path) as archive, archive.open(self.name + SUFFIX) as file:
            read_header(file, self.path, self.name)
            for start in range(0, self.shape[0], count):
                shape = (min(count, self.shape[0] - start), *self.shape[1:])
                yield np.frombuffer(self.take(file, prod(shape)), self.dtype).reshape(shape)
            file.read(1)  # at its end, the archive's checksum is compared

    def read(self) -> np.ndarray:
        """The whole array."""
        with explained(self.path), zipfile.ZipFile(self.path) as archive, archive.open(self.name + SUFFIX) as file:
            read_header(file, self.path, self.name)
            values = np.frombuffer(self.take(file, prod(self.shape)), self.dtype)
            file.read(1)
        return values.reshape(self.shape, order="F" if self.by_columns else "C")

    def take(self, file: Any, numbers: int) -> bytearray:
        """The bytes of the next numbers."""
        data = bytearray(file.read(numbers * self.dtype.itemsize))  # writable, as torch wants it
        if len(data) != numbers * self.dtype.itemsize:
            raise EOFError(f"{self.name} has less data than its header says")
        return data


def read_header(file: Any, path: Path, name: str) -> StoredArray:
    """What a .npy file says of itself, up to its first number; ValueError for objects, which only a pickle could be."""
    try:
        shape, by_columns, dtype = HEADERS[np.lib.format.read_magic(file)](file)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: {name}: not a .npy file of version 1 or 2 ({error}); write it again") from None
    if dtype.hasobject:
        raise ValueError(f"{path}: {name} holds Python objects, which reading would execute; store plain numbers")
    return StoredArray(path, name, shape, dtype, by_columns)


def arrays_in(path: Path) -> dict[str, StoredArray]:
    """The arrays of an npz file by name; ValueError if it is none, is cut off, or holds a pickle."""
    found = {}
    with explained(path), zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            name = member.removesuffix(SUFFIX)
            with archive.open(member) as file:
                found[name] = read_header(file, path, name)
    return found


def find(path: Path, name: str, *, shape: tuple[int | None, ...], dtype: type[np.generic]) -> StoredArray:
    """The array of this name; ValueError unless it has this shape (None: any length) and kind of numbers."""
    arrays = arrays_in(path)
    if name not in arrays:
        raise ValueError(f"{path}: no array {name}; it has {', '.join(arrays) or 'none'}")
    array = arrays[name]
    fits = len(array.shape) == len(shape) and all(w in (None, n) for w, n in zip(shape, array.shape, strict=True))
    if not fits or not np.issubdtype(array.dtype, dtype):
        wanted = f"{dtype.__name__} ({', '.join('any' if n is None else str(n) for n in shape)})"
        raise ValueError(f"{path}: {name} is {array.dtype} {array.shape}, expected {wanted}; this is another file")
    return array


class Column(NamedTuple):
    """An array to be written: its shape and kind of numbers, and its rows in blocks."""

    shape: tuple[int, ...]
    dtype: type[np.generic]
    blocks: Iterable[np.ndarray]


def write(path: Path, arrays: dict[str, Column]) -> None:
    """Write an npz file beside `path`, block by block, and rename it into place; equal arrays give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as raw:
        with zipfile.ZipFile(raw, "w") as archive:
            for name, (shape, dtype, blocks) in arrays.items():
                header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
                with archive.open(zipfile.ZipInfo(name + SUFFIX), "w", force_zip64=True) as file:
                    np.lib.format.write_array_header_1_0(file, header)
                    rows = 0
                    for block in blocks:
                        assert (block.dtype, block.shape[1:]) == (np.dtype(dtype), shape[1:])
                        file.write(np.ascontiguousarray(block).data)
                        rows += len(block)
                    assert rows == shape[0]
        raw.flush()
        os.fsync(raw.fileno())
    os.replace(partial, path)
