"""A training that one machine began goes on on another, by way of S3: real processes, killed and told to stop."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from dod_pipeline import mirror
from dod_pipeline.mirror import progress
from dod_pipeline.s3 import Bucket

from .bucket import S3
from .processes import Command, end_all, wait_for
from .project import Project
from .test_mirror import files, names, url_of


def longer(project: Project, url: str, **train_settings: Any) -> None:
    """A training of many steps, mirrored."""
    values = project.params()
    values["experiments"]["tiny"]["train"] |= {"steps": 600, "save_every": 100, "state_every": 20, **train_settings}
    last = values["experiments"]["tiny"]["train"]["steps"]
    values["checkpoints"]["tiny-6"]["step"] = values["sweeps"]["tiny-6"]["step"] = last
    values["deployment"] = {"storage": {"url": url, "push": "never"}}
    project.write_params(values)


OFTEN = """
import sys
from dod_pipeline import cli, mirror
mirror.EVERY = float(sys.argv[1])
sys.exit(cli.main(["stage", "train", "tiny"]))
"""


@pytest.mark.timeout(600)
def test_a_training_that_was_killed_goes_on_elsewhere_to_the_same_weights(own: Project, s3: S3, tmp_path: Path):
    url = url_of(tmp_path)
    longer(own, url)
    undisturbed, other = own.copy(tmp_path / "undisturbed"), own.copy(tmp_path / "other")
    first = Command(own, sys.executable, "-c", OFTEN, "0.1")
    try:
        place = lambda: [n for n in names(f"{url}/state/train/tiny") if n.endswith(mirror.INDEX)]  # noqa: E731
        assert wait_for(lambda: bool(place()), 200), first.text
        first.process.kill()
        first.process.wait()
    finally:
        end_all()
    assert not (own.root / "train" / "tiny" / "step-600").exists()
    shutil.rmtree(own.root / ".state")  # that machine is gone

    done = other.run(sys.executable, "-c", OFTEN, "0.1")
    step = int(done.stdout.partition("fetched the work up to step ")[2].split()[0])
    assert step >= 20 and f"going on from step {step}" in done.stdout + done.stderr
    assert len(place()) == 1  # its output is nowhere else yet

    values = undisturbed.params()
    undisturbed.write_params(values | {"deployment": {}})
    undisturbed.dod("stage", "train", "tiny")
    assert files(other.root / "train") != {} and files(other.root / "train") == files(undisturbed.root / "train")

    other.dod("run", "tiny", "--until", "train")  # which DVC records
    assert place() == [] and files(other.root / "train") == files(undisturbed.root / "train")


def test_a_training_that_is_told_to_stop_leaves_its_last_state_in_s3(own: Project, s3: S3, tmp_path: Path):
    url = url_of(tmp_path)
    longer(own, url, steps=100_000, state_every=100_000, save_every=50_000)
    stopped = Command(own, sys.executable, "-c", OFTEN, "3600")
    try:
        assert wait_for(lambda: "train: step 10:" in stopped.text, 200), stopped.text
        stopped.process.terminate()
        assert stopped.end(100) == 143
    finally:
        end_all()
    step = int(stopped.text.partition("train: stopped after step ")[2].split(",")[0])
    (index,) = [name for name in names(f"{url}/state/train/tiny") if name.endswith(mirror.INDEX)]
    found = Bucket(f"{url}/state/train/tiny").read(index)
    assert found and progress(mirror.parsed(found[0])) == (step, 2) and step >= 10
