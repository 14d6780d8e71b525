"""The index knows every file by its digest, says what is damaged each time, and is never needed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dod_pipeline import history, ledger, records
from dod_pipeline.history import Selection

from .bucket import BUCKET, S3
from .project import environment
from .test_history import indexes, names, plain, put, record, root  # noqa: F401

Captured = pytest.CaptureFixture[str]


def first(folder: Path) -> Path:
    """The file of the record in row r0."""
    (path,) = (p for p in folder.glob("*/*.json") if json.loads(p.read_text())["row"] == "r0")
    return path


def cut_off(path: Path) -> None:
    path.write_text(path.read_text()[:100])


def flip(path: Path) -> None:
    path.write_text(path.read_text().replace("2026", "2027"))


def rename(path: Path) -> None:
    path.rename(path.with_name("notes.txt"))


def other_fields(path: Path) -> None:
    path.unlink()
    put(path.parent, {"kind": "score", "time": "2026-01-01", "fid": 0.0})


def no_kind(path: Path) -> None:
    path.unlink()
    put(path.parent, {"hello": 1})


def no_object(path: Path) -> None:
    path.unlink()
    put(path.parent, [1])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut_off, "not its name: changed, damaged or cut off"),
        (flip, "not its name: changed, damaged or cut off"),
        (rename, "notes.txt: no record's name"),
        (other_fields, "no record of this version"),
        (no_kind, "kind and time are missing"),
        (no_object, "not a JSON object"),
    ],
)
def test_what_is_damaged_is_named_each_time_and_left_out(root: Path, capsys: Captured, damage: Any, said: str):  # noqa: F811
    assert len(history.query(root)) == 6 and capsys.readouterr().err == ""
    damage(first(root))
    for _ in range(2):
        assert names(history.query(root)) == ["r5", "r4", "r3", "r2", "r1"]
        error = capsys.readouterr().err
        assert error.startswith(f"dod: {root}/tiny/") and said in error and "left out" in error


def test_what_comes_goes_or_is_restored_is_noticed(root: Path, capsys: Captured, indexes: Path):  # noqa: F811
    path = first(root)
    text = path.read_text()
    history.query(root)
    (index,) = indexes.iterdir()
    before = index.stat().st_mtime_ns
    history.query(root)
    assert index.stat().st_mtime_ns == before  # nothing to do
    records.append(record(row="new"), root=root)
    assert "new" in names(history.query(root))
    path.unlink()
    assert "r0" not in names(history.query(root))
    path.write_text("half")
    assert "r0" not in names(history.query(root)) and "not its name" in capsys.readouterr().err
    path.write_text(text)
    assert "r0" in names(history.query(root)) and capsys.readouterr().err == ""
    assert [*indexes.iterdir()] == [index]


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"PAR1 no more"), cut_off])
def test_an_index_that_is_lost_or_damaged_is_made_again(root: Path, indexes: Path, damage: Any):  # noqa: F811
    found = history.query(root)
    (index,) = indexes.iterdir()
    index.write_bytes(index.read_bytes())
    if damage is cut_off:
        index.write_bytes(index.read_bytes()[:100])
    else:
        damage(index)
    assert history.query(root) == found


def test_a_killed_writer_s_leftovers_and_settings_are_no_records(root: Path, capsys: Captured):  # noqa: F811
    (root / "tiny" / ".0123.partial").write_text("{")
    (root / "settings" / "train").mkdir(parents=True)
    (root / "settings" / "train" / "x.json").write_text("{}")
    assert len(history.query(root)) == 6 and capsys.readouterr().err == ""


def test_many_readers_and_a_writer_at_once(tmp_path: Path):
    program = """
from pathlib import Path
from dod_pipeline import history
counts = [len(history.query()) for _ in range(6)]
assert counts == sorted(counts), counts
"""
    records.append(record(), tmp_path / "history")
    readers = [
        subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    for step in range(1, 60):
        records.append(record(step=step), tmp_path / "history")
    assert [reader.communicate()[1] for reader in readers] == [b""] * 3
    assert [*(tmp_path / ".state" / "history").glob(".*")] == []


def test_provisional_records_count_if_asked_for_until_there_are_versioned_ones(tmp_path: Path):
    where = tmp_path / "history"
    records.append(record(row="early", provisional=True, checkpoint="tiny-4"), where)
    records.append(record(row="replaced", provisional=True), where)
    records.append(record(row="versioned", time="2026-01-02T13:00:00Z"), where)
    records.append(record(row="retraining", provisional=True, time="2026-01-02T14:00:00Z"), where)
    assert names(Selection(where).records()) == ["versioned"]
    assert names(Selection(where, provisional=True).records()) == ["early", "versioned", "retraining"]


def test_a_bucket_s_records_are_asked_like_a_folder_s(root: Path, s3: S3, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    monkeypatch.delenv("DOD_CACHE", raising=False)
    url = s3.upload(root, "history")
    assert history.query(url) == history.query(root)
    new = record(row="new")
    s3.client().put_object(Bucket=BUCKET, Key=f"history/tiny/{new.digest}.json", Body=new.canonical().encode())
    assert [row for row in history.query(url) if row["row"] == "new"] == [plain(new)]
    assert ledger.typed(records.Record, history.query(url)[-1]).experiment == "tiny"
