"""A run's end: what was made is pushed and committed, or the run says why not and the next one makes it good."""

import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from dod_pipeline import dvc_git, dvc_keep, dvc_repo, dvc_transfer
from dod_pipeline.dvc_assets import Pipeline
from dod_pipeline.dvc_graph import Graph
from dod_pipeline.dvc_keep import Keep
from dod_pipeline.dvc_transfer import Remote

from . import toy
from .project import Project, environment

PATHS = ("dvc.lock", "three.json", "history")
WHO = {f"GIT_{role}_{what}": "toy@example.org" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A toy with a remote beside it; only to be copied."""
    root = tmp_path_factory.mktemp("keep") / "toy"
    project = toy.create(root)
    project.dvc("remote", "add", "--default", "store", "../store")
    project.dvc("repro", "--single-item", "one")
    project.commit()
    return project


@pytest.fixture
def project(made: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A copy, with an author for git."""
    for name, value in {**WHO, "GIT_CONFIG_GLOBAL": "/dev/null", "PATH": environment()["PATH"]}.items():
        monkeypatch.setenv(name, value)
    return made.copy(tmp_path / "toy")


def materialize(project: Project, keep: Keep, *names: str) -> tuple[list[str], Pipeline]:
    """Warnings of a run, which must succeed."""
    pipeline = Pipeline(Graph(project.root), keep=keep)
    job = dg.Definitions(assets=pipeline.assets()).resolve_implicit_global_asset_job_def()
    with dg.DagsterInstance.ephemeral() as instance:
        keys = [pipeline.keys[name] for name in names]
        done = job.execute_in_process(instance=instance, asset_selection=keys)
        assert done.success
        warnings = [entry.user_message for entry in instance.all_logs(done.run_id) if int(entry.level) == 30]
        return warnings, pipeline


def on_remote(project: Project) -> int:
    """How many objects the remote holds."""
    return sum(1 for path in (project.root.parent / "store").rglob("*") if path.is_file())


@pytest.fixture
def hung() -> Iterator[str]:
    """An S3 endpoint that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def use_s3(project: Project, endpoint: str) -> None:
    """Make an S3 remote there the default one."""
    settings = {"url": "s3://data/store", "endpointurl": endpoint, "access_key_id": "k", "secret_access_key": "SECRET"}
    lines = [
        "[core]",
        "    remote = far",
        "['remote \"far\"']",
        *(f"    {name} = {value}" for name, value in settings.items()),
    ]
    (project.root / ".dvc" / "config.local").write_text("\n".join(lines) + "\n")


def test_a_stage_is_pushed_when_it_is_made_or_at_the_end_in_one_call(project: Project):
    assert materialize(project, Keep(push="each"), "one")[0] == []
    assert on_remote(project) == 3 and dvc_transfer.owed(project.root) == {}  # two files and their folder
    assert materialize(project, Keep(push="end"), "two@x", "two@y")[0] == []
    assert on_remote(project) == 3 and set(dvc_transfer.owed(project.root)) == {"two@x", "two@y"}
    assert list(dvc_keep.after_run(Keep(push="end"), "r", known=["one", "two@x", "two@y"], root=project.root)) == []
    assert on_remote(project) == 4 and dvc_transfer.owed(project.root) == {}  # their content is equal


def test_a_stage_or_an_instance_has_a_time_of_its_own(project: Project):
    keep = Keep(push="each", push_of={"one": "never", "two": "end", "two@y": "each"})
    assert materialize(project, keep, "one", "two@x")[0] == []
    assert on_remote(project) == 0 and set(dvc_transfer.owed(project.root)) == {"two@x"}
    assert materialize(project, keep, "two@y")[0] == []  # with what was owed, in one call; their content is equal
    assert on_remote(project) == 1 and dvc_transfer.owed(project.root) == {}
    late = Keep(push_of={"one": "end"})
    assert materialize(project, late, "one", "two@x")[0] == [] and Pipeline(Graph(project.root), keep=late).jobs
    assert list(dvc_keep.after_run(late, "r", known=["one", "two@x", "two@y"], root=project.root)) == []
    assert on_remote(project) == 4
    with pytest.raises(ValueError, match=r"push_of: dvc.yaml has no stage 'ninth'; it has five, four, one, "):
        Pipeline(Graph(project.root), keep=Keep(push_of={"ninth": "end"}))


def test_without_the_wish_nothing_is_pushed(project: Project):
    assert materialize(project, Keep(), "one")[0] == []
    assert on_remote(project) == 0 and dvc_transfer.owed(project.root) == {}
    assert Pipeline(Graph(project.root)).jobs == []


def test_a_hung_remote_ends_in_time_and_is_made_good_later(project: Project, hung: str):
    use_s3(project, hung)
    started = time.monotonic()
    (said,), _ = materialize(project, Keep(push="each", timeout=8), "one")
    assert time.monotonic() - started < 60
    assert "dvc push, remote far s3://data/store, failed (no end after 8 s)" in said and "SECRET" not in said
    assert "What was computed stays here" in said and "dvc remote list" in said
    assert set(dvc_transfer.owed(project.root)) == {"one"}
    left = subprocess.run(["pgrep", "-f", f"dvc.*push one.*{project.root}"], capture_output=True, text=True)
    assert left.stdout == ""
    (project.root / ".dvc" / "config.local").unlink()
    assert materialize(project, Keep(push="each"), "two@x")[0] == []
    assert on_remote(project) == 4 and dvc_transfer.owed(project.root) == {}


def test_a_remote_becomes_the_folder_s_own_default_and_git_sees_nothing(project: Project):
    before = project.run("git", "status", "--porcelain").stdout, project.dvc("remote", "list").stdout
    near = Remote("near", str(project.root.parent / "near"))
    assert materialize(project, Keep(push="each", remote=near), "one")[0] == []
    assert sum(path.is_file() for path in (project.root.parent / "near").rglob("*")) == 3 and on_remote(project) == 0
    assert project.dvc("config", "remote.near.verify").stdout == "true\n"
    assert project.dvc("config", "core.remote").stdout == "near\n"  # of a bare `dvc push`, too
    assert project.run("git", "status", "--porcelain").stdout == before[0]

    dvc_transfer.use(near._replace(options=(("jobs", "2"),)), root=project.root)
    assert project.dvc("config", "remote.near.jobs").stdout == "2\n"
    dvc_transfer.use(near, root=project.root)
    assert project.dvc("config", "remote.near.jobs").stdout == ""
    assert before[1].split()[0] == "store" and "store" in project.dvc("remote", "list").stdout


def test_a_remote_that_is_as_it_should_be_costs_no_call_of_dvc(project: Project, monkeypatch: pytest.MonkeyPatch):
    near = Remote("near", "s3://bucket/dvc", (("endpointurl", "http://h%40st:8333"),))
    dvc_transfer.use(near, root=project.root)
    called: list[tuple[str, ...]] = []
    monkeypatch.setattr(dvc_repo, "text", lambda *arguments, root: called.append(arguments))
    dvc_transfer.use(near, root=project.root)
    assert called == []
    dvc_transfer.use(near._replace(url="s3://other/dvc"), root=project.root)
    assert [words[1] for words in called] == ["add", "modify", "modify"]


def test_a_dead_remote_is_named(project: Project):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    use_s3(project, f"http://127.0.0.1:{port}")
    dvc_transfer.owe(["one"], root=project.root)
    keeper = dvc_keep.job(Keep(push="end", timeout=60), known=["one"], root=project.root)
    config = {"ops": {dvc_keep.NAME: {"config": {"run_id": "r"}}}}
    done = keeper.execute_in_process(run_config=config, raise_on_error=False)
    (failed,) = [event.step_failure_data for event in done.all_events if event.is_step_failure]
    assert failed.user_failure_data is not None
    said = failed.user_failure_data.description or ""
    assert said.startswith("dvc push, remote far s3://data/store, failed (dvc: ") and "SECRET" not in said
    assert set(dvc_transfer.owed(project.root)) == {"one"}


def test_what_is_made_anew_during_a_push_is_still_owed(project: Project, monkeypatch: pytest.MonkeyPatch):
    dvc_transfer.owe(["one", "two@x"], root=project.root)

    def push(what: str, arguments: list[str], *, root: Path, timeout: float) -> None:
        assert (what, arguments) == ("push", ["one", "two@x"])
        dvc_transfer.owe(["one"], root=root)

    monkeypatch.setattr(dvc_transfer, "transfer", push)
    dvc_transfer.settle(["one", "two@x"], root=project.root, timeout=60)
    assert set(dvc_transfer.owed(project.root)) == {"one"}


def test_pull_takes_what_the_remote_has(project: Project, tmp_path: Path):
    project.dvc("push", "one")
    clone = project.clone(tmp_path / "clone")
    dvc_transfer.pull([], root=clone.root, timeout=60)
    assert (clone.root / "one" / "data").read_text() == "1"


def test_a_run_that_ended_is_followed_by_the_job(project: Project):
    keep = Keep(commit=PATHS)
    pipeline = Pipeline(Graph(project.root), keep=keep)
    definitions = dg.Definitions(assets=pipeline.assets(), jobs=pipeline.jobs, sensors=pipeline.sensors())
    repository = definitions.get_repository_def()
    assert {sensor.name for sensor in repository.sensor_defs} == {
        "dvc_lock",
        "dvc_keep_after_success",
        "dvc_keep_after_failure",
    }
    sensor = next(found for found in repository.sensor_defs if found.name == "dvc_keep_after_success")
    assert isinstance(sensor, dg.RunStatusSensorDefinition)
    (project.root / "history").mkdir()
    (project.root / "history" / "record.json").write_text("{}")
    with dg.DagsterInstance.ephemeral() as instance:
        job = definitions.resolve_implicit_global_asset_job_def()
        for tags, follows in (({}, True), ({dvc_keep.KEPT: "here"}, False)):
            done = job.execute_in_process(instance=instance, asset_selection=[dg.AssetKey("one")], tags=tags)
            context = dg.build_run_status_sensor_context(
                "dvc_keep_after_success", done.get_run_success_event(), instance, done.dagster_run
            )
            asked = sensor(context)
            assert isinstance(asked, dg.RunRequest) == follows
            if isinstance(asked, dg.RunRequest):
                assert pipeline.jobs[0].execute_in_process(instance=instance, run_config=asked.run_config).success
                assert done.run_id in project.run("git", "log", "-1", "--format=%B").stdout


def test_a_commit_holds_the_paths_and_leaves_what_is_staged(project: Project):
    root = project.root
    (root / "mine.txt").write_text("staged")
    project.run("git", "add", "mine.txt")
    (root / "two.src").write_text("edited")
    (root / "history").mkdir()
    (root / "history" / "record.json").write_text("{}")
    made = dvc_git.commit(PATHS, "Results of run r", root=root)
    assert made is not None
    shown = project.run("git", "show", "--name-only", "--format=%s", made).stdout.split("\n")
    assert [line for line in shown if line] == ["Results of run r", "history/record.json"]
    assert project.run("git", "status", "--porcelain").stdout.splitlines() == ["A  mine.txt", " M two.src"]
    assert dvc_git.commit(PATHS, "again", root=root) is None
    (root / "history" / "record.json").unlink()
    assert dvc_git.commit(PATHS, "gone", root=root) is not None
    assert project.run("git", "status", "--porcelain").stdout.splitlines() == ["A  mine.txt", " M two.src"]


def test_runs_that_commit_at_once_all_land(project: Project):
    code = """if True:
        import sys
        from pathlib import Path
        from dod_pipeline import dvc_git
        Path("history", sys.argv[1]).write_text("{}")
        assert dvc_git.commit(("dvc.lock", "history/" + sys.argv[1]), "run " + sys.argv[1], root=Path())
    """
    (project.root / "history").mkdir()
    started = [project.start("python", "-c", code, f"{number}.json") for number in range(4)]
    said = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0] * 4, said
    subjects = project.run("git", "log", "--format=%s").stdout.splitlines()
    assert sorted(subjects[:4]) == [f"run {number}.json" for number in range(4)]
    assert project.run("git", "status", "--porcelain").stdout == ""


def test_without_an_author_the_run_stays_and_git_s_words_are_said(project: Project, monkeypatch: pytest.MonkeyPatch):
    for name in WHO:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_AUTHOR_EMAIL", "")
    (project.root / "history").mkdir()
    (project.root / "history" / "record.json").write_text("{}")
    project.run("git", "config", "user.useConfigOnly", "true")
    (said,) = dvc_keep.after_run(Keep(commit=PATHS), "r", known=[], root=project.root)
    assert said.startswith(f"git commit in {project.root} failed: ") and said.endswith("let the next run do it")
