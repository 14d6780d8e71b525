"""Questions to the append-only history; each one brings the index of the records up to date and then asks DuckDB."""

import copy
import csv
import io
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TextIO

import duckdb

from dod_pipeline import catalogue, ledger
from dod_pipeline.ledger import HISTORY

Rows = list[dict[str, Any]]
HIGHER = {"inception_score", "precision", "recall", "psnr", "ssim", "top1"}  # the better; of other metrics lower is
CONDITION = re.compile(r"(\w+)\s*(=|!=|<=|>=|<|>)\s*(.*)", re.DOTALL)
NOTHING = "none"  # in a condition: the record says nothing of that


class Selection:
    """The records of a kind that match filters, as what stands behind WHERE.

    Values are parameters, and names are those of columns: nothing of a user's is pasted into SQL.
    """

    def __init__(
        self,
        root: Path | str = HISTORY,
        *,
        kind: str = "score",
        experiment: str | None = None,
        checkpoint: str | None = None,
        stage: str | None = None,
        metric: str | None = None,
        where: Iterable[str] = (),
        provisional: bool = False,
    ) -> None:
        if kind != "score" and metric is not None:
            raise ValueError(f"--metric {metric!r}: a {kind} has no metrics; leave it out, or --kind")
        self.folder = catalogue.folder_of(root)
        self.connection = catalogue.opened(self.folder, provisional=provisional)
        self.types = {str(row[0]): str(row[1]) for row in self.connection.execute("DESCRIBE items").fetchall()}
        self.parts, self.values, self.filtered = ["kind = ?"], [kind], set[str]()
        self.metric = metric
        self.add({"experiment": experiment, "checkpoint": checkpoint, "stage": stage}, where)
        if metric is not None and self.metrics:
            if metric not in self.metrics:
                raise ValueError(f"--metric {metric!r}: no record has it; they have {', '.join(self.metrics)}")
            self.parts.append(f'"{metric}" IS NOT NULL')

    @property
    def metrics(self) -> list[str]:
        """The metrics of all records."""
        return [name for name in self.types if name not in catalogue.INDEXED]

    def keep(self, name: str, part: str, *values: str) -> None:
        """Only records for which this holds of a column."""
        self.parts.append(part)
        self.values.extend(values)
        self.filtered.add(name)

    def add(self, equal: Mapping[str, str | None], where: Iterable[str] = ()) -> None:
        """Filters: what columns must be equal to, unless that is None, and conditions."""
        for name, value in equal.items():
            if value is not None:
                self.keep(name, f"{name} = ?", value)
        for condition in where:
            self.require(condition)

    def within(self, where: Iterable[str] = (), **equal: str) -> "Selection":
        """Those of these records that match more filters; the index is as this selection found it."""
        found = copy.copy(self)
        found.parts, found.values, found.filtered = [*self.parts], [*self.values], {*self.filtered}
        found.add(equal, where)
        return found

    def require(self, condition: str) -> None:
        """A condition such as `num_samples=50000`, `fid<2`, `extractor=inception*` or `guidance!=none`."""
        found = CONDITION.fullmatch(condition)
        if found is None:
            raise ValueError(f"--where {condition!r}: not of the form NAME=VALUE (or with !=, <, <=, > or >=)")
        name, operator, value = found.groups()
        known = [column for column in self.types if column != "path"]
        if name not in known:
            raise ValueError(f"--where {condition!r}: records have no {name!r}; they have {', '.join(known)}")
        if value == NOTHING and operator in ("=", "!="):
            return self.keep(name, f'"{name}" IS {"NOT " if operator == "!=" else ""}NULL')
        try:
            self.connection.execute(f"SELECT CAST(? AS {self.types[name]})", [value]).fetchall()
        except duckdb.ConversionException:
            raise ValueError(f"--where {condition!r}: {value!r} is no {self.types[name].lower()}") from None
        like = operator in ("=", "!=") and "*" in value and self.types[name] == "VARCHAR"
        compared = "GLOB ?" if like else f"{operator.removeprefix('!')} CAST(? AS {self.types[name]})"
        self.keep(name, f'("{name}" {compared}){" IS NOT TRUE" if operator == "!=" else ""}', value)

    def fetch(self, columns: str, rest: str = "") -> list[Any]:
        """Columns of what matches; all that is given here is ours."""
        sql = f"SELECT {columns} FROM items WHERE {' AND '.join(self.parts)} {rest}"
        return self.connection.execute(sql, self.values).fetchall()

    def listed(self, columns: str, newest: int = 0) -> list[Any]:
        """Columns of what matches, oldest first; only the newest so many, unless that is 0."""
        if newest == 0:
            return self.fetch(columns, "ORDER BY time, row, id")
        return self.fetch(columns, f"ORDER BY time DESC, row DESC, id DESC LIMIT {newest:d}")[::-1]

    def texts(self, *, newest: int = 0) -> list[str]:
        """What matches as JSON, each with its id."""
        return self.read(self.listed("path", newest))

    def read(self, found: Iterable[tuple[str]]) -> list[str]:
        """The records in these files as JSON, each with its id, the file's name; they are checked once more."""
        paths = [self.folder / path for (path,) in found]
        return [f'{{"id": "{path.stem}", {ledger.read(path)[1:]}' for path in paths]

    def records(self, *, newest: int = 0) -> Rows:
        """What matches as dictionaries; where a metric was asked for, with only that number and its error."""
        return self.narrowed(self.texts(newest=newest))

    def measured(self) -> Rows:
        """What matches as the index has it: records with the metric that was asked for, and without their sources."""
        assert self.metric is not None
        kept = [name for name in (self.metric, f"{self.metric}_error") if name in self.types]
        shown = [name for name in catalogue.COLUMNS if name in self.types]
        found = []
        for values in self.listed(", ".join(f'"{name}"' for name in (*shown, *kept))):
            row = dict(zip((*shown, *kept), values, strict=True))
            name, digest = row["extractor"], row.pop("extractor_digest")
            row |= {"time": f"{row['time'].isoformat()}Z", "extractor": name and {"name": name, "digest": digest}}
            row["stage"] = int(row["stage"]) if row["stage"].isdigit() else row["stage"]
            metrics = {name: value for name in kept if (value := row.pop(name)) is not None}
            found.append(row | {"metrics": metrics})
        return found

    def narrowed(self, texts: Iterable[str]) -> Rows:
        """Records without the metrics that were not asked for."""
        found: Rows = [json.loads(text) for text in texts]
        if self.metric is None:
            return found
        kept = (self.metric, f"{self.metric}_error")
        return [row | {"metrics": {n: row["metrics"][n] for n in kept if n in row["metrics"]}} for row in found]

    def count(self) -> int:
        """How many match."""
        return int(self.fetch("count(*)")[0][0])


class Table(NamedTuple):
    """What SQL answers."""

    columns: list[str]
    rows: list[tuple[Any, ...]]

    def csv(self) -> str:
        """As CSV."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return text.getvalue()


def query(
    root: Path | str = HISTORY,
    *,
    kind: str = "score",
    experiment: str | None = None,
    checkpoint: str | None = None,
    stage: str | None = None,
    metric: str | None = None,
) -> Rows:
    """Records of a kind that match, oldest first, as plain dictionaries with their ids; with `metric`, only that number
    and its error. `Selection` takes more filters."""
    found = Selection(root, kind=kind, experiment=experiment, checkpoint=checkpoint, stage=stage, metric=metric)
    return found.records()


def write_csv(selection: Selection, out: TextIO, *, newest: int = 0) -> None:
    """Records as CSV, oldest first: a column for each field and each metric that is said of any."""
    metrics = {selection.metric, f"{selection.metric}_error"} if selection.metric else {*selection.metrics}
    shown = [name for name in selection.types if name not in {"kind", "path", *selection.metrics} - metrics]
    (counts,) = selection.fetch(", ".join(f'count("{name}")' for name in shown))
    columns = ", ".join(f'"{name}"' for name, count in zip(shown, counts, strict=True) if count) or "id"
    matching = f"FROM items WHERE {' AND '.join(selection.parts)}"
    if newest:
        matching = f"FROM (SELECT * {matching} ORDER BY time DESC, row DESC, id DESC LIMIT {newest:d})"
    found = selection.connection.sql(f"SELECT {columns} {matching} ORDER BY time, row, id", params=selection.values)
    with TemporaryDirectory() as folder:  # DuckDB writes it several times as fast as Python would
        path = Path(folder, "records.csv")
        found.write_csv(str(path))
        with path.open(newline="") as file:
            shutil.copyfileobj(file, out, 2**20)


def best(selection: Selection, *, limit: int = 10) -> Rows:
    """The samples that score best by the selection's metric, best first; ValueError if they must not be compared.

    Floors, which no checkpoint reaches, are left out unless the selection is of them.
    """
    assert selection.metric is not None
    if "stage" not in selection.filtered:
        selection.keep("stage", "regexp_full_match(stage, '[0-9]+')")
    alike = "extractor_digest, reference, num_samples, num_train, experiment, checkpoint, stage"
    check_comparable(
        [json.loads(text) for text in selection.read(selection.fetch("any_value(path)", f"GROUP BY {alike}"))]
    )
    order = "DESC" if selection.metric in HIGHER else "ASC"
    found = selection.fetch("path", f'ORDER BY "{selection.metric}" {order}, time, id LIMIT {limit:d}')
    return selection.narrowed(selection.read(found))


def sql(statement: str, root: Path | str = HISTORY, *, provisional: bool = False) -> Table:
    """Answer one SELECT over `records`, a row for each score; it can neither change anything nor read other files."""
    connection = catalogue.opened(catalogue.folder_of(root), provisional=provisional)
    connection.execute("CREATE TABLE kept AS FROM records; DROP VIEW records; ALTER TABLE kept RENAME TO records")
    connection.execute("SET enable_external_access = false; SET lock_configuration = true")
    try:
        statements = connection.extract_statements(statement)
        if [one.type for one in statements] != [duckdb.StatementType.SELECT]:
            raise ValueError("--sql: give one SELECT, and nothing else")
        answer = connection.execute(statements[0])
        return Table([column[0] for column in answer.description], answer.fetchall())
    except duckdb.Error as error:
        raise ValueError(f"--sql: {error}") from None


SETTING = ("extractor", "reference", "num_samples")  # where these differ, numbers must not be compared


def texts(record: dict[str, Any]) -> dict[str, str]:
    """What must be equal for two records to be compared, in words."""
    named = record["extractor"]
    count = f"{record['num_samples']}" + (f" after {fitted} to fit" if (fitted := record.get("num_train")) else "")
    return {
        "extractor": f"{named['name']} ({named['digest'][:12]})" if named else "none",
        "reference": record["reference"][:12],
        "num_samples": count,
    }


def setting(found: Rows) -> str:
    """In what comparable records were measured."""
    named = found[0]["extractor"]
    return f"{found[0]['num_samples']:,} images" + (f", {named['name']}" if named else "")


def check_comparable(found: Rows) -> None:
    """ValueError that says what differs between the records, and which filter of `query` would separate them."""
    said = [texts(row) for row in found]
    differing = {name: sorted({one[name] for one in said}) for name in SETTING}
    what = "; ".join(f"{name} is {' or '.join(known)}" for name, known in differing.items() if len(known) > 1)
    if not what:
        return
    remedies = []
    for name in ("experiment", "checkpoint", "stage"):
        groups: dict[str, set[tuple[str, ...]]] = {}
        for row, one in zip(found, said, strict=True):
            groups.setdefault(str(row[name]), set()).add(tuple(one.values()))
        if len(groups) > 1 and all(len(kinds) == 1 for kinds in groups.values()):
            remedies.append(f"--{name} ({', '.join(sorted(groups))})")
    remedies += [f"--where {name}=..." for name in SETTING if len(differing[name]) > 1]
    raise ValueError(
        f"these {len(found)} records must not be compared: {what}; separate them with {' or '.join(remedies)}"
    )
