"""Append-only history: one immutable JSON record per evaluation, read with DuckDB."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveInt

from dod_models import artifact
from dod_models.config import Frozen
from dod_pipeline.config import Params
from dod_pipeline.ledger import HISTORY, current_commit, write_once
from dod_pipeline.stages import Job


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


def sampler_name(sampling: dict[str, Any]) -> str:
    """Short text for a stage's solver, e.g. `euler-10` or `dopri5`; where guidance is on, its options too."""
    name = f"{sampling['solver']}-{sampling['num_steps']}" if sampling["solver"] == "euler" else str(sampling["solver"])
    if sampling["solver"] == "dopri5" and (sampling["rtol"], sampling["atol"]) != (1e-3, 1e-6):
        name += f" rtol={sampling['rtol']:g} atol={sampling['atol']:g}"
    if sampling["guidance"] == 1:
        return name
    name += f" null={sampling['null_branch']} channels={sampling['channels']}"
    low, high = sampling["guidance_interval"]
    return name if (low, high) == (0, 1) else f"{name} t={low:g}-{high:g}"


def samplings(job: Job) -> dict[str, tuple[int, dict[str, Any], str]]:
    """For each row of a finished job that is a stage's: the stage, its settings, and the digest of its config."""
    from dod_models.sweeps import SweepConfig

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
    return write_once(root / record.experiment, record.id, record)


def query(
    root: Path = HISTORY,
    *,
    experiment: str | None = None,
    checkpoint: str | None = None,
    stage: str | None = None,
    metric: str | None = None,
) -> list[dict[str, Any]]:
    """Records that match, oldest first, as plain dictionaries; with `metric`, only that number and its error."""
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
    kept = (metric, f"{metric}_error")
    some = [row for row in found if metric in row["metrics"]]
    return [row | {"metrics": {name: row["metrics"][name] for name in kept if name in row["metrics"]}} for row in some]


SETTING = ("extractor", "reference", "num_samples")  # where these differ, numbers must not be compared


def texts(record: dict[str, Any]) -> dict[str, str]:
    """What must be equal for two records to be compared, in words."""
    extractor = f"{record['extractor']['name']} ({record['extractor']['digest'][:12]})"
    return {"extractor": extractor, "reference": record["reference"][:12], "num_samples": str(record["num_samples"])}


def setting(found: list[dict[str, Any]]) -> str:
    """In what comparable records were measured."""
    return f"{found[0]['num_samples']:,} images, {found[0]['extractor']['name']}"


def check_comparable(found: list[dict[str, Any]]) -> None:
    """ValueError that says what differs between the records, and which filter of `query` would separate them."""
    differing = [name for name in SETTING if len({texts(row)[name] for row in found}) > 1]
    if not differing:
        return
    values = {name: sorted({texts(row)[name] for row in found}) for name in differing}
    what = "; ".join(f"{name} is {' or '.join(known)}" for name, known in values.items())
    remedies = []
    for name in ("experiment", "checkpoint", "stage"):
        groups: dict[str, set[tuple[str, ...]]] = {}
        for row in found:
            groups.setdefault(str(row[name]), set()).add(tuple(texts(row).values()))
        if len(groups) > 1 and all(len(kinds) == 1 for kinds in groups.values()):
            remedies.append(f"--{name} ({', '.join(sorted(groups))})")
    remedy = f"separate them with {' or '.join(remedies)}" if remedies else "no filter separates all of them"
    raise ValueError(f"these {len(found)} records must not be compared: {what}; {remedy}")


Points = list[tuple[float, float, float | None]]  # step, value, and its standard error where the record has one


def over_steps(found: list[dict[str, Any]]) -> tuple[dict[str, Points], dict[str, float]]:
    """Records of one metric and its error -> points of each series, and floors, for `plots.over_steps`.

    A series is a stage under one setting: experiment, guidance, sampler and seed are named where they differ. Of equal
    ones at a step the newest counts; so does the newest floor of an experiment.
    """
    check_comparable(found)
    series: dict[str, dict[int, tuple[float, float | None]]] = {}
    floors: dict[str, float] = {}
    for row in found:  # oldest first
        alike = [other for other in found if other["stage"] == row["stage"]]
        fields = [name for name in ("experiment", "guidance", "sampler", "seed") if len({o[name] for o in alike}) > 1]
        if not isinstance(row["stage"], int) and len({tuple(other["metrics"].values()) for other in alike}) == 1:
            fields = []  # the same floor under all of them
        value, *error = (row["metrics"][name] for name in sorted(row["metrics"]))  # `fid` comes before `fid_error`
        told = "".join(f", {row[n]}" if n in ("experiment", "sampler") else f", {n} {row[n]}" for n in fields)
        if isinstance(row["stage"], int):
            series.setdefault(f"stage {row['stage']}{told}", {})[row["step"]] = (value, error[0] if error else None)
        else:
            floors[{"floor": "held-out"}.get(row["stage"], row["stage"]) + told] = value
    if not series:
        raise ValueError("only floors match, which have no step; leave --stage out")
    return {name: [(step, *points[step]) for step in sorted(points)] for name, points in series.items()}, floors
