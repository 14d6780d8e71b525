"""`dod history` answers from what the records say, under any condition, and SQL can't do more than ask."""

import csv
import io
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from dod_pipeline import cli, history, records
from dod_pipeline.history import Selection
from dod_pipeline.ledger import write_once
from dod_pipeline.sources import SETTINGS

from .test_history import NOON, SHA, indexes, record  # noqa: F401
from .test_lineage import Settings

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def evaluated(indexes: Path) -> None:  # noqa: F811
    """Two retrainings of two checkpoints, each with its floor; stage 2 under two scales of guidance."""
    for retraining in range(2):
        for step in (4, 6):
            fids: dict[Any, float] = {"floor": 0.5, 1: 10.0 - step - retraining, 2: 8.0 - step - retraining}
            for stage, fid in fids.items():
                put(
                    row=f"stage{stage}" if isinstance(stage, int) else stage,
                    time=NOON + timedelta(hours=retraining, minutes=step),
                    stage=stage,
                    step=step,
                    checkpoint=f"tiny-{step}",
                    metrics={"fid": fid, "fid_error": 0.1, "recall": fid / 10},
                    train_seed=retraining,
                    guidance=2.0 if stage == 2 else 1.0,
                    weights=f"{retraining}{SHA[1:]}",
                )


def put(**changes: Any) -> None:
    records.append(record(**changes))


def answer(capsys: Captured, *arguments: str, status: int = 0) -> str:
    """What `dod history` prints; of an error, what it says."""
    assert cli.main(["history", *arguments]) == status
    out, error = capsys.readouterr()
    assert bool(error) == bool(status)
    return error or out


def numbers(*where: str) -> list[float]:
    return [row["metrics"]["fid"] for row in Selection(where=where).records()]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (["stage=2", "step=6"], [2.0, 1.0]),
        (["fid<1.5"], [0.5, 0.5, 0.5, 1.0, 0.5]),
        (["guidance=2", "train_seed=1"], [3.0, 1.0]),
        (["extractor=small*", "stage!=floor", "fid>=6"], [6.0]),
        (["extractor=small"], []),
        (["sampler!=euler*"], []),
        (["num_train!=none"], []),
        (["checkpoint=tiny-4", "stage=1", "num_train=none"], [6.0, 5.0]),
    ],
)
def test_conditions_select(where: list[str], expected: list[float]):
    assert sorted(numbers(*where)) == sorted(expected)


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("guidance", "not of the form NAME=VALUE"),
        ("guidanse=2", "records have no 'guidanse'; they have"),
        ("json=2", "records have no 'json'"),
        ("step=six", "'six' is no ubigint"),
        ('fid" OR true OR "fid=1', "not of the form"),
    ],
)
def test_a_condition_that_makes_no_sense_is_named(capsys: Captured, condition: str, said: str):
    assert said in answer(capsys, "--where", condition, status=1)


def test_the_best_is_the_lowest_fid_and_the_highest_recall_and_no_floor(capsys: Captured):
    best = json.loads(answer(capsys, "--best", "fid", "--where", "num_samples=70", "--format", "json"))
    assert [row["metrics"]["fid"] for row in best] == [1.0, 2.0, 3.0, 3.0, 4.0, 4.0, 5.0, 6.0]
    assert [best[0][name] for name in ("checkpoint", "stage", "train_seed")] == ["tiny-6", 2, 1]
    assert history.best(Selection(metric="recall"), limit=1)[0]["metrics"] == {"recall": 0.6}
    assert history.best(Selection(metric="fid", stage="floor"), limit=1)[0]["metrics"]["fid"] == 0.5
    put(row="stage2", stage=2, num_samples=50, metrics={"fid": 0.1})
    assert "num_samples is 50 or 70; separate them with --where" in answer(capsys, "--best", "fid", status=1)
    assert "1.000" in answer(capsys, "--best", "fid", "--where", "num_samples=70")


def test_stages_stand_beside_each_other_over_retrainings(capsys: Captured):
    rows = list(csv.DictReader(io.StringIO(answer(capsys, "--checkpoint", "tiny-6", "--by-stage", "--csv"))))
    assert [(row["train seed"], row["stage 1"], row["stage 2"], row["floor"]) for row in rows] == [
        ("0", "4.0", "2.0", "0.5"),
        ("1", "3.0", "1.0", "0.5"),
    ]
    assert [row["weights"][:2] for row in rows] == ["01", "11"]


def test_a_curve_is_the_plot_s_numbers(capsys: Captured):
    rows = json.loads(answer(capsys, "--experiment", "tiny", "--curve", "--format", "json"))
    assert rows == [{"step": 4, "stage 1": 5.0, "stage 2": 3.0}, {"step": 6, "stage 1": 3.0, "stage 2": 1.0}]
    assert "floors: held-out 0.500" in " ".join(answer(capsys, "--curve").split())
    assert "a verdict is no score" in answer(capsys, "--curve", "--kind", "verdict", status=1)


def test_a_table_shows_the_newest_and_says_what_it_leaves_out(capsys: Captured):
    printed = answer(capsys, "--limit", "2")
    assert printed.count(" tiny-6 ") == 2 and "the newest 2 of 12; --limit 0 shows all" in printed
    assert len(json.loads(answer(capsys, "--format", "json"))) == 12
    assert len(answer(capsys, "--csv", "--limit", "3").splitlines()) == 4


def test_a_difference_names_settings_files_and_numbers(capsys: Captured):
    old, new = Settings(learning_rate=0.1), Settings(learning_rate=0.2)
    for config in (old, new):
        write_once(Path("history", SETTINGS, "train"), config)
    for name, config in (("a", old), ("b", new)):
        source = {"path": "train/tiny/manifest.json", "sha256": name, "config": config.digest}
        put(row="stage2", stage=2, checkpoint=name, sources={"train": source}, metrics={"fid": 1.0})
    printed = answer(capsys, "--diff", "a", "b")
    assert "train.learning_rate" in printed and "0.1" in printed and "0.2" in printed and "guidance" not in printed
    found = json.loads(answer(capsys, "--diff", "a", "b", "--format", "json"))
    assert found["changed"] == {
        "fields": {"checkpoint": ["a", "b"]},
        "settings": {"train.learning_rate": [0.1, 0.2]},
        "made from": {"train": ["a", "b"]},
    }
    assert found["metrics"]["fid"]["difference"] == 0 and found["warning"] is None
    Path("history", SETTINGS, "train", f"{old.digest}.json").unlink()
    assert f"sha256 {old.digest[:10]}" in answer(capsys, "--diff", "a", "b")
    put(row="stage2", stage=2, checkpoint="c", num_samples=50)
    assert "careful: " in answer(capsys, "--diff", "a", "c") and "nothing changed" in answer(capsys, "--diff", "a", "a")


def test_sql_asks_the_records(capsys: Captured):
    found = answer(capsys, "--sql", "SELECT checkpoint, min(fid) AS best FROM records GROUP BY 1 ORDER BY 1", "--csv")
    assert found == "checkpoint,best\ntiny-4,0.5\ntiny-6,0.5\n"
    assert json.loads(answer(capsys, "--sql", "SELECT count(*) AS n FROM records", "--format", "json")) == [{"n": 12}]


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT * FROM read_text('secret.txt')",
        "SELECT * FROM 'secret.txt'",
        "SELECT * FROM read_csv('secret.txt')",
        "SELECT * FROM glob('*')",
        "COPY records TO 'out.csv'",
        "DROP TABLE records",
        "SELECT 1; DROP TABLE records",
        "ATTACH 'other.db'",
        "SET enable_external_access = true",
        "INSTALL httpfs",
        "SELECT nothing FROM records",
        "",
    ],
)
def test_sql_can_only_ask(capsys: Captured, statement: str):
    Path("secret.txt").write_text("hunter2")
    before = sorted(Path().rglob("*"))
    error = answer(capsys, "--sql", statement, status=1)
    assert error.startswith("dod: --sql: ") and "hunter2" not in error
    assert {path.name for path in set(Path().rglob("*")) - set(before)} <= {".state", "history"} | {
        path.name for path in Path(".state/history").iterdir()
    }
