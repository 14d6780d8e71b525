"""`dod compare A B`: two evaluations beside each other, if they may be compared at all."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from dod_pipeline import history
from dod_pipeline.ledger import HISTORY

STAGE = "2"  # of a checkpoint that is named without one
SAID = ("train_seed", "seed", "guidance", "sampler", "config", "previous", "weights", "codec", "data", "commit")
MAIN = re.compile(r"-metrics-\d+$")  # ids of records that are the checkpoint's own, not rows of its sweep
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


def find(name: str, root: Path = HISTORY) -> dict[str, Any]:
    """The record of that id; or of a checkpoint KEY, or KEY:STAGE, the newest of stage `metrics`."""
    key, _, stage = name.partition(":")
    found = [row for row in history.query(root, checkpoint=key, stage=stage or STAGE) if MAIN.search(row["id"])]
    found = found or [row for row in history.query(root) if row["id"] == name]
    if not found:
        raise ValueError(
            f"{name!r} is neither a record's id nor a checkpoint with a record of stage {stage or STAGE}; "
            "`dod history --format json` lists the ids, `dod run EXPERIMENT` makes records"
        )
    return found[-1]


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
    return {name: (a.get(name), b.get(name)) for name in SAID if a.get(name) != b.get(name)}
