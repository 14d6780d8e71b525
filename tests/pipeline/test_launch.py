"""A training in several processes and on several machines, here two launchers on one; and a notice to stop."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from dod_models import artifact
from dod_pipeline import cli

from .processes import Command, assert_all_end, wait_for
from .project import Project

TRAIN = ("dod", "stage", "train", "tiny")
CPU = {"ACCELERATE_USE_CPU": "true", "PYTHONWARNINGS": ""}
LONGEST = 200  # seconds


def losses(project: Project) -> list[float]:
    return [json.loads(line)["loss"] for line in (project.root / "train/tiny/curve.jsonl").read_text().splitlines()]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: artifact.sha256_file(path) for path in folder.iterdir()}


def together(machines: list[Project], words: tuple[str, ...]) -> list[str]:
    """Run a command on several machines at once; what each of them said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        main = f"127.0.0.1:{free.getsockname()[1]}"
    known = {"DOD_MACHINES": str(len(machines)), "DOD_MAIN": main, **CPU}
    team = [Command(project, *words, DOD_MACHINE=str(i), **known) for i, project in enumerate(machines)]
    for command in team:
        assert command.end(LONGEST) == 0, command.text
    return [command.text for command in team]


@pytest.mark.timeout(600)
def test_two_machines_score_as_one_process_does(own: Project):
    """Half of the samples each, into a folder that they share; the first one puts the scores together."""
    scores = own.root / "metrics" / "tiny" / "tiny-6.json"
    alone = scores.read_bytes()
    scores.unlink()
    other = own.copy(own.root.parent / "other")
    shutil.rmtree(other.root / ".state", ignore_errors=True)
    (other.root / ".state").symlink_to(own.root / ".state")
    first, second = together([own, other], ("dod", "stage", "metrics", "tiny-6"))
    assert scores.read_bytes() == alone
    assert "score: 100%" in first and "score:   0%" not in first  # nothing was left to be done by one alone
    assert "score: " not in second and not (other.root / "metrics" / "tiny" / "tiny-6.json").exists()


@pytest.mark.timeout(600)
def test_two_machines_sample_as_one_process_does(own: Project):
    """In micro-batches of 8, four of which make a shard, 70 samples are three shards: two of machine 0, one of 1."""
    values = own.params()
    values["experiments"]["tiny"]["sampling"]["batch_size"] = 8
    own.write_params(values)
    words, out = ("dod", "stage", "stage2", "tiny-6"), Path("samples", "tiny", "tiny-6", "stage2")
    own.run(*words)
    alone = digests(own.root / out)
    own.run("rm", "-r", str(out), ".state/stage2")
    other = own.copy(own.root.parent / "other")
    shutil.rmtree(other.root / ".state", ignore_errors=True)
    (other.root / ".state").symlink_to(own.root / ".state")
    first, second = together([own, other], words)
    assert digests(own.root / out) == alone != {}
    assert "stage 2, process 1 of 2: 100%" in first and "stage 2: " not in first  # nothing was left for one alone
    assert "%" not in second and not (other.root / out).exists()
    assert len(list(own.root.glob(".state/stage2/tiny-6/*/done/samples-*.json"))) == 3


@pytest.mark.timeout(600)
def test_two_machines_train_as_one_process_does(own: Project):
    alone, ledger = losses(own), (own.root / "train/tiny/ledger.jsonl").read_bytes()
    records = list((own.root / "history" / "costs").rglob("*.json"))
    own.run("rm", "-r", "train/tiny", ".state/train")
    other = own.copy(own.root.parent / "other")  # the same params and latents, a disk of its own
    together([own, other], TRAIN)
    assert losses(own) == pytest.approx(alone, rel=1e-5)
    assert (own.root / "train/tiny/ledger.jsonl").read_bytes() == ledger
    artifact.verify(own.root / "train" / "tiny", schema="train/2")
    assert not (other.root / "train" / "tiny").exists() and not list(other.root.glob(".state/train/tiny/*"))
    assert len(list((own.root / "history" / "costs").rglob("*.json"))) == len(records) + 1
    assert len(list((other.root / "history" / "costs").rglob("*.json"))) == len(records)


@pytest.mark.timeout(600)
def test_sigterm_reaches_the_processes_which_save_and_end(own: Project):
    alone, values = losses(own), own.params()
    train = values["experiments"]["tiny"]["train"]
    train |= {"steps": 3000, "save_every": 3000, "state_every": 3000}
    del values["sweeps"]
    values["checkpoints"]["tiny-6"]["step"] = 3000
    own.write_params(values)
    command = Command(own, *TRAIN, DOD_PROCESSES="2", **CPU)
    assert wait_for(lambda: "train: step 6:" in command.text, LONGEST), command.text
    command.process.terminate()
    assert command.end(60) == 143, command.text
    assert "train: stopped after step " in command.text
    assert_all_end(own.root, 10)
    (state,) = own.root.glob(".state/train/tiny/*/resume/step-*")
    rows = artifact.verify(state, schema="state/2")["about"]["curve"]
    assert len(rows) == int(state.name.removeprefix("step-")) >= 6
    assert [row["loss"] for row in rows[:6]] == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"DOD_MACHINES": "0"}, "DOD_MACHINES='0': must be a number of machines, 1 or more"),
        ({"DOD_MACHINES": "2", "DOD_MACHINE": "2"}, "DOD_MACHINE=2: must be below DOD_MACHINES, which is 2"),
        ({"DOD_MACHINES": "2", "DOD_MAIN": "here"}, "DOD_MAIN='here': must be machine 0's host:port, e.g. 10.0.0.1:"),
    ],
)
def test_senseless_machines_are_refused(
    shared: Project,
    inside: Callable[[Project], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environment: dict[str, str],
    message: str,
):
    inside(shared)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["stage", "train", "tiny"]) == 1
    assert message in capsys.readouterr().err
