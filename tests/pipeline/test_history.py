"""The history is append-only: nothing is overwritten, nothing is half there, and values are only data."""

import csv
import io
import json
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dod_models.artifact import DamagedError
from dod_pipeline import history, ledger, records, tables
from dod_pipeline.history import Selection
from dod_pipeline.records import Record

from .project import environment

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
SHA = "0123456789abcdef" * 4


def record(**changes: Any) -> Record:
    """A record with any fields changed."""
    plain = {
        "row": "stage1",
        "time": NOON,
        "experiment": "tiny",
        "checkpoint": "tiny-6",
        "step": 6,
        "stage": 1,
        "metrics": {"fid": 2.5, "precision": 0.5},
        "num_samples": 70,
        "seed": 0,
        "guidance": 1.0,
        "sampler": "euler-2",
        "evaluations": 2.0,
        "extractor": {"name": "small-net-64", "digest": SHA},
        "reference": SHA,
        "config": SHA,
        "weights": SHA,
        "data": SHA,
        "commit": None,
    }
    return Record.model_validate(plain | changes)


def plain(item: Record) -> dict[str, Any]:
    """The record as a query gives it back."""
    return {"id": item.digest, **json.loads(item.model_dump_json())}


@pytest.fixture(autouse=True)
def indexes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, where indexes are kept."""
    found = tmp_path / "here"
    found.mkdir()
    monkeypatch.chdir(found)
    return found / ".state" / "history"


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"solver": "euler", "num_steps": 10}, "euler-10"),
        ({}, "dopri5"),
        ({"rtol": 1e-5}, "dopri5 rtol=1e-05 atol=1e-06"),
        ({"guidance_interval": (0.2, 0.8)}, "dopri5"),  # guidance is off
        ({"guidance": 2.0}, "dopri5 null=both channels=first3"),
        ({"guidance": 2.0, "guidance_interval": (0.2, 0.8)}, "dopri5 null=both channels=first3 t=0.2-0.8"),
    ],
)
def test_a_sampler_s_name_tells_apart_what_samples_differently(options: dict[str, Any], name: str):
    from dod_models.sample import SampleConfig

    assert records.sampler_name(SampleConfig(**options).model_dump(mode="json")) == name


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A history of two experiments, three checkpoints and all kinds of stages, the newest written first."""
    tmp_path /= "history"
    rows: list[tuple[str, str, Any]] = [
        ("tiny", "tiny-6", "floor"),
        ("tiny", "tiny-6", "codec"),
        ("tiny", "tiny-6", 1),
        ("tiny", "tiny-6", 2),
        ("tiny", "tiny-4", 1),
        ("other", "other-2", 11),
    ]
    for age, (experiment, checkpoint, stage) in enumerate(rows):
        metrics = {"fid": float(age)} | ({"recall": 0.5} if stage == 2 else {})
        fields = {"experiment": experiment, "checkpoint": checkpoint, "stage": stage, "metrics": metrics}
        records.append(record(row=f"r{age}", time=NOON - timedelta(hours=age), **fields), root=tmp_path)
    return tmp_path


def names(found: list[dict[str, Any]]) -> list[str]:
    return [row["row"] for row in found]


def test_records_come_back_as_they_were_and_oldest_first(root: Path):
    found = history.query(root)
    assert names(found) == ["r5", "r4", "r3", "r2", "r1", "r0"]
    assert [ledger.typed(Record, row).digest for row in found] == [row["id"] for row in found]
    assert found[-1]["metrics"] == {"fid": 0.0} and found[-1]["stage"] == "floor"


@pytest.mark.parametrize(
    "filters, expected",
    [
        ({"experiment": "other"}, ["r5"]),
        ({"checkpoint": "tiny-4"}, ["r4"]),
        ({"stage": "1"}, ["r4", "r2"]),  # not 11
        ({"stage": "floor"}, ["r0"]),
        ({"stage": "codec"}, ["r1"]),
        ({"experiment": "tiny", "checkpoint": "tiny-6", "stage": "2"}, ["r3"]),
        ({"experiment": "tiny", "checkpoint": "other-2"}, []),
        ({"experiment": "tin"}, []),
        ({"experiment": "%"}, []),
        ({"metric": "recall"}, ["r3"]),
    ],
)
def test_filters_select(root: Path, filters: dict[str, str], expected: list[str]):
    assert names(history.query(root, **filters)) == expected


def test_a_metric_stands_alone(root: Path):
    assert [row["metrics"] for row in history.query(root, metric="fid", stage="2")] == [{"fid": 3.0}]


def test_an_unknown_metric_is_named(root: Path):
    with pytest.raises(ValueError, match=r"--metric 'fdi': no record has it"):
        history.query(root, metric="fdi")


def test_verdicts_and_calibrations_are_no_scores(root: Path):
    for kind in ("verdict", "calibration"):
        put(
            root / records.FOLDERS[kind] / "tiny",
            {"kind": kind, "time": "2027-01-01", "experiment": "tiny", "stage": 2},
        )
    assert len(history.query(root)) == 6
    for kind in ("verdict", "calibration"):
        (row,) = history.query(root, kind=kind)
        assert row["kind"] == kind and history.query(root, kind=kind, stage="2") == [row]
        assert history.query(root, kind=kind, experiment="other") == []
    with pytest.raises(ValueError, match="a verdict has no metrics"):
        history.query(root, kind="verdict", metric="fid")


def put(folder: Path, values: dict[str, Any]) -> Path:
    """A file that is named as a record with these values is."""
    text = json.dumps(values).encode()
    path = folder / f"{sha256(text).hexdigest()}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)
    return path


def test_probes_on_other_numbers_of_images_are_not_compared():
    probes = [plain(record(extractor=None, stage="probe", num_train=count)) for count in (100, 100, 200)]
    history.check_comparable(probes[:2])
    with pytest.raises(ValueError, match="num_samples is 70 after 100 to fit or 70 after 200 to fit"):
        history.check_comparable(probes)
    assert history.setting(probes) == "70 images"


def test_no_history_is_no_records(tmp_path: Path):
    assert history.query(tmp_path / "nothing") == []


def test_a_record_is_named_by_its_digest_and_never_overwritten(tmp_path: Path):
    root = tmp_path / "history"
    path = records.append(record(), root=root)
    assert path == root / "tiny" / f"{record().digest}.json"
    assert sha256(path.read_bytes()).hexdigest() == path.stem
    before = path.stat().st_ino
    assert records.append(record(), root=root) == path and path.stat().st_ino == before
    path.write_text("{")
    with pytest.raises(DamagedError, match="not its name"):
        records.append(record(), root=root)
    assert [p for p in root.rglob("*") if p.is_file()] == [path] and path.read_text() == "{"


def test_two_writers_never_collide(tmp_path: Path):
    """Processes that all write the same hundred records, and one of its own each."""
    program = """
import sys
from pathlib import Path
from dod_pipeline import records
record = records.Record.model_validate_json(Path(sys.argv[1]).read_text())
for step in [*range(1, 101), 1000 + int(sys.argv[2])]:
    records.append(record.model_copy(update={"step": step}))
"""
    (tmp_path / "record.json").write_text(record().model_dump_json())
    writers = [
        subprocess.Popen([sys.executable, "-c", program, "record.json", str(n)], cwd=tmp_path, env=environment())
        for n in range(3)
    ]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert len(history.query(tmp_path / "history")) == len(list((tmp_path / "history" / "tiny").iterdir())) == 103


TEXT = st.text(st.characters(codec="utf-8"), max_size=30)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=40, deadline=None)
@given(
    checkpoint=TEXT,
    sampler=st.none() | TEXT,
    commit=st.none() | TEXT,
    metrics=st.dictionaries(TEXT, NUMBERS, max_size=3),
    stage=st.integers(1, 99) | st.sampled_from(["floor", "codec"]),
    guidance=st.none() | st.floats(0, 1e6),
    time=st.datetimes(timezones=st.just(UTC), min_value=datetime(1970, 1, 2)),
)
def test_any_record_survives_the_round_trip(tmp_path_factory: pytest.TempPathFactory, **fields: Any):
    root, item = tmp_path_factory.mktemp("round"), record(**fields)
    records.append(item, root=root)
    found = history.query(root, stage=str(item.stage))
    assert found == [plain(item)]
    assert ledger.typed(Record, found[0]) == item


@pytest.mark.parametrize("value", ["it's", '"; DROP TABLE x; --', "' OR '1'='1", "$.stage", "?", "a\\b", "é\n", "{}"])
def test_quotes_and_queries_in_values_are_only_data(tmp_path: Path, value: str):
    root = tmp_path / "history"
    records.append(record(row="wanted", checkpoint=value), root=root)
    records.append(record(row="other", checkpoint="x"), root=root)
    assert names(history.query(root, checkpoint=value)) == ["wanted"]
    assert names(Selection(root, where=[f"checkpoint={value}"]).records()) == ["wanted"]


@pytest.mark.parametrize("field, value", [("stage", 0), ("stage", "stage1"), ("num_samples", 0), ("fid", 1.0)])
def test_a_record_is_closed_and_bounded(field: str, value: Any):
    with pytest.raises(ValidationError, match=field):
        record(**{field: value})


@pytest.mark.parametrize("event", ["open", "os.link"])
def test_a_killed_writer_leaves_no_half_record(tmp_path: Path, event: str):
    (tmp_path / "record.json").write_text(record().model_dump_json())
    program = f"""
import os, signal, sys
from pathlib import Path
from dod_pipeline import records
record = records.Record.model_validate_json(Path("record.json").read_text())
records.append(record.model_copy(update={{"row": "whole"}}))
def die(event, arguments):
    if event == {event!r} and "partial" in str(arguments[0]):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(die)
records.append(record)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment(), capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert names(history.query(tmp_path / "history")) == ["whole"]
    records.append(record(), root=tmp_path / "history")
    assert len(history.query(tmp_path / "history")) == 2


def test_csv_has_a_column_for_everything_and_quotes_what_it_must(tmp_path: Path):
    records.append(record(sampler='a,"b"\nc'), root=tmp_path / "history")
    records.append(record(metrics={"recall": 0.25}, guidance=None, row="z"), root=tmp_path / "history")
    history.write_csv(Selection(tmp_path / "history"), text := io.StringIO())
    found = list(csv.DictReader(io.StringIO(text.getvalue())))
    assert found[0]["sampler"] == 'a,"b"\nc'
    assert [row["fid"] for row in found] == ["2.5", ""]
    assert [row["recall"] for row in found] == ["", "0.25"]
    assert found[0]["extractor"] == "small-net-64" and found[0]["extractor_digest"] == SHA
    assert found[1]["guidance"] == "" and "device" not in found[0]
    history.write_csv(Selection(tmp_path / "history", metric="recall"), other := io.StringIO())
    assert other.getvalue().splitlines()[0].endswith(",recall")


def test_the_table_has_a_line_for_each_record(root: Path, capsys: pytest.CaptureFixture[str]):
    tables.history(history.query(root))
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if "fid=" in line]
    assert len(lines) == 6
    assert "fid=3.000 recall=0.500" in printed and "2026-01-02 12:00:00" in printed
