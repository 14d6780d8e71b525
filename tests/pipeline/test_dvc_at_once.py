"""Eight runs at once of one repository, a slow large commit among them, and a bare `dvc repro` beside."""

import itertools
import json
import multiprocessing
import random
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.instance.ref import InstanceRef

from dod_pipeline import dvc_repo

from . import toy
from .project import Project

BRANCHES = "abcdef"
DVC_YAML = """
stages:
  large:
    cmd: head -c 100000000 /dev/urandom > large.bin
    outs: [large.bin]
    deps: [source]
  branch:
    foreach: [a, b, c, d, e, f]
    do:
      cmd: python timed.py ${item}
      deps: [source]
      outs: ["branch-${item}.txt"]
  join:
    foreach: [a, b, c, d, e, f]
    do:
      cmd: cat branch-${item}.txt > join-${item}.txt
      deps: ["branch-${item}.txt"]
      outs: ["join-${item}.txt"]
"""
TIMED = """
import sys, time
begun = time.time()
time.sleep(3)
open(f"branch-{sys.argv[1]}.txt", "w").write(sys.argv[1])
open("times.jsonl", "a").write(f"[{begun}, {time.time()}]\\n")
"""


def dagster_run(root: Path, home: Path, names: list[str]) -> None:
    """As one under the pages."""
    project = Project(root)
    _, definitions = toy.pipeline_of(project)
    keys = [dg.AssetKey(name.split("@")) for name in names]
    with dg.DagsterInstance.from_ref(InstanceRef.from_dir(str(home))) as instance:
        job = definitions.resolve_implicit_global_asset_job_def()
        done = job.execute_in_process(instance=instance, asset_selection=keys, raise_on_error=False)
        errors = [event.step_failure_data.error for event in done.all_events if event.is_step_failure]
        assert done.success, errors


def run_alone(root: Path, home: Path, names: list[str]) -> None:
    """As `dod run` does it."""
    with dvc_repo.alone(root):
        changed = dvc_repo.status(names, root=root, patient=True)
        for name in names:
            if name in changed:
                dvc_repo.repro_one(name, root=root)


@pytest.mark.timeout(600)
def test_eight_runs_at_once_meet_no_lock_and_lose_no_entry(tmp_path: Path):
    root, home = tmp_path / "toy", tmp_path / "home"
    project = toy.create(root, DVC_YAML, {"source": "1", "timed.py": TIMED, ".gitignore": "*.txt\n*.bin\n*.jsonl\n"})
    home.mkdir()
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    dg.DagsterInstance.from_ref(InstanceRef.from_dir(str(home))).dispose()  # makes its tables, which two can't at once
    rng, forks = random.Random(0), multiprocessing.get_context("fork")
    runs, wanted = [], set[str]()
    for number in range(8):
        chosen = rng.sample(BRANCHES, 2)
        names = [f"branch@{key}" for key in chosen] + [f"join@{key}" for key in chosen]
        names += ["large"] if number in (1, 5) else []
        runs.append(forks.Process(target=run_alone if number % 3 == 2 else dagster_run, args=(root, home, names)))
        runs[-1].start()
        wanted |= set(names)
    bare = [project.start("dvc", "repro", "--single-item", f"branch@{key}") for key in "ab"]
    said = [process.communicate() for process in bare]
    for process in runs:
        process.join()
    assert [process.exitcode for process in runs] == [0] * 8
    for other, (out, err) in zip(bare, said, strict=True):
        assert other.returncode == 0 or dvc_repo.BUSY.search(err), out + err
    assert set(project.lock()) >= wanted
    assert not wanted & set(json.loads(project.dvc("status", "--json").stdout))
    times = sorted(json.loads(line) for line in (root / "times.jsonl").read_text().splitlines())
    assert any(later[0] < earlier[1] for earlier, later in itertools.pairwise(times)), times
