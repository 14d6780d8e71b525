"""The history is append-only: nothing is overwritten, nothing is half there, and values are only data."""

import csv
import io
import json
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dod_pipeline import history, tables
from dod_pipeline.history import Record

from .project import environment

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
SHA = "0123456789abcdef" * 4


def record(**changes: Any) -> Record:
    """A record with any fields changed."""
    plain = {
        "id": "20260102T120000000000Z-tiny-6-stage1",
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
    """The record as JSON gives it back."""
    found: dict[str, Any] = json.loads(item.model_dump_json())
    return found


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

    assert history.sampler_name(SampleConfig(**options).model_dump(mode="json")) == name


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A history of two experiments, three checkpoints and all kinds of stages, the newest written first."""
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
        names = {"experiment": experiment, "checkpoint": checkpoint, "stage": stage, "metrics": metrics}
        history.append(record(id=f"r{age}", time=NOON - timedelta(hours=age), **names), root=tmp_path)
    return tmp_path


def ids(found: list[dict[str, Any]]) -> list[str]:
    return [row["id"] for row in found]


def test_records_come_back_as_they_were_and_oldest_first(root: Path):
    found = history.query(root)
    assert ids(found) == ["r5", "r4", "r3", "r2", "r1", "r0"]
    assert [Record.model_validate(row).id for row in found] == ids(found)
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
    assert ids(history.query(root, **filters)) == expected


def test_a_metric_stands_alone(root: Path):
    assert [row["metrics"] for row in history.query(root, metric="fid", stage="2")] == [{"fid": 3.0}]


def test_an_unknown_metric_is_named(root: Path):
    with pytest.raises(ValueError, match=r"--metric 'fdi': no such record"):
        history.query(root, metric="fdi")


def test_a_record_of_before_there_were_costs_and_kinds_still_loads():
    old = plain(record())
    new = ("kind", "num_train", "train_seed", "num_steps", "gflops_paper", "gflops_true", "seconds")
    for name in (*new, "images_per_second", "device", "previous"):
        del old[name]
    assert Record.model_validate(old) == record()


def test_verdicts_and_calibrations_are_no_scores(root: Path):
    for kind in ("verdict", "calibration"):
        folder = root / history.FOLDERS[kind] / "tiny"
        folder.mkdir(parents=True)
        (folder / "v.json").write_text(json.dumps({"id": kind, "time": "2027", "experiment": "tiny", "stage": 2}))
    assert len(history.query(root)) == 6
    for kind in ("verdict", "calibration"):
        assert ids(history.query(root, kind=kind)) == ids(history.query(root, kind=kind, stage="2")) == [kind]
        assert history.query(root, kind=kind, experiment="other") == []
    with pytest.raises(ValueError, match="a verdict has no metrics"):
        history.query(root, kind="verdict", metric="fid")


def test_probes_on_other_numbers_of_images_are_not_compared():
    probes = [plain(record(extractor=None, stage="probe", num_train=count)) for count in (100, 100, 200)]
    history.check_comparable(probes[:2])
    with pytest.raises(ValueError, match="num_samples is 70 after 100 to fit or 70 after 200 to fit"):
        history.check_comparable(probes)
    assert history.setting(probes) == "70 images"


def test_no_history_is_no_records(tmp_path: Path):
    assert history.query(tmp_path / "nothing") == []


def test_a_record_is_never_overwritten(tmp_path: Path):
    path = history.append(record(), root=tmp_path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        history.append(record(metrics={"fid": 0.0}), root=tmp_path)
    assert path.read_bytes() == before
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


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
    root, item = tmp_path_factory.mktemp("history"), record(**fields)
    history.append(item, root=root)
    found = history.query(root, stage=str(item.stage))
    assert found == [plain(item)]
    assert Record.model_validate(found[0]) == item


@pytest.mark.parametrize("value", ["it's", '"; DROP TABLE x; --', "' OR '1'='1", "$.stage", "?", "a\\b", "é\n", "{}"])
def test_quotes_and_queries_in_values_are_only_data(tmp_path: Path, value: str):
    history.append(record(id="wanted", checkpoint=value), root=tmp_path)
    history.append(record(id="other", checkpoint="x"), root=tmp_path)
    assert ids(history.query(tmp_path, checkpoint=value)) == ["wanted"]


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
from dod_pipeline import history
record = history.Record.model_validate_json(Path("record.json").read_text())
history.append(record.model_copy(update={{"id": "whole"}}))
def die(event, arguments):
    if event == {event!r} and record.id in str(arguments[0]):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(die)
history.append(record)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment(), capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert ids(history.query(tmp_path / "history")) == ["whole"]
    history.append(record(), root=tmp_path / "history")
    assert len(history.query(tmp_path / "history")) == 2


def test_csv_has_a_column_for_everything_and_quotes_what_it_must():
    rows = [plain(record(sampler='a,"b"\nc')), plain(record(metrics={"recall": 0.25}, guidance=None))]
    found = list(csv.DictReader(io.StringIO(tables.history_csv(rows))))
    assert found[0]["sampler"] == 'a,"b"\nc'
    assert [row["fid"] for row in found] == ["2.5", ""]
    assert [row["recall"] for row in found] == ["", "0.25"]
    assert found[0]["extractor_name"] == "small-net-64" and found[0]["extractor_digest"] == SHA
    assert found[1]["guidance"] == ""


def test_the_table_has_a_line_for_each_record(root: Path, capsys: pytest.CaptureFixture[str]):
    tables.history(history.query(root))
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if "fid=" in line]
    assert len(lines) == 6
    assert "fid=3.000 recall=0.500" in printed and "2026-01-02 12:00:00" in printed
