"""The commands of `dod` that make, read and judge evaluations: history, compare, gate, calibrate, provisional. Imports
come late."""

import argparse
import json
import os
from pathlib import Path
from typing import Any


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Give the command line these sub-commands."""
    history = commands.add_parser("history", help="every evaluation that was made")
    for name in ("experiment", "checkpoint", "stage", "metric"):
        history.add_argument(f"--{name}")
    history.add_argument("--kind", choices=("score", "verdict", "calibration"), default="score")
    history.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw the metric (default: fid) over steps by stage"
    )
    history.add_argument("--format", choices=("table", "json", "csv"), default="table")
    history.set_defaults(action=do_history)

    compare = commands.add_parser("compare", help="two evaluations side by side, if they may be compared")
    for name in ("a", "b"):
        compare.add_argument(name, metavar=name.upper(), help="id of a record, or CHECKPOINT, or CHECKPOINT:STAGE")
    compare.add_argument("--format", choices=("table", "json"), default="table")
    compare.set_defaults(action=do_compare)

    gate = commands.add_parser(
        "gate",
        help="whether a candidate is worse than the incumbent",
        description="Compares FID on paired seed blocks. Exit status: 0 PASS, 2 FAIL, 3 INCONCLUSIVE, 1 an error.",
    )
    gate.add_argument("candidate", metavar="CANDIDATE", help="a checkpoint of params.yaml")
    gate.add_argument("incumbent", metavar="INCUMBENT", help="another one")
    gate.set_defaults(action=do_gate)

    calibrate = commands.add_parser("calibrate", help="the gate's tolerance, from how far retrains differ")
    calibrate.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINT", help="at least 3, which differ in train.seed alone"
    )
    calibrate.set_defaults(action=do_calibrate)

    provisional = commands.add_parser("provisional", help="score a training's saved steps, while it runs too")
    provisional.add_argument("experiment", metavar="EXPERIMENT")
    provisional.add_argument("--watch", action="store_true", help="go on as steps come, at low priority, until stopped")
    provisional.set_defaults(action=do_provisional)


def do_history(given: argparse.Namespace) -> int:
    """Print the records that match."""
    from dod_pipeline import history, tables

    filters = {name: getattr(given, name) for name in ("experiment", "checkpoint", "stage", "metric")}
    if given.plot is not None:
        if given.kind != "score":
            raise ValueError(f"--plot: a {given.kind} is no score; leave out --kind")
        return plot_history(given.plot, filters | {"metric": given.metric or "fid"})
    found = history.query(kind=given.kind, **filters)
    if given.format == "json":
        print(json.dumps(found, indent=1))
    elif given.format == "csv":
        print(tables.history_csv(found), end="")
    elif found:
        {"score": tables.history, "verdict": show_verdicts, "calibration": show_calibrations}[given.kind](found)
    else:
        makes = {"score": "run EXPERIMENT", "verdict": "gate", "calibration": "calibrate"}
        print(f"no such record; `dod {makes[given.kind]}` makes some")
    return 0


def plot_history(path: Path, filters: dict[str, str]) -> int:
    """Draw the records that match into a PNG file."""
    from dod_pipeline import history, ledger

    if path.suffix != ".png":
        raise ValueError(f"--plot {path}: the picture is a PNG; name it FILE.png")
    found = history.query(ledger.HISTORY, **filters)
    if not found:
        raise ValueError("no such record; `dod history` lists what there is, `dod run EXPERIMENT` makes some")
    series, floors = history.over_steps(found)
    from dod_pipeline import canvas, plots  # late: what can't be plotted needs no matplotlib

    picture = canvas.png(plots.over_steps(series, floors, metric=filters["metric"], title=history.setting(found)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture)
    print(f"wrote {path}")
    return 0


def show_verdicts(found: list[dict[str, Any]]) -> None:
    """Verdicts, one a line."""
    from dod_pipeline import tables

    columns = ["time", "candidate", "incumbent", "verdict", "difference", "interval", "tolerance", "blocks", "samples"]
    rows = []
    for row in found:
        names = [row[role]["checkpoint"] for role in ("candidate", "incumbent")]
        numbers = [f"{row['mean']:+.3f}", f"{row['lower']:+.3f} to {row['upper']:+.3f}", f"{row['tolerance']:.3f}"]
        counts = [str(len(row["differences"])), str(row["num_samples"])]
        rows.append([row["time"][:19].replace("T", " "), *names, row["verdict"], *numbers, *counts])
    tables.show("verdicts", columns, rows, left=4)


def show_calibrations(found: list[dict[str, Any]]) -> None:
    """Calibrations, one a line."""
    from dod_pipeline import tables

    columns = ["time", "checkpoints", "tolerance", "spread", "blocks", "samples"]
    rows = []
    for row in found:
        names = ", ".join(one["checkpoint"] for one in row["retrains"])
        numbers = [f"{row['tolerance']:.3f}", f"{row['spread']:.3f}", str(len(row["seeds"])), str(row["num_samples"])]
        rows.append([row["time"][:19].replace("T", " "), names, *numbers])
    tables.show("calibrations", columns, rows, left=2)


def do_compare(given: argparse.Namespace) -> int:
    """Print both records' metrics, and what differs between them; a ValueError says why they can't be compared."""
    from dod_pipeline import compare, history, tables

    a, b = (compare.find(name) for name in (given.a, given.b))
    compare.check(a, b)
    found, differing = compare.lines(a, b), compare.differing(a, b)
    if given.format == "json":
        metrics = {line.metric: {k: v for k, v in line._asdict().items() if k != "metric"} for line in found}
        print(json.dumps({"a": a, "b": b, "metrics": metrics, "differs": differing}, indent=1))
        return 0
    rows = []
    for line in found:
        digits = tables.DIGITS.get(line.metric, 3)
        both = [
            tables.with_error(value, error, digits=digits)
            for value, error in ((line.a, line.a_error), (line.b, line.b_error))
        ]
        relative = "-" if line.relative is None else f"{line.relative:+.1%}"
        rows.append([line.metric, *both, f"{line.difference:+.{digits}f}", relative])
    tables.show(f"A {a['id']}\nB {b['id']}\n{history.setting([a])}", ["metric", "A", "B", "B - A", "relative"], rows)
    shown = [f"{name}: {str(ours)[:40]} and {str(theirs)[:40]}" for name, (ours, theirs) in differing.items()]
    print("they differ in\n  " + "\n  ".join(shown) if shown else "they differ in no setting that is recorded")
    return 0


def do_gate(given: argparse.Namespace) -> int:
    """Gate a candidate; the exit status is the verdict."""
    from dod_pipeline import gate
    from dod_pipeline.config import load_params

    verdict = gate.gate(load_params(), given.candidate, given.incumbent)
    gate.append(verdict)
    print(f"tolerance {verdict.tolerance:.3f} ({verdict.tolerance_from})")
    print(
        f"{verdict.verdict}: {given.candidate} against {given.incumbent}: FID {verdict.mean:+.3f}, with one-sided "
        f"{1 - verdict.level:.2%} bounds {verdict.lower:+.3f} and {verdict.upper:+.3f}, over "
        f"{len(verdict.differences)} blocks of {verdict.num_samples:,} samples"
    )
    return gate.STATUS[verdict.verdict]


def do_calibrate(given: argparse.Namespace) -> int:
    """Print each retrain's FID, the tolerance, and where it may be written down."""
    from dod_pipeline import gate, tables
    from dod_pipeline.config import load_params

    found = gate.calibrate(load_params(), given.checkpoints)
    gate.append(found)
    rows = []
    for one in found.retrains:
        mean = sum(one.fids) / len(one.fids)
        rows.append([one.checkpoint, str(one.train_seed), *(f"{fid:.3f}" for fid in one.fids), f"{mean:.3f}"])
    blocks = [f"block {block}" for block in range(len(found.seeds))]
    tables.show(f"FID of stage {found.stage}, {found.num_samples:,} samples", ["", "seed", *blocks, "mean"], rows)
    print(
        f"tolerance {found.tolerance:.3f}: of retrains whose FID spreads by {found.spread:.3f}, 5 % are worse by more"
    )
    print("dod gate takes it from the history; to fix it, write into params.yaml:")
    print(f"  experiments.{found.experiment}.gate: {{tolerance: {found.tolerance:.4g}}}")
    return 0


def do_provisional(given: argparse.Namespace) -> int:
    """Score the steps that are saved; with --watch, those to come too."""
    from dod_pipeline import provisional, stages
    from dod_pipeline.config import load_params

    params = load_params()
    stages.check_key(params, "train", given.experiment)
    if given.watch:
        os.nice(provisional.PATIENCE)
    provisional.follow(params, given.experiment, watch=given.watch)
    return 0
