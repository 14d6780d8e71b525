"""Work in progress in S3, against a real server: another machine goes on from it, and nothing half-visible is taken."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from dod_models import artifact
from dod_pipeline import mirror
from dod_pipeline.mirror import Mirror, mirrored, progress, whole
from dod_pipeline.s3 import Bucket

from .bucket import BUCKET, S3
from .project import environment
from .test_kill import content

Captured = pytest.CaptureFixture[str]


def url_of(path: Path) -> str:
    """A place of the test's own."""
    return f"s3://{BUCKET}/{path.parent.name}/{path.name}"


def save(folder: Path, text: str) -> None:
    """A finished folder."""
    with artifact.writing(folder, schema="x/1", config="c") as output:
        (output.path / "weights").write_text(text)


def train(work: Path, *steps: int) -> Path:
    """What training leaves: each step saved, and its state, of which two are kept."""
    for step in steps:
        save(work / "out" / f"step-{step}", f"checkpoint {step}")
        save(work / "resume" / f"step-{step:09d}", f"state {step}")
        for old in sorted((work / "resume").glob("step-*"))[:-2]:
            shutil.rmtree(old)
    return work


def files(work: Path) -> dict[str, str]:
    return {name.removeprefix(f"{work}/"): digest for name, digest in content(work).items()}


def names(url: str) -> list[str]:
    return sorted(item.name for item in Bucket(url).objects())


def test_another_machine_goes_on_from_the_newest_state(s3: S3, tmp_path: Path):
    a, b, url = train(tmp_path / "a", 1, 2, 3), tmp_path / "b", url_of(tmp_path)
    Mirror(url, a).upload()
    Mirror(url, b).restore()
    assert files(b) == {n: d for n, d in files(a).items() if not n.startswith("resume/step-000000002")}
    assert progress(whole(b)) == (3, 8) and not (b / mirror.BESIDE).exists()
    assert artifact.verify(b / "resume" / "step-000000003", schema="x/1")["files"].keys() == {"weights"}


def test_only_what_is_new_is_sent_and_what_is_old_goes(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sent: list[str] = []
    upload = Bucket.upload

    def noted(self: Bucket, path: Path, name: str) -> None:
        sent.append(name)
        upload(self, path, name)

    monkeypatch.setattr(Bucket, "upload", noted)
    work, url = train(tmp_path / "a", 1), url_of(tmp_path)
    one = Mirror(url, work)
    for _ in range(2):
        one.upload()
    assert len(sent) == 4
    train(work, 2)
    one.upload()
    assert len(sent) == 8 and len(names(url)) == 1 + 6  # the index; two steps and one state, with their manifests
    state = sha256(b"state 1").hexdigest()
    assert f"files/{state}" in sent and f"files/{state}" not in names(url)
    one.forget()
    assert names(url) == []
    train(work, 3)
    one.upload()
    assert names(url) == []


def test_what_is_half_written_is_not_sent(s3: S3, tmp_path: Path):
    work, url = train(tmp_path / "a", 1), url_of(tmp_path)
    for name in ("out/step-2", "out/.step-3.partial", "resume/step-000000002"):
        (work / name).mkdir()
        (work / name / "weights").write_text("half")
    Mirror(url, work).upload()
    assert progress(whole(work)) == (1, 4) and len(names(url)) == 5


def test_shards_are_mirrored_too(s3: S3, tmp_path: Path):
    work, url = tmp_path / "a", url_of(tmp_path)
    for name in ("shard-0.npy", "shard-1.npy"):
        (work / "out").mkdir(parents=True, exist_ok=True)
        (work / "out" / name).write_text(name)
        artifact.write_json(work / "done" / f"{name}.json", {"sha256": sha256(name.encode()).hexdigest()})
    (work / "out" / ".shard-2.npy.partial").write_text("half")
    Mirror(url, work).upload()
    Mirror(url, tmp_path / "b").restore()
    assert files(tmp_path / "b") == {n: d for n, d in files(work).items() if "partial" not in n}


def test_what_lies_here_and_goes_further_stays(s3: S3, tmp_path: Path, capsys: Captured):
    a, b, url = train(tmp_path / "a", 1, 2), train(tmp_path / "b", 1, 2, 3), url_of(tmp_path)
    Mirror(url, a).upload()
    before = files(b)
    one = Mirror(url, b)
    one.restore()
    assert files(b) == before and capsys.readouterr().out == ""
    one.upload()
    late = Mirror(url, a)
    late.upload()  # of two machines that train the same, the one behind takes nothing away
    Mirror(url, tmp_path / "c").restore()
    assert progress(whole(tmp_path / "c")) == (3, 8)


NEWEST = f"files/{sha256(b'state 2').hexdigest()}"


def tamper(url: str) -> None:
    Bucket(url).write(NEWEST, b"other")


def lose(url: str) -> None:
    Bucket(url).remove([NEWEST])


def spoil(url: str) -> None:
    Bucket(url).write(mirror.INDEX, b"[]")


def lead_out(url: str) -> None:
    index = json.loads(Bucket(url).read(mirror.INDEX)[0])  # type: ignore[index]
    index["files"]["out/../../../evil"] = [1, "0" * 64]
    Bucket(url).write(mirror.INDEX, json.dumps(index).encode())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (tamper, "is damaged: its name is not its sha256"),
        (lose, "is not there, and index.json names it"),
        (spoil, "index.json: not an index of version mirror/1"),
        (lead_out, "index.json: not an index of version mirror/1: it names 'out/../../../evil'"),
    ],
)
def test_what_is_damaged_is_named_passed_over_and_replaced(
    s3: S3, tmp_path: Path, capsys: Captured, damage: Callable[[str], None], said: str
):
    url, b = url_of(tmp_path), train(tmp_path / "b", 1)
    Mirror(url, train(tmp_path / "a", 1, 2)).upload()
    damage(url)
    before = files(b)
    one = Mirror(url, b)
    one.restore()
    told = capsys.readouterr().err
    assert url in told and said in told and "the work begins from what lies here" in told
    assert files(b) == before
    one.upload()
    Mirror(url, tmp_path / "c").restore()
    assert progress(whole(tmp_path / "c")) == (1, 4)


def test_a_mirror_that_fails_is_told_once_and_stops_nothing(
    s3: S3, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(mirror, "EVERY", 0.1)
    tried = threading.Semaphore(0)
    url, work = url_of(tmp_path), tmp_path / "a"
    write, broken = Bucket.write, [True]

    def refuse(self: Bucket, *rest: Any, **how: Any) -> str:
        tried.release()
        if broken:
            raise ConnectionError("no permission")
        return write(self, *rest, **how)

    monkeypatch.setattr(Bucket, "write", refuse)
    with mirrored(Mirror(url, work)):
        train(work, 1)
        assert all(tried.acquire(timeout=60) for _ in range(3))
        assert names(url) and mirror.INDEX not in names(url)
        broken.clear()
    told = capsys.readouterr().err
    assert told.count("no permission") == 1 and url in told and "which is tried again" in told
    assert mirror.INDEX in names(url)


def test_the_last_state_is_uploaded_when_the_work_is_stopped(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """SIGTERM has become an exit by then; that dvc repeats its interrupt meanwhile is not heeded."""
    url, work = url_of(tmp_path), tmp_path / "a"
    write = Bucket.write

    def interrupted(self: Bucket, *rest: Any, **how: Any) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return write(self, *rest, **how)

    monkeypatch.setattr(Bucket, "write", interrupted)
    with pytest.raises(SystemExit), mirrored(Mirror(url, work)):
        train(work, 1)
        raise SystemExit(143)
    assert mirror.INDEX in names(url)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


KILLED = """
import os, signal, sys
from pathlib import Path
from dod_pipeline.mirror import Mirror
from dod_pipeline.s3 import Bucket
count, upload, write = int(sys.argv[1]), Bucket.upload, Bucket.write
def die(do):
    def before(self, *rest, **how):
        global count
        count -= 1
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return do(self, *rest, **how)
    return before
Bucket.upload, Bucket.write = die(upload), die(write)
Mirror(sys.argv[2], Path(sys.argv[3])).upload()
"""


def test_a_kill_during_an_upload_leaves_the_state_before(s3: S3, tmp_path: Path):
    """Before each of its requests: four files, then the index."""
    url, work = url_of(tmp_path), train(tmp_path / "a", 1)
    Mirror(url, work).upload()
    train(work, 2)
    for count in range(6):
        done = subprocess.run([sys.executable, "-c", KILLED, str(count), url, str(work)], env=environment())
        assert done.returncode == (-signal.SIGKILL if count < 5 else 0)
        fresh = tmp_path / f"fresh-{count}"
        Mirror(url, fresh).restore()
        assert progress(whole(fresh)) == ((1, 4) if count < 5 else (2, 6))
    Mirror(url, work).forget()
    assert names(url) == []


def test_where_nothing_may_be_removed_the_newest_state_counts(
    s3: S3, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
):
    """As under the role of a worker."""

    def refuse(self: Bucket, names: Any) -> None:
        for name in names:
            raise ConnectionError(f"{name}: not removed: AccessDenied")

    url, work = url_of(tmp_path), tmp_path / "a"
    one = Mirror(url, work)
    monkeypatch.setattr(Bucket, "remove", refuse)
    for step in (1, 2, 3):
        train(work, step)
        one.upload()
    told = capsys.readouterr().err
    assert told.count("AccessDenied") == 1 and "older states stay there, too" in told
    Mirror(url, tmp_path / "b").restore()
    assert progress(whole(tmp_path / "b")) == (3, 8)
