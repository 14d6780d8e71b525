"""Ctrl-C, and processes that meet each other or lose their parents: a clear end, and the next `dod run` goes on."""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from .processes import Command, alive, assert_all_end, kill_first, wait_for
from .project import Project
from .test_blows import DEATH, LATE, LONGEST, assert_recovers, forget

STOPPED = "dod: stopped; run it again to go on"


def interrupt(command: Command) -> None:
    """As a terminal does it: the whole foreground group gets the signal, and dvc has a session of its own."""
    os.killpg(command.process.pid, signal.SIGINT)


def terminate(command: Command) -> None:
    """As a supervisor does it."""
    command.process.terminate()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "stop, made, phases",
    [
        pytest.param(
            interrupt,
            LATE[1:],
            ("dvc status", "dagster's start", "dvc before the stage", "stage", "dvc after the stage"),
            id="Ctrl-C",
        ),
        pytest.param(terminate, LATE[3:], ("dagster's start", "stage"), id="SIGTERM"),
    ],
)
def test_stopped_at_any_moment_it_ends_in_one_line_and_the_next_run_goes_on(
    own: Project,
    built: Project,
    home: Path,
    stop: Callable[[Command], None],
    made: tuple[str, ...],
    phases: tuple[str, ...],
):
    forget(own, made)
    for phase in phases:
        command = Command(own, "dod", "run", "tiny", PYTHONWARNINGS="")
        assert command.reach(phase), command.text
        stop(command)
        assert command.end(45) == 130, command.text
        assert command.text.splitlines()[-1] == STOPPED and "Traceback" not in command.text, command.text
        assert_all_end(own.root, DEATH)
    assert_recovers(own, built)


def steps_are_made(command: Command) -> bool:
    """Whether its training has told of some."""
    return "train: step " in command.text


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("stop", "processes"),
    [pytest.param(interrupt, "1", id="Ctrl-C"), pytest.param(terminate, "2", id="SIGTERM, two processes")],
)
def test_a_training_that_is_stopped_saves_the_step_it_is_in(
    own: Project, home: Path, stop: Callable[[Command], None], processes: str
):
    values = own.params() | {"sweeps": {}}
    values["experiments"]["tiny"]["train"] |= dict.fromkeys(("steps", "save_every", "state_every"), 100_000)
    values["checkpoints"]["tiny-6"]["step"] = 100_000
    own.write_params(values)
    environment = {"DOD_PROCESSES": processes, "ACCELERATE_USE_CPU": "true", "PYTHONWARNINGS": ""}
    saved = 0
    for _ in range(2):
        command = Command(own, "dod", "run", "tiny", "--until", "train", **environment)
        assert wait_for(partial(steps_are_made, command), LONGEST), command.text
        assert (f"train: going on from step {saved}" in command.text) == (saved > 0)
        stop(command)
        assert command.end(60) == 130, command.text
        states = sorted(own.root.glob(".state/train/tiny/*/resume/step-*"))
        before, saved = saved, int(states[-1].name.removeprefix("step-"))
        assert before < saved < 100_000
        assert_all_end(own.root, DEATH)


@pytest.mark.timeout(600)
def test_a_killed_run_of_dagster_leaves_nothing_that_goes_on(own: Project, built: Project, home: Path):
    forget(own, LATE[3:])
    words = ("asset", "materialize", "-m", "dod_pipeline.definitions", "--select", "metrics/tiny-6")
    command = Command(own, "dagster", *words, DAGSTER_HOME=str(home))
    assert wait_for(lambda: "stage" in alive(own.root).values(), LONGEST), command.text
    assert len(alive(own.root)) >= 4  # run, step, dvc, stage
    assert kill_first(own.root, "dagster")
    assert command.end(5) == -signal.SIGKILL
    assert_all_end(own.root, DEATH)
    assert_recovers(own, built)


@pytest.mark.timeout(600)
def test_no_worker_of_a_training_outlives_a_killed_run(own: Project, built: Project, home: Path):
    forget(own, LATE[:1])
    command = Command(own, "dod", "run", "tiny", "--until", "train", DOD_PROCESSES="2", ACCELERATE_USE_CPU="true")
    assert wait_for(lambda: list(alive(own.root).values()).count("worker") == 2, LONGEST), command.text
    assert kill_first(own.root, "run")
    assert command.end(5) == -signal.SIGKILL
    assert_all_end(own.root, DEATH)
    assert_recovers(own, built)


@pytest.mark.timeout(600)
def test_a_run_beside_a_bare_dvc_repro_ends_well(own: Project, built: Project, home: Path):
    forget(own, LATE[2:])
    bare = Command(own, "dvc", "repro", "metrics@tiny-6")
    assert wait_for(lambda: "stage" in alive(own.root).values(), LONGEST), bare.text
    run = Command(own, "dod", "run", "tiny")
    assert run.end(LONGEST) == 0, run.text
    assert bare.end(LONGEST) in (0, 255), bare.text  # dvc itself says "busy" where dod was faster
    assert_recovers(own, built)
