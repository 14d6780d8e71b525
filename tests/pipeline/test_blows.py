"""SIGKILL of `dod run`, of dvc and of a stage at random moments: nothing goes on, and the next `dod run` recovers."""

import json
import random
import shutil
from pathlib import Path

import dagster as dg
import pytest

from dod_models import artifact
from dod_pipeline import runs

from .processes import Command, alive, assert_all_end, kill_first, wait_for
from .project import Project

LATE = ("train@tiny", "stage1@tiny-6", "stage2@tiny-6", "metrics@tiny-6")
EARLY = ("dataset@tiny", "reference@tiny", "codec@tiny", "latents@tiny")
DEATH = 3.0  # seconds that what a killed process started may live on
BLOWS = 10  # in each chain
LONGEST = 240.0  # seconds of a `dod run` on a busy machine
# (phase, seconds that it lasts about): where blows fall
PHASES = (
    ("start", 2.0),
    ("dvc status", 1.0),
    ("dagster's start", 2.0),
    ("dvc before the stage", 1.5),
    ("stage", 3.0),
    ("stage", 4.0),
    ("dvc after the stage", 0.5),
    ("dagster", 0.7),
)


def forget(project: Project, names: tuple[str, ...]) -> None:
    """Remove what these stages made, from DVC's cache too, so that it must be made again."""
    for name in names:
        for out in project.lock()[name]["outs"]:
            path, md5 = project.root / out["path"], out["md5"]
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            cached(project, md5).unlink(missing_ok=True)


def cached(project: Project, md5: str) -> Path:
    """Where DVC's cache has a file, or the list of a folder."""
    return project.root / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]


def content(project: Project) -> dict[str, str]:
    """sha256 of every file of every output, but for what a killed process left half-written."""
    found = {}
    for name in project.outs():
        top = project.root / name
        for path in [top] if top.is_file() else [p for p in top.rglob("*") if p.is_file()]:
            if path.suffix != ".partial":
                found[path.relative_to(project.root).as_posix()] = artifact.sha256_file(path)
    return found


def history(project: Project) -> dict[str, bytes]:
    """Every record."""
    return {path.name: path.read_bytes() for path in (project.root / "history").rglob("*.json")}


def assert_recovers(project: Project, undisturbed: Project) -> None:
    """The next `dod run` ends well; results are those of an undisturbed run, and nothing is held, open or lost."""
    last = Command(project, "dod", "run", "tiny")
    assert last.end(LONGEST) == 0, last.text
    assert_all_end(project.root, DEATH)
    assert project.outs() == undisturbed.outs() and content(project) == content(undisturbed)
    project.dvc("status", "-q")
    assert history(undisturbed).items() <= history(project).items()
    with runs.instance(project.root) as instance:
        assert not instance.get_runs(dg.RunsFilter(statuses=runs.UNFINISHED))
        for pool in ("gpu", "dvc_repo"):
            info = instance.event_log_storage.get_concurrency_info(pool)
            assert (info.active_slot_count, info.pending_step_count) == (0, 0)


def blow(project: Project, rng: random.Random, phase: str, pause: float) -> dict[str, str | float] | None:
    """Kill one of the processes of a `dod run` some time after that phase has begun, and see all of it end; None if it
    ended before."""
    command = Command(project, "dod", "run", "tiny")
    if not command.reach(phase):
        assert command.process.returncode == 0, command.text
        return None
    wait_for(lambda: command.phase() == "over", pause * rng.random())
    victims = sorted(set(alive(project.root).values()) & {"run", "dvc", "dvc status", "stage"})
    if not victims:
        assert command.end(LONGEST) == 0, command.text
        return None
    victim, hit = rng.choice(victims), command.phase()
    if not kill_first(project.root, victim):
        command.end(LONGEST)
        return None
    seconds = command.seconds
    if victim == "run":
        assert_all_end(project.root, DEATH)
    else:
        if victim == "dvc":
            assert wait_for(lambda: "stage" not in alive(project.root).values(), DEATH)
        assert command.end(LONGEST) == 1, command.text
        assert "Traceback" not in command.text and "Stack Trace" not in command.text
        assert_all_end(project.root, DEATH)
    return {"victim": victim, "phase": hit, "aimed": phase, "seconds": round(seconds, 1), "status": command.end(1)}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("names", [pytest.param(EARLY, id="data"), pytest.param(LATE, id="training")])
def test_a_chain_of_kills_changes_no_result(
    own: Project, built: Project, home: Path, base: Path, names: tuple[str, ...]
):
    rng = random.Random(len(names[0]))
    if names is EARLY:  # Dagster's storage is made under fire, too
        for path in home.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
    forget(own, names)
    blows: list[dict[str, str | float]] = []
    while len(blows) < BLOWS:
        phase, pause = PHASES[(len(blows) + len(names[0])) % len(PHASES)]
        made = blow(own, rng, phase, pause)
        if made is None:
            forget(own, names)
        else:
            blows.append(made)
            print(json.dumps(made))
    (base / f"blows-{names[0]}.json").write_text(json.dumps(blows, indent=1))
    assert_recovers(own, built)
