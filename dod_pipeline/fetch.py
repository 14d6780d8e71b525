"""Copies of what lies in S3: objects under a prefix, in parallel, resumable, each one checked.

Credentials, region and endpoint (AWS_ENDPOINT_URL_S3) are found as boto3 and the aws command find them. The copy lies
where `dod_models.config.local_copy` looks for it, with a journal of the objects that are whole.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from dod_models import artifact
from dod_models.config import S3, place_of_copy
from dod_models.images import SCHEMA as DATASET_SCHEMA
from dod_models.images import in_order
from dod_models.layout import belongs
from dod_pipeline.stages import Job

JOURNAL = ".objects.jsonl"
CONNECTIONS = 16
RETRIES = {"max_attempts": 5, "mode": "standard"}  # boto3's, of a request
TRIES = 3  # of an object whose bytes stop coming
CHUNK = 2**20  # bytes


class Object(NamedTuple):
    """An object under the prefix, as it is listed."""

    name: str  # key without the prefix
    size: int  # bytes
    etag: str


def inputs(job: Job) -> None:
    """Bring the copies of what the job reads from S3 up to date.

    What the index names is checked against its digests when it is read, so once complete it isn't listed again.
    """
    settings = job.config.model_dump()
    if job.stage == "dataset" and is_s3(settings["root"]):
        fetch(settings["root"], belongs, again=True)
    if "dataset" in job.inputs and (job.inputs["dataset"] / artifact.MANIFEST).is_file():
        root = artifact.read_manifest(job.inputs["dataset"], schema=DATASET_SCHEMA)["about"]["root"]
        if is_s3(root):
            fetch(root, belongs, again=False)
    if job.stage == "codec" and is_s3(settings["path"]):
        from dod_models.stable_diffusion import CONFIG, WEIGHTS  # late, as below: this imports torch

        fetch(settings["path"], {CONFIG, WEIGHTS}.__contains__, again=True)
    if job.stage == "reference" and settings["extractor"] == "inception":
        from dod_models import inception, reference

        for place, name in (("weights", inception.WEIGHTS), ("statistics", reference.STATISTICS)):
            if is_s3(settings[place]):
                fetch(settings[place], {name}.__contains__, again=True)


def is_s3(place: str | None) -> bool:
    """Whether a setting names a prefix in S3."""
    return place is not None and place.startswith(S3)


def fetch(url: str, wanted: Callable[[str], bool], *, again: bool) -> Path:
    """Copy the wanted objects under s3://BUCKET/PREFIX that lack here or have changed.

    A copy that was complete once is compared only if asked `again`. ConnectionError says what S3 said; OSError where
    the disk is too small. Returns the copy's folder.
    """
    target = place_of_copy(url)
    with artifact.locked(target):
        had, complete = read_journal(target / JOURNAL)
        if complete and not again:
            return target
        with reading(url) as bucket:
            listed = {o.name: o for o in bucket.objects() if wanted(o.name)}
            if not listed:
                raise FileNotFoundError(f"{url}: nothing there that a stage can use; correct it in params.yaml")
            for name in filter(wanted, had.keys() - listed.keys()):  # it was removed there
                (target / name).unlink(missing_ok=True)
            copy(bucket, [o for o in listed.values() if not is_here(target, o, had)], target, total=len(listed))
    return target


@contextmanager
def reading(url: str) -> Iterator["Bucket"]:
    """What lies under s3://BUCKET/PREFIX; what goes wrong is a ConnectionError with S3's words, and where to look."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield Bucket(url)
    except (BotoCoreError, ClientError) as error:
        raise ConnectionError(
            f"{url}: {error}; look at the credentials, the region and AWS_ENDPOINT_URL_S3: `aws s3 ls` finds them "
            "in the same places. What was fetched is kept"
        ) from None


def is_here(target: Path, wanted: Object, had: dict[str, Object]) -> bool:
    """Whether this version of an object was fetched, and its file is still of that size."""
    path = target / wanted.name
    return had.get(wanted.name) == wanted and path.is_file() and path.stat().st_size == wanted.size


def copy(bucket: "Bucket", objects: list[Object], target: Path, *, total: int) -> None:
    """Fetch the objects, noting each in the journal once it is whole, and at last that all are."""
    size, room = sum(o.size for o in objects), shutil.disk_usage(target).free
    if size > room:
        raise OSError(f"{target}: {size:,} bytes to fetch, {room:,} bytes are free; make room or set DOD_CACHE")
    title = f"fetch {len(objects)} of {total} objects"
    with (
        (target / JOURNAL).open("a") as journal,
        tqdm(total=size, desc=title, unit="B", unit_scale=True, disable=not objects) as bar,
    ):
        for done in in_order(partial(bucket.download, target=target, progress=bar.update), objects, ahead=CONNECTIONS):
            journal.write("\n" + json.dumps(done._asdict()))
            journal.flush()
        journal.write("\n" + json.dumps("complete"))


def read_journal(path: Path) -> tuple[dict[str, Object], bool]:
    """The objects that were fetched, and whether they were all. A line that was cut off by a kill doesn't count."""
    found: dict[str, Object] = {}
    complete = False
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        complete = value == "complete"
        if not complete:
            found[value["name"]] = Object(**value)
    return found, complete


class Bucket:
    """The objects under s3://BUCKET/PREFIX."""

    def __init__(self, url: str) -> None:
        import boto3
        from botocore.config import Config

        bucket, _, prefix = url.removeprefix(S3).rstrip("/").partition("/")
        self.url, self.bucket, self.prefix = url, bucket, f"{prefix}/" if prefix else ""
        session = boto3.session.Session()  # its own: boto3's default one remembers the credentials it found first
        self.client = session.client("s3", config=Config(max_pool_connections=CONNECTIONS, retries=RETRIES))

    def objects(self) -> Iterator[Object]:
        """All of them; ValueError for a name that would leave the copy's folder."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix)
        for item in (item for page in pages for item in page.get("Contents", [])):
            name = item["Key"].removeprefix(self.prefix)
            if name == "" or name.endswith("/"):  # a folder, as some tools write it
                continue
            if {"", ".", ".."} & set(name.split("/")):
                raise ValueError(f"{self.url}: an object is called {name!r}, which is no path; rename it")
            yield Object(name, item["Size"], item["ETag"].strip('"'))

    def download(self, wanted: Object, *, target: Path, progress: Callable[[int], Any]) -> Object:
        """Write an object to its place below `target`, checked."""
        from botocore.exceptions import BotoCoreError

        for left in reversed(range(TRIES)):
            try:
                self.download_once(wanted, target / wanted.name, progress)
                break
            except BotoCoreError:
                if left == 0:
                    raise
                time.sleep(TRIES - left)
        return wanted

    def download_once(self, wanted: Object, path: Path, progress: Callable[[int], Any]) -> None:
        """One attempt. boto3 checks the checksum that an object was stored with, if it was; here its size and ETag."""
        place = {"Bucket": self.bucket, "Key": self.prefix + wanted.name}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_file = path.with_name(f".{path.name}.partial")
        answer = self.client.get_object(**place, IfMatch=wanted.etag)
        check = None if is_encrypted(answer) else self.etag_check(wanted, place)
        size = 0
        with partial_file.open("wb") as file:
            for chunk in answer["Body"].iter_chunks(CHUNK):
                file.write(chunk)
                size += len(chunk)
                progress(len(chunk))
                if check is not None:
                    check.update(chunk)
        found = wanted.etag if check is None else check.etag()
        if (size, found) != (wanted.size, wanted.etag):
            partial_file.unlink()
            raise ConnectionError(
                f"{self.url}: {wanted.name} arrived with {size} bytes and ETag {found}, listed are {wanted.size} and "
                f"{wanted.etag}: it was damaged on the way, or there; try again, then upload it again"
            )
        os.replace(partial_file, path)

    def etag_check(self, wanted: Object, place: dict[str, str]) -> "EtagCheck | None":
        """What computes the object's ETag, if that is a digest of its bytes."""
        digest, _, parts = wanted.etag.partition("-")
        if len(digest) != 32 or not set(digest) <= set("0123456789abcdef"):
            return None
        if not parts:
            return EtagCheck(None)
        size = self.client.head_object(**place, PartNumber=1)["ContentLength"]
        return EtagCheck(size) if size and -(-wanted.size // size) == int(parts) else None


def is_encrypted(answer: dict[str, Any]) -> bool:
    """Whether the object lies encrypted under a key of its own: its ETag is then no digest."""
    return str(answer.get("ServerSideEncryption", "")).startswith("aws:kms") or "SSECustomerAlgorithm" in answer


class EtagCheck:
    """S3's ETag of bytes: their md5; of an upload in parts, the md5 of the parts' md5s and how many there were."""

    def __init__(self, part_size: int | None) -> None:
        self.part_size, self.room = part_size, part_size
        self.part, self.digests = md5(), list[bytes]()

    def update(self, data: bytes) -> None:
        """Take the next bytes."""
        while self.room is not None and self.part_size is not None and len(data) >= self.room:
            self.part.update(data[: self.room])
            self.digests.append(self.part.digest())
            data, self.part, self.room = data[self.room :], md5(), self.part_size
        self.part.update(data)
        if self.room is not None:
            self.room -= len(data)

    def etag(self) -> str:
        """The ETag of what was taken."""
        if self.part_size is None:
            return str(self.part.hexdigest())
        digests = self.digests if self.room == self.part_size else [*self.digests, self.part.digest()]
        return f"{md5(b''.join(digests)).hexdigest()}-{len(digests)}"


def md5(data: bytes = b"") -> Any:
    """A hash of S3's kind."""
    return hashlib.md5(data, usedforsecurity=False)
