"""Objects in a real S3 server: what it refuses, what others change meanwhile, and what many do at once."""

import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from dod_pipeline import s3 as transfers
from dod_pipeline import s3_attempts
from dod_pipeline.s3 import Bucket, ChangedError, Object, reaching

from .bucket import BUCKET, READER, READER_SECRET, S3, SECRET, serve
from .proxy import CUT_ANSWER, CUT_REQUEST, HANG, LOST, RESET, Proxy, note, proxied

PART = 5 * 2**20  # bytes: the smallest that S3 allows


@pytest.fixture
def url(s3: S3, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix of the test's own."""
    monkeypatch.setattr(transfers, "PART", PART)
    monkeypatch.setattr(s3_attempts, "PAUSE", 0.05)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def proxy(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with proxied(s3.endpoint) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", found.url)
        yield found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of two parts."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(PART + 1))
    return path


def calls(bucket: Bucket, path: Path) -> dict[str, Callable[[], Any]]:
    """All that writes, and what reads."""
    small = path.with_name("small")
    small.write_bytes(b"small")
    return {
        "upload": lambda: bucket.upload(small, "new"),
        "upload in parts": lambda: bucket.upload(path, "new"),
        "write": lambda: bucket.write("new", b"1"),
        "conditional write": lambda: bucket.write("new", b"1", etag=None),
        "remove": lambda: bucket.remove(["there"]),
        "list": lambda: list(bucket.objects()),
        "find": lambda: bucket.find("there"),
        "read": lambda: bucket.read("there"),
        "download": lambda: bucket.download(Object("there", 1, "0" * 32), path.with_name("copy")),
    }


def test_an_object_goes_there_and_back(url: str, file: Path, tmp_path: Path):
    with reaching(url + "/") as bucket:
        assert bucket.find("below/file") is None and bucket.read("below/file") is None
        whole = bucket.upload(file, "below/file")
        assert whole == Object("below/file", PART + 1, whole.etag) and whole.etag.endswith("-2")
        etag = bucket.write("belowness", b"pointer")
        assert bucket.read("belowness") == (b"pointer", etag)
        assert list(bucket.objects()) == [whole, Object("belowness", 7, etag)]
        assert list(bucket.objects("below")) == list(bucket.objects("below/")) == [whole] == [bucket.find("below/file")]
        bucket.download(whole, tmp_path / "copies" / "copy")
        assert (tmp_path / "copies" / "copy").read_bytes() == file.read_bytes()
        bucket.remove(o.name for o in bucket.objects())
        assert list(bucket.objects()) == []


def test_more_than_a_page_is_listed_and_removed(url: str, monkeypatch: pytest.MonkeyPatch):
    bucket = Bucket(url)
    listed = bucket.client.list_objects_v2
    monkeypatch.setattr(bucket.client, "list_objects_v2", lambda **ask: listed(**ask, MaxKeys=2))
    monkeypatch.setattr(transfers, "AT_ONCE", 2)
    for name in "abcde":
        bucket.write(name, b"")
    assert [o.name for o in bucket.objects()] == list("abcde")
    bucket.remove("abcd")
    assert [o.name for o in bucket.objects()] == ["e"]


@pytest.mark.parametrize("name", ["", "../x", "a//b", "/a", "a/./b", "a/"])
def test_names_that_are_no_paths_are_refused(url: str, file: Path, name: str):
    bucket = Bucket(url)
    refused = [lambda: bucket.find(name), lambda: bucket.read(name), lambda: bucket.write(name, b"")]
    refused += [lambda: bucket.upload(file, name), lambda: bucket.remove([name])]
    for call in refused:
        with pytest.raises(ValueError, match="which is no path; rename it"):
            call()


@pytest.mark.parametrize("who", ["wrong secret", "reader"])
def test_what_s3_refuses_is_said_at_once(who: str, url: str, file: Path, s3: S3, proxy: Proxy, monkeypatch: Any):
    Bucket(url).write("there", b"1")
    key, secret = (
        (READER, READER_SECRET) if who == "reader" else (s3.environment()["AWS_ACCESS_KEY_ID"], "another-secret")
    )
    for name, value in s3.environment(key, secret).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
    bucket = Bucket(url)
    for name, call in calls(bucket, file).items():
        proxy.heal()
        if who == "reader" and name in ("list", "find", "read"):
            assert call()
            continue
        if who == "reader" and name == "download":
            found = bucket.find("there")
            assert found is not None
            bucket.download(found, file.with_name("copy"))
            continue
        with pytest.raises(ConnectionError, match=f"^{url}.*(AccessDenied|SignatureDoesNotMatch|403)") as raised:
            call()
        assert len(proxy.requests) == 1  # no second attempt
        assert "what they permit" in str(raised.value) and "\n" not in str(raised.value)
        assert SECRET not in str(raised.value) and secret not in str(raised.value)
        note(who, name, "ConnectionError at once", 1)
    monkeypatch.undo()
    client = s3.client()
    listed = client.list_objects_v2(Bucket=BUCKET, Prefix=url.rpartition("/")[2])["Contents"]
    assert [item["Key"].rpartition("/")[2] for item in listed] == ["there"]


def test_secrets_in_the_settings_are_not_repeated(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transfers, "REQUESTS", 1)
    monkeypatch.setattr(s3_attempts, "TRIES", 1)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "canary\nwith a line's end")
    with pytest.raises(ConnectionError, match="Invalid header value") as raised:
        Bucket(url).read("x")
    monkeypatch.delenv("AWS_SESSION_TOKEN")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://user:canary@127.0.0.1:9")
    with pytest.raises(ConnectionError, match="Could not connect") as other:
        Bucket(url).read("x")
    assert "canary" not in str(raised.value) + str(other.value)


@pytest.mark.parametrize("change", ["tampered", "vanished"])
def test_what_changed_since_it_was_listed_is_named(change: str, url: str, file: Path, tmp_path: Path):
    bucket, copy = Bucket(url), tmp_path / "copies" / "copy"
    copy.parent.mkdir()
    copy.write_bytes(b"old")
    listed = bucket.upload(file, "name")
    if change == "tampered":
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        bucket.upload(file, "name")
    else:
        bucket.remove(["name"])
    with pytest.raises(ChangedError, match=f"^{url}/name: was replaced or removed since it was listed"):
        bucket.download(listed, copy)
    assert [(p.name, p.read_bytes()) for p in copy.parent.iterdir()] == [("copy", b"old")]
    note(change, "download", "ChangedError", 1)


def test_a_write_that_won_though_its_answer_got_lost_is_no_loss(url: str, proxy: Proxy):
    """Both times: where botocore sends it again, and where nothing does for long."""
    bucket = Bucket(url)
    proxy.fail(LOST, on="^PUT")
    etag = bucket.write("pointer", b"1", etag=None)
    assert bucket.read("pointer") == (b"1", etag) and proxy.fired == {LOST: 1}
    proxy.fail(LOST, on="^PUT", times=transfers.REQUESTS + 1)
    newer = bucket.write("pointer", b"2", etag=etag)
    assert bucket.read("pointer") == (b"2", newer) and proxy.fired == {LOST: transfers.REQUESTS + 2}
    with pytest.raises(ChangedError, match="pointer: another one wrote or removed it; read it again"):
        bucket.write("pointer", b"2", etag=etag)  # the same bytes, but another writer
    bucket.remove(["pointer"])
    with pytest.raises(ChangedError, match="pointer: another one wrote or removed it"):
        bucket.write("pointer", b"3", etag=newer)


def test_of_many_writers_of_one_version_one_wins(url: str):
    bucket, rounds, writers = Bucket(url), 10, 4
    etag: str | None = None
    with ThreadPoolExecutor(writers) as pool:
        for number in range(rounds):
            start = threading.Barrier(writers)

            def attempt(writer: int, start: Any = start, etag: str | None = etag, number: int = number) -> str | None:
                start.wait()
                try:
                    return bucket.write("pointer", f"{number} {writer}".encode(), etag=etag)
                except ChangedError:
                    return None

            won = [(writer, found) for writer, found in enumerate(pool.map(attempt, range(writers))) if found]
            assert len(won) == 1
            ((writer, etag),) = won
            assert bucket.read("pointer") == (f"{number} {writer}".encode(), etag)
    note(f"{writers} threads, one version", "conditional write", f"one wins each of {rounds} rounds", rounds)


COUNT = """
import sys
from dod_pipeline.s3 import Bucket, ChangedError
bucket, lost = Bucket(sys.argv[1]), 0
for _ in range(int(sys.argv[2])):
    while True:
        data, etag = bucket.read("pointer")
        try:
            bucket.write("pointer", b"%d" % (int(data) + 1), etag=etag)
            break
        except ChangedError:
            lost += 1
print(lost)
"""


def test_processes_that_count_in_one_pointer_lose_nothing(url: str):
    writers, times = 3, 40
    Bucket(url).write("pointer", b"0", etag=None)
    command = [sys.executable, "-c", COUNT, url, str(times)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(writers)]
    lost = [int(process.communicate()[0]) for process in started]
    found = Bucket(url).read("pointer")
    assert found is not None and found[0] == b"%d" % (writers * times)
    assert sum(lost) > 0  # they did meet
    note(f"{writers} processes that count to {writers * times}", "conditional write", "none lost", sum(lost))


def test_many_threads_in_a_storm_of_faults(url: str, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bucket, number = Bucket(url), 48
    for index in range(number):
        (tmp_path / f"{index}").write_bytes(os.urandom(20_000))
    for kind, on in (
        (RESET, ""),
        ("SlowDown", "GET"),
        ("InternalError", "PUT"),
        (CUT_ANSWER, "GET"),
        (CUT_REQUEST, ""),
    ):
        proxy.fail(kind, on=on, times=6)
    proxy.fail(LOST, times=6)

    def there_and_back(index: int) -> bool:
        bucket.upload(tmp_path / f"{index}", f"{index}")
        found = bucket.find(f"{index}")
        assert found is not None
        bucket.download(found, tmp_path / "copies" / f"{index}")
        return (tmp_path / "copies" / f"{index}").read_bytes() == (tmp_path / f"{index}").read_bytes()

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(there_and_back, range(number))) == [True] * number
    fired = sum(proxy.fired.values())
    assert len(proxy.fired) == 6 and fired == 36
    note("a storm of six faults, 16 threads", "upload and download", "recovers", fired)


def test_a_server_killed_during_an_upload_leaves_what_was_there_and_takes_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(transfers, "PART", PART)
    monkeypatch.setattr(s3_attempts, "PAUSE", 0.02)
    old, new, data = os.urandom(PART + 1), os.urandom(4 * PART), tmp_path / "data"
    data.mkdir()
    with ExitStack() as stack:
        first = stack.enter_context(ExitStack())
        server = first.enter_context(serve(data))
        proxy = stack.enter_context(proxied(server.endpoint))
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        (tmp_path / "file").write_bytes(old)
        Bucket(f"s3://{BUCKET}/x").upload(tmp_path / "file", "name")
        (tmp_path / "file").write_bytes(new)
        for tries, outcome in ((1, "ConnectionError"), (100, "recovers")):
            monkeypatch.setattr(s3_attempts, "TRIES", tries)
            bucket = Bucket(f"s3://{BUCKET}/x")
            proxy.heal()
            proxy.fail(HANG, on="partNumber=4")  # until the server has gone
            with ThreadPoolExecutor(1) as pool:
                sent = pool.submit(bucket.upload, tmp_path / "file", "name")
                while not proxy.fired[HANG]:
                    time.sleep(0.01)
                first.close()
                proxy.heal()
                if outcome == "ConnectionError":
                    with pytest.raises(ConnectionError, match=r"^s3://data/x/name: .*AWS_ENDPOINT_URL_S3"):
                        sent.result()
                server = first.enter_context(serve(data))
                proxy.upstream = server.endpoint
                if outcome == "recovers":
                    assert sent.result().size == len(new)
            there = server.client().get_object(Bucket=BUCKET, Key="x/name")["Body"].read()
            assert there == (new if outcome == "recovers" else old)
            note("server killed and restarted", f"upload in parts, {tries} tries", outcome, 1)
