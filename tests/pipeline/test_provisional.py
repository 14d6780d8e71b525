"""Scores of steps that are saved while training runs: they change nothing of it, and don't outlive it."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest

from dod_models import artifact
from dod_pipeline import cli, dvc_repo, history, provisional, stages
from dod_pipeline.config import Params
from dod_pipeline.definitions import define

from . import project as tiny
from .processes import Command, alive, assert_all_end, end_all, wait_for
from .project import Project
from .test_dagster import stale
from .test_kill import Enter

STEPS = 300
FIRST = 100  # the evaluated step


def watching(project: Project, **settings: Any) -> dict[str, Any]:
    """The project's params.yaml for a longer training, whose saved steps are scored as they come."""
    values = project.params()
    experiment = values["experiments"]["tiny"]
    experiment["train"] |= {"steps": STEPS, "save_every": FIRST, "state_every": FIRST}
    experiment["provisional"] = {"num_samples": tiny.SAMPLES, **settings}
    values["checkpoints"] = {f"tiny-{FIRST}": tiny.CHECKPOINT | {"step": FIRST}}
    return values | {"sweeps": {}}


@pytest.fixture
def watched(own: Project, home: Path) -> Project:
    own.write_params(watching(own))
    return own


def scores(project: Project) -> list[dict[str, Any]]:
    """The provisional records."""
    found = [json.loads(path.read_text()) for path in (project.root / "history" / "tiny").glob("*.json")]
    return [record for record in found if record.get("provisional")]


def named(project: Project, *words: str) -> list[psutil.Process]:
    """Processes of the project with these words in their command lines."""
    found = []
    for process in alive(project.root):
        with suppress(psutil.Error):
            if set(words) <= set(process.cmdline()):
                found.append(process)
    return found


def weights(project: Project) -> dict[str, str]:
    """Digests of all files of the training."""
    files = [path for path in sorted((project.root / "train" / "tiny").rglob("*")) if path.is_file()]
    return {str(path.relative_to(project.root)): artifact.sha256_file(path) for path in files}


@pytest.fixture
def held(watched: Project) -> Iterator[tuple[Command, psutil.Process]]:
    """`dod run` whose training was stopped, in the middle of its work, once it had saved a step."""
    running = Command(watched, "dod", "run", "tiny", "--until", "train")
    work = watched.root / ".state" / "train" / "tiny"
    assert wait_for(lambda: any(work.glob(f"*/out/step-{FIRST}/manifest.json")), 120), running.text
    (stage,) = named(watched, "stage", "train")
    stage.send_signal(signal.SIGSTOP)
    assert not any(work.glob("*/out/manifest.json"))  # the training is not over
    yield running, stage
    end_all()


@pytest.mark.timeout(600)
def test_steps_are_scored_while_training_runs(watched: Project, held: tuple[Command, psutil.Process], inside: Enter):
    running, stage = held
    saved, done = (watched.root / ".state" / where / "tiny" for where in ("train", "provisional"))
    count = len(list(saved.glob("*/out/step-*")))
    assert wait_for(lambda: len(list(done.glob("*.done"))) == count, 120), running.text
    assert {(r["checkpoint"], r["stage"]) for r in scores(watched)} >= {(f"tiny-{FIRST}", stage) for stage in (1, 2)}
    stage.send_signal(signal.SIGCONT)
    assert running.end(120) == 0
    assert_all_end(watched.root, 10)  # the scores' process too
    inside(watched)
    pipeline, definitions = define()
    with dg.DagsterInstance.get() as instance:
        told = [r.asset_observation for r in instance.fetch_observations(pipeline.keys["train@tiny"], limit=9).records]
        assert "train/tiny" not in stale(instance, definitions)
    numbers = {key: value.value for event in told if event for key, value in event.metadata.items()}
    assert numbers["provisional.stage2.fid"] in [record["metrics"]["fid"] for record in scores(watched)]
    assert not dvc_repo.status(["train@tiny"])
    made = weights(watched)
    values = watched.params()
    del values["experiments"]["tiny"]["provisional"]
    watched.write_params(values)
    assert not dvc_repo.status(["train@tiny"])  # it is no setting of the training's
    artifact.forget_finished(Path(".state", "train", "tiny"))
    assert cli.main(["stage", "train", "tiny"]) == 0
    assert made == weights(watched)
    for name in ("stage1", "stage2", "metrics"):
        assert cli.main(["stage", name, f"tiny-{FIRST}"]) == 0
    rows = [row for row in history.Selection(provisional=True).records() if row["step"] == FIRST and row["stage"] == 2]
    assert [row["provisional"] for row in rows] == [False]


def test_a_training_that_is_killed_leaves_nothing_behind(watched: Project):
    running = Command(watched, "dod", "stage", "train", "tiny")
    assert wait_for(lambda: bool(named(watched, "provisional", "--watch")), 60), running.text
    running.process.kill()
    assert_all_end(watched.root, 10)


def test_a_finished_training_s_other_steps_are_scored_once(
    own: Project, inside: Enter, capsys: pytest.CaptureFixture[str]
):
    """Those of params.yaml have the versioned evaluation."""
    inside(own)
    values = own.params()
    values["experiments"]["tiny"]["provisional"] = {"num_samples": tiny.SAMPLES, "every": 2}
    own.write_params(values)
    assert cli.main(["provisional", "tiny"]) == 0
    assert "tiny-4: stage1 FID" in capsys.readouterr().out
    assert {record["step"] for record in scores(own)} == {2, 4} and len(scores(own)) == 4
    assert cli.main(["provisional", "tiny"]) == 0
    assert capsys.readouterr().out == "" and len(scores(own)) == 4
    values["experiments"]["tiny"]["provisional"] = {"num_samples": 10, "every": 4}
    own.write_params(values)
    assert cli.main(["provisional", "tiny"]) == 1
    assert "raise the number of samples above 64" in capsys.readouterr().err
    del values["experiments"]["tiny"]["provisional"]
    own.write_params(values)
    assert cli.main(["provisional", "tiny"]) == 1
    assert "experiments.tiny.provisional: not in params.yaml" in capsys.readouterr().err


def test_what_becomes_of_the_scores_is_no_concern_of_the_training_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """Here is no params.yaml: the child fails at once."""
    monkeypatch.chdir(tmp_path)
    values = tiny.params(tmp_path)
    values["experiments"]["tiny"]["provisional"] = {"num_samples": tiny.SAMPLES}
    params = Params.parse(values, place="params.yaml")
    log = tmp_path / provisional.CACHE / "tiny.log"
    with provisional.beside(params, stages.resolve(params, "train", "tiny")):
        assert wait_for(lambda: log.exists() and "params.yaml" in log.read_text(), 60)
        time.sleep(1)
    assert "ended early, with status 1; see .state/provisional/tiny.log" in capfd.readouterr().out


def test_nothing_is_started_for_another_stage_or_where_nobody_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    values, before = tiny.params(tmp_path), psutil.Process().children()
    for stage in ("train", "stage1"):
        params = Params.parse(values, place="params.yaml")
        job = stages.resolve(params, stage, "tiny" if stage == "train" else "tiny-6")
        with provisional.beside(params, job):
            assert set(psutil.Process().children()) <= set(before)
        values["experiments"]["tiny"]["provisional"] = {"num_samples": tiny.SAMPLES}
    assert list(tmp_path.iterdir()) == []
