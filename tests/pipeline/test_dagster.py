"""DVC and Dagster agree on what exists and what is up to date, whichever of them made it."""

import base64
import io
import json
import logging
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.instance.ref import InstanceRef
from dagster._core.loader import LoadingContextForTest
from dagster._core.utils import make_new_run_id
from PIL import Image

from dod_pipeline import cli, runs, stages
from dod_pipeline.config import load_params
from dod_pipeline.definitions import define
from dod_pipeline.dvc_assets import Pipeline
from dod_pipeline.dvc_hash import together

from .project import Project
from .test_kill import DRIVER, Enter


@contextmanager
def dagster_of(project: Project) -> Iterator[dg.DagsterInstance]:
    """The project's Dagster instance, whatever DAGSTER_HOME says here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAGSTER_HOME", str(project.root / "dagster_home"))
        ref = InstanceRef.from_dir(str(project.root / "dagster_home"))
        with dg.DagsterInstance.from_ref(ref) as instance:
            yield instance


def stale(instance: dg.DagsterInstance, definitions: dg.Definitions) -> set[str]:
    """The assets that don't read fresh, as the pages show them."""
    graph = definitions.resolve_asset_graph()
    resolver = CachingStaleStatusResolver(instance, graph, LoadingContextForTest(instance))
    keys = graph.get_all_asset_keys()
    return {key.to_user_string() for key in keys if resolver.get_status(key) != StaleStatus.FRESH}


def materialization(instance: dg.DagsterInstance, stage: str, key: str) -> dg.AssetMaterialization:
    """The newest one of a stage instance."""
    (record,) = instance.fetch_materializations(dg.AssetKey([stage, key]), limit=1).records
    assert record.asset_materialization is not None
    return record.asset_materialization


def tick(instance: dg.DagsterInstance, pipeline: Pipeline, cursor: str | None = None) -> tuple[str, str | None]:
    """What the sensor says, and its cursor afterwards."""
    with dg.build_sensor_context(instance, cursor=cursor) as context:
        result = pipeline.sensor()(context)
        assert isinstance(result, dg.SkipReason) and result.skip_message is not None
        return result.skip_message, context.cursor


def picture_in(value: Any) -> Image.Image:
    """The picture in Markdown metadata."""
    assert isinstance(value, dg.MarkdownMetadataValue) and value.md_str is not None
    return Image.open(io.BytesIO(base64.b64decode(value.md_str.partition("base64,")[2].rstrip(")"))))


def test_after_dod_run_nothing_is_stale_and_versions_are_those_of_dvc_lock(shared: Project, inside: Enter):
    inside(shared)
    _, definitions = define()
    with dagster_of(shared) as instance:
        assert stale(instance, definitions) == set()
        for name, entry in shared.lock().items():
            stage, key = name.split("@")
            tags = materialization(instance, stage, key).tags or {}
            out = str(stages.paths(load_params(), stage, key)[1])
            versions = {out["path"]: out["md5"] for out in entry["outs"]}
            both = ("metrics/tiny/tiny-6.sweep.json", "samples/tiny/tiny-6/sweep.png")  # no one output stands for them
            version = together([versions[name] for name in both]) if stage == "sweeps" else versions[out]
            assert tags["dagster/data_version"] == version
            made_from = {path.split("/")[0] for path in (dep["path"] for dep in entry["deps"])}
            inputs = {tag.split("/")[2] for tag in tags if tag.startswith("dagster/input_data_version/")}
            assert made_from & set(stages.ORDER) <= inputs


def test_numbers_and_pictures_are_metadata(shared: Project, inside: Enter):
    inside(shared)
    with dagster_of(shared) as instance:
        metrics = materialization(instance, "metrics", "tiny-6").metadata
        scores = json.loads((shared.root / "metrics" / "tiny" / "tiny-6.json").read_text())
        assert metrics["stage2.fid"].value == scores["stage2"]["fid"]
        assert {f"{row}.{name}" for row, found in scores.items() for name in found} | {"scores"} == set(metrics)
        train = materialization(instance, "train", "tiny").metadata
        curve = json.loads((shared.root / "curves" / "tiny.json").read_text())
        table = train["Training loss"]
        assert isinstance(table, dg.TableMetadataValue)
        assert [record.data for record in table.records] == [
            {"step": row["step"], "loss": row["loss"]} for row in curve
        ]
        assert picture_in(train["loss curve"]).width > 300
        grid = picture_in(materialization(instance, "stage2", "tiny-6").metadata["grid"])
        with Image.open(shared.root / "samples" / "tiny" / "tiny-6" / "stage2" / "grid.png") as original:
            assert grid.tobytes() == original.tobytes()
        assert picture_in(materialization(instance, "sweeps", "tiny-6").metadata["grid"]).width > 60


def test_a_run_says_for_what_and_from_which_commit(shared: Project):
    with dagster_of(shared) as instance:
        found = instance.get_runs(dg.RunsFilter(tags={"dod/experiment": "tiny"}))
        (start,) = shared.run("git", "rev-list", "--max-parents=0", "HEAD").stdout.split()
        assert found and {run.tags["dod/commit"] for run in found} == {start}
        assert {run.status for run in found} == {dg.DagsterRunStatus.SUCCESS}


def test_checks_were_evaluated(shared: Project):
    with dagster_of(shared) as instance:
        for stage, names in {"stage1": ("count", "finite", "range", "variety"), "metrics": ("finite", "floor")}.items():
            for name in names:
                key = dg.AssetCheckKey(dg.AssetKey([stage, "tiny-6"]), name)
                summary = instance.event_log_storage.get_asset_check_summary_records([key])[key]
                evaluation = summary.last_check_execution_record
                assert evaluation is not None and evaluation.status.value == "SUCCEEDED"


def test_dod_run_waits_for_no_slot_of_a_run_that_waits_for_it(own: Project):
    """A step under the pages takes its slot of the pool before it waits for the folder, which `dod run` has alone."""
    own.run("rm", "samples/tiny/tiny-6/stage2/manifest.json")
    with dagster_of(own) as instance:
        storage = instance.event_log_storage
        storage.set_concurrency_slots("gpu", 1)
        assert storage.claim_concurrency_slot("gpu", "a run under the pages", "train__tiny").is_claimed
    own.dod("run", "tiny")
    own.dvc("status", "-q", "report@tiny")


def test_a_buried_run_is_not_started_again(own: Project):
    with dagster_of(own) as instance:
        tags = {runs.OWNER: runs.owner(own.root)}
        run = dg.DagsterRun(job_name="tiny", run_id=make_new_run_id(), status=dg.DagsterRunStatus.STARTED, tags=tags)
        instance.add_run(run)
        runs.bury(instance, own.root)
        found = instance.get_run_by_id(run.run_id)
        assert found is not None and found.status == dg.DagsterRunStatus.FAILURE
        assert found.tags.get("dagster/will_retry") != "true"


@pytest.mark.timeout(600)
def test_after_dagster_asset_materialize_repro_has_nothing_to_do(own: Project, inside: Enter):
    """The run's steps are processes of their own here, as under `dagster dev`."""
    inside(own)
    values = own.params()
    values["experiments"]["tiny"]["stage2"]["guidance"] = 3.0
    own.write_params(values)
    before = own.lock()
    select = 'key:"stage2/tiny-6" or key:"metrics/tiny-6"'
    own.run("dagster", "asset", "materialize", "--select", select, DAGSTER_HOME="dagster_home", PYTHONWARNINGS="")
    assert {name for name, entry in own.lock().items() if entry != before[name]} >= {"stage2@tiny-6"}
    printed = own.dvc("repro", "metrics@tiny-6").stdout
    assert "Running stage" not in printed
    pipeline, definitions = define()
    with dagster_of(own) as instance:
        assert stale(instance, definitions) == {"report/tiny", "sweeps/tiny-6"}
        assert "nothing new" in tick(instance, pipeline)[0]


def test_progress_and_log_lines_arrive_while_training_runs(own: Project, inside: Enter):
    inside(own)
    values = own.params()
    values["experiments"]["tiny"]["train"]["seed"] = 1
    own.write_params(values)
    arguments = ("open", "/out/.step-4.partial/.manifest.json.partial", "train", "tiny")
    own.run("python", "-c", DRIVER, *arguments, status=-9)
    assert cli.main(["run", "tiny", "--until", "train"]) == 0
    with dagster_of(own) as instance:
        run = instance.get_runs(limit=1)[0]
        logs = {entry.user_message for entry in instance.all_logs(run.run_id) if entry.step_key == "train__tiny"}
        assert "train: going on from step 2" in logs


def test_a_step_that_has_nothing_to_do_does_not_warn(own: Project, inside: Enter):
    inside(own)
    _, definitions = define()
    job = definitions.resolve_implicit_global_asset_job_def()
    with dagster_of(own) as instance:
        done = job.execute_in_process(instance=instance, asset_selection=[dg.AssetKey(["dataset", "tiny"])])
        assert done.success
        assert not [entry for entry in instance.all_logs(done.run_id) if int(entry.level) >= logging.WARNING]


@contextmanager
def busy(project: Project) -> Iterator[subprocess.Popen[str]]:
    """Another process that, as far as DVC knows, writes stage 2's samples."""
    path = str(project.root / "samples" / "tiny" / "tiny-6" / "stage2")
    with project.start("bash", "-c", "exec -a dvc sleep 1000") as other:
        held = {"read": {}, "write": {path: {"pid": other.pid, "cmd": "a bare dvc repro"}}}
        (project.root / ".dvc" / "tmp" / "rwlock").write_text(json.dumps(held))
        yield other
        other.kill()


def test_dod_run_waits_for_a_bare_dvc(own: Project):
    with busy(own) as other, own.start("dod", "run", "tiny") as run:
        assert run.stdout is not None
        assert "another dvc is at work in " in run.stdout.readline()
        other.kill()
        other.wait()
        assert "Nothing to do" in run.communicate()[0]
    assert run.returncode == 0


def test_a_step_that_finds_a_lock_is_tried_again(own: Project, inside: Enter):
    inside(own)
    own.run("rm", "-r", "samples/tiny/tiny-6/stage2")
    _, definitions = define()
    job = definitions.resolve_implicit_global_asset_job_def()
    with dagster_of(own) as instance, busy(own) as other:

        def end() -> None:
            while not (instance.get_runs(limit=1) and retried(instance)):
                time.sleep(0.2)
            other.kill()
            other.wait()

        ender = threading.Thread(target=end)
        ender.start()
        done = job.execute_in_process(instance=instance, asset_selection=[dg.AssetKey(["stage2", "tiny-6"])])
        ender.join()
        assert done.success and retried(instance)[0] == "stage2__tiny_6"


def retried(instance: dg.DagsterInstance) -> list[str | None]:
    """Steps of the newest run that were put off."""
    run = instance.get_runs(limit=1)[0]
    return [e.step_key for e in instance.all_logs(run.run_id, of_type={dg.DagsterEventType.STEP_UP_FOR_RETRY})]


def test_a_stage_that_fails_is_not_tried_again(own: Project, inside: Enter, capsys: pytest.CaptureFixture[str]):
    inside(own)
    values = own.params()
    values["experiments"]["tiny"]["evaluation"]["num_samples"] = 100_000
    own.write_params(values)
    before = own.lock()["metrics@tiny-6"]
    assert cli.main(["run", "tiny"]) == 1
    assert "dod: metrics@tiny-6 failed (dvc: 255): metrics: " in capsys.readouterr().err
    with dagster_of(own) as instance:
        assert retried(instance) == [] and instance.get_runs(limit=1)[0].status == dg.DagsterRunStatus.FAILURE
    assert own.lock()["metrics@tiny-6"] == before
