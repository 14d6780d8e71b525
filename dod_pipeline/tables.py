"""What the commands print: tables of models, records and results."""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

METRICS = {
    "fid": "FID",
    "sfid": "sFID",
    "kid": "KID",
    "inception_score": "IS",
    "precision": "precision",
    "recall": "recall",
}
SIMILARITIES = {"rfid": "rFID", "psnr": "PSNR, dB", "ssim": "SSIM"}  # of reconstructions with their originals
DIGITS = {"kid": 5, "psnr": 2}  # after the point; 3 otherwise
INTERVAL = 1.96  # standard errors to either side: 95 % of a normal variate
NAMES = {"floor": "floor: held-out real images", "codec": "floor: the codec's reconstructions"}


def show(title: str, columns: list[str], rows: list[list[str]], *, left: int = 1, wrap: bool = False) -> None:
    """Print a table, its first `left` columns aligned left; in a file or pipe it is as wide as its content.

    On a terminal, what is too long is cut off, or wrapped.
    """
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=not wrap)
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(Console(width=1000).measure(table).maximum, len(title)))
    console.print(table)


def with_error(value: float, error: float | None, *, digits: int = 3) -> str:
    """A value as text, with half the width of its 95 % interval where its standard error is known."""
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {INTERVAL * error:.{digits}f}")


def cell(row: Mapping[str, Any], metric: str, *, missing: str = "-") -> str:
    """A metric of a row as tables show it."""
    if metric not in row:
        return missing
    return with_error(row[metric], row.get(f"{metric}_error"), digits=DIGITS.get(metric, 3))


PARTS = {"stage1": "step of stage 1", "stage2": "step of stage 2", "lem": "LEM, once per stage"}


def models(found: list[dict[str, Any]]) -> None:
    """Parameters and GFLOPs of the presets beside what the paper prints: its value, ours, the difference."""
    rows = []
    for model in found:
        for part, count in model["params"].items():
            stated = model["stated"]["params"].get(part)
            rows.append([model["name"], f"parameters, {part} (M)", *beside(stated, count / 1e6), "-"])
        for part, title in PARTS.items():
            ours, true = (model["gflops"][convention][part] for convention in ("paper", "true"))
            shown = beside(model["stated"]["gflops"].get(part), ours)
            rows.append([model["name"], f"GFLOPs, {title}", *shown, f"{true:.2f}"])
    columns = ["model", "", "paper", "ours", "difference", "true FLOPs, attention too"]
    show("Parameters, and GFLOPs of one sample as the paper counts them", columns, rows, left=2)


def beside(stated: float | None, ours: float) -> list[str]:
    """The paper's value, ours, and ours less the paper's; "-" where the paper states none."""
    return ["-", f"{ours:.2f}", "-"] if stated is None else [f"{stated:g}", f"{ours:.2f}", f"{ours - stated:+.2f}"]


def results(key: str, scores: dict[str, dict[str, float]]) -> None:
    """A checkpoint's stages and floors."""
    rows = []
    for name, row in sorted(scores.items(), key=lambda item: not item[0].startswith("stage")):
        title = NAMES.get(name, name.replace("stage", "stage "))
        rows.append([title, *(cell(row, metric) for metric in METRICS), str(row["num_samples"])])
    show(f"checkpoint {key}", ["", *METRICS.values(), "samples"], rows)


def sweep(key: str, table: dict[str, dict[str, Any]]) -> None:
    """A checkpoint's sweep: variants of its stages, then reconstructions, then the probe, each where there are some."""
    ordered = sorted(table.items(), key=lambda item: (item[1]["kind"], item[1].get("guidance", 0), item[0]))
    for title, metrics in (("sweep", METRICS), ("reconstruction", SIMILARITIES)):
        rows = [
            [name, f"{row['evaluations']:g}", *(cell(row, metric) for metric in metrics), str(row["num_samples"])]
            for name, row in ordered
            if next(iter(metrics)) in row
        ]
        if rows:
            show(f"{title} of {key}", ["", "evaluations", *metrics.values(), "samples"], rows)
    for row in table.values():
        if "top1" in row:
            print(f"linear probe of {key}: {probe(row)}")


def probe(row: Mapping[str, Any]) -> str:
    """The result of a linear probe, in words."""
    return f"top-1 {100 * row['top1']:.1f} % of {row['num_test']:,} images, fitted on {row['num_train']:,}"


def side_by_side(found: dict[str, dict[str, dict[str, Any]]]) -> None:
    """FID of every row that all checkpoints have, a column for each one and their mean."""
    first = next(iter(found.values()))
    names = [name for name in first if all("fid" in table.get(name, {}) for table in found.values())]
    rows = []
    for name in names:
        values = [table[name]["fid"] for table in found.values()]
        evaluations = first[name].get("evaluations")
        spent = "-" if evaluations is None else f"{evaluations:g}"
        shown = [f"{value:.3f}" for value in [*values, sum(values) / len(values)]]
        rows.append([NAMES.get(name, name), spent, *shown])
    show("FID, side by side", ["", "evaluations", *found, "mean"], rows)


def differences(title: str, lines: Iterable[Any]) -> None:
    """Lines of `compare`: both values, their difference, and that relative to the first."""
    rows = []
    for line in lines:
        digits = DIGITS.get(line.metric, 3)
        both = [with_error(*pair, digits=digits) for pair in ((line.a, line.a_error), (line.b, line.b_error))]
        relative = "-" if line.relative is None else f"{line.relative:+.1%}"
        rows.append([line.metric, *both, f"{line.difference:+.{digits}f}", relative])
    show(title, ["metric", "A", "B", "B - A", "relative"], rows)


def history(records: list[dict[str, Any]]) -> None:
    """Records, one a line."""
    columns = ["id", "time", "checkpoint", "stage", "metrics", "samples", "seed", "guidance", "sampler"]
    rows = []
    for record in records:
        metrics = " ".join(f"{name}={value:.{DIGITS.get(name, 3)}f}" for name, value in record["metrics"].items())
        rest = [record["num_samples"], record["seed"], record["guidance"], record["sampler"]]
        shown = ["-" if value is None else str(value) for value in rest]
        stage = f"{record['stage']}{' (provisional)' * record['provisional']}"
        rows.append([record["id"][:12], moment(record["time"]), record["checkpoint"], stage, metrics, *shown])
    show("history", columns, rows)


COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red", "skipped": "dim"}


def findings(found: Iterable[tuple[str, Any]]) -> None:
    """What checks of the installation found, one a line, and under it how to mend it."""
    rows = []
    for name, finding in found:
        state = f"[{COLOURS[finding.state]}]{finding.state}[/]"
        text = escape(finding.found) + (f"\n[bold]{escape(finding.remedy)}[/]" if finding.remedy else "")
        rows.append([state, escape(name), text])
    show("dod doctor", ["", "check", "found, and how to mend it"], rows, left=3, wrap=True)


def verdicts(found: list[dict[str, Any]]) -> None:
    """Verdicts, one a line."""
    columns = ["time", "candidate", "incumbent", "verdict", "difference", "interval", "tolerance", "blocks", "samples"]
    rows = []
    for row in found:
        names = [row[role]["checkpoint"] for role in ("candidate", "incumbent")]
        numbers = [f"{row['mean']:+.3f}", f"{row['lower']:+.3f} to {row['upper']:+.3f}", f"{row['tolerance']:.3f}"]
        counts = [str(len(row["differences"])), str(row["num_samples"])]
        rows.append([moment(row["time"]), *names, row["verdict"], *numbers, *counts])
    show("verdicts", columns, rows, left=4)


def calibrations(found: list[dict[str, Any]]) -> None:
    """Calibrations, one a line."""
    columns = ["time", "checkpoints", "tolerance", "spread", "blocks", "samples"]
    rows = []
    for row in found:
        names = ", ".join(one["checkpoint"] for one in row["retrains"])
        numbers = [f"{row['tolerance']:.3f}", f"{row['spread']:.3f}", str(len(row["seeds"])), str(row["num_samples"])]
        rows.append([moment(row["time"]), names, *numbers])
    show("calibrations", columns, rows, left=2)


def moment(time: str) -> str:
    """A time as tables show it, to the second."""
    return time[:19].replace("T", " ")


def plain(title: str, columns: list[str], rows: Iterable[Iterable[Any]]) -> None:
    """Any table: six digits of a number, and "-" for what is missing."""
    shown = [["-" if v is None else f"{v:.6g}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    show(title, columns, shown)


def history_csv(records: list[dict[str, Any]]) -> str:
    """Records as CSV: a column for each field, each metric and each part of what has parts; lists as JSON."""
    flat = []
    for record in records:
        row: dict[str, Any] = {}
        for name, value in record.items():
            if isinstance(value, dict):
                inner = {part if name == "metrics" else f"{name}_{part}": of for part, of in value.items()}
            else:
                inner = {name: value}
            row |= {column: json.dumps(v) if isinstance(v, list) else v for column, v in inner.items()}
        flat.append(row)
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in flat for name in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()
