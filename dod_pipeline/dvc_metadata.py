"""What the metrics and plots of a stage say, as Dagster's metadata: numbers to plot over time, and tables."""

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from dod_pipeline.dvc_graph import Graph, Instance, Options, overlap
from dod_pipeline.dvc_template import read_values

CURVE_ROWS = 40  # of a plot's table

Row = Mapping[str, Any]


def metadata_of(graph: Graph, instance: Instance) -> dict[str, Any]:
    """The numbers and tables of an instance, those that dvc.yaml lists beside its stages among them. What is no table,
    as a picture, has none."""
    found: dict[str, Any] = {}
    metrics = [*instance.metrics, *sorted(path for path in graph.metrics if makes(instance, path))]
    for path in metrics:
        found |= dict(numbers(read_values(graph.root / path)))
    for path, options in [*instance.plots, *(plot for plot in graph.plots if makes(instance, plot[0]))]:
        rows = rows_of(graph.root / path)
        if rows:
            found[options.get("title") or Path(path).stem] = table(rows, columns_of(rows, options))
    return found


def makes(instance: Instance, path: str) -> bool:
    """Whether the path is, or lies in, an output of the instance."""
    return path not in instance.metrics and any(overlap(path, out) and len(path) >= len(out) for out in instance.made)


def numbers(value: Any, *place: str) -> Iterator[tuple[str, float | int]]:
    """The numbers in nested mappings, by dotted name: what Dagster plots over time."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from numbers(inner, *place, str(name))
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield ".".join(place), value


def rows_of(path: Path) -> list[Row]:
    """The rows of a plot's file: CSV, TSV, or the first list of mappings in JSON or YAML; none where it is no such."""
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv") and path.is_file():
        with path.open(newline="") as file:
            return list(csv.DictReader(file, delimiter="," if kind == ".csv" else "\t"))
    if kind == ".json" and path.is_file():
        return first_rows(json.loads(path.read_text()))
    return first_rows(read_values(path)) if kind in (".yaml", ".yml") else []


def first_rows(value: Any) -> list[Row]:
    """The first list of mappings, however deep within mappings."""
    if isinstance(value, list):
        return value if value and all(isinstance(row, dict) for row in value) else []
    inner = value.values() if isinstance(value, dict) else ()
    return next((rows for rows in map(first_rows, inner) if rows), [])


def columns_of(rows: Sequence[Row], options: Options) -> list[str]:
    """The columns that the plot shows: `x` and `y`, or all."""
    y = options.get("y")
    stated = [options.get("x"), *(y if isinstance(y, list) else [y])]
    named = [column for column in dict.fromkeys(stated) if column in rows[0]]
    return named if y else list(rows[0])


def table(rows: Sequence[Row], columns: list[str]) -> dg.TableMetadataValue:
    """Rows at even distances, the last one among them, as a table."""
    every = max(1, math.ceil(len(rows) / CURVE_ROWS))
    kept = rows[::-1][::every][::-1]
    plain = (str, int, float, bool)
    shown = [{column: row.get(column) for column in columns} for row in kept]
    records = [dg.TableRecord({c: v if isinstance(v, plain) else str(v) for c, v in row.items()}) for row in shown]
    return dg.MetadataValue.table(records)
