"""The main job in a tiny project, as a user runs it: `dod run`, again, elsewhere, twice at once, and after changes."""

import json
import re
from typing import Any

import pytest
import yaml
from PIL import Image

from dod_pipeline import tables

from . import project as tiny
from .project import Project

FIELDS = {
    *("id", "time", "experiment", "checkpoint", "stage", "metrics", "num_samples", "seed", "guidance", "sampler"),
    *("extractor", "reference", "config", "weights", "data", "commit"),
}


def test_run_makes_every_stage_and_prints_both_stages_and_floors(built: Project):
    printed = (built.root.parent / "log.txt").read_text()
    assert set(tiny.STAGES) <= set(built.lock())
    numbers = r"( │ +-?\d+\.\d+( ± \d+\.\d+)?){6} │ +70 │"  # FID, sFID, KID, IS, precision, recall, samples
    for row in ("stage 1", "stage 2", "floor: held-out real images", "floor: the codec's reconstructions"):
        assert re.search(rf"│ {row} *{numbers}", printed), row
    for title in ("FID", "sFID", "KID", "IS", "precision", "recall", "samples"):
        assert f" {title} ┃" in printed


def test_the_printed_picture_shows_two_stages_of_every_class(built: Project):
    (path,) = re.findall(
        r"^stage 2 under stage 1, same samples: (.*)$", (built.root.parent / "log.txt").read_text(), re.M
    )
    with Image.open(built.root / path) as two, Image.open(built.root / path.replace("stage2", "stage1")) as one:
        assert two.width == one.width
        assert two.height - one.height == 4 * 68  # a further row of cells and gaps for each of four samples
        assert len(two.convert("L").getcolors() or []) > 50  # something is drawn


def test_the_printed_numbers_are_those_of_the_metrics_file(built: Project):
    scores = json.loads((built.root / "metrics" / "tiny" / "tiny-6.json").read_text())
    printed = (built.root.parent / "log.txt").read_text()
    for name, row in {"stage 1": scores["stage1"], "floor: held-out real images": scores["floor"]}.items():
        shown = " │ +".join(re.escape(tables.cell(row, metric)) for metric in tables.METRICS)
        assert re.search(rf"{name} *│ +{shown} │", printed)


def test_a_second_run_says_so_and_changes_no_file(shared: Project):
    before = shared.files()
    printed = shared.dod("run", "tiny").stdout
    assert printed.startswith("Nothing to do: all 10 stages of tiny are up to date.")
    assert "checkpoint tiny-6" in printed
    assert shared.files() == before


def test_status_says_up_to_date_for_every_stage(shared: Project):
    printed = shared.dod("status").stdout
    for address in tiny.STAGES:
        assert re.search(rf"│ {address} +│ +up to date │", printed)


def test_the_history_says_what_was_measured_and_how(built: Project, shared: Project):
    found = json.loads(shared.dod("history", "--format", "json").stdout)
    records = {row["stage"]: row for row in found if row["job"] == "metrics"}  # the sweep adds others
    assert set(records) == {1, 2, "floor", "codec"}
    for row in records.values():
        assert set(row) >= FIELDS
        assert (row["experiment"], row["checkpoint"], row["num_samples"]) == ("tiny", "tiny-6", 70)
        assert set(row["metrics"]) == {*tables.METRICS, "fid_error"}
    assert len({row["extractor"]["digest"] for row in records.values()}) == 1
    assert records[1]["weights"] == records[2]["weights"] and records["floor"]["weights"] is None
    assert records[1]["config"] != records[2]["config"]
    assert [records[s]["guidance"] for s in (1, 2, "floor")] == [1.0, 2.0, None]
    assert records[1]["sampler"] == "euler-2" and records["floor"]["sampler"] is None
    (start,) = shared.run("git", "rev-list", "--max-parents=0", "HEAD").stdout.split()
    assert {row["commit"] for row in records.values()} == {start}
    scores = json.loads((built.root / "metrics" / "tiny" / "tiny-6.json").read_text())
    assert records[2]["metrics"]["fid"] == scores["stage2"]["fid"]


def test_generate_draws_the_classes_through_three_stages(shared: Project, tmp_path):
    command = ["generate", "tiny-6", "--class", "0", "--class", "2", "--stages", "3", "--per-class", "2"]
    shared.dod(*command, "--out", str(tmp_path / "new" / "g.png"))
    with Image.open(tmp_path / "new" / "g.png") as picture:
        assert picture.format == "PNG"
        assert picture.height > 6 * 64 and 2 * 64 < picture.width < 4 * 64  # 2 samples of 3 stages, 2 classes


def test_generate_refuses_a_class_that_the_model_lacks(shared: Project, tmp_path):
    done = shared.dod("generate", "tiny-6", "--class", "3", "--out", str(tmp_path / "g.png"), status=1)
    assert "--class 3: the model knows classes 0 to 2" in done.stderr
    assert not (tmp_path / "g.png").exists()


@pytest.mark.timeout(600)
def test_two_runs_at_once_take_turns_and_equal_the_first_to_the_bit(built: Project, images, tmp_path):
    project = tiny.create(tmp_path / "project", tiny.params(images))
    runs = [project.start("dod", "run", "tiny") for _ in range(2)]
    printed = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], printed
    waited = [out for out, _ in printed if out.startswith("another dod is running stages in")]
    assert len(waited) == 1 and "Nothing to do" in waited[0]
    for name in tiny.STAGES:
        assert sum(text.count(f"Running stage '{name}'") for out in printed for text in out) == 1
    found = project.outs()
    assert found.pop("report/tiny.html") is not None  # shows seconds, the one thing that differs
    assert found == {path: md5 for path, md5 in built.outs().items() if path in found}
    assert len(found) == 7 + 7 + 2 + 2  # folders, facts, metrics, curve; the sweep's metrics and picture


def change(project: Project, edit: Any) -> None:
    """Change params.yaml by a function of its values."""
    values = yaml.safe_load((project.root / "params.yaml").read_text())
    edit(values)
    project.write_params(values)


def test_evaluating_another_saved_step_does_not_retrain(own: Project):
    change(own, lambda v: v["checkpoints"].update({"tiny-4": tiny.CHECKPOINT | {"step": 4}}))
    before = own.outs()
    printed = own.dod("run", "tiny", "--until", "stage1").stdout
    assert re.findall(r"Running stage '(.*)'", printed) == ["stage1@tiny-4"]
    assert {path: own.outs()[path] for path in before} == before
    assert (own.root / "samples" / "tiny" / "tiny-4" / "stage1" / "grid.png").exists()


def test_a_changed_guidance_leaves_training_and_stage_1_alone(own: Project):
    change(own, lambda v: v["experiments"]["tiny"]["stage2"].update(guidance=4.0))
    stale = json.loads(own.dvc("status", "--json").stdout)
    # metrics follow when stage 2's samples are new; the report shows the settings themselves
    assert set(stale) == {"stage2@tiny-6", "sweeps@tiny-6", "report@tiny"}


def test_an_edit_of_the_evaluation_leaves_training_and_samples_alone(own: Project):
    with (own.root / "dod_models" / "evaluate.py").open("a") as file:
        file.write("# a remark\n")
    stale = set(json.loads(own.dvc("status", "--json").stdout))
    assert "metrics@tiny-6" in stale
    assert not stale & {
        "dataset@tiny",
        "latents@tiny",
        "train@tiny",
        "stage1@tiny-6",
        "stage2@tiny-6",
    }


def test_accept_records_a_refactoring_without_running_anything(own: Project):
    with (own.root / "dod_models" / "train.py").open("a") as file:
        file.write("# a remark\n")
    assert re.search(r"train@tiny +│ +changed deps: dod_models/train.py modified", own.dod("status").stdout)
    before, data = own.outs(), own.files()
    assert "recording without running: train@tiny" in own.dod("accept", "train@tiny").stdout
    assert own.dvc("status", "-q").returncode == 0
    assert own.outs() == before
    assert {p: s for p, s in own.files().items() if p != "dvc.lock"} == {
        p: s for p, s in data.items() if p != "dvc.lock"
    }
