"""Folders by content against a real S3 server: what travels, what is refused, what DVC finds there."""

import hashlib
import os
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from dod_models.artifact import DamagedError
from dod_pipeline import objects
from dod_pipeline.objects import File
from dod_pipeline.s3 import Bucket

from .bucket import BUCKET, S3


@pytest.fixture
def bucket(s3: S3, tmp_path: Path) -> Bucket:
    return Bucket(f"s3://{BUCKET}/{tmp_path.name}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two equal files and another one, and what is no part of the content."""
    root = tmp_path / "folder"
    for name, text in {"a": "same", "below/b": "same", "c": "", ".hidden": "x", ".x.partial/d": "x"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_content_is_named_as_dvc_names_it(folder: Path):
    found = {file.path: file for file in objects.content_of(folder)}
    assert set(found) == {"a", "below/b", "c"}
    digest = hashlib.md5(b"same").hexdigest()
    assert found["a"].object == f"files/md5/{digest[:2]}/{digest[2:]}" and found["c"].size == 0


def test_a_content_arrives_as_it_left(bucket: Bucket, folder: Path, tmp_path: Path):
    content = objects.content_of(folder)
    assert objects.push(bucket, folder, content) == 2  # equal files go once
    assert objects.push(bucket, folder, content) == 0
    target, cache = tmp_path / "target", tmp_path / "cache"
    for _ in range(2):
        objects.pull(bucket, content, target, cache=cache)
    assert objects.content_of(target) == content
    assert (target / "a").stat().st_ino == (target / "below/b").stat().st_ino  # from the cache, without copies
    assert (target / "a").stat().st_mode & 0o222 == 0


def test_a_single_file_is_a_content(bucket: Bucket, folder: Path, tmp_path: Path):
    content = objects.content_of(folder / "a")
    objects.push(bucket, folder / "a", content)
    objects.pull(bucket, content, tmp_path / "one", cache=tmp_path / "cache")
    assert (tmp_path / "one").read_text() == "same"


def test_an_object_that_is_not_what_its_name_says_is_refused(bucket: Bucket, folder: Path, tmp_path: Path):
    content = objects.content_of(folder)
    objects.push(bucket, folder, content)
    bucket.write(content[0].object, b"evil")  # as long as the true one
    with pytest.raises(DamagedError, match=f"{content[0].object}: its md5 is .* not its name"):
        objects.pull(bucket, content, tmp_path / "target", cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("[!.]*.partial")) and not (tmp_path / "target" / "a").exists()


def test_an_object_that_is_gone_is_named(bucket: Bucket, folder: Path, tmp_path: Path):
    content = objects.content_of(folder)
    objects.push(bucket, folder, content)
    bucket.remove([content[0].object])
    with pytest.raises(DamagedError, match=f"{content[0].object}: not there, for "):
        objects.pull(bucket, content, tmp_path / "target", cache=tmp_path / "cache")


def test_a_cut_file_in_the_cache_is_fetched_again(bucket: Bucket, folder: Path, tmp_path: Path):
    content = objects.content_of(folder)
    objects.push(bucket, folder, content)
    cache = tmp_path / "cache"
    objects.pull(bucket, content, tmp_path / "first", cache=cache)
    place = cache / content[0].object
    place.unlink()
    place.write_text("sam")
    objects.pull(bucket, content, tmp_path / "second", cache=cache)
    assert (tmp_path / "second" / "a").read_text() == "same"


class Disk(NamedTuple):
    """What a disk of 400 bytes has left beside a cache."""

    free: int

    @classmethod
    def with_cache(cls, cache: Path) -> "Disk":
        return cls(400 - sum(path.stat().st_size for path in (cache / "files").rglob("*") if path.is_file()))


def test_a_full_cache_loses_what_was_used_longest_ago_and_by_nobody_now(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of the folder that is fetched, what is there already is used now, too."""
    contents, cache = [], tmp_path / "cache"
    monkeypatch.setattr(shutil, "disk_usage", Disk.with_cache)
    for number, name in enumerate(("used", "oldest", "old", "new")):
        (tmp_path / name).write_bytes(bytes([number]) * 100)
        contents.append(objects.content_of(tmp_path / name))
        objects.push(bucket, tmp_path / name, contents[-1])
        objects.pull(bucket, contents[-1], tmp_path / "in use" / name, cache=cache)
        ago = time.time() - objects.UNUSED * (3.5 - number)  # the last is of this hour
        os.utime(cache / contents[-1][0].object, (ago, ago))
        if name != "used":
            (tmp_path / "in use" / name).unlink()

    def take(name: str, size: int) -> list[bool]:
        (tmp_path / name).write_bytes(name[:1].encode() * size)
        content = objects.content_of(tmp_path / name)
        objects.push(bucket, tmp_path / name, content)
        objects.pull(bucket, content, tmp_path / "in use" / name, cache=cache)
        return [objects.is_kept(file, cache) for (file,) in contents]

    assert take("a hundred", 100) == [True, False, True, True]
    (tmp_path / "both").mkdir()
    shutil.copy(tmp_path / "old", tmp_path / "both" / "old")  # the oldest by now
    (tmp_path / "both" / "b").write_bytes(b"b" * 100)
    both = objects.content_of(tmp_path / "both")
    objects.push(bucket, tmp_path / "both", both)
    with pytest.raises(OSError, match=r"cache: 100 bytes to fetch, 0 bytes are free; make room or set DOD_CACHE"):
        objects.pull(bucket, both, tmp_path / "in use" / "both", cache=cache)
    os.utime(cache / contents[2][0].object, (0, 0))
    assert take("c hundred", 100) == [True, False, False, True]
    with pytest.raises(OSError, match=r"cache: 300 bytes to fetch, 0 bytes are free; make room or set DOD_CACHE"):
        take("three hundred", 300)
    assert take("empty", 0) == [True, False, False, True]


@pytest.mark.parametrize("path", ["/etc/passwd", "../out", "a/../../b", "a//b", "", "a/."])
def test_a_path_that_leads_elsewhere_is_refused(path: str):
    with pytest.raises(ValueError, match="must be a path below its folder"):
        File(path=path, md5="0" * 32, size=1)
