"""Everybody's records in S3, against a real server: each clone has them all, and no query fails without S3."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dod_pipeline import cli, ledger, records, union
from dod_pipeline.config import ENDPOINT
from dod_pipeline.s3 import Bucket

from .bucket import BUCKET, S3
from .project import params
from .test_history import record

Captured = pytest.CaptureFixture[str]
Asked = Callable[[], list[str]]


def clone(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose storage is the test's own place; it becomes the current one."""
    root = tmp_path / name
    root.mkdir(exist_ok=True)
    url = f"s3://{BUCKET}/{tmp_path.parent.name}/{tmp_path.name}"
    (root / "params.yaml").write_text(yaml.safe_dump(params(Path("/")) | {"deployment": {"storage": url}}))
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def go(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Enter a clone."""
    return lambda name: clone(tmp_path, name, monkeypatch)


@pytest.fixture
def bucket(s3: S3, tmp_path: Path) -> Bucket:
    return Bucket(f"s3://{BUCKET}/{tmp_path.parent.name}/{tmp_path.name}")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """The requests since it was last asked."""
    found: list[str] = []
    for name in ("read", "write", "objects"):
        do = getattr(Bucket, name)

        def noted(self: Bucket, *rest: Any, do: Any = do, name: str = name, **how: Any) -> Any:
            found.append(name)
            return do(self, *rest, **how)

        monkeypatch.setattr(Bucket, name, noted)

    def take() -> list[str]:
        taken = sorted(found)
        found.clear()
        return taken

    return take


def known() -> frozenset[str]:
    return union.names_in(ledger.HISTORY)


def test_what_one_clone_records_the_other_sees(go: Callable[[str], Path], capsys: Captured):
    go("a")
    for row in ("stage1", "stage2"):
        records.append(record(row=row))
    ledger.write_once(ledger.HISTORY / "costs" / "train@tiny", record(row="x"))
    ledger.write_once(ledger.HISTORY / "settings" / "train", record(row="y"))
    assert cli.main(["history", "--format", "json"]) == 0
    mine, names = json.loads(capsys.readouterr().out), known()
    go("b")
    records.append(record(row="floor", stage="floor"))
    assert cli.main(["history", "--format", "json"]) == 0
    theirs = json.loads(capsys.readouterr().out)
    assert [row for row in theirs if row["row"] != "floor"] == mine and len(theirs) == len(mine) + 1 == 4
    assert names < known() and len(names) == 4
    go("a")
    assert cli.main(["history", "--format", "json"]) == 0
    assert sorted(map(str, json.loads(capsys.readouterr().out))) == sorted(map(str, theirs))


def test_a_sync_costs_one_request_and_one_for_each_record_that_lacks(go: Callable[[str], Path], asked: Asked):
    go("a")
    for seed in range(3):
        records.append(record(seed=seed))
    union.sync()
    assert asked() == ["objects", *["read"] * 2, *["write"] * 4]
    union.sync()
    assert asked() == ["read"]
    go("b")
    union.sync()
    assert asked() == ["objects", *["read"] * 4]
    records.append(record(seed=3))
    union.sync()
    assert asked() == [*["read"] * 2, *["write"] * 2]
    go("a")
    union.sync()
    assert asked() == ["read", "read"] and len(known()) == 4


def test_names_are_listed_where_the_last_ones_reach_not_far_enough_back_and_now_and_then(
    go: Callable[[str], Path], asked: Asked, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(union, "REACH", 2)
    go("a")
    records.append(record(seed=0))
    union.sync()
    go("b")
    for seed in range(1, 4):
        records.append(record(seed=seed))
        union.sync()
    asked()
    go("a")
    union.sync()
    assert asked() == ["objects", *["read"] * 4] and len(known()) == 4
    monkeypatch.setattr(union, "EVERY", 0.0)
    union.sync()
    assert asked() == ["objects", "read"]


def test_a_damaged_record_there_is_named_and_left_out_and_its_owner_can_mend_it(
    go: Callable[[str], Path], bucket: Bucket, capsys: Captured, monkeypatch: pytest.MonkeyPatch
):
    go("a")
    path = records.append(record())
    records.append(record(seed=1))
    union.sync()
    bucket.write(path.as_posix(), b'{"kind": "score"}')
    bucket.write("history/tiny/notes.txt", b"not a record")
    go("b")
    union.sync()
    told = capsys.readouterr().err
    assert f"{bucket.url}/{path}: its sha256 is " in told and "left out" in told
    assert f"{bucket.url}/history/tiny/notes.txt: no record's name" in told
    assert len(known()) == 1 and not path.exists()
    bucket.remove([path.as_posix()])
    monkeypatch.setattr(union, "EVERY", 0.0)
    go("a")
    union.sync()
    go("b")
    union.sync()
    assert ledger.read(path) and len(known()) == 2


def test_a_damaged_record_here_is_not_uploaded(go: Callable[[str], Path], bucket: Bucket, capsys: Captured):
    go("a")
    path = records.append(record())
    path.write_text("{}")
    union.sync()
    assert f"{path}: its sha256 is " in capsys.readouterr().err
    assert list(bucket.objects()) == []


def test_names_that_lead_out_of_the_folder_are_not_followed(go: Callable[[str], Path], bucket: Bucket):
    root = go("a")
    bucket.write(union.RECENT, f"../../{'0' * 64}.json\n/{'1' * 64}.json".encode())
    union.sync()
    names = [f"../../{'0' * 64}.json", f"/{'1' * 64}.json"]
    found = union.look(bucket, names, union.Known(frozenset(), names[0], 1e12))
    assert found == (frozenset(), names[1], 1e12)
    assert sorted(path.name for path in root.iterdir()) == [".state", "params.yaml"]


def test_without_s3_commands_warn_and_go_on_and_a_later_one_makes_it_good(
    go: Callable[[str], Path], s3: S3, capsys: Captured, monkeypatch: pytest.MonkeyPatch
):
    go("a")
    records.append(record())
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:9")
    assert cli.main(["history", "--format", "json"]) == 0
    said = capsys.readouterr()
    assert len(json.loads(said.out)) == 1
    assert "dod: history/ is not brought up to date: s3://" in said.err and "goes with the next command" in said.err
    monkeypatch.setenv(ENDPOINT, s3.endpoint)
    assert cli.main(["history", "--format", "json"]) == 0
    assert capsys.readouterr().err == ""
    go("b")
    union.sync()
    assert len(known()) == 1


def test_a_server_that_hangs_is_not_waited_for(
    go: Callable[[str], Path], capsys: Captured, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(union, "SOON", 0.2)
    go("a")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv(ENDPOINT, f"http://127.0.0.1:{server.getsockname()[1]}")
        union.sync()
    assert "no answer within 0.2 s" in capsys.readouterr().err


def test_a_broken_params_file_is_named_and_no_query_fails(go: Callable[[str], Path], capsys: Captured):
    root = go("a")
    records.append(record())
    (root / "params.yaml").write_text("datasets: [")
    assert cli.main(["history", "--format", "json"]) == 0
    said = capsys.readouterr()
    assert len(json.loads(said.out)) == 1 and "params.yaml: not YAML" in said.err
    os.remove(root / "params.yaml")
    assert cli.main(["history", "--format", "json"]) == 0
    assert capsys.readouterr().err == ""
