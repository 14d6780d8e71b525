"""SIGKILL at random instants of a training, begun again until it ends: equal weights, and no sample twice or never.

`DOD_KILLS=500` (or `make soak`) kills more often than the usual 25 times.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from glob import glob
from pathlib import Path
from typing import Any

import pytest

from dod_models import artifact, train
from dod_models.data import LatentShards
from dod_models.record import check_ledger, read_rows

from . import tiny
from .forks import ENVIRONMENT, Child, Forks, arguments

KILLS = int(os.environ.get("DOD_KILLS", "25"))
CONFIG: dict[str, Any] = {**tiny.TRAIN, "steps": 24, "save_every": 8, "state_every": 2, "log_every": 2}
# Where the next kill is aimed: what to wait for, and for how many seconds more at most. Starts of a new Python, which
# takes seconds to import torch, are few; the other processes are forks of one that has done so.
AIMS = {
    "import": 4.0,
    "first step": 0.05,
    "step": 0.3,
    "state": 0.03,
    "checkpoint": 0.03,
    "publishing": 0.02,
    "anywhere": 0.8,
}
SIGNS = {
    "state": "state/*/resume/.*.partial",
    "publishing": "state/*/out/*.jsonl",
    "checkpoint": "state/*/out/.*.partial",
}
ORDER = (
    *("import", "first step", "state", "step", "checkpoint", "anywhere"),
    *("state", "publishing", "step", "anywhere", "state", "publishing"),
)


class Victim:
    """A training below `root` that is killed and begun again."""

    def __init__(self, forks: Forks, latents: Path, root: Path) -> None:
        self.forks, self.root, self.arguments = forks, root, arguments(CONFIG, latents, root)
        root.mkdir()
        self.starts = 0

    def start(self, *, fork: bool) -> Child:
        self.starts += 1
        log = self.root / f"log-{self.starts}"
        if fork:
            return self.forks.start(self.arguments, log=log)
        with log.open("w") as file:
            command = [sys.executable, "-m", "dod_models.cli", *self.arguments]
            process = subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=file, stderr=file)
        return Child(process.pid, log, lambda pid: process.wait())

    def doing(self, child: Child) -> str:
        """What the process does, or was at when it died, by what it has printed and what lies on the disk."""
        if "train: beginning\n" not in child.text and "train: going on" not in child.text:
            return "import"
        for place, pattern in SIGNS.items():
            found = glob(str(self.root / pattern))  # which doesn't mind what goes while it looks
            if any(changed(Path(path)) > child.begun for path in found):
                return place
        return "step" if "train: step " in child.text else "first step"

    def kill(self, aim: str, chance: random.Random) -> str:
        """Kill the next start near `aim`; returns what was hit, "" if it ended before."""
        child = self.start(fork=aim != "import")
        waits = {"import": "import", "anywhere": "import"}.get(aim, aim)
        if waits != "import" and not child.until(lambda: self.doing(child) == waits):
            assert child.wait() == 0, child.text
            return ""
        end = time.monotonic() + chance.uniform(0, AIMS[aim])
        child.until(lambda: time.monotonic() > end)
        child.kill()
        status = child.wait()
        assert status in (0, -signal.SIGKILL), child.text
        return self.doing(child) if status else ""


def changed(path: Path) -> int:
    """When, in nanoseconds; 0 if it is gone."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


@pytest.fixture(scope="module")
def forks():
    found = Forks()
    yield found
    found.end()


@pytest.mark.timeout(max(600, 8 * KILLS))
def test_kills_at_random_instants_change_no_bit_and_no_sample(forks, pipeline, tmp_path):
    seed = random.randrange(2**32)
    print(f"seed of the instants: {seed}")
    chance, hits, rounds = random.Random(seed), Counter[str](), 0
    whole = Victim(forks, pipeline.latents, tmp_path / "whole")
    assert whole.start(fork=False).wait() == 0
    expected = tiny.digests(tmp_path / "whole" / "train")
    while hits.total() < KILLS:
        victim, rounds = Victim(forks, pipeline.latents, tmp_path / f"round-{rounds}"), rounds + 1
        while hits.total() < KILLS:
            hit = victim.kill(ORDER[(hits.total() + rounds - 1) % len(ORDER)], chance)
            if not hit:
                break
            hits[hit] += 1
            if hits.total() % 25 == 0:
                print(f"{hits.total()} kills in {rounds} trainings: {dict(hits)}", file=sys.__stdout__, flush=True)
        last = victim.start(fork=True)
        assert last.wait() == 0, last.text
        assert tiny.digests(victim.root / "train") == expected
        assert artifact.verify(victim.root / "train", schema=train.SCHEMA)
        rows, size = read_rows(victim.root / "train" / "ledger.jsonl"), len(LatentShards(pipeline.latents))
        check_ledger(rows, samples=24 * 8, seed=0, size=size)
        assert [(row["first"], row["stop"]) for row in rows] == [(16 * i, 16 * i + 16) for i in range(12)]
    assert min(hits["import"], hits["first step"] + hits["step"], hits["state"] + hits["checkpoint"]) > 0, hits
