"""DVC's remote in a real S3 server, behind a proxy that does harm: what `dvc push` and `dod pull` make of it."""

import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from dod_pipeline.s3 import Bucket

from .bucket import BUCKET, KEY, READER, READER_SECRET, S3, SECRET, serve
from .project import Project
from .proxy import ALWAYS, CUT_REQUEST, HANG, RESET, Proxy, note, proxied

NUMBER = 3  # files


def use(project: Project, url: str, endpoint: str) -> None:
    """Make this remote the project's."""
    settings = {"url": url, "endpointurl": endpoint, "verify": "true"}
    lines = [f"    {name} = {value}" for name, value in settings.items()]
    text = "\n".join(["[core]", "    remote = cloud", "['remote \"cloud\"']", *lines])
    (project.root / ".dvc" / "config.local").write_text(text + "\n")


def whole(bucket: Bucket) -> int:
    """How many objects there are; each is named by the md5 of its bytes."""
    names = [o.name for o in bucket.objects()]
    for name in names:
        found = bucket.read(name)
        assert found is not None
        digest = md5(found[0])
        assert name.removesuffix(".dir") == f"files/md5/{digest[:2]}/{digest[2:]}"
    return len(names)


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


@pytest.fixture(scope="module")
def settings(server: S3) -> Iterator[None]:
    """What boto3 and DVC read of the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def proxy(server: S3, settings: None) -> Iterator[Proxy]:
    with proxied(server.endpoint) as found:
        yield found


@pytest.fixture
def bucket(server: S3, settings: None) -> Bucket:
    """A remote of the test's own, past the proxy."""
    return Bucket(f"s3://{BUCKET}/{uuid.uuid4().hex}")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A DVC project with a folder of files, one of them large; only to be copied."""
    project = Project(tmp_path_factory.mktemp("made") / "project")
    (project.root / "data").mkdir(parents=True)
    for index in range(NUMBER):
        (project.root / "data" / f"{index}").write_bytes(os.urandom(50_000 if index else 12 * 2**20))
    project.run("git", "init", "--quiet")
    project.dvc("init", "--quiet")
    project.dvc("add", "--quiet", "data")
    project.commit()
    return project


@pytest.mark.parametrize("kind", ["SlowDown", "InternalError", RESET, CUT_REQUEST])
def test_a_push_through_a_fault_recovers_or_fails_clearly_and_the_next_one_completes(
    kind: str, made: Project, proxy: Proxy, bucket: Bucket, tmp_path: Path
):
    project = made.copy(tmp_path / "project")
    use(project, bucket.url, proxy.url)
    proxy.fail(kind, on="^PUT", times=3)
    project.dvc("push")
    assert proxy.fired == {kind: 3} and whole(bucket) == NUMBER + 1
    note(f"{kind}, 3 times", "dvc push", "recovers", 3)
    second = Bucket(f"{bucket.url}/second")
    use(project, second.url, proxy.url)
    proxy.heal()
    proxy.fail(kind, on="^PUT", times=ALWAYS)
    said = project.run("dvc", "push", status=1, AWS_MAX_ATTEMPTS="1").stderr  # of botocore; there are s3fs's, too
    assert "ERROR: failed to push data to the cloud" in said and SECRET not in said
    fired = proxy.fired[kind]
    assert fired > 0 and whole(second) == 0
    proxy.heal()
    project.dvc("push")
    assert whole(second) == NUMBER + 1
    note(f"{kind}, always", "dvc push", "fails clearly; the next completes", fired)


@pytest.mark.parametrize("who", ["wrong secret", "reader"])
def test_who_may_not_write_pushes_nothing(who: str, made: Project, bucket: Bucket, server: S3, tmp_path: Path):
    project = made.copy(tmp_path / "project")
    use(project, bucket.url, server.endpoint)
    key, secret = (READER, READER_SECRET) if who == "reader" else (KEY, "another-secret")
    done = project.start("dvc", "push", AWS_ACCESS_KEY_ID=key, AWS_SECRET_ACCESS_KEY=secret)
    said = "".join(done.communicate())
    assert done.returncode != 0 and ("Access Denied" in said or "Forbidden" in said or "403" in said), said
    assert SECRET not in said and secret not in said and whole(bucket) == 0
    note(who, "dvc push", "fails clearly", 1)


def test_a_server_killed_during_a_push_has_nothing_half_and_the_next_push_completes(
    made: Project, settings: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    project, data = made.copy(tmp_path / "project"), tmp_path / "server"
    data.mkdir()
    with ExitStack() as stack:
        first = stack.enter_context(ExitStack())
        server = first.enter_context(serve(data))
        proxy = stack.enter_context(proxied(server.endpoint))
        use(project, f"s3://{BUCKET}/x", proxy.url)
        proxy.fail(HANG, on="^PUT")  # until the server has gone
        push = project.start("dvc", "push")
        while not proxy.fired[HANG]:
            assert push.poll() is None, push.communicate()
            time.sleep(0.05)
        first.close()
        proxy.heal()
        said = push.communicate()[1]
        assert push.returncode != 0 and "ERROR" in said
        server = stack.enter_context(serve(data))
        proxy.upstream = server.endpoint
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
        bucket = Bucket(f"s3://{BUCKET}/x")
        assert whole(bucket) < NUMBER + 1
        project.dvc("push")
        assert whole(bucket) == NUMBER + 1
    note("server killed and restarted", "dvc push", "fails clearly; the next completes", 1)


@pytest.fixture(scope="module")
def pushed(built: Project, server: S3, settings: None, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The tiny project, pushed to S3; only to be cloned."""
    project = built.copy(tmp_path_factory.mktemp("pushed") / "project")
    use(project, f"s3://{BUCKET}/pushed", server.endpoint)
    project.dvc("push")
    return project


@pytest.fixture
def clone(pushed: Project, proxy: Proxy, tmp_path: Path) -> Project:
    """A clone with nothing in it, which reaches the remote through the proxy."""
    found = pushed.clone(tmp_path / "clone")
    use(found, f"s3://{BUCKET}/pushed", proxy.url)
    return found


def files(project: Project, *stages: str) -> dict[str, str]:
    """Digests of the files that stages made and that DVC keeps."""
    outs = [out for stage in stages or project.lock() for out in project.lock()[stage].get("outs", [])]
    paths = [project.root / out["path"] for out in outs]
    found = [p for path in paths for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file()]
    return {p.relative_to(project.root).as_posix(): md5(p.read_bytes()) for p in found}


def test_what_one_clone_pushed_another_one_pulls_to_the_byte(pushed: Project, clone: Project):
    clone.dod("pull")
    assert files(clone) == files(pushed) and len(files(clone)) > 20
    assert clone.outs() == pushed.outs()
    assert yaml.safe_load(clone.dvc("status", "--json").stdout) == {}
    assert whole(Bucket(f"s3://{BUCKET}/pushed")) > 20
    note("none", "dvc push and dod pull", "equal md5s and bytes", 0)


@pytest.mark.parametrize("change", ["tampered", "vanished"])
def test_an_object_that_changed_in_the_remote_is_refused_or_named_and_nothing_is_lost(
    change: str, pushed: Project, clone: Project
):
    bucket = Bucket(f"s3://{BUCKET}/pushed")
    clone.dod("pull", "dataset@tiny", "codec@tiny")
    had = files(clone, "dataset@tiny", "codec@tiny")
    victim = max(files(pushed, "train@tiny"))
    digest = files(pushed, "train@tiny")[victim]
    name = f"files/md5/{digest[:2]}/{digest[2:]}"
    kept = bucket.read(name)
    assert kept is not None
    if change == "tampered":
        bucket.write(name, kept[0][:-1] + bytes([kept[0][-1] ^ 1]))
    else:
        bucket.remove([name])
    try:
        said = clone.run("dod", "pull", status=1).stderr
        assert said.startswith(f"dod: dvc pull, remote cloud s3://{BUCKET}/pushed") and SECRET not in said
        assert (
            f"refused {victim}: the bytes there" if change == "tampered" else f"failed to transfer '{digest}'"
        ) in said
        assert not (clone.root / victim).exists()
        assert files(clone, "dataset@tiny", "codec@tiny") == had
        note(change, "dod pull", "refused and named" if change == "tampered" else "named", 1)
    finally:
        bucket.write(name, kept[0])
    clone.dod("pull")
    assert files(clone) == files(pushed)


def test_a_hung_remote_ends_the_pull_after_the_timeout(pushed: Project, clone: Project, proxy: Proxy):
    clone.write_params(clone.params() | {"deployment": {"storage": {"timeout": 8}}})
    proxy.fail(HANG, times=ALWAYS)
    said = clone.run("dod", "pull", status=1).stderr
    assert f"dod: dvc pull, remote cloud s3://{BUCKET}/pushed, failed (no end after 8 s)" in said
    assert "What was computed stays here" in said and SECRET not in said
    assert proxy.fired[HANG] > 0
    note("hang, always", "dod pull", "error after deployment.storage.timeout", proxy.fired[HANG])
    proxy.heal()
    clone.dod("pull", "dataset@tiny")
    assert files(clone, "dataset@tiny") == files(pushed, "dataset@tiny")
