"""Records of one metric -> series: over steps, as `plots.over_steps` draws them, and over evaluations by stage."""

from typing import Any, NamedTuple

from dod_pipeline.history import Rows, check_comparable


class Evaluation(NamedTuple):
    """What one evaluation of a checkpoint found, by stage: of equal time, for they were measured together."""

    time: str
    checkpoint: str
    train_seed: int | None
    weights: str | None  # of its last stage
    data: str
    commit: str | None
    values: dict[str, tuple[float, float | None]]  # by stage: the metric and its standard error


def by_stage(found: Rows) -> list[Evaluation]:
    """Records of one metric -> a line for each evaluation: of one checkpoint, over its retrainings."""
    together: dict[tuple[str, str, str], Rows] = {}
    for row in found:
        if row["job"] == "metrics":
            together.setdefault((row["time"], row["experiment"], row["checkpoint"]), []).append(row)
    evaluations = []
    for (time, _, checkpoint), rows in together.items():
        values = {str(row["stage"]): point(row) for row in rows}
        last = max(rows, key=lambda row: row["stage"] if isinstance(row["stage"], int) else 0)
        said = {name: last[name] for name in ("train_seed", "weights", "data", "commit")}
        evaluations.append(Evaluation(time, checkpoint, **said, values=values))
    return evaluations


def point(row: dict[str, Any]) -> tuple[float, float | None]:
    """The one metric of a record, and its standard error if it has one."""
    value, *error = (row["metrics"][name] for name in sorted(row["metrics"]))  # `fid` comes before `fid_error`
    return value, error[0] if error else None


WAY = ("experiment", "checkpoint", "stage", "guidance", "sampler", "seed")  # to sample: what tells two apart


class Priced(NamedTuple):
    """One way to sample a checkpoint, beside the one of its ways that takes the least arithmetic."""

    checkpoint: str
    stage: int
    guidance: float | None
    sampler: str | None
    value: float
    gained: float  # by how much the metric is better than the cheapest way's
    gflops: float  # of a sample, earlier stages included, attention's products too; so are seconds
    seconds: float | None
    gflops_per_point: float | None  # more arithmetic than the cheapest way's, by point gained; None where none is
    seconds_per_point: float | None


def cost_per_point(found: Rows, *, higher: bool = False) -> list[Priced]:
    """Comparable records of one metric -> a line for each way to sample a checkpoint, the cheapest first. Of equal ways
    the newest counts; `higher`: the better."""
    check_comparable(found)
    ways: dict[Any, dict[str, Any]] = {}
    for row in found:  # oldest first
        if isinstance(row["stage"], int) and row["gflops_true"] is not None:
            ways[tuple(row[name] for name in WAY)] = row
    checkpoints: dict[tuple[str, str], Rows] = {}
    for row in ways.values():
        checkpoints.setdefault((row["experiment"], row["checkpoint"]), []).append(row)
    lines = []
    for rows in checkpoints.values():
        first, *rest = sorted(rows, key=lambda row: (row["gflops_true"], row["stage"]))
        lines += [priced(row, first, higher=higher) for row in (first, *rest)]
    if not lines:
        raise ValueError("none of these records says what its samples took; `dod run EXPERIMENT` makes some that do")
    return lines


def priced(row: dict[str, Any], cheapest: dict[str, Any], *, higher: bool) -> Priced:
    """A way to sample beside the cheapest one."""
    value, base = point(row)[0], point(cheapest)[0]
    gained = value - base if higher else base - value
    seconds, least = (one["seconds"] and one["seconds"] / one["num_samples"] for one in (row, cheapest))
    known = None not in (seconds, least)
    return Priced(
        **{name: row[name] for name in ("checkpoint", "stage", "guidance", "sampler")},
        value=value,
        gained=gained,
        gflops=row["gflops_true"],
        seconds=seconds,
        gflops_per_point=(row["gflops_true"] - cheapest["gflops_true"]) / gained if gained > 0 else None,
        seconds_per_point=(seconds - least) / gained if gained > 0 and known else None,
    )


Points = list[tuple[float, float, float | None]]  # step, value, and its standard error where the record has one


def over_steps(found: Rows) -> tuple[dict[str, Points], dict[str, float]]:
    """Records of one metric and its error -> points of each series, and floors, for `plots.over_steps`.

    A series is a stage under one setting: experiment, guidance, sampler and seed are named where they differ. Of equal
    ones at a step the newest counts; so does the newest floor of an experiment.
    """
    check_comparable(found)
    alike: dict[Any, Rows] = {}
    for row in found:
        alike.setdefault(row["stage"], []).append(row)
    fields = {stage: told_apart(rows) for stage, rows in alike.items()}
    series: dict[str, dict[int, tuple[float, float | None]]] = {}
    floors: dict[str, float] = {}
    for row in found:  # oldest first
        names = fields[row["stage"]]
        told = "".join(f", {row[n]}" if n in ("experiment", "sampler") else f", {n} {row[n]}" for n in names)
        if isinstance(row["stage"], int):
            series.setdefault(f"stage {row['stage']}{told}", {})[row["step"]] = point(row)
        else:
            name = "held-out" if row["stage"] == "floor" else row["stage"]
            floors[f"{name}{told}"] = point(row)[0]
    if not series:
        raise ValueError("only floors match, which have no step; leave --stage out")
    return {name: [(step, *points[step]) for step in sorted(points)] for name, points in series.items()}, floors


def told_apart(alike: Rows) -> list[str]:
    """The fields in which records of one stage differ, so that a series must name them."""
    if not isinstance(alike[0]["stage"], int) and len({tuple(row["metrics"].values()) for row in alike}) == 1:
        return []  # the same floor under all of them
    return [name for name in ("experiment", "guidance", "sampler", "seed") if len({row[name] for row in alike}) > 1]
