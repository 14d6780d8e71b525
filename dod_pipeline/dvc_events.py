"""Dagster's events about the instances of a dvc.yaml, and what to add to them so that they say what DVC says.

An asset reads fresh when its newest materialization names its present code version, and the present data version of
each asset upstream; else stale, or missing if there is none. So an instance that DVC holds to be up to date and Dagster
does not is told with these; one that DVC holds to be outdated and Dagster does not is told with a code version that no
code has. What was lost or changed in place gets a data version that says so, for the sake of those made from it.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import dagster as dg
from dagster._core.definitions.data_version import (
    CODE_VERSION_TAG,
    DATA_VERSION_TAG,
    DEFAULT_DATA_VERSION,
    INPUT_DATA_VERSION_TAG_PREFIX,
    INPUT_EVENT_POINTER_TAG_PREFIX,
    NULL_DATA_VERSION,
    NULL_EVENT_POINTER,
)

from dod_pipeline.dvc_graph import Graph

OUTDATED = "outdated"  # for a code version
LOST = ("deleted", "modified", "new")  # DVC's words for an output that isn't the one in dvc.lock

Changed = Mapping[str, Sequence[str | Mapping[str, Mapping[str, Any]]]]  # `dvc status --json`


class Known(NamedTuple):
    """Dagster's newest materialization of an asset."""

    number: int
    tags: Mapping[str, str]


class Made(NamedTuple):
    """What is told beside versions of an instance that is up to date; asked for only then."""

    metadata: Callable[[], Mapping[str, Any]]
    checks: Callable[[], Sequence[dg.AssetCheckResult]]


class Events:
    """Those of one Dagster instance about one graph."""

    def __init__(
        self, instance: dg.DagsterInstance, graph: Graph, code: Mapping[str, str], keys: Mapping[str, dg.AssetKey]
    ):
        self.instance, self.graph, self.code, self.keys = instance, graph, code, keys
        names = {key: name for name, key in keys.items()}
        self.known: dict[str, Known] = {}
        for record in instance.get_asset_records(list(names)):
            self.hear(names[record.asset_entry.asset_key], record.asset_entry.last_materialization_record)

    def hear(self, name: str, record: dg.EventLogRecord | None) -> None:
        """Remember a materialization."""
        if record is not None and record.asset_materialization is not None:
            self.known[name] = Known(record.storage_id, record.asset_materialization.tags or {})

    @property
    def newest(self) -> str:
        """Changes with every materialization, and when they are wiped."""
        return f"{len(self.known)} assets, {max([known.number for known in self.known.values()], default=0)}"

    def report(self, changed: Changed, names: Collection[str], made: Mapping[str, Made]) -> list[str]:
        """Tell Dagster what DVC says of these instances, in order, where it differs; returns those told of."""
        recorded, told = self.graph.recorded(), []
        for name in self.graph.instances:
            if name not in names:
                continue
            if name in changed and self.reads_fresh(name):
                versions = {CODE_VERSION_TAG: OUTDATED, DATA_VERSION_TAG: self.left_of(name, changed)}
                self.tell(name, versions, {"dvc": "; ".join(reasons(changed, name))})
            elif name not in changed and name in recorded and not self.reads_fresh(name, recorded[name]):
                versions = {CODE_VERSION_TAG: self.code[name], DATA_VERSION_TAG: recorded[name]}
                self.tell(name, versions, made[name].metadata())
                self.judge(name, made[name].checks())
            else:
                continue
            told.append(name)
        return told

    def reads_fresh(self, name: str, data: str | None = None) -> bool:
        """Whether Dagster shows the asset as neither stale nor missing, and if asked, knows it in this version."""
        if name not in self.known:
            return False
        tags = self.known[name].tags
        if CODE_VERSION_TAG not in tags:  # reported by hand: Dagster has nothing to compare
            return data is None
        inputs = {tag: value for tag, value in tags.items() if tag.startswith(f"{INPUT_DATA_VERSION_TAG_PREFIX}/")}
        wanted = {
            tag: value for tag, value in self.inputs(name).items() if tag.startswith(INPUT_DATA_VERSION_TAG_PREFIX)
        }
        return tags[CODE_VERSION_TAG] == self.code[name] and inputs == wanted and data in (None, self.data(name))

    def data(self, name: str) -> str:
        """The data version that Dagster has."""
        if name not in self.known:
            return NULL_DATA_VERSION.value
        return self.known[name].tags.get(DATA_VERSION_TAG, DEFAULT_DATA_VERSION.value)

    def inputs(self, name: str) -> dict[str, str]:
        """Tags that name the present materializations upstream."""
        found = {}
        for before in sorted(self.graph.upstream[name]):
            key = self.keys[before].to_user_string()
            number = str(self.known[before].number) if before in self.known else NULL_EVENT_POINTER
            found[f"{INPUT_DATA_VERSION_TAG_PREFIX}/{key}"] = self.data(before)
            found[f"{INPUT_EVENT_POINTER_TAG_PREFIX}/{key}"] = number
        return found

    def left_of(self, name: str, changed: Changed) -> str:
        """A data version for what is outdated: the old one, unless an output is gone or another."""
        outs = [
            how
            for reason in changed[name]
            if isinstance(reason, Mapping)
            for how in reason.get("changed outs", {}).values()
        ]
        return next((how for how in LOST if how in outs), self.data(name))

    def tell(self, name: str, versions: Mapping[str, str], metadata: Mapping[str, Any]) -> None:
        """Add a materialization."""
        key = self.keys[name]
        event = dg.AssetMaterialization(key, metadata=metadata, tags={**versions, **self.inputs(name)})
        self.instance.report_runless_asset_event(event)
        self.hear(name, self.instance.fetch_materializations(key, limit=1).records[0])

    def judge(self, name: str, verdicts: Sequence[dg.AssetCheckResult]) -> None:
        """Add the verdicts of its checks."""
        for check in verdicts:
            assert check.check_name is not None
            evaluation = dg.AssetCheckEvaluation(
                asset_key=self.keys[name],
                check_name=check.check_name,
                passed=check.passed,
                severity=check.severity,
                description=check.description,
                metadata=check.metadata,
                blocking=True,
            )
            self.instance.report_runless_asset_event(evaluation)


def reasons(changed: Changed, name: str) -> Iterator[str]:
    """DVC's reasons for holding an instance to be outdated, in words."""
    for reason in changed[name]:
        if isinstance(reason, str):
            yield reason
            continue
        for kind, paths in reason.items():
            yield f"{kind}: {', '.join(f'{path} {how}' for path, how in paths.items())}"
