"""Eight runs at once of one repository, a slow large commit among them, and a bare `dvc repro` beside; and commands."""

import itertools
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.instance.ref import InstanceRef

from dod_pipeline import dvc_repo

from . import toy
from .processes import Command, wait_for
from .project import Project

BRANCHES = "abcdef"
LONG = 8.0  # seconds
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


def holder_of(lock: Path) -> int | None:
    """The process that holds a lock on this file."""
    inode = str(lock.stat().st_ino) if lock.exists() else ""
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if words[1] != "->" and words[5].rpartition(":")[2] == inode:
            return int(words[4])
    return None


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="only Linux says in /proc/locks who holds a lock")
@pytest.mark.timeout(600)
def test_commands_at_once_wait_for_a_bare_dvc_whose_commit_takes_long(own: Project, home: Path):
    """It has DVC's lock, and is stopped: for longer than the 3 s for which a dvc waits for another."""
    values, before = own.params(), set(own.lock())
    values["experiments"]["tiny"]["stage2"]["guidance"] = 3.0
    own.write_params(values)
    lock, holder = own.root / ".dvc" / "tmp" / "lock", 0

    def holds() -> bool:
        nonlocal holder
        holder = holder_of(lock) or 0
        return holder != 0

    bare = Command(own, "dvc", "commit", "--force", "train@tiny")
    assert wait_for(holds, 60), bare.text
    os.kill(holder, signal.SIGSTOP)
    select = 'key:"stage2/tiny-6"'
    commands = [
        Command(own, "dagster", "asset", "materialize", "--select", select, DAGSTER_HOME=str(home), PYTHONWARNINGS=""),
        Command(own, "dod", "run", "tiny", "--until", "stage2"),
        Command(own, "dod", "run", "tiny", "--until", "metrics"),
    ]
    try:
        assert wait_for(lambda: sum("waiting for it" in command.text for command in commands) >= 2, 120)
        time.sleep(LONG)
        assert holder_of(lock) == holder and [one.process.poll() for one in commands] == [None] * 3
    finally:
        os.kill(holder, signal.SIGCONT)
    assert [one.end(400) for one in (bare, *commands)] == [0] * 4, [one.text for one in commands]
    assert not [one.text for one in commands if dvc_repo.BUSY.search(one.text)]
    assert set(own.lock()) == before
    own.dvc("status", "-q", "stage2@tiny-6", "metrics@tiny-6")
