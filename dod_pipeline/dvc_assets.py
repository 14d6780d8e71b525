"""A dvc.yaml as Dagster assets: one for each stage instance, in whose body DVC does the work.

Ten lines load any dvc.yaml, which lies at the root of a DVC repository:

    from pathlib import Path

    import dagster as dg

    from dod_pipeline.dvc_assets import Pipeline
    from dod_pipeline.dvc_graph import Graph

    pipeline = Pipeline(Graph(Path(__file__).parent))
    defs = dg.Definitions(assets=pipeline.assets(), jobs=pipeline.jobs, sensors=pipeline.sensors())

**Names.** The stage `clean` is the asset `clean`; `train@large`, from `foreach` or `matrix`, is `train/large`. Edges
are those of `dvc dag`. `desc` is the description; `metrics` are numbers in the metadata, which Dagster plots over time;
`plots` with rows are tables. `Extras` adds groups, kinds, pools, checks and more metadata to an instance.

**What is up to date.** The body calls `dvc repro --single-item`, so DVC finds nothing to do after a run of Dagster. An
asset's code version is a digest of its command, sources and settings; its data version is the md5 in dvc.lock. The
sensor asks `dvc status` when dvc.lock, an output or a materialization is another than before and no stage runs under
Dagster or `dvc_repo`, whose end it waits for, however long that takes. It tells Dagster what differs, both ways: after
`dvc repro`, `dvc pull` or `git checkout` with `dvc checkout` nothing reads stale that is not; and what was deleted,
edited in place, or is `always_changed` reads stale. Afterwards the assets that read stale or missing are exactly the
instances that `dvc status` lists. As there, what is made from an outdated instance is not itself outdated until that
one is made anew and differs.

**Edits.** Definitions are those of the moment at which Dagster loaded them. After an edit of dvc.yaml, its settings or
its sources the sensor says of which instances it tells nothing until "Reload definitions" is pressed: those whose code
is another by now, those that have gone, and new ones. Of all others it tells as before.

**Frozen stages.** As `dvc repro` does, the asset of one never runs its command, and nothing upstream makes it stale: it
has no inputs in Dagster. Materializing it has DVC verify that its outputs are there, and record them.

**Understood.** `foreach` and `matrix`; `vars` (files, `file:key`, mappings; of dvc.yaml and of a stage); ${...} with
places in lists, a backslash before the dollar, mappings in `cmd`; `wdir`; `params` in YAML, JSON or TOML; `outs` with
options; `metrics` and `plots` of a stage or beside the stages; folders as dependencies (the .dvcignore at the root
holds in them); `always_changed`; `meta`. **Not understood**, and refused with a ValueError that names stage, field and
remedy: settings in Python files, dependencies and outputs that are URLs. Other dvc.yaml files below the root, and .dvc
files, are no assets: what they make is a source.

**What is kept elsewhere.** With `Keep(push="each")` each stage that was made is pushed to DVC's default remote, with
`Keep(push="end")` all of a run at its end, in one call and a bounded time; `push_of={"raw": "never", "train@large":
"each"}` says it of a stage or an instance; what is to go at the end goes with whatever is pushed before. With
`Keep(commit=("dvc.lock", ...))` a run ends in a commit of those paths. What fails is a warning, undoes nothing, and is
repeated the next time.

**Locks.** Any number of runs may share a repository: stages run side by side where DVC's locks allow it, and who finds
one taken is tried again. The stage's process gets Dagster Pipes' variables: it can report while it runs, and need not.
"""

import hashlib
import multiprocessing
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import dagster as dg

from dod_pipeline import dvc_keep, dvc_repo, lifeline
from dod_pipeline.dvc_events import Changed, Events, Made
from dod_pipeline.dvc_graph import DVC_LOCK, Graph, Instance
from dod_pipeline.dvc_keep import NOTHING, Keep
from dod_pipeline.dvc_metadata import metadata_of

RETRIES = 8  # after a transfer that broke off; who finds a lock waits for as long as its holder takes
LONGEST_PAUSE, LONGEST_WAIT = 60.0, 10.0  # seconds, after one and the other
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


def asset_keys(instances: Mapping[str, Instance]) -> dict[str, dg.AssetKey]:
    """metrics@mnist-1500 is the asset metrics/mnist-1500. Characters that Dagster has no use for become `_`."""
    found: dict[str, dg.AssetKey] = {}
    taken = set()  # Dagster tells names apart without their punctuation
    for name, item in instances.items():
        path = [re.sub("[^A-Za-z0-9_-]", "_", part) for part in (item.stage, item.key) if part is not None]
        if re.sub(r"\W", "_", "__".join(path)) in taken:
            path[-1] += f"_{len(found)}"
        taken.add(re.sub(r"\W", "_", "__".join(path)))
        found[name] = dg.AssetKey(path)
    return found


class Pipeline:
    """The assets of a graph, and the bridge between dvc.lock and Dagster's events."""

    def __init__(
        self,
        graph: Graph,
        extras: Callable[[Instance], Extras] = lambda _: Extras(),
        *,
        run_tags: Callable[[], Mapping[str, str]] = dict,
        pools: bool = True,
        keep: Keep = NOTHING,
    ) -> None:
        self.graph = graph
        self.keep = keep
        keep.check(graph.stages | graph.instances.keys())
        self.run_tags = run_tags
        self.pools = pools  # not for a run that has the folder alone: who holds a slot may wait for the folder
        self.code = {name: graph.code(instance) for name, instance in graph.instances.items()}
        self.extras = {name: extras(instance) for name, instance in graph.instances.items()}
        self.keys = asset_keys(graph.instances)

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
            metadata={"dvc": instance.name, "command": str(instance.cmd), "frozen": instance.frozen},
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
                busy = isinstance(error, dvc_repo.BusyError)
                pause = min(2.0 ** min(context.retry_number, 10), LONGEST_WAIT if busy else LONGEST_PAUSE)
                context.log.warning(f"{error}\ntrying again in {pause:g} s")
                retries = context.retry_number + 1 if busy else RETRIES
                raise dg.RetryRequested(max_retries=retries, seconds_to_wait=pause) from error
            except OSError as error:
                raise dg.Failure(description=str(error), allow_retries=False) from None
            self.warn(context, dvc_keep.after_stage(self.keep, instance, known=self.keys, root=self.graph.root))
            context.instance.add_run_tags(context.run.run_id, dict(self.extras[instance.name].run_tags(began)))
            return dg.MaterializeResult(
                asset_key=self.keys[instance.name],
                data_version=dg.DataVersion(self.version(instance.name)),
                metadata=self.metadata(instance),
                check_results=self.extras[instance.name].check(),
            )

    def warn(self, context: dg.AssetExecutionContext, wrong: Iterable[str]) -> None:
        """Say what doesn't undo the run, in its log and on the terminal."""
        for text in wrong:
            context.log.warning(text)
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def version(self, name: str) -> str:
        """What dvc.lock says of an instance that was just made; another dvc may be in the middle of writing it."""
        for _ in range(READS - 1):
            with suppress(ValueError, KeyError):
                return self.graph.recorded()[name]
            time.sleep(READ_PAUSE)
        return self.graph.recorded()[name]

    def metadata(self, instance: Instance) -> dict[str, Any]:
        """What `extras` adds, for a page shows that first; then the numbers and plots of what was made."""
        return {**self.extras[instance.name].metadata(), **metadata_of(self.graph, instance)}

    def events(self, instance: dg.DagsterInstance) -> Events:
        """What Dagster knows of the assets."""
        return Events(instance, self.graph, self.code, self.keys)

    def report(self, events: Events, changed: Changed, names: Collection[str] | None = None) -> list[str]:
        """Tell Dagster what `dvc status` says, of these instances or of all, unless it knows; returns those told of."""
        made = {
            name: Made(partial(self.metadata, instance), self.extras[name].check)
            for name, instance in self.graph.instances.items()
        }
        return events.report(changed, made if names is None else names, made)

    @cached_property
    def jobs(self) -> list[dg.JobDefinition]:
        """The one that keeps what was made, where that is wanted."""
        wanted = self.keep.commit or self.keep.pushes
        return [dvc_keep.job(self.keep, known=self.keys, root=self.graph.root)] if wanted else []

    def sensors(self) -> list[dg.SensorDefinition]:
        """The one that reads dvc.lock, and those that start the job."""
        return [self.sensor(), *(sensor for job in self.jobs for sensor in dvc_keep.sensors(job))]

    def sensor(self, *, seconds: int = 30) -> dg.SensorDefinition:
        """A sensor that calls `report` when dvc.lock, an output or Dagster's events have changed since it last did."""

        @dg.sensor(
            name="dvc_lock",
            description="Tells Dagster of what was made without it: by `dvc repro`, `dvc checkout` or `dvc pull`.",
            minimum_interval_seconds=seconds,
            default_status=dg.DefaultSensorStatus.RUNNING,
            asset_selection=list(self.keys.values()),
        )
        def body(context: dg.SensorEvaluationContext) -> dg.SkipReason:
            left = self.left()
            advice = f"; press Reload definitions to see what has changed: {', '.join(sorted(left))}" if left else ""
            files, events = self.fingerprint(left), self.events(context.instance)
            if f"{files} {events.newest}" == context.cursor:
                return dg.SkipReason(f"dvc.lock and the outputs are as they were{advice}")
            try:
                with dvc_repo.alone(self.graph.root, wait=False):
                    told = self.report(events, dvc_repo.status([], root=self.graph.root), self.keys.keys() - left)
            except (BlockingIOError, dvc_repo.TryAgainError):
                return dg.SkipReason(f"stages are running; what they make will be looked at afterwards{advice}")
            context.update_cursor(f"{files} {events.newest}")
            return dg.SkipReason(f"told Dagster of {', '.join(told) or 'nothing new'}{advice}")

        return body

    def left(self) -> set[str]:
        """The instances whose definitions are older than dvc.yaml, its settings and sources; new and gone ones too."""
        now = Graph(self.graph.root)
        code = {name: now.code(instance) for name, instance in now.instances.items()}
        return {name for name in self.code.keys() | code if self.code.get(name) != code.get(name)}

    def fingerprint(self, left: Collection[str]) -> str:
        """Changes with dvc.lock, with the definitions, with what is left out, and when a file of an output comes, goes
        or is replaced."""
        lock = self.graph.root / DVC_LOCK
        paths = [self.graph.root / path for instance in self.graph.instances.values() for path in instance.made]
        text = lock.read_text() if lock.exists() else ""
        parts = [text, *self.code.values(), *sorted(left), *map(touched, paths)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def touched(path: Path) -> str:
    """When a file, or the last in a folder, was changed, and how many there are."""
    try:
        times = [entry.stat(follow_symlinks=False).st_mtime_ns for entry in entries(path)] if path.is_dir() else []
        return f"{path.stat().st_mtime_ns} {max(times, default=0)} {len(times)}"
    except FileNotFoundError:  # or it went while this looked
        return "none"


def entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """All that lies in a folder, however deep."""
    with os.scandir(folder) as found:
        for entry in found:
            yield entry
            if entry.is_dir(follow_symlinks=False):
                yield from entries(Path(entry))


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
