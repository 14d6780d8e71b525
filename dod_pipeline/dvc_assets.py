"""A dvc.yaml as Dagster assets: one for each stage instance, in whose body DVC does the work.

    graph = Graph(Path())
    pipeline = Pipeline(graph, lambda instance: Extras(group=instance.stage))
    defs = dagster.Definitions(assets=pipeline.assets(), sensors=[pipeline.sensor()])

What the two say of each other agrees. The body calls `dvc repro --single-item`, so DVC finds nothing to do after a run
of Dagster; and `report` tells Dagster of what was made without it, from dvc.lock, so that nothing reads stale after a
`dvc repro`. An asset's code version is a digest of its command, sources and settings; its data version is the md5 in
dvc.lock. The stage's process gets Dagster Pipes' variables, so it can report while it runs; it need not.
"""

import hashlib
import json
import math
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import dagster as dg
from dagster._core.definitions.data_version import (
    CODE_VERSION_TAG,
    DATA_VERSION_TAG,
    INPUT_DATA_VERSION_TAG_PREFIX,
    INPUT_EVENT_POINTER_TAG_PREFIX,
)

from dod_pipeline import dvc_repo, lifeline
from dod_pipeline.dvc_graph import DVC_LOCK, Graph, Instance, Version

RETRIES = 8
LONGEST_PAUSE = 60.0  # seconds
CURVE_ROWS = 40  # of a plot's table
READS, READ_PAUSE = 20, 0.2  # tries to read dvc.lock, and seconds between them

Metadata = Mapping[str, Any]


class Extras(NamedTuple):
    """What Dagster is told of an instance beyond dvc.yaml."""

    group: str = "default"
    kinds: frozenset[str] = frozenset()
    pool: str | None = None
    checks: tuple[str, ...] = ()  # names; each blocks what follows
    check: Callable[[], Sequence[dg.AssetCheckResult]] = tuple  # their verdicts; one of severity WARN blocks nothing
    metadata: Callable[[], Metadata] = dict  # more than numbers and plots of dvc.yaml, once made
    owners: tuple[str, ...] = ()
    freshness: dg.FreshnessPolicy | None = None
    run_tags: Callable[[float], Mapping[str, str]] = lambda _: {}  # once made; told when that began, in Unix time


def asset_key(instance: Instance) -> dg.AssetKey:
    """metrics@mnist-1500 is the asset metrics/mnist-1500."""
    return dg.AssetKey([instance.stage] if instance.key is None else [instance.stage, instance.key])


class Pipeline:
    """The assets of a graph, and the bridge between dvc.lock and Dagster's events."""

    def __init__(
        self,
        graph: Graph,
        extras: Callable[[Instance], Extras],
        *,
        run_tags: Callable[[], Mapping[str, str]] = dict,
        pools: bool = True,
    ) -> None:
        self.graph = graph
        self.run_tags = run_tags
        self.pools = pools  # not for a run that has the folder alone: who holds a slot may wait for the folder
        self.code = {name: graph.code(instance) for name, instance in graph.instances.items()}
        self.extras = {name: extras(instance) for name, instance in graph.instances.items()}
        self.keys = {name: asset_key(instance) for name, instance in graph.instances.items()}

    def assets(self) -> list[dg.AssetsDefinition]:
        """One unpartitioned asset for each instance."""
        return [self.asset(instance) for instance in self.graph.instances.values()]

    def asset(self, instance: Instance) -> dg.AssetsDefinition:
        """The asset of one instance."""
        key, extras = self.keys[instance.name], self.extras[instance.name]

        @dg.asset(
            key=key,
            deps=[self.keys[name] for name in sorted(self.graph.upstream[instance.name])],
            description=instance.desc or None,
            group_name=extras.group,
            kinds={*extras.kinds, "dvc"},
            owners=extras.owners,
            freshness_policy=extras.freshness,
            code_version=self.code[instance.name],
            metadata={"dvc": instance.name, "command": str(instance.cmd)},
            check_specs=[dg.AssetCheckSpec(name, asset=key, blocking=True) for name in extras.checks],
            pool=extras.pool if self.pools else None,
        )
        def body(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult[Any]]:
            yield self.materialize(context, instance)

        return body

    def materialize(self, context: dg.AssetExecutionContext, instance: Instance) -> dg.MaterializeResult[Any]:
        """Have DVC make the instance if it isn't up to date; what DVC recorded and what the checks say."""
        if multiprocessing.parent_process() is not None:
            lifeline.hold()
        context.instance.add_run_tags(context.run.run_id, dict(self.run_tags()))
        began = time.time()
        with dvc_repo.shared(self.graph.root), pipes(context) as session:
            try:
                dvc_repo.repro_one(instance.name, root=self.graph.root, env=session.get_bootstrap_env_vars())
            except dvc_repo.TryAgainError as error:
                pause = min(2.0**context.retry_number, LONGEST_PAUSE)
                context.log.warning(f"{error}\ntrying again in {pause:g} s")
                raise dg.RetryRequested(max_retries=RETRIES, seconds_to_wait=pause) from error
            except OSError as error:
                raise dg.Failure(description=str(error), allow_retries=False) from None
            context.instance.add_run_tags(context.run.run_id, dict(self.extras[instance.name].run_tags(began)))
            return dg.MaterializeResult(
                asset_key=self.keys[instance.name],
                data_version=dg.DataVersion(self.version(instance.name).data),
                metadata=self.metadata(instance),
                check_results=self.extras[instance.name].check(),
            )

    def version(self, name: str) -> Version:
        """What dvc.lock says of an instance that was just made; another dvc may be in the middle of writing it."""
        for _ in range(READS - 1):
            with suppress(ValueError, KeyError):
                return self.graph.recorded()[name]
            time.sleep(READ_PAUSE)
        return self.graph.recorded()[name]

    def metadata(self, instance: Instance) -> dict[str, Any]:
        """What `extras` adds, for a page shows that first; then the numbers and plots of what was made."""
        found = dict(self.extras[instance.name].metadata())
        for path in instance.metrics:
            found |= dict(numbers(read_json(self.graph.root / path)))
        for path, options in instance.plots:
            rows = read_json(self.graph.root / path)
            found[options.get("title", Path(path).stem)] = table(rows, [options["x"], options["y"]])
        return found

    def report(self, instance: dg.DagsterInstance, names: Sequence[str]) -> list[str]:
        """Tell Dagster of these instances, which DVC holds to be up to date, unless it knows; returns those told of."""
        recorded, told = self.graph.recorded(), []
        for name in self.graph.instances:
            if name in names and name in recorded:
                tags = self.tags(instance, name, recorded[name])
                if not self.knows(instance, name, tags):
                    self.tell(instance, name, tags)
                    told.append(name)
        return told

    def tags(self, instance: dg.DagsterInstance, name: str, version: Version) -> dict[str, str]:
        """A materialization's versions: its own, and those of its inputs that Dagster knows last."""
        found = {CODE_VERSION_TAG: version.code, DATA_VERSION_TAG: version.data}
        for before in sorted(self.graph.upstream[name]):
            key = self.keys[before].to_user_string()
            event = latest(instance, self.keys[before])
            if event is not None and event.asset_materialization is not None:
                made = (event.asset_materialization.tags or {}).get(DATA_VERSION_TAG)
                if made is not None:  # a materialization that somebody reported by hand has none
                    found[f"{INPUT_DATA_VERSION_TAG_PREFIX}/{key}"] = made
                    found[f"{INPUT_EVENT_POINTER_TAG_PREFIX}/{key}"] = str(event.storage_id)
        return found

    def knows(self, instance: dg.DagsterInstance, name: str, tags: Mapping[str, str]) -> bool:
        """Whether Dagster's last materialization has these versions."""
        event = latest(instance, self.keys[name])
        if event is None or event.asset_materialization is None:
            return False
        found = event.asset_materialization.tags or {}
        return all(
            found.get(tag) == value
            for tag, value in tags.items()
            if not tag.startswith(f"{INPUT_EVENT_POINTER_TAG_PREFIX}/")
        )

    def tell(self, instance: dg.DagsterInstance, name: str, tags: Mapping[str, str]) -> None:
        """Add a materialization, and the verdicts of its checks."""
        key = self.keys[name]
        metadata = self.metadata(self.graph.instances[name])
        instance.report_runless_asset_event(dg.AssetMaterialization(key, metadata=metadata, tags=tags))
        for check in self.extras[name].check():
            assert check.check_name is not None
            evaluation = dg.AssetCheckEvaluation(
                asset_key=key,
                check_name=check.check_name,
                passed=check.passed,
                description=check.description,
                metadata=check.metadata,
                severity=check.severity,
                blocking=True,
            )
            instance.report_runless_asset_event(evaluation)

    def up_to_date(self) -> list[str]:
        """The instances of which DVC says that nothing changed; asks DVC, which takes seconds."""
        changed = dvc_repo.status([], root=self.graph.root)
        return [name for name in self.graph.instances if name not in changed]

    def sensor(self, *, seconds: int = 30) -> dg.SensorDefinition:
        """A sensor that calls `report` when dvc.lock or an output has changed since it last did."""

        @dg.sensor(
            name="dvc_lock",
            description="Tells Dagster of what was made without it: by `dvc repro`, `dvc checkout` or `dvc pull`.",
            minimum_interval_seconds=seconds,
            default_status=dg.DefaultSensorStatus.RUNNING,
            asset_selection=list(self.keys.values()),
        )
        def body(context: dg.SensorEvaluationContext) -> dg.SkipReason:
            now = Graph(self.graph.root)
            if self.code != {name: now.code(instance) for name, instance in now.instances.items()}:
                return dg.SkipReason("dvc.yaml, its settings or its sources have changed: press Reload definitions")
            cursor = self.fingerprint()
            if cursor == context.cursor:
                return dg.SkipReason("dvc.lock and the outputs are as they were")
            try:
                with dvc_repo.alone(self.graph.root, wait=False):
                    told = self.report(context.instance, self.up_to_date())
            except (BlockingIOError, dvc_repo.TryAgainError):
                return dg.SkipReason("stages are running; what they make will be looked at afterwards")
            context.update_cursor(cursor)
            return dg.SkipReason(f"told Dagster of {', '.join(told) or 'nothing new'}")

        return body

    def fingerprint(self) -> str:
        """Changes with dvc.lock, with the definitions, and when an output comes, goes or is replaced."""
        lock = self.graph.root / DVC_LOCK
        paths = [self.graph.root / path for instance in self.graph.instances.values() for path in instance.made]
        changed = [str(path.stat().st_mtime_ns) if path.exists() else "none" for path in paths]
        parts = [lock.read_text() if lock.exists() else "", *self.code.values(), *changed]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@contextmanager
def pipes(context: dg.AssetExecutionContext) -> Iterator[dg.PipesSession]:
    """Through which a stage's process may report while it runs. DVC may have nothing to run: that needs no warning."""
    context.log.addFilter(lambda record: "did not receive any messages" not in record.getMessage())
    injector, reader = dg.PipesTempFileContextInjector(), dg.PipesTempFileMessageReader()
    with warnings.catch_warnings():
        for own in (dg.PreviewWarning, DeprecationWarning):  # Dagster's own code calls what it warns of
            warnings.simplefilter("ignore", own)
        with dg.open_pipes_session(context=context, context_injector=injector, message_reader=reader) as session:
            yield session


def latest(instance: dg.DagsterInstance, key: dg.AssetKey) -> dg.EventLogRecord | None:
    """The newest materialization of an asset."""
    found = instance.fetch_materializations(key, limit=1).records
    return found[0] if found else None


def numbers(value: Any, *place: str) -> Iterator[tuple[str, float | int]]:
    """The numbers in nested mappings, by dotted name: what Dagster plots over time."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from numbers(inner, *place, name)
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield ".".join(place), value


def table(rows: list[dict[str, Any]], columns: list[str]) -> dg.TableMetadataValue:
    """Rows at even distances, the last one among them, as a table."""
    every = max(1, math.ceil(len(rows) / CURVE_ROWS))
    kept = rows[::-1][::every][::-1]
    records = [dg.TableRecord({column: row[column] for column in columns}) for row in kept]
    return dg.MetadataValue.table(records)


def read_json(path: Path) -> Any:
    """JSON of a metrics or plots file."""
    return json.loads(path.read_text())
