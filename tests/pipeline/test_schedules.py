"""What Dagster would begin by itself: when it asks for a retraining, and what becomes of the command."""

import shutil
import time
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest

from dod_pipeline import champion, lifeline, listing, schedules
from dod_pipeline.config import Params, load_params
from dod_pipeline.schedules import Automation
from dod_pipeline.turns import turn

from . import project as tiny
from .project import Project
from .test_champion import weights


@pytest.fixture
def root(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The images of a data set that params.yaml in the current folder names, and that is watched."""
    monkeypatch.chdir(tmp_path)
    found = Path(shutil.copytree(images, tmp_path / "images"))
    Project(tmp_path).write_params(values(found))
    return found


def values(root: Path, **retrain: Any) -> dict[str, Any]:
    """The tiny project's, with settings of `retrain`."""
    found = tiny.params(root)
    found["experiments"]["tiny"]["retrain"] = {"watch": True, "watch_every": 2, "cron": "0 3 * * 0"} | retrain
    return found


def automation(root: Path, **retrain: Any) -> Automation:
    return schedules.automation(Params.parse(values(root, **retrain), place="params.yaml"))


def look(cursor: str | None = None) -> tuple[dg.RunRequest | str, str | None]:
    """What the sensor says, and its cursor afterwards."""
    (sensor,) = schedules.automation(load_params()).sensors
    with dg.build_sensor_context(cursor=cursor) as context:
        said = sensor(context)
        if isinstance(said, dg.SkipReason):
            return said.skip_message or "", context.cursor
        assert isinstance(said, dg.RunRequest)
        return said, context.cursor


def test_all_is_off_until_it_is_switched_on(root: Path):
    found = automation(root)
    assert [job.name for job in found.jobs] == ["retrain_tiny"]
    assert [one.default_status for one in found.schedules] == [dg.DefaultScheduleStatus.STOPPED]
    assert [one.default_status for one in found.sensors] == [dg.DefaultSensorStatus.STOPPED]
    assert found.schedules[0].cron_schedule == "0 3 * * 0"
    without = automation(root, cron=None, watch=False)
    assert (len(without.jobs), without.schedules, without.sensors) == (1, [], [])


def test_a_retrain_has_no_automation_of_its_own(root: Path):
    raw = values(root)
    raw["experiments"]["tiny-r1"] = tiny.params(root)["experiments"]["tiny"]
    raw["experiments"]["tiny-r1"]["train"]["warm_start"] = {"path": "x", "sha256": "0" * 64}
    assert len(schedules.automation(Params.parse(raw, place="")).jobs) == 1


@pytest.mark.parametrize("cron", ["every day", "61 3 * * 0"])
def test_what_is_no_cron_is_named_with_its_place(root: Path, cron: str):
    with pytest.raises(ValueError, match=r"params\.yaml: experiments\.tiny\.retrain\.cron: "):
        automation(root, cron=cron)


def test_never_two_of_one_experiment_at_a_time(root: Path):
    (job,) = automation(root).jobs
    assert [node.definition.pool for node in job.nodes if isinstance(node.definition, dg.OpDefinition)] == [job.name]
    with turn("retrain-tiny"), Project(root.parent).start("dod", "retrain", "tiny") as second:
        assert second.stdout is not None
        assert second.stdout.readline().endswith("turns/retrain-tiny: another dod is at this; waiting for it\n")
        second.kill()


def test_the_sensor_asks_once_for_each_version_of_the_images_after_two_equal_looks(root: Path):
    assert look() == ("no champion yet: dod champion tiny --set CHECKPOINT", None)
    first, _ = listing.update("tiny", load_params().datasets["tiny"])
    champion.decide("tiny", "set", weights("tiny"), why="", data=first.sha256)
    assert look() == ("the images are those of the last decision", None)
    (root / "train" / "bar" / "000.png").unlink()
    said, cursor = look()
    assert said == "179 images, others than before: asking again before a run is begun"
    (root / "train" / "bar" / "001.png").unlink()  # they go on changing
    said, cursor = look(cursor)
    assert isinstance(said, str) and said.startswith("178 images")
    asked, same = look(cursor)
    assert isinstance(asked, dg.RunRequest) and same == cursor == asked.run_key
    assert asked.run_config == {"ops": {"dod_retrain_tiny": {"config": {"if_changed": True}}}}
    assert listing.find("tiny") == first  # the run looks for itself, and DVC is told then
    champion.decide("tiny", "kept", weights("tiny-r1"), why="FAIL", data=asked.run_key)
    assert look(cursor) == ("the images are those of the last decision", cursor)


def test_what_the_command_prints_is_logged_and_its_failure_is_the_run_s(root: Path):
    said = schedules.lines_of(["scan", "tiny"])
    assert any(line.endswith("written to listings/tiny.json") for line in said)
    with pytest.raises(dg.Failure) as caught:
        list(schedules.lines_of(["retrain", "tiny"]))
    assert "champions/tiny.json: tiny has no champion yet" in (caught.value.description or "")


def test_a_run_that_is_stopped_stops_the_command(root: Path):
    code = "import time; print('begun', flush=True); time.sleep(600)"
    before = set(psutil.Process().children())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lifeline, "held", lambda command: [command[0], "-c", code])
        lines = schedules.lines_of(["retrain", "tiny"])
        assert next(lines) == "begun"
        (child,) = set(psutil.Process().children()) - before
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            lines.throw(KeyboardInterrupt)
    assert time.monotonic() - started < 10 and not child.is_running()
