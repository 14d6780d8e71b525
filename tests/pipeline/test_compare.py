"""What must not be compared is refused with both values; what may be is shown with everything that differs."""

import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from dod_pipeline import cli, compare, history, records

from .test_history import NOON, SHA, record

Captured = pytest.CaptureFixture[str]
OTHER = SHA[::-1]


@pytest.fixture(autouse=True)
def evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that was evaluated twice, with a newer sweep; and others of which each differs in one thing."""
    monkeypatch.chdir(tmp_path)
    put("old", metrics={"fid": 9.0})
    put("a", hours=1)
    put("a1", stage=1, hours=1, metrics={"fid": 20.0})
    put("floor", stage="floor", hours=1, metrics={"fid": 0.0, "precision": 0.5})
    put("swept", hours=2, job="sweeps", metrics={"fid": 99.0})
    put("b", checkpoint="b", metrics={"fid": 12.0, "fid_error": 0.4, "precision": 0.4}, seed=3, guidance=3.0)
    put("extractor", checkpoint="extractor", extractor={"name": "inception", "digest": OTHER})
    put("reference", checkpoint="reference", reference=OTHER)
    put("count", checkpoint="count", num_samples=50_000)
    put("rfid", checkpoint="rfid", metrics={"rfid": 1.0, "psnr": 20.0})


def put(name: str, *, hours: int = 0, job: str = "metrics", checkpoint: str = "a", **changes: Any) -> None:
    metrics = {"fid": 10.0, "fid_error": 0.3, "precision": 0.5}
    fields = {"checkpoint": checkpoint, "stage": 2, "metrics": metrics, "time": NOON + timedelta(hours=hours)}
    records.append(record(row=name, job=job, **(fields | changes)))


def row_of(name: str) -> str:
    return str(compare.find([name])[0]["row"])


def test_a_checkpoint_stands_for_its_newest_own_record():
    assert row_of("a") == row_of("a:2") == "a"
    assert (row_of("a:1"), row_of("a:floor")) == ("a1", "floor")


def test_an_id_may_be_cut_short(monkeypatch: pytest.MonkeyPatch):
    (swept,) = (row for row in history.query() if row["row"] == "swept")
    assert compare.find([swept["id"], swept["id"][:12]]) == [swept, swept]
    with pytest.raises(ValueError, match="'0123' is neither a record's id"):
        compare.find(["0123"])
    monkeypatch.setattr(compare, "ID", re.compile(""))
    with pytest.raises(ValueError, match="'': the ids of 10 records begin so; give more digits"):
        compare.find([""])


@pytest.mark.parametrize("name", ["c", "a:3", "b:1", "old-metrics"])
def test_what_is_not_there_is_named(name: str, capsys: Captured):
    assert cli.main(["compare", "a", name]) == 1
    assert f"dod: '{name}' is neither a record's id nor a checkpoint with a record" in capsys.readouterr().err


@pytest.mark.parametrize(
    "other, values, remedy",
    [
        ("extractor", f"extractor is small-net-64 ({SHA[:12]}) and inception ({OTHER[:12]})", "with one feature net"),
        ("reference", f"reference is {SHA[:12]} and {OTHER[:12]}", "against one reference"),
        ("count", "num_samples is 70 and 50000", "at equal N"),
        ("rfid", "no metric in common: fid, fid_error, precision and psnr, rfid", "records of one kind"),
    ],
)
def test_what_cannot_be_compared_is_refused(other: str, values: str, remedy: str, capsys: Captured):
    assert cli.main(["compare", "a", other]) == 1
    out, error = capsys.readouterr()
    assert out == "" and values in error and remedy in error and error.count("\n") == 1


def test_the_table_has_differences_errors_and_what_else_differs(capsys: Captured):
    assert cli.main(["compare", "a", "b"]) == 0
    printed = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    assert ["fid", "10.000 ± 0.588", "12.000 ± 0.784", "+2.000", "+20.0%"] in cells  # 95 %
    assert ["precision", "0.500", "0.400", "-0.100", "-20.0%"] in cells
    assert "seed: 0 and 3" in printed and "guidance: 1.0 and 3.0" in printed and "weights" not in printed


def test_json_has_the_same(capsys: Captured):
    assert cli.main(["compare", "a", "b", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["differs"] == {"seed": [0, 3], "guidance": [1.0, 3.0]}
    assert found["metrics"]["fid"] == {
        **{"a": 10.0, "b": 12.0, "difference": 2.0, "relative": 0.2},
        **{"a_error": 0.3, "b_error": 0.4},
    }
    assert found["a"]["row"] == "a" and list(found["metrics"]) == ["fid", "precision"]


def test_a_difference_from_zero_has_no_relative_one(capsys: Captured):
    assert cli.main(["compare", "a:floor", "a"]) == 0
    assert "+10.000" in (printed := capsys.readouterr().out) and " - " in printed


def test_equal_records_differ_in_nothing(capsys: Captured):
    assert cli.main(["compare", "a", "a"]) == 0
    assert "they differ in no setting that is recorded" in capsys.readouterr().out
