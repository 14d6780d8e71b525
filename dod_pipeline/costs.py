"""What a finished stage took: one immutable record each, beside the evaluations and apart from the stage's outputs.

Two equal runs differ in nothing but these.
"""

from datetime import UTC, datetime
from pathlib import Path

from pydantic import NonNegativeFloat, PositiveInt

from dod_models.config import Frozen
from dod_pipeline import ledger
from dod_pipeline.stages import Job

COSTS = ledger.HISTORY / "costs"


class Cost(Frozen):
    """Of the process that finished a stage: a run that was cut off and went on counts from there."""

    id: str
    time: datetime
    stage: str
    key: str
    seconds: NonNegativeFloat  # by a steady clock
    device: str  # "cpu", or the GPU's name
    processes: PositiveInt
    config: str  # sha256 of the stage's config
    commit: str | None  # of the code; "-dirty" where files were changed


def folder(root: Path, stage: str, key: str) -> Path:
    """Where the records of a stage instance lie."""
    return root / f"{stage}@{key}"


def append(job: Job, *, seconds: float, device: str, processes: int, root: Path = COSTS) -> Path:
    """Record what a job that has just ended took."""
    now = datetime.now(UTC)
    cost = Cost(
        id=f"{now:%Y%m%dT%H%M%S%fZ}-{job.key}-{job.stage}",
        time=now,
        stage=job.stage,
        key=job.key,
        seconds=round(seconds, 3),
        device=device,
        processes=processes,
        config=job.config.digest,
        commit=ledger.current_commit(),
    )
    return ledger.write_once(folder(root, job.stage, job.key), cost.id, cost)


def newest(job: Job, root: Path = COSTS) -> Cost | None:
    """The newest record of a job under its present settings; None if there is none."""
    paths = folder(root, job.stage, job.key).glob("*.json")
    found = [cost for cost in map(Cost.load, map(str, paths)) if cost.config == job.config.digest]
    return max(found, key=lambda cost: (cost.time, cost.id), default=None)
