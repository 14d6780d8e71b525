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


def current_commit() -> str | None:
    """The commit of the working folder, or None outside of git."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--abbrev=40", "--dirty"], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def sampler_name(sampling: dict[str, Any]) -> str:
    """Short text for a stage's solver, e.g. `euler-10` or `dopri5`; guidance's null branch where it is on."""
    name = f"{sampling['solver']}-{sampling['num_steps']}" if sampling["solver"] == "euler" else sampling["solver"]
    return (
        name if sampling["guidance"] == 1 else f"{name} null={sampling['null_branch']} channels={sampling['channels']}"
    )


def records(params: Params, job: Job) -> list[Record]:
    """The records of a finished stage `metrics`: both stages and both floors."""
    item = params.checkpoints[job.key]
    now = datetime.now(UTC)
    manifest = artifact.MANIFEST
    digest = {name: artifact.sha256_file(path / manifest) for name, path in job.inputs.items()}
    reference = artifact.read_json(job.inputs["reference"] / manifest)["about"]
    checkpoint = artifact.read_json(Path("train", item.experiment, f"step-{item.step}", manifest))
    found = []
    for name, row in artifact.read_json(job.out).items():
        stage: Any = int(name.removeprefix("stage")) if name.startswith("stage") else name
        about = artifact.read_json(job.inputs[name] / manifest)["about"] if name.startswith("stage") else {}
        sampling = about.get("sampling", {})
        weights = {"floor": None, "codec": digest["codec"]}.get(name)
        if sampling:
            weights = checkpoint["files"][f"ema-{sampling['ema_decay']}.safetensors"]["sha256"]
        found.append(
            Record(
                id=f"{now:%Y%m%dT%H%M%S%fZ}-{job.key}-{name}",
                time=now,
                experiment=item.experiment,
                checkpoint=job.key,
                step=item.step,
                stage=stage,
                metrics={key: value for key, value in row.items() if key not in ("num_samples", "evaluations")},
                num_samples=row["num_samples"],
                seed=sampling.get("seed"),
                guidance=sampling.get("guidance"),
                sampler=sampler_name(sampling) if sampling else None,
                evaluations=row.get("evaluations"),
                extractor=reference["extractor"],
                reference=digest["reference"],
                config=digest[name] if sampling else job.config.digest,
                weights=weights,
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
    partial.write_text(record.model_dump_json(indent=1) + "\n")
    try:
        os.link(partial, path)
    finally:
        partial.unlink()
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
    if metric is not None:
        found = [row | {"metrics": {metric: row["metrics"][metric]}} for row in found if metric in row["metrics"]]
        if not found:
            raise ValueError(
                f"--metric {metric!r}: no such record; metrics are e.g. fid, inception_score, precision, recall"
            )
    return found
