"""The commands of `dod` that ask the history: history, lineage. Imports come late."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dod_pipeline.history import Selection, Table

LIMIT = 200  # records in a table, unless another limit is given


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Give the command line these sub-commands."""
    history = commands.add_parser("history", help="every evaluation that was made")
    for name in ("experiment", "checkpoint", "stage", "metric"):
        history.add_argument(f"--{name}")
    history.add_argument(
        "--where", action="append", default=[], metavar="NAME=VALUE", help="also !=, <, <=, >, >=; may be repeated"
    )
    history.add_argument("--kind", choices=("score", "verdict", "calibration"), default="score")
    history.add_argument("--provisional", action="store_true", help="those too that were measured while training ran")
    history.add_argument("--limit", type=int, metavar="N", help=f"the newest N (a table: {LIMIT}); 0: all")
    add_root(history)
    question = history.add_mutually_exclusive_group()
    question.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the metric over steps by stage")
    question.add_argument("--curve", action="store_true", help="the numbers that --plot draws")
    question.add_argument("--by-stage", action="store_true", help="a line for each evaluation, a column for each stage")
    question.add_argument("--cost", action="store_true", help="what each set of samples gains, and what a point costs")
    question.add_argument("--best", metavar="METRIC", help="the samples that score best")
    question.add_argument("--diff", nargs=2, metavar=("A", "B"), help="what changed between two records")
    question.add_argument("--sql", metavar="SELECT", help="ask the table `records` in DuckDB's SQL")
    how = history.add_mutually_exclusive_group()
    how.add_argument("--format", choices=("table", "json", "csv"), default="table")
    how.add_argument("--csv", action="store_const", const="csv", dest="format")
    history.set_defaults(action=do_history)

    lineage = commands.add_parser("lineage", help="what a number was made from, back to the images, and how to again")
    lineage.add_argument("record", metavar="RECORD", help="first digits of a record's id, or CHECKPOINT[:STAGE]")
    lineage.add_argument("--json", action="store_true")
    add_root(lineage)
    lineage.set_defaults(action=do_lineage)


def add_root(command: argparse.ArgumentParser) -> None:
    """Where the records lie."""
    command.add_argument("--root", default="history", metavar="PATH|s3://...", help="where the records lie")


def bring(root: str) -> None:
    """Fetch first what others have recorded, where the history is this folder's own."""
    from dod_pipeline import ledger, union

    if root == str(ledger.HISTORY):
        union.sync()


def do_history(given: argparse.Namespace) -> int:
    """Answer the one question that was asked; by default, print the records that match."""
    from dod_pipeline import history

    bring(given.root)
    if given.sql is not None:
        answer = history.sql(given.sql, given.root, provisional=given.provisional)
        return show_table("records", answer, given.format)
    if given.diff is not None:
        a, b = given.diff
        return show_difference(a, b, given.root, given.format)
    for name in ("plot", "curve", "by_stage", "cost", "best"):
        if getattr(given, name) and given.kind != "score":
            raise ValueError(f"--{name.replace('_', '-')}: a {given.kind} is no score; leave out --kind")
    asks_one = given.plot or given.curve or given.by_stage or given.cost
    found = history.Selection(
        given.root,
        kind=given.kind,
        experiment=given.experiment,
        checkpoint=given.checkpoint,
        stage=given.stage,
        metric=given.best or given.metric or ("fid" if asks_one else None),
        where=given.where,
        provisional=given.provisional,
    )
    if given.plot is not None:
        return plot(given.plot, found)
    if given.curve:
        return show_curve(found, given.format)
    if given.by_stage:
        return show_by_stage(found, given.format)
    if given.cost:
        return show_cost(found, given.format)
    if given.best is not None:
        return show_records(given, history.best(found, limit=given.limit or 10))
    return list_records(given, found)


def list_records(given: argparse.Namespace, found: "Selection") -> int:
    """Print the newest of what matches, oldest first."""
    from dod_pipeline import history

    limit = given.limit if given.limit is not None else LIMIT if given.format == "table" else 0
    if given.kind == "score" and given.format == "csv":
        history.write_csv(found, sys.stdout, newest=limit)
        return 0
    if given.format == "json" and given.metric is None:
        print("[" + ",\n ".join(found.texts(newest=limit)) + "]")
        return 0
    rows, count = found.records(newest=limit), found.count()
    show_records(given, rows)
    if given.format == "table" and len(rows) < count:
        print(f"the newest {len(rows):,} of {count:,}; --limit 0 shows all")
    return 0


def show_records(given: argparse.Namespace, found: list[dict[str, Any]]) -> int:
    """Print records."""
    from dod_pipeline import tables

    if given.format == "json":
        print(json.dumps(found, indent=1))
    elif given.format == "csv":
        print(tables.history_csv(found), end="")
    elif found:
        {"score": tables.history, "verdict": tables.verdicts, "calibration": tables.calibrations}[given.kind](found)
    else:
        makes = {"score": "run EXPERIMENT", "verdict": "gate", "calibration": "calibrate"}
        print(f"no such record; `dod {makes[given.kind]}` makes some")
    return 0


def show_table(title: str, answer: "Table", how: str) -> int:
    """Print any table."""
    from dod_pipeline import tables

    if how == "csv":
        print(answer.csv(), end="")
    elif how == "json":
        rows = [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]
        print(json.dumps(rows, indent=1, default=str))
    else:
        tables.plain(title, answer.columns, answer.rows)
    return 0


def some(found: "Selection") -> list[dict[str, Any]]:
    """The records that match; ValueError if none do."""
    rows = found.measured()
    if not rows:
        raise ValueError("no such record; `dod history` lists what there is, `dod run EXPERIMENT` makes some")
    return rows


def plot(path: Path, found: "Selection") -> int:
    """Draw the records that match into a PNG file."""
    from dod_pipeline import curves, history

    if path.suffix != ".png":
        raise ValueError(f"--plot {path}: the picture is a PNG; name it FILE.png")
    rows = some(found)
    series, floors = curves.over_steps(rows)
    from dod_pipeline import canvas, plots  # late: what can't be plotted needs no matplotlib

    assert found.metric is not None
    picture = canvas.png(plots.over_steps(series, floors, metric=found.metric, title=history.setting(rows)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture)
    print(f"wrote {path}")
    return 0


def show_curve(found: "Selection", how: str) -> int:
    """Print the metric at each step, a column for each series; floors stand above."""
    from dod_pipeline import curves, history

    rows = some(found)
    series, floors = curves.over_steps(rows)
    at = {name: {step: value for step, value, _ in points} for name, points in series.items()}
    steps = sorted({step for points in at.values() for step in points})
    table = history.Table(["step", *at], [(step, *(points.get(step) for points in at.values())) for step in steps])
    floor = ", ".join(f"{name} {value:.3f}" for name, value in floors.items())
    return show_table(f"{found.metric}, {history.setting(rows)}" + f"; floors: {floor}" * bool(floors), table, how)


def show_by_stage(found: "Selection", how: str) -> int:
    """Print a line for each evaluation."""
    from dod_pipeline import curves, history, tables

    evaluations = curves.by_stage(some(found))
    stages = list(dict.fromkeys(stage for one in evaluations for stage in one.values))
    stages.sort(key=lambda stage: (not stage.isdigit(), stage))
    rows = []
    for one in evaluations:
        told = [
            tables.moment(one.time),
            one.checkpoint,
            one.train_seed,
            *map(short, (one.weights, one.data, one.commit)),
        ]
        values = [one.values.get(stage, (None, None))[0] for stage in stages]
        rows.append((*told, *values))
    columns = ["time", "checkpoint", "train seed", "weights", "data", "commit"]
    titles = [f"stage {stage}" if stage.isdigit() else stage for stage in stages]
    return show_table(f"{found.metric} by stage", history.Table([*columns, *titles], rows), how)


def show_cost(found: "Selection", how: str) -> int:
    """Print what samples cost and gain, a line for each way in which a checkpoint was sampled."""
    from dod_pipeline import curves, history

    assert found.metric is not None
    rows = some(found)
    lines: list[tuple[Any, ...]] = [*curves.cost_per_point(rows, higher=found.metric in history.HIGHER)]
    columns = ["checkpoint", "samples of", "guidance", "sampler", found.metric, "gained"]
    columns += [f"{what}{per}" for per in (" a sample", " a point") for what in ("GFLOPs", "seconds")]
    return show_table(f"cost per point, {history.setting(rows)}", history.Table(columns, lines), how)


def short(digest: str | None) -> str | None:
    """The first digits."""
    return digest and digest[:12]


def show_difference(first: str, second: str, root: str, how: str) -> int:
    """Print what changed from one record to another."""
    from dod_pipeline import compare, tables

    a, b = compare.find([first, second], root)
    changed = {
        "fields": compare.changed_fields(a, b),
        "settings": compare.changed_settings(a, b, root),
        "made from": compare.changed_sources(a, b),
    }
    numbers = compare.lines(a, b)
    try:
        compare.check(a, b)
        warning = None
    except ValueError as error:
        warning = str(error)
    if how == "json":
        metrics = {line.metric: {k: v for k, v in line._asdict().items() if k != "metric"} for line in numbers}
        print(
            json.dumps(
                {"a": a["id"], "b": b["id"], "metrics": metrics, "changed": changed, "warning": warning}, indent=1
            )
        )
        return 0
    if how == "csv":
        raise ValueError("--diff: a difference is no table; take --format json")
    tables.differences(f"A {a['id']}\nB {b['id']}", numbers)
    for title, found in changed.items():
        if found:
            tables.show(title, ["", "A", "B"], [[name, *map(cut, both)] for name, both in found.items()], left=3)
        else:
            print(f"{title}: nothing changed")
    if warning is not None:
        print(f"careful: {warning}")
    return 0


def cut(value: Any) -> str:
    """A value on a line."""
    text = "-" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def do_lineage(given: argparse.Namespace) -> int:
    """Print what a record's number was made from, and the commands that make it again."""
    from dod_pipeline import compare, lineage, tables

    bring(given.root)
    (record,) = compare.find([given.record], given.root)
    if given.json:
        print(json.dumps(lineage.as_json(record), indent=1))
        return 0
    metrics = " ".join(f"{name}={value:.{tables.DIGITS.get(name, 3)}f}" for name, value in record["metrics"].items())
    print(f"{record['id']}\n{record['row']} of {record['checkpoint']}, {tables.moment(record['time'])}: {metrics}")
    rows = []
    for indent, node, again in lineage.walk(lineage.trace(record), set()):
        named = [
            f"{indent}{node.name}",
            node.path or "-",
            *(short(value) or "-" for value in (node.sha256, node.config)),
        ]
        rows.append([*named, "see above" if again else node.now])
    tables.show("made from", ["", "file", "sha256", "settings", "there now is"], rows, left=5)
    print(f"to make it again:\n{lineage.remake(record)}")
    return 0
