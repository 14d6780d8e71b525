"""The loop of retraining on real digits, half of which arrive later: Dagster's daemon notices, and decisions follow."""

import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dod_models.artifact import read_json
from dod_models.dataset import write_mnist

from . import project as tiny
from .processes import Command, assert_all_end, end_all, wait_for
from .project import Project
from .test_dagster import dagster_of

FIRST, LATER = 20, 20  # digits of a class in split train; half as many are held out
DAEMON = ("-m", "dod_pipeline.definitions")


def params(images: Path) -> dict[str, Any]:
    """The tiny project's, for ten classes of digits, watched; a gate that lets everything pass."""
    values = tiny.params(images)
    experiment = values["experiments"]["tiny"]
    experiment["train"]["model"]["num_classes"] = 10
    experiment["gate"] = {"tolerance": 1000.0}
    experiment["retrain"] = {"cron": "0 3 * * 0", "watch": True, "watch_every": 2, "steps": 4}
    return values | {"sweeps": {}}


def write_digits(root: Path) -> tuple[Path, Path]:
    """Two halves of some of the demo's digits."""
    write_mnist(root / "all", num_train=3500, seed=0)
    for folder in sorted((root / "all").glob("*/*")):
        scale = 1 if folder.parent.name == "train" else 2
        for rank, file in enumerate(sorted(folder.iterdir())[: (FIRST + LATER) // scale]):
            half = root / ("images" if rank < FIRST // scale else "later") / folder.relative_to(root / "all")
            half.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, half)
    return root / "images", root / "later"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Path]:
    """A project with a champion of the first half and its codec pinned; where the other half lies."""
    root = tmp_path_factory.mktemp("digits")
    images, later = write_digits(root)
    project = tiny.create(root / "project", params(images))
    project.dod("run", "tiny", "--until", "train")
    project.dod("champion", "tiny", "--set", "tiny-6", "--why", "the first half")
    return project, later


@pytest.fixture(autouse=True)
def no_process_outlives_a_test():
    yield
    end_all()


def history(project: Project) -> list[dict[str, Any]]:
    """What was decided."""
    found: list[dict[str, Any]] = read_json(project.root / "champions" / "tiny.json")["history"]
    return found


def in_use(project: Project) -> str:
    """The champion."""
    return project.dod("champion", "tiny", "--format", "key").stdout.strip()


def change(project: Project, **changes: Any) -> None:
    """Change settings of the experiment."""
    values = project.params()
    values["experiments"]["tiny"] |= changes
    project.write_params(values)


def arrive(project: Project, later: Path) -> None:
    """The other half of the images."""
    shutil.copytree(later, project.root.parent / "images", dirs_exist_ok=True)


@pytest.mark.timeout(900)
def test_the_loop(trained: tuple[Project, Path]):
    """One story in one test: what comes later stands on what came before, and each retraining takes a minute."""
    project, later = trained
    arrive(project, later)

    # Another codec would be trained on more images: refused, with the remedy, before anything is changed.
    refused = project.dod("retrain", "tiny", status=1).stderr
    assert "datasets.tiny.codec: is trained on the images, and these have changed since tiny-6" in refused
    assert "`dod pin tiny`" in refused and "tiny-r1" not in project.params()["experiments"]
    pinned = project.dod("pin", "tiny").stdout.splitlines()[-1].partition("codec: ")[2]
    values = project.params()
    values["datasets"]["tiny"]["codec"] = dict(pair.split(": ") for pair in pinned.strip("{}").split(", "))
    project.write_params(values)

    # The daemon's sensor notices the images, twice, and has one retraining made.
    project.run("dagster", "sensor", "start", "images_of_tiny", *DAEMON, DAGSTER_HOME="dagster_home", PYTHONWARNINGS="")
    home = str(project.root / "dagster_home")
    daemon = Command(project, "dagster-daemon", "run", *DAEMON, DAGSTER_HOME=home, PYTHONWARNINGS="")
    assert wait_for(lambda: len(history(project)) > 1 or daemon.process.poll() is not None, 400), daemon.text
    with dagster_of(project) as instance:
        only_job = dg.RunsFilter(job_name="retrain_tiny")
        assert wait_for(lambda: all(run.is_finished for run in instance.get_runs(only_job)), 60)
        (run,) = instance.get_runs(only_job)
        assert run.status == dg.DagsterRunStatus.SUCCESS and run.tags["dagster/sensor_name"] == "images_of_tiny"
        logged = [entry.user_message for entry in instance.all_logs(run.run_id)]
        assert any("promoted; in use: tiny-r1-4" in line for line in logged)
    daemon.process.terminate()
    daemon.end(60)
    assert_all_end(project.root, 60)
    first, promoted = history(project)
    (verdict,) = (project.root / "history" / "verdicts" / "tiny-r1").glob("*.json")
    assert (promoted["event"], promoted["checkpoint"]) == ("promoted", "tiny-r1-4")
    assert promoted["verdict"] == verdict.stem == read_json(verdict)["id"] and read_json(verdict)["verdict"] == "PASS"
    assert promoted["data"] == read_json(project.root / "listings" / "tiny.json")["sha256"] != first["data"]
    assert project.params()["experiments"]["tiny-r1"]["train"]["warm_start"]["sha256"] == first["sha256"]
    assert read_json(project.root / "facts" / "dataset" / "tiny.json")["train"] == 10 * (FIRST + LATER)
    project.dvc("status", "-q", "metrics@tiny-r1-4", "report@tiny-r1")

    # No stage depends on who is champion.
    before = project.dvc("status", "--json").stdout
    assert "train@tiny" in before  # made of fewer images, and DVC says so
    project.dod("champion", "tiny", "--rollback", "--why", "to see it")
    assert in_use(project) == "tiny-6" and history(project)[-1]["event"] == "rolled back"
    assert project.dvc("status", "--json").stdout == before
    assert "is the first champion" in project.dod("champion", "tiny", "--rollback", status=1).stderr

    # Nothing new to train on; then a retrain that spoils the weights, killed on its way, and taken up again.
    assert "tiny-6 stays in use" in project.dod("retrain", "tiny", "--if-changed").stdout
    change(project, retrain={"steps": 4, "learning_rate": 0.1}, gate={"tolerance": 0})
    killed = Command(project, "dod", "retrain", "tiny")
    assert wait_for(lambda: "Running stage 'train@tiny-r2'" in killed.text, 200), killed.text
    killed.process.kill()
    assert_all_end(project.root, 60)
    failed = project.dod("retrain", "tiny", status=2).stdout
    assert "going on with candidate tiny-r2-4" in failed and "tiny-r3" not in project.params()["experiments"]
    assert in_use(project) == "tiny-6"
    kept = history(project)[-1]
    assert (kept["event"], kept["checkpoint"]) == ("kept", "tiny-r2-4") and kept["why"].startswith(
        "FAIL against tiny-6"
    )
