"""`dod run`: what DVC finds outdated is made by a Dagster run in this process, in the instance that the UI shows."""

import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import dagster as dg
import psutil
from dagster._core.events import EngineEventData
from dagster._core.execution.plan.objects import StepFailureData
from dagster._utils.env import environ
from sqlalchemy.exc import SQLAlchemyError
from yaml import YAMLError

from dod_pipeline import cluster, dvc_keep, dvc_repo, dvc_transfer, listing, mirror, remote, stages
from dod_pipeline.config import Params
from dod_pipeline.definitions import define, keep
from dod_pipeline.dvc_assets import Pipeline
from dod_pipeline.dvc_graph import Graph
from dod_pipeline.storage import POSTGRES

HOME = "DAGSTER_HOME"
OWNER = "dod/folder"  # tag of runs that `dod run` started: where
UNFINISHED = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}  # stages print for themselves


def home(root: Path) -> Path:
    """Dagster's folder: $DAGSTER_HOME, or dagster_home in the project. FileNotFoundError if it isn't there."""
    stated = os.environ.get(HOME)
    found = (root / (stated or "dagster_home")).expanduser().absolute()
    if not found.is_dir():
        remedy = f"unset it to use {(root / 'dagster_home').absolute()}, or make the folder" if stated else "restore it"
        raise FileNotFoundError(f"{HOME}={stated or found}: there is no such folder; {remedy}")
    if not (found / "dagster.yaml").is_file():
        raise FileNotFoundError(f"{HOME}={found}: holds no dagster.yaml; copy dagster_home/dagster.yaml there")
    return found


@contextmanager
def instance(root: Path) -> Iterator[dg.DagsterInstance]:
    """The Dagster instance of the project; what goes wrong with its storage is an OSError that names the folder."""
    folder = str(home(root))
    try:
        with environ({HOME: folder, "DAGSTER_DISABLE_TELEMETRY": "yes"}), opened() as found:
            yield found
    except (SQLAlchemyError, StorageError) as error:
        cause = " ".join(str(getattr(error, "orig", None) or error).split())  # without the SQL, on one line
        room = f"{shutil.disk_usage(folder).free:,} bytes are free there"
        raise OSError(f"{HOME}={folder}: Dagster's storage or its dagster.yaml failed ({room}): {cause}") from error


class StorageError(Exception):
    """Dagster's storage can't be opened, for a reason that isn't SQLAlchemy's."""


def opened() -> dg.DagsterInstance:
    """The instance in $DAGSTER_HOME."""
    try:
        return dg.DagsterInstance.get()
    except (YAMLError, dg.DagsterError) as error:
        raise StorageError(str(error)) from error


def owner(root: Path) -> str:
    """Names this folder, also among equal paths on several machines: by a number that lies beside its lock."""
    number = root / ".dvc" / "tmp" / "dod.id"
    if not number.exists():
        number.write_text(uuid.uuid4().hex)
    return f"{root.absolute()} {number.read_text()}"


def bury(found: dg.DagsterInstance, root: Path) -> None:
    """Mark the runs of killed processes as failed and free their slots, for which others would wait without end. Call
    it with the folder's lock held: whoever started a `dod run` here before is dead then."""
    for run in found.get_runs(dg.RunsFilter(statuses=UNFINISHED)):
        if run.tags.get(OWNER) == owner(root) or (OWNER not in run.tags and is_orphan(found, run)):
            found.add_run_tags(run.run_id, {"dagster/max_retries": "0"})  # or the daemon would start it once more
            found.report_run_failed(run, "the process of this run was killed; the next dod run went on from there")
            found.event_log_storage.free_concurrency_slots_for_run(run.run_id)


def is_orphan(found: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Whether the process in which `dagster` executed a run has ended. False where another machine may have it."""
    if POSTGRES in os.environ:
        return False
    for entry in found.all_logs(run.run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
        stated = entry.get_dagster_event().event_specific_data
        number = stated.metadata.get("pid") if isinstance(stated, EngineEventData) else None
        if number is not None:  # the first is the run's own, those of its steps follow
            with suppress(psutil.NoSuchProcess):
                return psutil.Process(int(str(number.value))).create_time() > entry.timestamp
            return True
    return False


def run(params: Params, experiments: Sequence[str], until: str) -> list[tuple[str, str]]:
    """Make what is outdated, in order; OSError where a stage fails. Returns all of the experiments' stage instances."""
    jobs = list(dict.fromkeys(job for name in experiments for job in stages.instances(params, name, until)))
    names, root, run_id = [dvc_repo.address(stage, key) for stage, key in jobs], Path(), str(uuid.uuid4())
    with kept(params, run_id, root), dvc_repo.alone(root):
        remote.use(params.deployment.storage, root)
        ends = Graph(root).ends(names)  # dvc reads its files anew for each target
        status = dvc_repo.status(ends, root=root, patient=True)
        changed = {name: status[name] for name in names if name in status}
        if changed:  # an error in a late stage's settings shows before hours of training, not after
            for stage, key in jobs:
                stages.resolve(params, stage, key)
            listing.ensure(params, experiments)
        pipeline, definitions = define(pools=False)
        with instance(root) as found:
            bury(found, root)
            pipeline.report(pipeline.events(found), {}, [name for name in names if name not in changed])
            due = [name for name in pipeline.graph.downstream(changed) if name in names]
            demand(pipeline, [name for name in names if name not in due])
            if not due:
                print(f"Nothing to do: all {len(names)} stages of {', '.join(experiments)} are up to date.")
            else:
                tags = {OWNER: owner(root), "dod/experiment": ",".join(experiments), dvc_keep.KEPT: "dod run"}
                execute(found, definitions, [pipeline.keys[name] for name in due], tags, run_id)
    owed = dvc_transfer.owed(root)
    for stage, key in jobs:  # what is recorded, and pushed if it is to be, need not be kept twice
        if dvc_repo.address(stage, key) not in owed:
            mirror.forget_finished(params, stage, key)
            cluster.forget(stage, key, params.deployment)
    return jobs


@contextmanager
def kept(params: Params, run_id: str, root: Path) -> Iterator[None]:
    """Commit and push what was made, as `deployment` says, also where a later stage failed; not after Ctrl-C."""
    failed = None
    try:
        yield
    except (ValueError, OSError) as error:
        failed = error
    known = Graph(root).instances
    for text in dvc_keep.after_run(keep(params), run_id, known=known, root=root):
        print(f"warning: {text}", file=sys.stderr, flush=True)
    if failed is not None:
        raise failed


def demand(pipeline: Pipeline, names: Sequence[str]) -> None:
    """ValueError if what is up to date doesn't pass its checks; a warning stops nothing."""
    for name in names:
        for result in pipeline.extras[name].check():
            if not result.passed and result.severity is dg.AssetCheckSeverity.ERROR:
                raise ValueError(f"{name}: check {result.check_name!r} failed: {result.description}")


def execute(
    found: dg.DagsterInstance, defs: dg.Definitions, keys: list[dg.AssetKey], tags: dict[str, str], run_id: str
) -> None:
    """Materialize assets in this process; OSError says why one failed, KeyboardInterrupt that it was stopped."""
    job = defs.resolve_implicit_global_asset_job_def()
    try:
        done = job.execute_in_process(
            instance=found, asset_selection=keys, tags=tags, run_id=run_id, run_config=QUIET, raise_on_error=False
        )
    except dg.DagsterExecutionInterruptedError:
        raise KeyboardInterrupt from None
    failures = [event.step_failure_data for event in done.all_events if event.is_step_failure]
    if any(failure.error and failure.error.cls_name == "DagsterExecutionInterruptedError" for failure in failures):
        raise KeyboardInterrupt
    if not done.success:
        raise OSError("\n".join([*map(reason, failures), "What was finished stays: run it again to go on"]))


def reason(failure: StepFailureData) -> str:
    """Why a step failed, in the words of the stage or the check."""
    if failure.user_failure_data is not None and failure.user_failure_data.description:
        return failure.user_failure_data.description
    error = failure.error
    while error is not None and error.cause is not None:
        error = error.cause
    return "a step failed" if error is None else error.to_string()
