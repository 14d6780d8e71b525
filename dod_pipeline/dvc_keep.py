"""What a run's end keeps elsewhere of what was made: outputs on DVC's remote, dvc.lock and small files in git.

Neither undoes a run: what can't be kept now is said, and kept the next time. Runs that Dagster's daemon sees end are
followed by a run of the job `dvc_keep`, for a push may take longer than a sensor has.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import dagster as dg

from dod_pipeline import dvc_git, dvc_transfer
from dod_pipeline.dvc_graph import Instance

KEPT = "dvc/kept"  # tag of runs whose end their own process sees to
NAME = "dvc_keep"


Push = Literal["each", "end", "never"]  # after each stage, or at a run's end


class Keep(NamedTuple):
    """What is kept, and when."""

    push: Push = "never"
    push_of: Mapping[str, Push] = MappingProxyType({})  # of some stages, or stage instances, instead
    timeout: float = 600.0  # seconds for one transfer
    remote: dvc_transfer.Remote | None = None  # where to; None: DVC's own default
    commit: tuple[str, ...] = ()  # files and folders that a run's end commits, dvc.lock first; none: no commit

    @property
    def pushes(self) -> bool:
        """Whether anything is pushed."""
        return {self.push, *self.push_of.values()} != {"never"}

    def when(self, instance: Instance) -> Push:
        """When the outputs of a stage instance are pushed."""
        return self.push_of.get(instance.name, self.push_of.get(instance.stage, self.push))

    def check(self, known: Collection[str]) -> None:
        """ValueError where `push_of` names what is neither a stage nor an instance."""
        for name in self.push_of.keys() - set(known):
            raise ValueError(f"push_of: dvc.yaml has no stage {name!r}; it has {', '.join(sorted(known))}")


NOTHING = Keep()


def after_stage(keep: Keep, instance: Instance, *, known: Collection[str], root: Path) -> Iterator[str]:
    """Push what was made, or note it for the run's end; yields what went wrong."""
    when = keep.when(instance)
    if when == "never":
        return
    dvc_transfer.owe([instance.name], root=root)
    if when == "each":
        yield from pushed(keep, known, root)


def after_run(keep: Keep, run_id: str, *, known: Collection[str], root: Path) -> Iterator[str]:
    """Commit and push; yields what went wrong."""
    if keep.commit:
        try:
            dvc_git.commit(keep.commit, f"Results of run {run_id}", root=root)
        except OSError as error:
            yield str(error)
    if keep.pushes:
        yield from pushed(keep, known, root)


def pushed(keep: Keep, known: Collection[str], root: Path) -> Iterator[str]:
    """Push what is noted; yields what went wrong."""
    try:
        if keep.remote is not None:
            dvc_transfer.use(keep.remote, root=root)
        dvc_transfer.settle(known, root=root, timeout=keep.timeout)
    except OSError as error:
        yield str(error)


def job(keep: Keep, *, known: Collection[str], root: Path) -> dg.JobDefinition:
    """The job that keeps; it fails where something couldn't be."""

    @dg.op(name=NAME, config_schema={"run_id": str})
    def body(context: dg.OpExecutionContext) -> None:
        wrong = list(after_run(keep, context.op_config["run_id"], known=known, root=root))
        if wrong:
            raise dg.Failure(description="\n".join(wrong), allow_retries=False)

    @dg.job(name=NAME, description="Commits and pushes what a run has made.")
    def graph() -> None:
        body()

    return graph


def sensors(keeper: dg.JobDefinition) -> list[dg.SensorDefinition]:
    """Those that start the job when a run has ended, well or not."""
    return [sensor(keeper, status) for status in (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE)]


def sensor(keeper: dg.JobDefinition, status: dg.DagsterRunStatus) -> dg.SensorDefinition:
    """The one for runs that end like this."""

    @dg.run_status_sensor(
        run_status=status,
        name=f"{NAME}_after_{status.value.lower()}",
        request_job=keeper,
        default_status=dg.DefaultSensorStatus.RUNNING,
    )
    def body(context: dg.RunStatusSensorContext) -> dg.RunRequest | dg.SkipReason:
        run = context.dagster_run
        if run.job_name == NAME or KEPT in run.tags:
            return dg.SkipReason("nothing of this run is left to be kept")
        return dg.RunRequest(run_key=run.run_id, run_config={"ops": {NAME: {"config": {"run_id": run.run_id}}}})

    return body
