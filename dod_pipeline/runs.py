"""`dod run`: what DVC finds outdated is made by a Dagster run in this process, in the instance that the UI shows."""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
from dagster._core.execution.plan.objects import StepFailureData
from dagster._utils.env import environ
from sqlalchemy.exc import SQLAlchemyError

from dod_pipeline import checks, dvc_repo, stages
from dod_pipeline.config import Params
from dod_pipeline.definitions import define

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
        with environ({HOME: folder, "DAGSTER_DISABLE_TELEMETRY": "yes"}), dg.DagsterInstance.get() as found:
            yield found
    except (SQLAlchemyError, dg.DagsterError) as error:
        raise OSError(f"{HOME}={folder}: Dagster's storage or its dagster.yaml failed: {error}") from error


def owner(root: Path) -> str:
    """Names this folder on this machine."""
    return f"{socket.gethostname()}:{root.absolute()}"


def bury(found: dg.DagsterInstance, root: Path) -> None:
    """Mark the runs of killed `dod run`s here as failed and free their slots. Call it with the folder's lock held:
    whoever started them is dead then."""
    wanted = dg.RunsFilter(statuses=UNFINISHED, tags={OWNER: owner(root)})
    for run in found.get_runs(wanted):
        found.report_run_failed(run, "the dod run that started this was killed; the next one went on from there")
        found.event_log_storage.free_concurrency_slots_for_run(run.run_id)


def run(params: Params, experiments: Sequence[str], until: str, root: Path) -> list[tuple[str, str]]:
    """Make what is outdated, in order; OSError where a stage fails. Returns all of the experiments' stage instances."""
    jobs = list(dict.fromkeys(job for name in experiments for job in stages.instances(params, name, until)))
    names = [dvc_repo.address(stage, key) for stage, key in jobs]
    with dvc_repo.alone(root):
        changed = dvc_repo.status(names, root=root, wait=True)
        if changed:  # an error in a late stage's settings shows before hours of training, not after
            for stage, key in jobs:
                stages.resolve(params, stage, key)
        pipeline, definitions = define(root)
        with instance(root) as found:
            bury(found, root)
            pipeline.report(found, [name for name in names if name not in changed])
            due = [name for name in pipeline.graph.downstream(changed) if name in names]
            for stage, key in jobs:
                if dvc_repo.address(stage, key) not in due:
                    demand(params, stage, key)
            if not due:
                print(f"Nothing to do: all {len(names)} stages of {', '.join(experiments)} are up to date.")
            else:
                tags = {OWNER: owner(root), "dod/experiment": ",".join(experiments)}
                execute(found, definitions, [pipeline.keys[name] for name in due], tags)
    return jobs


def demand(params: Params, stage: str, key: str) -> None:
    """ValueError if an output that is up to date doesn't pass its checks."""
    check, _ = checks.CHECKS.get(stage, (None, ()))
    out = stages.paths(params, stage, key)[1]
    for outcome in check(out) if check else []:
        if not outcome.passed:
            raise ValueError(f"{stage}@{key}: check {outcome.name!r} failed: {outcome.grounds} ({out})")


def execute(found: dg.DagsterInstance, defs: dg.Definitions, keys: list[dg.AssetKey], tags: dict[str, str]) -> None:
    """Materialize assets in this process; OSError says why one failed, KeyboardInterrupt that it was stopped."""
    job = defs.resolve_implicit_global_asset_job_def()
    try:
        done = job.execute_in_process(
            instance=found, asset_selection=keys, tags=tags, run_config=QUIET, raise_on_error=False
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
