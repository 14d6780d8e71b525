"""Objects in S3: whole or not at all, each one checked, in bounded time.

Credentials, region and endpoint (AWS_ENDPOINT_URL_S3) are found as boto3 and the aws command find them. What may pass
is tried again after random pauses, a bounded number of times, by whom it concerns:

* botocore repeats a request: SlowDown, 500 to 504, a connection refused, reset or silent. A server that accepts and
  then says nothing, or takes nothing, is an error after REQUESTS x SILENCE seconds; what S3 refuses (a wrong secret, no
  permission) is one at once;
* boto3's transfer manager sends large files in parts, each a request, and has them removed if one fails at last;
* `s3_attempts` repeats the whole: outages of seconds, an answer that breaks off or is damaged, parts that S3 forgot.
"""

import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dod_models.config import S3
from dod_pipeline.s3_attempts import BrokenError, Progress, absent, again, chunks, counted, telling
from dod_pipeline.s3_etag import EtagCheck, is_digest, is_encrypted

CONNECTIONS = 16  # transfers at once
SILENCE = 30.0  # seconds in which a server must accept, take some bytes or say some
REQUESTS = 6  # attempts of one request, by botocore
PART = 16 * 2**20  # bytes: larger files go up in parts of this size
AT_ONCE = 1000  # S3's limit
ANY = "*"  # whatever is there, or nothing: no ETag
WRITER = "writer"  # metadata of a small object: who wrote it


class Object(NamedTuple):
    """An object under the prefix, as it is listed."""

    name: str  # key without the prefix
    size: int  # bytes
    etag: str


class ChangedError(OSError):
    """What is there is not the version that the caller knew: another one wrote or removed it."""


@contextmanager
def reaching(url: str) -> Iterator["Bucket"]:
    """What lies under s3://BUCKET/PREFIX; what goes wrong is a ConnectionError with S3's words, and where to look."""
    with telling(url):
        yield Bucket(url)


def ignore(size: int) -> None:
    """Progress that nobody looks at."""


def condition(etag: str | None) -> dict[str, str]:
    """What a request says so that it passes for this version only; for None, where nothing is."""
    if etag is None:
        return {"IfNoneMatch": "*"}
    return {} if etag == ANY else {"IfMatch": f'"{etag}"'}


class Bucket:
    """The objects under s3://BUCKET/PREFIX; many threads may use one.

    Errors are ConnectionError with the object's name, S3's words and where to look.
    """

    def __init__(self, url: str) -> None:
        import boto3
        from boto3.s3.transfer import TransferConfig, create_transfer_manager
        from botocore.config import Config

        bucket, _, prefix = url.removeprefix(S3).rstrip("/").partition("/")
        self.url, self.bucket, self.prefix = url.rstrip("/"), bucket, f"{prefix}/" if prefix else ""
        session = boto3.session.Session()  # its own: boto3's default one remembers the credentials it found first
        config = Config(
            connect_timeout=SILENCE,
            read_timeout=SILENCE,
            retries={"total_max_attempts": REQUESTS, "mode": "standard"},
            max_pool_connections=2 * CONNECTIONS,  # the transfer manager's, and as many downloads
        )
        self.client = session.client("s3", config=config)
        parts = TransferConfig(
            multipart_threshold=PART,
            multipart_chunksize=PART,
            max_concurrency=CONNECTIONS,
            preferred_transfer_client="classic",  # else, on large GPU machines, one that heeds none of the above
        )
        self.transfers = create_transfer_manager(self.client, parts)

    def place(self, name: str) -> dict[str, str]:
        """What requests call an object; ValueError for a name that would leave the prefix, or a copy's folder."""
        if {"", ".", ".."} & set(name.split("/")):
            raise ValueError(f"{self.url}: an object is called {name!r}, which is no path; rename it")
        return {"Bucket": self.bucket, "Key": self.prefix + name}

    def objects(self, below: str = "") -> Iterator[Object]:
        """All of them, or those in the folder `below`; ValueError for a name that is no path."""
        folder = self.place(below.rstrip("/"))["Key"] + "/" if below else self.prefix
        ask, more = {"Bucket": self.bucket, "Prefix": folder}, True
        while more:
            page = again(self.url, partial(self.client.list_objects_v2, **ask))
            for item in page.get("Contents", []):
                name = item["Key"].removeprefix(self.prefix)
                if name and not name.endswith("/"):  # else a folder, as some tools write it
                    self.place(name)
                    yield Object(name, item["Size"], item["ETag"].strip('"'))
            more = page["IsTruncated"]
            ask["ContinuationToken"] = page.get("NextContinuationToken", "")

    def find(self, name: str) -> Object | None:
        """One object, or None."""
        return again(f"{self.url}/{name}", partial(self.find_once, name))

    def find_once(self, name: str) -> Object | None:
        """One attempt."""
        found = self.head(name)
        if found is None:
            self.client.head_bucket(Bucket=self.bucket)  # that there is no such bucket is another matter
            return None
        return Object(name, found["ContentLength"], found["ETag"].strip('"'))

    def head(self, name: str) -> dict[str, Any] | None:
        """What S3 says of an object, or None."""
        with absent():
            answer: dict[str, Any] = self.client.head_object(**self.place(name))
            return answer
        return None

    def download(self, wanted: Object, path: Path, *, progress: Progress = ignore) -> None:
        """Write an object to a file, checked; one writer a file at a time. ChangedError if it isn't there any more."""
        again(f"{self.url}/{wanted.name}", partial(self.download_once, wanted, path, progress))

    def download_once(self, wanted: Object, path: Path, progress: Progress) -> None:
        """One attempt. boto3 checks the checksum that an object was stored with, if it was; here its size and ETag."""
        answer = self.get(wanted.name, etag=wanted.etag)
        if answer is None:
            raise ChangedError(f"{self.url}/{wanted.name}: was replaced or removed since it was listed; try again")
        check = None if is_encrypted(answer) else self.etag_check(wanted)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_file = path.with_name(f".{path.name}.partial")
        try:
            with counted(progress) as tell:
                size = 0
                with partial_file.open("wb") as file:
                    for chunk in chunks(answer):
                        file.write(chunk)
                        size += len(chunk)
                        tell(len(chunk))
                        if check is not None:
                            check.update(chunk)
                found = wanted.etag if check is None else check.etag()
                if (size, found) != (wanted.size, wanted.etag):
                    raise BrokenError(
                        f"arrived with {size} bytes and ETag {found}, listed are {wanted.size} and {wanted.etag}: it "
                        "was damaged on the way, or there; try again, then upload it again"
                    )
            os.replace(partial_file, path)
        finally:
            partial_file.unlink(missing_ok=True)

    def get(self, name: str, *, etag: str = ANY) -> dict[str, Any] | None:
        """S3's answer that holds an object, or None where this version isn't there."""
        with absent():
            answer: dict[str, Any] = self.client.get_object(**self.place(name), **condition(etag))
            return answer
        return None

    def etag_check(self, wanted: Object) -> EtagCheck | None:
        """What computes the object's ETag, if that is a digest of its bytes."""
        _, _, parts = wanted.etag.partition("-")
        if not is_digest(wanted.etag):
            return None
        if not parts:
            return EtagCheck(None)
        size = self.client.head_object(**self.place(wanted.name), PartNumber=1)["ContentLength"]
        return EtagCheck(size) if size and -(-wanted.size // size) == int(parts) else None

    def upload(self, path: Path, name: str, *, progress: Progress = ignore) -> Object:
        """Send a file, which S3 checks and shows when it is whole; what is there then."""
        place = f"{self.url}/{name}"
        again(place, partial(self.upload_once, path, name, progress))
        found = self.find(name)
        if found is None or found.size != path.stat().st_size:
            raise ChangedError(f"{place}: was replaced or removed as soon as {path} was there; see who writes there")
        return found

    def upload_once(self, path: Path, name: str, progress: Progress) -> None:
        """One attempt. If it fails, its parts are removed; those of a killed process, by the bucket's own rule."""
        from boto3.s3.transfer import ProgressCallbackInvoker

        place = self.place(name)
        checksum = {"ChecksumAlgorithm": "CRC32", "ChecksumType": "FULL_OBJECT"}  # of each part, and of the whole
        with counted(progress) as tell:
            told = [ProgressCallbackInvoker(tell)]
            self.transfers.upload(str(path), place["Bucket"], place["Key"], checksum, told).result()

    def read(self, name: str) -> tuple[bytes, str] | None:
        """A small object and its ETag, or None."""
        return again(f"{self.url}/{name}", partial(self.read_once, name))

    def read_once(self, name: str) -> tuple[bytes, str] | None:
        """One attempt."""
        answer = self.get(name)
        return None if answer is None else (b"".join(chunks(answer)), answer["ETag"].strip('"'))

    def write(self, name: str, data: bytes, *, etag: str | None = ANY) -> str:
        """Put a small object there; its ETag.

        `etag`: ANY replaces what may be there, None wants nothing to be there, an ETag replaces this version.
        ChangedError where that isn't so: of several writers who know the same version, one wins. After a
        ConnectionError it may be there or not; read it.
        """
        return again(f"{self.url}/{name}", partial(self.write_once, name, data, etag, uuid.uuid4().hex))

    def write_once(self, name: str, data: bytes, etag: str | None, writer: str) -> str:
        """One attempt. Where an answer got lost, botocore sends it again; then what stands in the way may be ours."""
        with absent():
            done = self.client.put_object(**self.place(name), **condition(etag), Body=data, Metadata={WRITER: writer})
            return str(done["ETag"]).strip('"')
        found = self.head(name)
        if found is None or found["Metadata"].get(WRITER) != writer:
            raise ChangedError(f"{self.url}/{name}: another one wrote or removed it; read it again, then write")
        return str(found["ETag"]).strip('"')

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects, as far as they are there."""
        keys = [{"Key": self.place(name)["Key"]} for name in names]
        for start in range(0, len(keys), AT_ONCE):
            again(self.url, partial(self.remove_once, keys[start : start + AT_ONCE]))

    def remove_once(self, keys: list[dict[str, str]]) -> None:
        """One attempt."""
        from botocore.exceptions import ClientError

        done = self.client.delete_objects(Bucket=self.bucket, Delete={"Objects": keys, "Quiet": True})
        for failed in done.get("Errors", []):
            said = {"Code": failed["Code"], "Message": f"{failed['Key']}: {failed.get('Message', '')}"}
            raise ClientError({"Error": said}, "DeleteObjects")
