"""Two evaluations beside each other: their numbers, if these may be compared at all, and what differs between them."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dod_models import artifact
from dod_pipeline import catalogue, history, ledger
from dod_pipeline.ledger import HISTORY
from dod_pipeline.sources import SETTINGS

STAGE = "2"  # of a checkpoint that is named without one
SAID = ("train_seed", "seed", "guidance", "sampler", "config", "previous", "weights", "codec", "data", "commit")
ID = re.compile("[0-9a-f]{4,64}")  # or the first digits of one
ERROR = "_error"  # name of a metric's standard error, after the metric's


class Line(NamedTuple):
    """A metric of both records."""

    metric: str
    a: float
    b: float
    difference: float  # b - a
    relative: float | None  # to a; None where that is 0
    a_error: float | None  # standard errors
    b_error: float | None


def find(names: Sequence[str], root: Path | str = HISTORY) -> list[dict[str, Any]]:
    """For each name the record whose id begins so, or of a checkpoint KEY, or KEY:STAGE, the newest of `metrics`."""
    records = history.Selection(root)
    return [pick(name, records) for name in names]


def pick(name: str, records: history.Selection) -> dict[str, Any]:
    """One of these records by its name."""
    key, _, stage = name.partition(":")
    rows = records.within(["job=metrics"], checkpoint=key, stage=stage or STAGE).records(newest=1)
    if not rows and ID.fullmatch(name):
        rows = records.within([f"id={name}*"]).records()
        if len(rows) > 1:
            raise ValueError(f"{name!r}: the ids of {len(rows)} records begin so; give more digits")
    if not rows:
        raise ValueError(
            f"{name!r} is neither a record's id nor a checkpoint with a record of stage {stage or STAGE}; "
            "`dod history` lists the ids, `dod run EXPERIMENT` makes records"
        )
    return rows[0]


def check(a: dict[str, Any], b: dict[str, Any]) -> None:
    """ValueError that names both values of whatever forbids the comparison, and the remedy."""
    remedies = {
        "extractor": "evaluate both with one feature net: the same data set and settings of stage reference",
        "reference": "evaluate both against one reference: the same data set, after `dod run` of both",
        "num_samples": "evaluate both at equal N: FID falls with it (evaluation.num_samples)",
    }
    ours, theirs = history.texts(a), history.texts(b)
    wrong = [
        f"{name} is {ours[name]} and {theirs[name]}; {remedies[name]}" for name in ours if ours[name] != theirs[name]
    ]
    if wrong:
        raise ValueError(f"{a['id']} and {b['id']} must not be compared: {'; '.join(wrong)}")
    if not {*a["metrics"]} & {*b["metrics"]}:
        have = " and ".join(", ".join(row["metrics"]) for row in (a, b))
        raise ValueError(f"{a['id']} and {b['id']} have no metric in common: {have}; compare records of one kind")


def lines(a: dict[str, Any], b: dict[str, Any]) -> list[Line]:
    """Every metric that both have, but for the errors, which stand beside theirs."""
    found = []
    for name, value in a["metrics"].items():
        if name not in b["metrics"] or name.endswith(ERROR):
            continue
        other = b["metrics"][name]
        relative = (other - value) / abs(value) if value else None
        errors = (row["metrics"].get(name + ERROR) for row in (a, b))
        found.append(Line(name, value, other, other - value, relative, *errors))
    return found


def differing(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What else differs, by name: it may explain the difference, or be its point."""
    return unequal(*({name: row.get(name) for name in SAID} for row in (a, b)))


def changed_fields(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """All that differs but what else is told: when, the numbers, and what they were made from."""
    told = {"id", "time", "metrics", "sources"}
    return unequal(*({name: value for name, value in row.items() if name not in told} for row in (a, b)))


def changed_sources(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The files that both rest on with other digests, or that only one of them does."""
    ours, theirs = ({name: of["sha256"] for name, of in row["sources"].items()} for row in (a, b))
    return unequal(ours, theirs)


def changed_settings(a: dict[str, Any], b: dict[str, Any], root: Path | str = HISTORY) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, by dotted name after their stage; digests where the settings were not kept."""
    found: dict[str, tuple[Any, Any]] = {}
    folder = catalogue.folder_of(root) / SETTINGS
    for stage in {**a["sources"], **b["sources"]}:
        digests = [row["sources"].get(stage, {}).get("config") for row in (a, b)]
        if None in digests or digests[0] == digests[1]:  # a stage of one of them alone is among the sources that differ
            continue
        both = [settings(folder / stage, digest) for digest in digests]
        if None in both:
            found[stage] = (f"sha256 {digests[0]}", f"sha256 {digests[1]}")
        else:
            found |= {f"{stage}.{name}": values for name, values in unequal(*map(leaves, both)).items()}
    return found


def settings(folder: Path, digest: str) -> dict[str, Any] | None:
    """Settings of that digest, if they were kept and are whole."""
    path = folder / f"{digest}.json"
    try:
        found: dict[str, Any] = json.loads(ledger.read(path))
    except FileNotFoundError:
        return None
    except artifact.DamagedError as error:
        ledger.warn(error)
        return None
    return found


def leaves(values: Any, place: str = "") -> dict[str, Any]:
    """Dotted name and value of everything that is not a mapping."""
    if not isinstance(values, dict) or not values:
        return {place: values}
    return {
        name: leaf for key in values for name, leaf in leaves(values[key], f"{place}.{key}" if place else key).items()
    }


def unequal(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs between two mappings; None for what one of them lacks."""
    return {name: (a.get(name), b.get(name)) for name in {**a, **b} if a.get(name) != b.get(name)}
