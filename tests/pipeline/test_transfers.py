"""Transfers with a real S3 server behind a proxy that does harm: they come to the right bytes, or to a clear error in
bounded time; and nobody ever sees half of anything."""

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dod_pipeline import s3 as transfers
from dod_pipeline import s3_attempts
from dod_pipeline.s3 import Bucket

from .bucket import BUCKET, S3, SECRET
from .proxy import ALWAYS, CUT_ANSWER, CUT_REQUEST, HANG, LOST, RESET, Proxy, note, proxied

PART = 5 * 2**20  # bytes: the smallest that S3 allows
SMALL, LARGE, POINTER = os.urandom(300_000), os.urandom(PART + 1), b"new" * 100
STATE = dict[str, bytes]
BEFORE: STATE = {"large": b"old", "pointer": b"old", "small": b"old", "there": SMALL, "local/copy": b"old"}
Fault = tuple[str, float]  # kind, and how much of a body passes
FAULTS: list[Fault] = [(kind, 1.0) for kind in ("SlowDown", "InternalError", RESET, LOST, HANG)]
ANSWERS: list[Fault] = [(CUT_ANSWER, share) for share in (0.1, 0.5, 0.99)]
REQUESTS: list[Fault] = [(CUT_REQUEST, share) for share in (0.1, 0.5, 0.99)]


class Place(NamedTuple):
    """Where a test works: a prefix that holds BEFORE, reached through the proxy, and a folder."""

    client: Any  # of the server itself
    proxy: Proxy
    folder: Path
    prefix: str

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}/{self.prefix}"

    def state(self) -> STATE:
        """Everything that anybody can see, there and here."""
        listed = self.client.list_objects_v2(Bucket=BUCKET, Prefix=f"{self.prefix}/").get("Contents", [])
        keys = [item["Key"] for item in listed]
        there = {k.partition("/")[2]: self.client.get_object(Bucket=BUCKET, Key=k)["Body"].read() for k in keys}
        return there | {f"local/{p.name}": p.read_bytes() for p in self.folder.iterdir()}

    def parts(self) -> int:
        """How many uploads are half done."""
        found = self.client.list_multipart_uploads(Bucket=BUCKET, Prefix=f"{self.prefix}/")
        return len(found.get("Uploads", []))


class Operation(NamedTuple):
    """What is done, to which requests harm comes, and what is different afterwards."""

    act: Callable[[Bucket, Place, list[int]], Any]
    on: str
    change: dict[str, bytes | None]
    faults: list[Fault]


def download(bucket: Bucket, place: Place, told: list[int]) -> None:
    wanted = bucket.find("there")
    assert wanted is not None
    bucket.download(wanted, place.folder / "copy", progress=told.append)


def upload(bucket: Bucket, place: Place, told: list[int], *, name: str, data: bytes) -> None:
    path = place.folder.parent / f"{place.folder.name}-{name}"
    path.write_bytes(data)
    assert bucket.upload(path, name, progress=told.append).size == len(data)


def upload_small(bucket: Bucket, place: Place, told: list[int]) -> None:
    upload(bucket, place, told, name="small", data=SMALL)


def upload_large(bucket: Bucket, place: Place, told: list[int]) -> None:
    upload(bucket, place, told, name="large", data=LARGE)


def replace(bucket: Bucket, place: Place, told: list[int]) -> None:
    found = bucket.find("pointer")
    assert found is not None
    assert bucket.write("pointer", POINTER, etag=found.etag) != found.etag


def create(bucket: Bucket, place: Place, told: list[int]) -> None:
    bucket.write("created", POINTER, etag=None)


def read(bucket: Bucket, place: Place, told: list[int]) -> None:
    found = bucket.read("there")
    assert found is not None and found[0] == SMALL


def names(bucket: Bucket, place: Place, told: list[int]) -> None:
    assert [o.name for o in bucket.objects()] == ["large", "pointer", "small", "there"]


def remove(bucket: Bucket, place: Place, told: list[int]) -> None:
    bucket.remove(["small", "never was there"])


OPERATIONS = {
    "download": Operation(download, "^GET", {"local/copy": SMALL}, FAULTS + ANSWERS),
    "upload": Operation(upload_small, "^PUT", {"small": SMALL}, FAULTS + REQUESTS),
    "upload's part": Operation(upload_large, "^PUT", {"large": LARGE}, FAULTS + REQUESTS),
    "upload's end": Operation(upload_large, "^POST .*uploadId=", {"large": LARGE}, FAULTS + ANSWERS[1:2]),
    "conditional replace": Operation(replace, "^PUT", {"pointer": POINTER}, FAULTS + REQUESTS),
    "conditional create": Operation(create, "^PUT", {"created": POINTER}, [(LOST, 1.0)]),
    "read": Operation(read, "^GET", {}, ANSWERS[1:2]),
    "list": Operation(names, "^GET", {}, [(RESET, 1.0), *ANSWERS[1:2]]),
    "remove": Operation(remove, "^POST", {"small": None}, [(LOST, 1.0)]),
}
CASES = [
    pytest.param(name, fault, id=f"{name}-{fault[0]}" + (f"-{fault[1]:.0%}" if "cut" in fault[0] else ""))
    for name, operation in OPERATIONS.items()
    for fault in operation.faults
]


@pytest.fixture(scope="module")
def client(server: S3) -> Any:
    return server.client()


@pytest.fixture(scope="module")
def proxy(server: S3) -> Iterator[Proxy]:
    with proxied(server.endpoint) as found:
        yield found


@pytest.fixture
def place(s3: S3, client: Any, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A prefix and a folder of the test's own."""
    found = Place(client, proxy, tmp_path / "local", uuid.uuid4().hex)
    found.folder.mkdir()
    for name, data in BEFORE.items():
        if name.startswith("local/"):
            (found.folder / name.removeprefix("local/")).write_bytes(data)
        else:
            client.put_object(Bucket=BUCKET, Key=f"{found.prefix}/{name}", Body=data)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
    monkeypatch.setattr(transfers, "PART", PART)
    proxy.heal()
    yield found
    proxy.heal()


def patience(monkeypatch: pytest.MonkeyPatch, *, silence: float, requests: int, tries: int) -> None:
    """How long the buckets that are made from now on wait for a server."""
    monkeypatch.setattr(transfers, "SILENCE", silence)
    monkeypatch.setattr(transfers, "REQUESTS", requests)
    monkeypatch.setattr(s3_attempts, "TRIES", tries)
    monkeypatch.setattr(s3_attempts, "PAUSE", 0.01)


def after(operation: Operation) -> STATE:
    """What there is once it is done."""
    changed = BEFORE | operation.change
    return {name: data for name, data in changed.items() if data is not None}


@pytest.mark.parametrize(("name", "fault"), CASES)
def test_a_fault_that_ends_is_overcome(name: str, fault: Fault, place: Place, monkeypatch: pytest.MonkeyPatch):
    (kind, share), operation, told = fault, OPERATIONS[name], list[int]()
    patience(monkeypatch, silence=1.5 if kind == HANG else 30, requests=5, tries=5)
    bucket = Bucket(place.url)
    place.proxy.fail(kind, on=operation.on, share=share)
    operation.act(bucket, place, told)
    assert place.proxy.fired == {kind: 1}
    assert place.state() == after(operation)
    assert sum(told) in (0, *map(len, filter(None, operation.change.values())))
    assert bool(told) == (name in ("download", "upload", "upload's part", "upload's end"))
    note(f"{kind} at {share:.0%}, once" if "cut" in kind else f"{kind}, once", name, "recovers", 1)


@pytest.mark.parametrize(("name", "fault"), CASES)
def test_a_fault_that_stays_ends_in_a_clear_error_and_nothing_is_half_there(
    name: str, fault: Fault, place: Place, monkeypatch: pytest.MonkeyPatch
):
    (kind, share), operation, told = fault, OPERATIONS[name], list[int]()
    patience(monkeypatch, silence=0.5 if kind == HANG else 30, requests=2, tries=2)
    bucket = Bucket(place.url)
    place.proxy.fail(kind, on=operation.on, share=share, times=ALWAYS)
    with pytest.raises(ConnectionError, match=f"^{place.url}.*: .*AWS_ENDPOINT_URL_S3") as raised:
        operation.act(bucket, place, told)
    assert SECRET not in str(raised.value) and "\n" not in str(raised.value)
    fired = place.proxy.fired[kind]
    assert fired >= 2
    place.proxy.heal()
    found, done = place.state(), kind in (LOST, CUT_ANSWER)  # S3 did it, and the answer was spoilt
    assert found == BEFORE or (done and found == after(operation))
    assert place.parts() == 0 and sum(told) == 0
    note(f"{kind} at {share:.0%}, always" if "cut" in kind else f"{kind}, always", name, "ConnectionError", fired)
