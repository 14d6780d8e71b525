"""Append-only history: one immutable JSON record per evaluation, read with DuckDB."""

import json
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveInt

from dod_models import artifact
from dod_models.config import Frozen
from dod_pipeline.config import Params
from dod_pipeline.stages import Job

HISTORY = Path("history")


class Named(BaseModel):
    """A name, and the sha256 of what it names (not a `Frozen`, whose own `digest` the field would shadow)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    digest: str


class Record(Frozen):
    """The scores of one set of images, and everything they depend on. None: does not apply to a floor."""

    id: str
    time: datetime
    experiment: str
    checkpoint: str
    step: PositiveInt
    stage: PositiveInt | Literal["floor", "codec"]
    metrics: dict[str, float]
    num_samples: PositiveInt
    seed: NonNegativeInt | None
    guidance: NonNegativeFloat | None
    sampler: str | None
    evaluations: float | None  # of the network, per sample, earlier stages included
    extractor: Named
    reference: str  # sha256 of the reference's manifest
    config: str  # sha256 of the stage's config
    weights: str | None  # sha256 of the averaged weights; of the codec's manifest for its floor
    data: str  # sha256 of the data set's manifest
    commit: str | None  # of the code; "-dirty" where files were changed


CODE = (
    "dod_models",
    "dod_pipeline",
    "params.yaml",
    "dvc.yaml",
)  # what a commit must hold for its numbers to be its own


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run git here."""
    return subprocess.run(["git", *arguments], capture_output=True, text=True)


def current_commit() -> str | None:
    """The commit of the working folder, with "-dirty" where code or settings differ from it; None outside of git."""
    try:
        head = git("rev-parse", "HEAD")
        dirty = git("diff", "--quiet", "HEAD", "--", *CODE).returncode != 0
    except FileNotFoundError:
        return None
    return head.stdout.strip() + "-dirty" * dirty if head.returncode == 0 else None


def sampler_name(sampling: dict[str, Any]) -> str:
    """Short text for a stage's solver, e.g. `euler-10` or `dopri5`; guidance's null branch where it is on."""
    name = f"{sampling['solver']}-{sampling['num_steps']}" if sampling["solver"] == "euler" else sampling["solver"]
    return (
        name if sampling["guidance"] == 1 else f"{name} null={sampling['null_branch']} channels={sampling['channels']}"
    )


def samplings(job: Job) -> dict[str, tuple[int, dict[str, Any], str]]:
    """For each row of a finished job that is a stage's: the stage, its settings, and the digest of its config."""
    from dod_models.score import SweepConfig

    if isinstance(job.config, SweepConfig):
        return {n: (stage, c.model_dump(mode="json"), c.digest) for n, (stage, c) in job.config.variants().items()}
    found = {}
    for name in ("stage1", "stage2"):
        manifest = artifact.read_json(job.inputs[name] / artifact.MANIFEST)
        found[name] = (manifest["about"]["stage"], manifest["about"]["sampling"], manifest["config"])
    return found


def records(params: Params, job: Job) -> list[Record]:
    """The records of a finished stage `metrics` (both stages and both floors) or `sweeps` (its rows)."""
    from dod_models.checkpoint import weights_file

    item = params.checkpoints[job.key]
    now = datetime.now(UTC)
    reference = artifact.read_json(job.inputs["reference"] / artifact.MANIFEST)["about"]
    files = artifact.read_json(Path("train", item.experiment, f"step-{item.step}", artifact.MANIFEST))["files"]
    codec = artifact.sha256_file(job.inputs["codec"] / artifact.MANIFEST)
    stages, found = samplings(job), []
    for number, (name, row) in enumerate(artifact.read_json(job.out).items()):
        stage, sampling, config = stages.get(name, (name, None, job.config.digest))
        weights = files[weights_file(sampling["ema_decay"])]["sha256"] if sampling else None
        found.append(
            Record(
                id=f"{now:%Y%m%dT%H%M%S%fZ}-{job.key}-{job.stage}-{number}",
                time=now,
                experiment=item.experiment,
                checkpoint=job.key,
                step=item.step,
                stage=stage,
                metrics={key: value for key, value in row.items() if key not in ("num_samples", "evaluations")},
                num_samples=row["num_samples"],
                seed=sampling["seed"] if sampling else None,
                guidance=sampling["guidance"] if sampling else None,
                sampler=sampler_name(sampling) if sampling else None,
                evaluations=row.get("evaluations"),
                extractor=reference["extractor"],
                reference=artifact.sha256_file(job.inputs["reference"] / artifact.MANIFEST),
                config=config,
                weights=codec if name == "codec" else weights,
                data=reference["dataset"],
                commit=current_commit(),
            )
        )
    return found


def append(record: Record, root: Path = HISTORY) -> Path:
    """Write a record; FileExistsError rather than change one that is there."""
    folder = root / record.experiment
    folder.mkdir(parents=True, exist_ok=True)
    path, partial = folder / f"{record.id}.json", folder / f".{record.id}.{os.getpid()}.partial"
    try:
        partial.write_text(record.model_dump_json(indent=1) + "\n")
        os.link(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def query(
    root: Path = HISTORY,
    *,
    experiment: str | None = None,
    checkpoint: str | None = None,
    stage: str | None = None,
    metric: str | None = None,
) -> list[dict[str, Any]]:
    """Records that match, oldest first, as plain dictionaries; with `metric`, only that one of their numbers."""
    if not any(root.glob("*/*.json")):
        return []
    import duckdb

    filters = {"experiment": experiment, "checkpoint": checkpoint, "stage": stage}
    given = {name: value for name, value in filters.items() if value is not None}
    # `->>` takes a value out of the JSON as text; names and values are ours or parameters, never pasted input
    where = " AND ".join(["true", *(f"json ->> '$.{name}' = ?" for name in given)])
    sql = f"SELECT json FROM read_json_objects(?) WHERE {where} ORDER BY json ->> '$.time', json ->> '$.id'"
    rows = duckdb.execute(sql, [str(root / "*" / "*.json"), *given.values()]).fetchall()
    found = [json.loads(row[0]) for row in rows]
    if metric is None or not found:
        return found
    known = sorted({name for row in found for name in row["metrics"]})
    if metric not in known:
        raise ValueError(f"--metric {metric!r}: no such record has it; they have {', '.join(known)}")
    return [row | {"metrics": {metric: row["metrics"][metric]}} for row in found if metric in row["metrics"]]
