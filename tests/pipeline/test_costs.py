"""What a stage took is recorded apart from its outputs, once, and found again under the same settings only."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dod_models import artifact
from dod_pipeline import cli, costs, history, stages
from dod_pipeline.config import Params
from dod_pipeline.costs import Cost

from . import project as tiny
from .project import Project

Enter = Callable[[Project], None]


def job(guidance: float = 2.0) -> stages.Job:
    """Stage 2 of the tiny project, which needs not exist."""
    values = tiny.params(Path("/images"))
    values["experiments"]["tiny"]["stage2"]["guidance"] = guidance
    return stages.resolve(Params.parse(values, place="params.yaml"), "stage2", "tiny-6")


def put(root: Path, seconds: float, guidance: float = 2.0) -> Path:
    return costs.append(job(guidance), seconds=seconds, device="cpu", processes=1, root=root)


def test_the_newest_record_under_the_same_settings_is_found(tmp_path: Path):
    assert costs.newest(job(), root=tmp_path) is None
    put(tmp_path, 1.0)
    put(tmp_path, 2.25)
    put(tmp_path, 3.0, guidance=4.0)
    found = costs.newest(job(), root=tmp_path)
    assert found is not None and (found.seconds, found.device, found.processes) == (2.25, "cpu", 1)
    assert (found.stage, found.key, found.config) == ("stage2", "tiny-6", job().config.digest)
    other = costs.newest(job(guidance=4.0), root=tmp_path)
    assert other is not None and other.seconds == 3.0


def test_a_record_lies_in_the_folder_of_its_stage_instance_and_comes_back_whole(tmp_path: Path):
    path = put(tmp_path, 1.0)
    assert path.parent == tmp_path / "stage2@tiny-6"
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]
    assert json.loads(Cost.load(str(path)).model_dump_json()) == artifact.read_json(path)


def test_evaluations_are_read_without_costs(built: Project):
    folder = built.root / "history"
    assert len(list(folder.glob("costs/*/*.json"))) == len(tiny.STAGES) - 1  # the report took no record
    assert {row["experiment"] for row in history.query(folder)} == {"tiny"}
    assert len(history.query(folder)) == len(list(folder.glob("tiny/*.json"))) == 5


def test_each_stage_of_a_run_was_recorded_with_its_settings_and_commit(built: Project):
    params = Params.parse(tiny.params(built.root.parents[1] / "images"), place="params.yaml")
    (start,) = built.run("git", "rev-list", "--max-parents=0", "HEAD").stdout.split()
    for stage, key in stages.instances(params, "tiny", until="metrics"):
        found = costs.newest(stages.resolve(params, stage, key), root=built.root / "history" / "costs")
        assert found is not None, f"{stage}@{key}"
        assert found.commit == start and 0 < found.seconds < 600


def test_a_stage_that_fails_records_nothing(own: Project, inside: Enter, capsys: pytest.CaptureFixture[str]):
    inside(own)
    own.run("rm", "-r", "codec/tiny")
    before = own.files()
    assert cli.main(["stage", "latents", "tiny"]) == 1
    assert "codec" in capsys.readouterr().err
    assert {name for name in own.files() if name.startswith("history")} == {
        n for n in before if n.startswith("history")
    }
