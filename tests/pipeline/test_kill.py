"""SIGKILL in the middle of each stage: the old output is whole or gone, and the next run ends as if undisturbed."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dod_models import artifact
from dod_pipeline import cli, stages
from dod_pipeline.config import load_params

from .project import Project

Enter = Callable[[Project], None]
Captured = pytest.CaptureFixture[str]

# `dod stage STAGE KEY` in a process that kills itself when it comes to open, rename or link a certain file.
DRIVER = """
import os, signal, sys
kind, name, *arguments = sys.argv[1:]
def die(event, details):
    if event == kind and str(details[0]).endswith(name):
        os.kill(os.getpid(), signal.SIGKILL)
from dod_pipeline import cli
sys.addaudithook(die)
sys.exit(cli.main(["stage", *arguments]))
"""

# A file that the stage opens when about half of its work lies in the partial folder.
MIDDLE = {
    "dataset": "/.tiny.partial/val.jsonl",
    "reference": "/.tiny.partial/extractor.safetensors",
    "codec": "/.tiny.partial/vae/config.json",
    "latents": "/out/.shard-00001.npy.partial",
    "train": "/out/.step-4.partial/.manifest.json.partial",
    "stage1": "/.stage1.partial/grid.png",
    "stage2": "/.stage2.partial/grid.png",
    "metrics": "/.tiny-6.json.partial",
    "sweeps": "/.tiny-6.sweep.json.partial",
}


def key_of(stage: str) -> str:
    return "tiny-6" if stage in stages.BY_CHECKPOINT else "tiny"


def target_of(stage: str) -> Path:
    """The stage's output in the current folder, which is the project's."""
    return stages.paths(load_params(), stage, key_of(stage))[1]


def content(path: Path) -> dict[str, str]:
    """sha256 of a file, or of everything in a folder that DVC would keep."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(p): artifact.sha256_file(p) for p in files if p.suffix != ".partial"}


def kill(project: Project, kind: str, name: str, stage: str) -> None:
    """Run the stage in a process that is killed at that event."""
    project.run(sys.executable, "-c", DRIVER, kind, name, stage, key_of(stage), status=-signal.SIGKILL)


@pytest.mark.parametrize("stage", [pytest.param(name, id=name) for name in MIDDLE])
def test_a_stage_that_was_killed_half_way_leaves_the_old_output_and_runs_again(own: Project, inside: Enter, stage: str):
    inside(own)
    target = target_of(stage)
    before = content(target)
    kill(own, "open", MIDDLE[stage], stage)
    assert content(target) == before != {}
    assert cli.main(["stage", stage, key_of(stage)]) == 0
    assert content(target) == before


@pytest.mark.parametrize("stage", ["dataset", "train", "metrics"])
def test_a_stage_that_was_killed_half_way_leaves_nothing_at_its_target(own: Project, inside: Enter, stage: str):
    inside(own)
    target = target_of(stage)
    before = content(target)
    own.run("rm", "-r", str(target))
    kill(own, "open", MIDDLE[stage], stage)
    assert not target.exists()
    assert cli.main(["stage", stage, key_of(stage)]) == 0
    assert content(target) == before


@pytest.mark.parametrize("moment", ["before the old output steps aside", "before the new one takes its place"])
def test_killed_between_the_renames_the_target_is_whole_or_gone(own: Project, inside: Enter, moment: str):
    inside(own)
    target = target_of("dataset")
    before = content(target)
    kill(own, "os.rename", "dataset/tiny" if moment.startswith("before the old") else ".tiny.partial", "dataset")
    assert content(target) == (before if moment.startswith("before the old") else {})
    assert cli.main(["stage", "dataset", "tiny"]) == 0
    assert content(target) == before


@pytest.mark.parametrize(
    "name, step",
    [
        ("/out/.step-2.partial/.manifest.json.partial", None),  # in the first checkpoint
        ("/resume/.step-000000002.partial/.manifest.json.partial", None),  # in the first state
        ("/resume/.step-000000004.partial/.manifest.json.partial", 2),  # in the second state
        ("/out/curve.jsonl", 6),  # all steps are done
    ],
)
def test_a_training_that_was_killed_goes_on_from_its_last_state(
    own: Project, inside: Enter, capsys: Captured, name: str, step: int | None
):
    inside(own)
    before = content(Path("train", "tiny"))
    own.run("rm", "-r", "train/tiny")
    kill(own, "open", name, "train")
    assert not Path("train", "tiny").exists()
    assert cli.main(["stage", "train", "tiny"]) == 0
    printed = capsys.readouterr().out
    assert ("going on" in printed) == (step is not None)
    assert step is None or f"train: going on from step {step}\n" in printed
    assert content(Path("train", "tiny")) == before


def test_dvc_goes_on_after_a_kill_and_records_the_same_outputs(own: Project, inside: Enter):
    inside(own)
    before = own.outs()
    own.run("rm", "-r", "train/tiny")
    kill(own, "open", "/out/.step-4.partial/.manifest.json.partial", "train")
    printed = own.dvc("repro", "--force", "--single-item", "train@tiny").stdout
    assert "train: going on from step 2" in printed
    assert own.outs() == before
    own.dvc("status", "-q")


def test_a_report_that_was_killed_half_way_leaves_the_old_page(own: Project, inside: Enter):
    inside(own)
    before = content(target_of("report"))
    kill(own, "open", "/.tiny.html.partial", "report")
    assert content(target_of("report")) == before != {}
    assert cli.main(["stage", "report", "tiny"]) == 0
