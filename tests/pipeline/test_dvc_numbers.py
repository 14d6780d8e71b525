"""The numbers that the history holds are those of `dvc metrics diff`, `dvc plots diff` and `dvc exp show`."""

import json
from typing import Any

import pytest

from dod_models import artifact
from dod_pipeline import history

from .project import Project


def asked(project: Project, *command: str) -> Any:
    """What dvc prints as JSON."""
    return json.loads(project.dvc(*command, "--json").stdout)


def test_dvc_compares_commits_by_the_history_s_numbers(own: Project, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(own.root)
    scores, curve = (own.root / name for name in ("metrics/tiny/tiny-6.json", "curves/tiny.json"))
    fids = {row["stage"]: row["metrics"]["fid"] for row in history.query() if row["job"] == "metrics"}
    table, rows = artifact.read_json(scores), artifact.read_json(curve)
    table["stage2"]["fid"] += 0.5
    rows[-1]["loss"] += 1
    artifact.write_json(scores, table)
    artifact.write_json(curve, rows)

    changed = {"old": fids[2], "new": fids[2] + 0.5, "diff": pytest.approx(0.5)}
    assert asked(own, "metrics", "diff") == {"metrics/tiny/tiny-6.json": {"stage2.fid": changed}}
    (plot,) = asked(own, "plots", "diff")["data"]["curves/tiny.json"]
    drawn = [(point["rev"], point["loss"]) for point in plot["content"]["data"]["values"] if point["step"] == 6]
    assert sorted(drawn) == [("HEAD", rows[-1]["loss"] - 1), ("workspace", rows[-1]["loss"])]
    workspace, commit = asked(own, "exp", "show")
    shown = [one["data"]["metrics"]["metrics/tiny/tiny-6.json"]["data"] for one in (workspace, commit)]
    assert [row["stage2"]["fid"] for row in shown] == [fids[2] + 0.5, fids[2]]
    assert [shown[1][f"stage{n}" if n in (1, 2) else n]["fid"] for n in fids] == [*fids.values()]
    swept = commit["data"]["metrics"]["metrics/tiny/tiny-6.sweep.json"]["data"]
    assert [row["fid"] for row in swept.values()] == [
        row["metrics"]["fid"] for row in history.query() if row["job"] == "sweeps"
    ]
