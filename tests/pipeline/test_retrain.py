"""The loop of retraining on real digits, half of which arrive later: Dagster's daemon notices, and decisions follow."""

import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dod_models.artifact import read_json
from dod_models.dataset import write_mnist
from dod_pipeline import champion, retrain
from dod_pipeline.config import Params, load_params

from . import project as tiny
from .processes import Command, assert_all_end, end_all, wait_for
from .project import Project
from .test_dagster import dagster_of
from .test_kill import Enter

FIRST, LATER = 20, 20  # digits of a class in split train; half as many are held out
LONGEST = 600  # seconds of one retraining, on a machine that is busy with others
DAEMON = ("-m", "dod_pipeline.definitions")


def params(images: Path) -> dict[str, Any]:
    """The tiny project's, for ten classes of digits, watched; a gate that lets everything pass."""
    values = tiny.params(images)
    experiment = values["experiments"]["tiny"]
    experiment["train"]["model"]["num_classes"] = 10
    experiment["train"] |= {"steps": 240, "batch_size": 16, "save_every": 240, "state_every": 120, "log_every": 4}
    values["datasets"]["tiny"]["codec"]["steps"] = 200  # this and the next two: so that a spoilt model scores worse
    values["datasets"]["tiny"]["reference"]["epochs"] = 8
    experiment["sampling"] = experiment["sampling"] | {"num_steps": 8}
    values["checkpoints"] = {"tiny-240": {"experiment": "tiny", "data": "tiny", "step": 240}}
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


@pytest.fixture(autouse=True)
def no_process_outlives_a_test():
    yield
    end_all()


def history(project: Project) -> list[dict[str, Any]]:
    """What was decided."""
    found: list[dict[str, Any]] = read_json(project.root / "champions" / "tiny.json")["history"]
    return found


def refused_until_the_codec_is_pinned(project: Project) -> None:
    """Another codec would be trained on more images: refused, with the remedy, before anything is begun."""
    refused = project.dod("retrain", "tiny", status=1).stderr
    assert "datasets.tiny.codec: is trained on the images, and these have changed since tiny-240" in refused
    assert "`dod pin tiny`" in refused and "tiny-r1" not in project.params()["experiments"]
    pinned = project.dod("pin", "tiny").stdout.splitlines()[-1].partition("codec: ")[2]
    values = project.params()
    values["datasets"]["tiny"]["codec"] = dict(pair.split(": ") for pair in pinned.strip("{}").split(", "))
    project.write_params(values)


def made_by_the_daemon(project: Project) -> None:
    """The sensor notices the images, and has one retraining made."""
    project.run("dagster", "sensor", "start", "images_of_tiny", *DAEMON, DAGSTER_HOME="dagster_home", PYTHONWARNINGS="")
    home = str(project.root / "dagster_home")
    daemon = Command(project, "dagster-daemon", "run", *DAEMON, DAGSTER_HOME=home, PYTHONWARNINGS="")
    jobs = dg.RunsFilter(job_name="retrain_tiny")
    with dagster_of(project) as instance:
        assert wait_for(lambda: any(run.is_finished for run in instance.get_runs(jobs)), LONGEST), daemon.text
        (run,) = instance.get_runs(jobs)
        logged = [entry.user_message for entry in instance.all_logs(run.run_id)]
        assert run.status == dg.DagsterRunStatus.SUCCESS, logged
        assert run.tags["dagster/sensor_name"] == "images_of_tiny"
        assert any("promoted; in use: tiny-r1-4" in line for line in logged)
    daemon.process.terminate()
    daemon.end(60)
    assert_all_end(project.root, 60)


def promoted_with_a_record(project: Project) -> None:
    """What a promotion leaves: verdict, digests, images, and a candidate that DVC holds to be up to date."""
    first, promoted = history(project)
    (verdict,) = (project.root / "history" / "verdicts" / "tiny-r1").glob("*.json")
    assert (promoted["event"], promoted["checkpoint"]) == ("promoted", "tiny-r1-4")
    assert promoted["verdict"] == verdict.stem and read_json(verdict)["verdict"] == "PASS"
    assert promoted["data"] == read_json(project.root / "listings" / "tiny.json")["sha256"] != first["data"]
    assert project.params()["experiments"]["tiny-r1"]["train"]["warm_start"]["sha256"] == first["sha256"]
    assert read_json(project.root / "facts" / "dataset" / "tiny.json")["train"] == 10 * (FIRST + LATER)
    project.dvc("status", "-q", "metrics@tiny-r1-4", "report@tiny-r1")


def rolled_back_without_a_stale_stage(project: Project) -> None:
    """No stage depends on who is champion."""
    before = project.dvc("status", "--json").stdout
    assert "train@tiny" in before  # made of fewer images, and DVC says so
    project.dod("champion", "tiny", "--rollback", "--why", "to see it")
    assert history(project)[-1]["event"] == "rolled back"
    assert project.dod("champion", "tiny", "--format", "key").stdout == "tiny-240\n"
    assert project.dvc("status", "--json").stdout == before


def killed_taken_up_and_refused(project: Project) -> None:
    """A retrain that spoils the weights: the incumbent stays, and the record says why."""
    values = project.params()
    spoils = {"steps": 4, "learning_rate": 0.07, "warmup_steps": 0}  # 0.5 leaves the range that a check allows
    values["experiments"]["tiny"] |= {"retrain": spoils, "gate": {"tolerance": 0, "level": 0.49}}
    project.write_params(values)
    killed = Command(project, "dod", "retrain", "tiny")
    assert wait_for(lambda: "Running stage 'train@tiny-r2'" in killed.text, LONGEST), killed.text
    killed.process.kill()
    assert_all_end(project.root, 60)
    failed = project.dod("retrain", "tiny", status=2).stdout
    assert "going on with candidate tiny-r2-4" in failed and "tiny-r3" not in project.params()["experiments"]
    kept = history(project)[-1]
    assert (kept["event"], kept["checkpoint"]) == ("kept", "tiny-r2-4") and kept["why"].startswith(
        "FAIL against tiny-240"
    )
    assert failed.endswith("kept; in use: tiny-240\n")


@pytest.mark.timeout(1200)  # alone on a core it takes a fifth of that
def test_the_loop(tmp_path: Path):
    """One story in one test: each step stands on those before it, and a retraining takes a minute."""
    images, later = write_digits(tmp_path)
    project = tiny.create(tmp_path / "project", params(images))
    project.dod("run", "tiny", "--until", "train")
    project.dod("champion", "tiny", "--set", "tiny-240", "--why", "the first half")
    assert "tiny-240 stays in use" in project.dod("retrain", "tiny", "--if-changed").stdout
    shutil.copytree(later, images, dirs_exist_ok=True)
    refused_until_the_codec_is_pinned(project)
    made_by_the_daemon(project)
    promoted_with_a_record(project)
    rolled_back_without_a_stale_stage(project)
    killed_taken_up_and_refused(project)


def test_a_candidate_in_the_latents_of_another_codec_is_not_compared(shared: Project, inside: Enter):
    inside(shared)
    one = champion.holder(load_params(), "tiny-6")
    champion.decide("tiny", "set", one._replace(codec="0" * 64), why="")
    with pytest.raises(
        ValueError, match=r"tiny-6 and tiny-6 were trained in the latents of two codecs, .*`dod pin tiny`"
    ):
        retrain.judge(load_params(), "tiny", "tiny-6", None)
    values = params(Path("images"))
    values["datasets"]["tiny"]["codec"] = {"source": "finished", "path": "pinned", "sha256": one.codec}
    with pytest.raises(ValueError, match=rf"codec\.sha256: is {one.codec}, and tiny-6 speaks the latents of 0+"):
        retrain.check_codec(Params.parse(values, place=""), "tiny", champion.read("tiny"), None)


def test_retrains_are_judged_under_the_gate_that_their_experiment_has_now():
    values = params(Path("images"))
    values["experiments"]["tiny-r1"] = values["experiments"]["tiny"] | {"gate": {"tolerance": 1.0}}
    values["checkpoints"]["tiny-r1-240"] = {"experiment": "tiny-r1", "data": "tiny", "step": 240}
    loaded = Params.parse(values, place="")
    same = retrain.under_one_gate(loaded, "tiny", ["tiny-r1-240", "tiny-240"])
    assert {one.gate.tolerance for one in same.experiments.values()} == {1000.0}
    assert loaded.experiments["tiny-r1"].gate.tolerance == 1.0
