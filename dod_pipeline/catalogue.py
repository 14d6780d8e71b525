"""The records of a history as DuckDB sees them: an index of the files, kept beside them and brought up to date first.

The index, one Parquet file under `.state/history/`, has what is asked for and nothing that the records don't have:
without it, every file is read and its digest checked once more. Files are known again by name, size and time of change.
A new index is written beside the old one and renamed, so that processes never wait for each other.
"""

import json
import os
import re
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
from tqdm import tqdm

from dod_models import artifact
from dod_models.config import S3
from dod_pipeline import ledger
from dod_pipeline.records import Record
from dod_pipeline.sources import SETTINGS

INDEXES = Path(".state", "history")
SCHEMA = 1  # of the index; one of another number is not looked at
PATIENCE = 1000  # new files from which on a bar shows progress

FILES = {"path": "VARCHAR", "size": "BIGINT", "mtime": "BIGINT", "error": "VARCHAR", "kind": "VARCHAR"}
SHARED = {  # columns that records of any kind may have
    **{"id": "VARCHAR", "time": "TIMESTAMP", "experiment": "VARCHAR", "checkpoint": "VARCHAR", "stage": "VARCHAR"},
}
COLUMNS = SHARED | {  # those of `Record`, the extractor in two; time is UTC
    **{"step": "UBIGINT", "provisional": "BOOLEAN", "job": "VARCHAR", "row": "VARCHAR"},
    **{"metrics": "MAP(VARCHAR, DOUBLE)", "num_samples": "UBIGINT", "num_train": "UBIGINT"},
    **{"seed": "UBIGINT", "train_seed": "UBIGINT"},
    **{"guidance": "DOUBLE", "sampler": "VARCHAR", "num_steps": "UBIGINT", "evaluations": "DOUBLE"},
    **{"gflops_paper": "DOUBLE", "gflops_true": "DOUBLE", "seconds": "DOUBLE", "images_per_second": "DOUBLE"},
    **{"device": "VARCHAR", "extractor": "VARCHAR", "extractor_digest": "VARCHAR", "reference": "VARCHAR"},
    **{"config": "VARCHAR", "previous": "VARCHAR", "weights": "VARCHAR", "codec": "VARCHAR", "data": "VARCHAR"},
    "commit": "VARCHAR",
}
INDEXED = FILES | COLUMNS

PLAIN = re.compile(r"[a-z][a-z0-9_]*")  # name of a metric that is given a column

# What was measured while training still ran counts only if asked for, and until the checkpoint's versioned evaluation.
FINAL = "NOT coalesce(provisional, false)"
PENDING = f"""{FINAL} OR NOT EXISTS (
    SELECT 1 FROM everything other WHERE other.provisional = false AND other.experiment = one.experiment
    AND other.checkpoint = one.checkpoint AND other.stage = one.stage AND other.time >= one.time)"""


class File(NamedTuple):
    """A file below the history, and by what a change of it is noticed."""

    path: str
    size: int  # bytes
    mtime: int  # ns


def opened(folder: Path, *, provisional: bool = False) -> duckdb.DuckDBPyConnection:
    """A connection to an up-to-date index of a history; what is damaged is named on stderr.

    Its view `items` has a row for each record of any kind: `COLUMNS`, but a column for each metric, and
    `path`. Its view `records` has the scores, without `path`.
    """
    connection = duckdb.connect()
    if files := sorted(scan(folder)):
        connection.read_parquet(str(indexed(connection, folder, files))).create_view("everything")
    else:
        declared = ", ".join(f'"{name}" {of}' for name, of in INDEXED.items())
        connection.execute(f"CREATE TABLE everything ({declared})")
    for (error,) in connection.execute("SELECT error FROM everything WHERE error IS NOT NULL ORDER BY path").fetchall():
        ledger.warn(error)
    metrics = "".join(f", metrics['{name}'] AS \"{name}\"" for name in metrics_of(connection))
    connection.execute(
        f"CREATE VIEW items AS SELECT * EXCLUDE (size, mtime, error, metrics){metrics} FROM everything one "
        f"WHERE error IS NULL AND ({PENDING if provisional else FINAL})"
    )
    connection.execute("CREATE VIEW records AS SELECT * EXCLUDE (kind, path) FROM items WHERE kind = 'score'")
    return connection


def folder_of(root: Path | str) -> Path:
    """The folder of a history; for s3://BUCKET/PREFIX that of its copy, to which what is new is fetched first."""
    if not str(root).startswith(S3):
        return Path(root)
    from dod_pipeline import fetch  # late: it takes half a second

    return fetch.fetch(str(root), lambda name: True, again=True)


def metrics_of(connection: duckdb.DuckDBPyConnection) -> list[str]:
    """The metrics that have a column of their own."""
    found = connection.execute("SELECT DISTINCT unnest(map_keys(metrics)) FROM everything").fetchall()
    return sorted(name for (name,) in found if PLAIN.fullmatch(name) and name not in INDEXED)


def scan(root: Path) -> Iterator[File]:
    """Every file below the history but settings, and hidden ones such as a killed writer leaves."""
    folders, skipped = [str(root)] if root.is_dir() else [], str(root / SETTINGS)
    start = len(str(root)) + 1
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if not entry.is_dir():
                    stat = entry.stat(follow_symlinks=False)
                    yield File(entry.path[start:], stat.st_size, stat.st_mtime_ns)
                elif entry.path != skipped:
                    folders.append(entry.path)


def indexed(connection: duckdb.DuckDBPyConnection, root: Path, files: list[File]) -> Path:
    """The index of these files, made anew where it is of others."""
    path = INDEXES / f"{sha256(str(root.resolve()).encode()).hexdigest()[:16]}-{SCHEMA}.parquet"
    state = sha256(json.dumps(files).encode()).hexdigest()
    held = state_of(connection, path)
    if held != state:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{uuid.uuid4().hex}.partial")
        new = beside.with_suffix(".jsonl.partial")
        try:
            known = set() if held is None else rows_of(connection, path)
            gone = [file.path for file in known.difference(files)]
            write_rows(new, root, [file for file in files if file not in known])
            merge(connection, new, old=None if held is None else path, gone=gone, out=beside, state=state)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
            new.unlink(missing_ok=True)
    return path


def state_of(connection: duckdb.DuckDBPyConnection, index: Path) -> str | None:
    """Digest of the files that an index is of; None where there is no index, or none that can be read."""
    sql = "SELECT decode(value) FROM parquet_kv_metadata(?) WHERE decode(key) = 'files'"
    try:
        found = connection.execute(sql, [str(index)]).fetchall()
    except duckdb.Error:
        return None
    return str(found[0][0]) if found else None


def rows_of(connection: duckdb.DuckDBPyConnection, index: Path) -> set[File]:
    """The files that an index is of."""
    found = connection.execute("SELECT path, size, mtime FROM read_parquet(?)", [str(index)]).fetchall()
    return {File(*row) for row in found}


def write_rows(out: Path, root: Path, files: list[File]) -> None:
    """What the index says of these files, as lines of JSON."""
    with out.open("w") as lines:
        for file in tqdm(files, desc="index the history", unit=" records", disable=len(files) < PATIENCE):
            lines.write(json.dumps(described(root, file)) + "\n")


def merge(
    connection: duckdb.DuckDBPyConnection, new: Path, *, old: Path | None, gone: list[str], out: Path, state: str
) -> None:
    """New lines, and the rows of an old index but for those of files that are gone -> an index."""
    columns = ", ".join(f"'{name}': '{of}'" for name, of in INDEXED.items())
    options = f"format = 'newline_delimited', columns = {{{columns}}}"
    sql = f"SELECT * FROM read_json('{new}', {options})"  # as below, all that is pasted here is ours
    if old is not None:
        connection.execute("CREATE TEMP TABLE gone AS SELECT unnest(?::VARCHAR[]) AS path", [gone])
        sql += f" UNION ALL SELECT * FROM read_parquet('{old}') WHERE path NOT IN (SELECT path FROM gone)"
    connection.execute(f"COPY ({sql}) TO '{out}' (FORMAT parquet, COMPRESSION zstd, KV_METADATA {{files: '{state}'}})")


def described(root: Path, file: File) -> dict[str, Any]:
    """The index's row for a file."""
    found: dict[str, Any] = file._asdict()
    try:
        return found | columns_of(json.loads(ledger.read(root / file.path))) | {"id": Path(file.path).stem}
    except artifact.DamagedError as error:
        return found | {"error": str(error)}
    except (ValueError, TypeError, OSError) as error:
        return found | {
            "error": f"{root / file.path}: no record of this version ({str(error).splitlines()[0]}); left out"
        }


def columns_of(values: dict[str, Any]) -> dict[str, Any]:
    """The columns of a record; ValueError if it has no kind and time, or calls itself a score and is none."""
    when = datetime.fromisoformat(values["time"]) if {"kind", "time"} <= values.keys() else None
    if when is None or not isinstance(values["kind"], str):
        raise ValueError("kind and time are missing")
    found = {name: values.get(name) for name in SHARED}
    if values["kind"] == "score":
        record = Record.parse(values, place="it").model_dump(mode="json")
        named = record["extractor"] or {"name": None, "digest": None}
        found = {name: record.get(name) for name in COLUMNS}
        found |= {"extractor": named["name"], "extractor_digest": named["digest"]}
    return found | {"kind": values["kind"], "time": when.astimezone(UTC).replace(tzinfo=None).isoformat()}
