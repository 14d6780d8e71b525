"""What Dagster loads, and that its own commands find it."""

import json
from datetime import timedelta
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.freshness import CronFreshnessPolicy

from dod_pipeline import costs, dvc_repo, runs
from dod_pipeline.costs import Cost
from dod_pipeline.definitions import define

from . import project as tiny
from .project import Project
from .test_kill import Enter


def test_definitions_compute_nothing_and_import_nothing_heavy(shared: Project):
    program = """
import json, sys
import dagster  # asks `file` about this Python
started = []
sys.addaudithook(lambda event, _: started.append(event) if event in ("subprocess.Popen", "os.system") else None)
from dod_pipeline import definitions
print(json.dumps([started, sorted({name.split(".")[0] for name in sys.modules})]))
"""
    before = shared.files()
    started, modules = json.loads(shared.run("python", "-c", program).stdout.splitlines()[-1])
    assert started == [] and not {"torch", "diffusers", "matplotlib", "duckdb", "pandas"} & set(modules)
    assert shared.files() == before


def test_jobs_groups_pools_and_descriptions(shared: Project, inside: Enter):
    inside(shared)
    pipeline, definitions = define()
    job = definitions.resolve_job_def("tiny")
    made = {key.to_user_string() for key in job.asset_layer.selected_asset_keys}
    assert {name.replace("@", "/") for name in tiny.STAGES} <= made
    graph = definitions.resolve_asset_graph()
    assert {graph.get(key).group_name for key in graph.get_all_asset_keys()} == {"tiny"}
    pools = {key.to_user_string(): graph.get(key).pools for key in graph.get_all_asset_keys()}
    assert pools["train/tiny"] == {"gpu"} and pools["dataset/tiny"] == {"dvc_repo"}
    for name, instance in pipeline.graph.instances.items():
        node = graph.get(pipeline.keys[name])
        assert node.description == instance.desc and {instance.stage, "dvc"} <= node.kinds
        assert {key.to_user_string() for key in node.parent_keys} == {
            before.replace("@", "/") for before in pipeline.graph.upstream[name]
        }


def test_the_checkpoints_of_an_experiment_have_a_job_of_their_own(shared: Project, inside: Enter):
    inside(shared)
    _, definitions = define()
    job = definitions.resolve_job_def("evaluate_tiny")
    made = {key.to_user_string() for key in job.asset_layer.selected_asset_keys}
    assert made == {*(f"{stage}/tiny-6" for stage in ("stage1", "stage2", "metrics", "sweeps")), "report/tiny"}
    assert job.tags["dod/experiment"] == "tiny"


def test_owners_are_those_of_the_deployment(own: Project, inside: Enter):
    values = own.params()
    owners = ["team:vision", "ada@example.org"]
    own.write_params(values | {"deployment": {"owners": owners}})
    inside(own)
    _, definitions = define()
    graph = definitions.resolve_asset_graph()
    assert all(list(graph.get(key).owners) == owners for key in graph.get_all_asset_keys())
    own.write_params(values | {"deployment": {"owners": ["vision"]}})
    with pytest.raises(ValueError, match=r"params\.yaml: deployment\.owners"):
        define()


def test_the_report_that_a_schedule_renews_has_a_deadline(own: Project, inside: Enter):
    values = own.params()
    values["experiments"]["tiny"]["retrain"] = {"cron": "0 3 * * 1"}
    values["experiments"]["other"] = tiny.params(own.root)["experiments"]["tiny"]
    own.write_params(values)
    inside(own)
    graph = define()[1].resolve_asset_graph()
    policies = {key.to_user_string(): graph.get(key).freshness_policy for key in graph.get_all_asset_keys()}
    policy = policies.pop("report/tiny")
    assert isinstance(policy, CronFreshnessPolicy) and policy.deadline_cron == "0 3 * * 1"
    assert policy.lower_bound_delta == timedelta(days=7) and not any(policies.values())


def test_a_run_says_what_it_took_and_pages_show_a_table(shared: Project, inside: Enter):
    inside(shared)
    with dg.DagsterInstance.get() as instance:
        (run,) = instance.get_runs()
        (event,) = instance.fetch_materializations(dg.AssetKey(["metrics", "tiny-6"]), limit=1).records
    spent = {json.loads(file.read_text())["seconds"] for file in Path("history/costs/train@tiny").glob("*.json")}
    assert {float(run.tags["dod/seconds.train.tiny"])} == spent and float(run.tags["dod/gflops.train.tiny"]) > 0
    assert run.tags["dod/experiment"] == "tiny" and len(run.tags["dod/commit"].split("-")[0]) == 40
    assert event.asset_materialization is not None
    table = event.asset_materialization.metadata["scores"]
    assert isinstance(table, dg.TableMetadataValue)
    rows = {str(record.data["of"]): record.data for record in table.records}
    scores = json.loads(Path("metrics/tiny/tiny-6.json").read_text())
    assert {of: row["fid"] for of, row in rows.items()} == {of: row["fid"] for of, row in scores.items()}


def test_what_was_not_computed_cost_nothing(shared: Project, inside: Enter):
    inside(shared)
    last = max(Cost.load(str(file)).time for file in Path("history/costs/train@tiny").glob("*.json")).timestamp()
    assert costs.after("train", "tiny", last + 1) is None
    found = costs.after("train", "tiny", last - 1)
    assert found is not None and found.time.timestamp() == last


@pytest.mark.parametrize(
    "command, printed",
    [
        (("dagster", "definitions", "validate"), "All code locations passed validation"),
        (("dagster", "asset", "list", "--select", 'key:"train/tiny"+'), "stage1/tiny-6"),
        (("dg", "check", "defs"), "All definitions loaded successfully"),
    ],
)
@pytest.mark.parametrize("home", ["dagster_home", ""])
def test_dagster_s_commands_work_from_the_root(shared: Project, command: tuple[str, ...], printed: str, home: str):
    for file in ("pyproject.toml",):
        (shared.root / file).write_bytes((tiny.SOURCE / file).read_bytes())
    done = shared.run(*command, DAGSTER_HOME=home, PYTHONWARNINGS="")
    assert printed in done.stdout + done.stderr
    assert not list(shared.root.glob(".tmp_dagster_home*"))


def test_dagster_home_is_the_project_s_unless_it_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("dagster_home", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dagster.yaml").write_text("")
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    assert runs.home(tmp_path) == tmp_path / "dagster_home"
    monkeypatch.setenv("DAGSTER_HOME", "other")
    assert runs.home(tmp_path) == tmp_path / "other"


def test_advice_and_progress_bars_are_left_out_of_what_is_repeated():
    said = b"train:  10%|#   | 1/10\rtrain:  20%|##  | 2/10\rtrain: the loss is nan\nERROR: failed to reproduce\n\n"
    assert dvc_repo.last_lines(said) == "train: the loss is nan\nERROR: failed to reproduce"
    for line in (b"\n", b"\tgit add dvc.lock\n", b"Updating lock file 'dvc.lock'\n", b"Use `dvc push` to send\n"):
        assert dvc_repo.ADVICE.match(line)
    assert not dvc_repo.ADVICE.match(b"Running stage 'train@tiny':\n")


@pytest.mark.parametrize(
    "said, passes",
    [
        ("ERROR: 'train/tiny' is busy, it is being blocked by:\n  (PID 7): dvc repro", True),
        ("ERROR: failed to push data to the cloud - 2 files failed to upload", True),
        ("ERROR: failed to reproduce 'train@tiny': failed to run: dod stage train tiny, exited with 1", False),
        ("ERROR: [Errno 28] No space left on device\nERROR: failed to transfer 2 files", False),
    ],
)
def test_only_locks_and_transfers_are_tried_again(said: str, passes: bool):
    assert issubclass(dvc_repo.kind_of(said), dvc_repo.TryAgainError) == passes
