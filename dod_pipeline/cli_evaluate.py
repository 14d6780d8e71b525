"""The commands of `dod` that make and judge evaluations: compare, gate, calibrate, provisional. Imports come late."""

import argparse
import json
import os


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Give the command line these sub-commands."""
    compare = commands.add_parser("compare", help="two evaluations side by side, if they may be compared")
    for name in ("a", "b"):
        compare.add_argument(name, metavar=name.upper(), help="first digits of a record's id, or CHECKPOINT[:STAGE]")
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


def do_compare(given: argparse.Namespace) -> int:
    """Print both records' metrics, and what differs between them; a ValueError says why they can't be compared."""
    from dod_pipeline import compare, history, tables, union

    union.sync()
    a, b = compare.find([given.a, given.b])
    compare.check(a, b)
    found, differing = compare.lines(a, b), compare.differing(a, b)
    if given.format == "json":
        metrics = {line.metric: {k: v for k, v in line._asdict().items() if k != "metric"} for line in found}
        print(json.dumps({"a": a, "b": b, "metrics": metrics, "differs": differing}, indent=1))
        return 0
    tables.differences(f"A {a['id']}\nB {b['id']}\n{history.setting([a])}", found)
    shown = [f"{name}: {str(ours)[:40]} and {str(theirs)[:40]}" for name, (ours, theirs) in differing.items()]
    print("they differ in\n  " + "\n  ".join(shown) if shown else "they differ in no setting that is recorded")
    return 0


def do_gate(given: argparse.Namespace) -> int:
    """Gate a candidate; the exit status is the verdict."""
    from dod_pipeline import gate, union
    from dod_pipeline.config import load_params

    union.sync()
    verdict = gate.gate(load_params(), given.candidate, given.incumbent)
    gate.append(verdict)
    union.sync()
    print(f"tolerance {verdict.tolerance:.3f} ({verdict.tolerance_from})")
    print(
        f"{verdict.verdict}: {given.candidate} against {given.incumbent}: FID {verdict.mean:+.3f}, with one-sided "
        f"{1 - verdict.level:.2%} bounds {verdict.lower:+.3f} and {verdict.upper:+.3f}, over "
        f"{len(verdict.differences)} blocks of {verdict.num_samples:,} samples"
    )
    return gate.STATUS[verdict.verdict]


def do_calibrate(given: argparse.Namespace) -> int:
    """Print each retrain's FID, the tolerance, and where it may be written down."""
    from dod_pipeline import gate, tables, union
    from dod_pipeline.config import load_params

    found = gate.calibrate(load_params(), given.checkpoints)
    gate.append(found)
    union.sync()
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
