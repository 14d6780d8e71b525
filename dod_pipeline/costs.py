"""What a finished stage took: one immutable record each, beside the evaluations and apart from the stage's outputs.

Two equal runs differ in nothing but these.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import NonNegativeFloat, PositiveInt

from dod_models import artifact
from dod_models.config import TOOK, Frozen
from dod_pipeline import ledger, stages
from dod_pipeline.config import Params
from dod_pipeline.stages import Job

COSTS = ledger.HISTORY / "costs"


class Cost(Frozen):
    """Of the process that finished a stage: a run that was cut off and went on counts from there."""

    kind: Literal["cost"] = "cost"
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
    cost = Cost(
        time=datetime.now(UTC),
        stage=job.stage,
        key=job.key,
        seconds=round(seconds, 3),
        device=device,
        processes=processes,
        config=job.config.digest,
        commit=ledger.current_commit(),
    )
    return ledger.write_once(folder(root, job.stage, job.key), cost)


def known(stage: str, key: str, root: Path = COSTS) -> list[Cost]:
    """The records of a stage instance, in no order."""
    place = folder(root, stage, key)
    return [Cost.parse(row, place=f"{place}") for row in ledger.records_in(place)]


def newest(job: Job, root: Path = COSTS) -> Cost | None:
    """The newest record of a job under its present settings; None if there is none."""
    found = [cost for cost in known(job.stage, job.key, root) if cost.config == job.config.digest]
    return max(found, key=lambda cost: cost.time, default=None)


def after(stage: str, key: str, moment: float, root: Path = COSTS) -> Cost | None:
    """The newest record of a stage instance, if it ended after a moment in Unix time."""
    found = [cost for cost in known(stage, key, root) if cost.time.timestamp() > moment]
    return max(found, key=lambda cost: cost.time, default=None)


def training_gflops(params: Params, experiment: str) -> float:
    """What a training costs in GFLOPs, 2 for a multiply-add: by arithmetic, whatever it runs on."""
    from dod_models.speed import training_flops  # late, as they import torch
    from dod_models.state import TrainConfig

    config = stages.resolve(params, "train", experiment).config
    assert isinstance(config, TrainConfig)
    images = config.steps * config.batch_size
    return images * training_flops(config.model, prior_drop=config.prior_drop) / 1e9


class Pace(NamedTuple):
    """How fast samples came about, all stages counted."""

    seconds: float
    images_per_second: float
    device: str


def pace(params: Params, checkpoint: str, *, stage: int, root: Path = COSTS) -> Pace | None:
    """What a checkpoint's samples took up to a stage, under the present settings; None where a part is not recorded."""
    jobs = [stages.resolve(params, f"stage{number}", checkpoint) for number in range(1, stage + 1)]
    found = [cost for job in jobs if (cost := newest(job, root)) is not None]
    seconds = sum(cost.seconds for cost in found)
    if len(found) < len(jobs) or seconds == 0:
        return None
    devices = {f"{cost.processes} x {cost.device}" if cost.processes > 1 else cost.device for cost in found}
    count = jobs[-1].config.model_dump()["num_samples"]
    return Pace(round(seconds, 3), round(count / seconds, 3), ", ".join(sorted(devices)))


def row_pace(params: Params, job: Job, name: str, *, count: int, before: int, root: Path = COSTS) -> Pace | None:
    """What the samples of a sweep's row took, with those of as many stages `before` it; None where that isn't known."""
    note, sweep = job.inputs["state"] / TOOK, newest(job, root)
    own = artifact.read_json(note).get(name) if note.exists() else None
    earlier = pace(params, job.key, stage=before, root=root) if before else Pace(0, 0, "")
    if not own or sweep is None or earlier is None:
        return None
    seconds, devices = own + earlier.seconds, {sweep.device, *earlier.device.split(", ")} - {""}
    return Pace(round(seconds, 3), round(count / seconds, 3), ", ".join(sorted(devices)))
