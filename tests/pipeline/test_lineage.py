"""From a number back to the images: every digest is the file's, and what lies there now is said."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dod_models import artifact
from dod_models.config import Frozen
from dod_pipeline import cli, history, lineage, records

from . import project as tiny
from .project import Project
from .test_history import record

Enter = Callable[[Project], None]
Captured = pytest.CaptureFixture[str]


class Settings(Frozen):
    """Of any stage."""

    learning_rate: float


def nodes(tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The nodes of a tree, by name."""
    found = {tree["name"]: tree}
    for one in tree["inputs"]:
        found = nodes(one) | found if one["inputs"] else {one["name"]: one} | found
    return found


def test_a_number_is_traced_to_the_images_and_made_again(own: Project, inside: Enter, capsys: Captured):
    inside(own)
    assert cli.main(["lineage", "tiny-6:2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    tree = nodes(found["made_from"])
    stages = [stage.partition("@")[0] for stage in tiny.STAGES[:-2]]
    assert {*tree} == {*stages, "weights1", "weights2", "train.jsonl", "val.jsonl"}
    for name, node in tree.items():
        assert node["sha256"] == artifact.sha256_file(Path(node["path"])) and node["now"] == "the same", name
    for name in stages:  # the settings of each were kept
        assert json.loads(Path("history", "settings", name, f"{tree[name]['config']}.json").read_text()), name
    (start,) = own.run("git", "rev-list", "--max-parents=0", "HEAD").stdout.split()
    commands = f"git checkout {start}\ndvc repro metrics@tiny-6    # or: dod run tiny"
    assert found["again"] == commands

    Path("samples/tiny/tiny-6/stage1/manifest.json").unlink()
    index = Path("dataset/tiny/train.jsonl")
    index.unlink()
    index.write_text("{}")
    assert cli.main(["lineage", found["id"][:12]]) == 0
    printed = capsys.readouterr().out
    lines = {line.split("│")[1].strip(): line.split("│")[5].strip() for line in printed.splitlines() if "│" in line}
    assert lines["stage1"] == "missing" and lines["train.jsonl"] == "another" and lines["stage2"] == "the same"
    assert printed.endswith(f"{commands}\n") and "see above" in printed


def test_what_was_not_recorded_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    records.append(record(stage=2, commit="abc-dirty"))
    (row,) = history.query()
    tree = lineage.trace(row)
    assert (tree.name, tree.now, tree.inputs[0].name) == ("metrics", "not recorded", "stage2")
    assert lineage.remake(row).startswith("git checkout abc    # code or settings had changes that were in no commit\n")
    assert "under no commit" in lineage.remake(row | {"commit": None})
