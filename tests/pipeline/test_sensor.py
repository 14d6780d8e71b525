"""The sensor on dvc.lock, in the whole project: it tells Dagster of what was made without it."""

import json
import subprocess
from pathlib import Path

from dod_pipeline import candidates, champion, dvc_repo
from dod_pipeline.config import load_params
from dod_pipeline.definitions import define

from .project import Project
from .test_dagster import dagster_of, materialization, stale, tick
from .test_kill import Enter


def test_after_dvc_repro_the_sensor_tells_dagster(own: Project, inside: Enter):
    inside(own)
    values = own.params()
    values["experiments"]["tiny"]["stage2"]["guidance"] = 3.0
    own.write_params(values)
    pipeline, definitions = define()
    with dagster_of(own) as instance:
        outdated = {name.replace("@", "/") for name in dvc_repo.status([])}
        assert stale(instance, definitions) == outdated == {"stage2/tiny-6", "report/tiny", "sweeps/tiny-6"}
        own.dvc("repro", "metrics@tiny-6")
        said, cursor = tick(instance, pipeline)
        assert said.startswith("told Dagster of stage2@tiny-6, metrics@tiny-6")
        assert stale(instance, definitions) == {"report/tiny", "sweeps/tiny-6"}
        again, same = tick(instance, pipeline, cursor)
        assert (again, same) == ("dvc.lock and the outputs are as they were", cursor)
        assert tick(instance, pipeline)[0] == "told Dagster of nothing new"
        scores = json.loads((own.root / "metrics" / "tiny" / "tiny-6.json").read_text())
        assert materialization(instance, "metrics", "tiny-6").metadata["stage2.fid"].value == scores["stage2"]["fid"]


def test_what_dvc_holds_to_be_outdated_is_not_told(own: Project, inside: Enter):
    inside(own)
    pipeline, _ = define()
    own.run("rm", "-r", "samples/tiny/tiny-6/stage2")
    own.run("rm", "-r", "dagster_home/history")  # Dagster has forgotten everything
    with dagster_of(own) as instance:
        said, _ = tick(instance, pipeline)
        assert "stage1@tiny-6" in said and "stage2@tiny-6" not in said


def test_after_dvc_pull_the_sensor_tells_dagster(built: Project, tmp_path: Path, inside: Enter):
    """dvc.lock is the colleague's and stays as it is; the outputs come."""
    clone = built.clone(tmp_path / "clone")
    clone.dvc("remote", "modify", "--local", "local", "url", str(built.root.parent / "dod-dvc-remote"))
    inside(clone)
    pipeline, definitions = define()
    with dagster_of(clone) as instance:
        said, cursor = tick(instance, pipeline)
        assert said == "told Dagster of nothing new"
        clone.dvc("pull")
        said, _ = tick(instance, pipeline, cursor)
        assert said.startswith("told Dagster of dataset@tiny, ") and "report@tiny" in said
        assert stale(instance, definitions) == set()


def test_the_sensor_asks_for_new_definitions_where_its_own_are_old(own: Project, inside: Enter):
    inside(own)
    pipeline, _ = define()
    values = own.params()
    values["experiments"]["tiny"]["stage2"]["guidance"] = 3.0
    own.write_params(values)
    changed = "press Reload definitions to see what has changed: report@tiny, stage2@tiny-6, sweeps@tiny-6"
    with dagster_of(own) as instance:
        said, cursor = tick(instance, pipeline)
        assert said == f"told Dagster of nothing new; {changed}"
        own.dvc("repro", "stage2@tiny-6")
        said, cursor = tick(instance, pipeline, cursor)
        assert said == f"told Dagster of metrics@tiny-6; {changed}"  # outdated, and its definition is not
        reloaded, definitions = define()
        assert tick(instance, reloaded, cursor)[0] == "told Dagster of stage2@tiny-6"
        assert stale(instance, definitions) == {name.replace("@", "/") for name in dvc_repo.status([])}


def test_a_candidate_does_not_keep_the_sensor_from_telling_of_the_others(own: Project, inside: Enter):
    """Retraining writes it into params.yaml, and nobody is there to reload definitions."""
    inside(own)
    pipeline, _ = define()
    decided = champion.decide("tiny", "set", champion.holder(load_params(), "tiny-6"), why="first")
    assert candidates.add("tiny", decided).checkpoint == "tiny-r1-6"
    own.run("rm", "-r", "dagster_home/history", "samples/tiny/tiny-6/stage2")  # Dagster has forgotten everything
    own.dvc("repro", "--single-item", "stage2@tiny-6")
    with dagster_of(own) as instance:
        said, cursor = tick(instance, pipeline)
        told, _, left = said.partition("; press Reload definitions to see what has changed: ")
        assert "train@tiny, " in told and "stage2@tiny-6, metrics@tiny-6" in told
        new = {"train@tiny-r1", *(f"{stage}@tiny-r1-6" for stage in ("stage1", "stage2", "metrics"))}
        assert set(left.split(", ")) == new | {"report@tiny-r1", "report@tiny"}  # a report says what isn't evaluated
        assert tick(instance, pipeline, cursor)[0].startswith("dvc.lock and the outputs are as they were; press Reload")


def test_the_sensor_waits_while_stages_run(own: Project, inside: Enter):
    inside(own)
    pipeline, _ = define()
    code = "from dod_pipeline import dvc_repo\nwith dvc_repo.alone(): print('mine', flush=True); input()"
    with (
        dagster_of(own) as instance,
        subprocess.Popen(
            ["python", "-c", code], cwd=own.root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other,
    ):
        assert other.stdout is not None and other.stdout.readline() == "mine\n"
        said, cursor = tick(instance, pipeline)
        assert said.startswith("stages are running") and cursor is None
        other.kill()
    with dagster_of(own) as instance:
        assert tick(instance, pipeline)[0].startswith("told Dagster of")
