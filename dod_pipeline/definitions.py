"""What Dagster loads: the assets of dvc.yaml, a job for each experiment, the sensor. Nothing is computed on import."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition
from dagster._utils.schedules import get_smallest_cron_interval

from dod_pipeline import candidates, checks, costs, dvc_repo, exhibits, ledger, remote, schedules, stages
from dod_pipeline.config import Params, identifier, load_params
from dod_pipeline.dvc_assets import Extras, Pipeline
from dod_pipeline.dvc_graph import Graph, Instance
from dod_pipeline.dvc_keep import Keep

COMMITTED = ("dvc.lock", "metrics", "facts", "curves", "history")  # what git keeps of a run


class Line(NamedTuple):
    """What Dagster adds to a stage: what it is made with, and the pool whose slots it needs."""

    kind: str
    pool: str


LINES = {name: Line("pytorch", "gpu") for name in stages.ORDER} | {
    "dataset": Line("python", "dvc_repo"),
    "report": Line("html", "dvc_repo"),
}
EVALUATION = (*stages.BY_CHECKPOINT, "report")


def group_of(params: Params, stage: str, key: str) -> str:
    """The group of a stage instance: its experiment, or its data set where several experiments share it."""
    if stage in stages.BY_CHECKPOINT:
        return params.checkpoints[key].experiment
    return key


def extras(params: Params, instance: Instance) -> Extras:
    """A stage instance's line, checks, exhibits and owners."""
    stage, key = instance.stage, instance.key or ""
    line = LINES[stage]
    _, out, _ = stages.paths(params, stage, key)
    return Extras(
        group=identifier(group_of(params, stage, key)),
        kinds=frozenset({stage, line.kind}),  # the page shows a key's last part alone, and the kinds under it
        pool=line.pool,
        checks=checks.NAMES.get(stage, ()),
        check=lambda: [result(outcome) for outcome in checks.outcomes(params, stage, key)],
        metadata=lambda: exhibits.of(params, stage, key, out),
        owners=params.deployment.owners,
        freshness=freshness(params, stage, key),
        run_tags=partial(cost_tags, params, stage, key),
    )


def result(outcome: checks.Outcome) -> dg.AssetCheckResult:
    """A check's outcome as Dagster has it."""
    severity = dg.AssetCheckSeverity.ERROR if outcome.blocks else dg.AssetCheckSeverity.WARN
    return dg.AssetCheckResult(
        check_name=outcome.name, passed=outcome.passed, description=outcome.grounds, severity=severity
    )


def cost_tags(params: Params, stage: str, key: str, began: float) -> dict[str, str]:
    """Tags of the run that trained: seconds of the device, and arithmetic. None where DVC had it, nor of other stages,
    whose many tags would hide these: `history/costs` has theirs."""
    spent = costs.after(stage, key, began) if stage == "train" else None
    if spent is None:
        return {}
    return {
        f"dod/seconds.train.{key}": f"{spent.seconds:g}",
        f"dod/gflops.train.{key}": f"{costs.training_gflops(params, key):.4g}",
    }


def freshness(params: Params, stage: str, key: str) -> dg.FreshnessPolicy | None:
    """Of the report that a scheduled retraining makes, the newest retrain's or the experiment's own: overdue once the
    clock strikes and nothing was made since it struck before."""
    for experiment, settings in params.experiments.items():
        known, cron = candidates.numbers(params, experiment), settings.retrain.cron
        newest = f"{experiment}-r{known[-1]}" if known else experiment
        if cron is not None and (stage, key) == ("report", newest):
            return dg.FreshnessPolicy.cron(deadline_cron=cron, lower_bound_delta=get_smallest_cron_interval(cron))
    return None


def run_tags() -> dict[str, str]:
    """Tags of a run that makes something: the commit of the code."""
    commit = ledger.current_commit()
    return {} if commit is None else {"dod/commit": commit}


def keep(params: Params) -> Keep:
    """What a run's end keeps elsewhere, as params.yaml's `deployment` says."""
    storage, versioning = params.deployment.storage, params.deployment.versioning
    commit = COMMITTED if versioning.git_commit else ()
    return Keep(storage.push, storage.push_of, storage.timeout, remote.of(storage), commit)


def selected(pipeline: Pipeline, params: Params, experiment: str, wanted: Sequence[str]) -> dg.AssetSelection:
    """The assets of an experiment's stages that are wanted."""
    known = stages.instances(params, experiment, stages.LAST)
    names = [dvc_repo.address(stage, key) for stage, key in known if stage in wanted]
    return dg.AssetSelection.assets(*(pipeline.keys[name] for name in names))


def jobs_of(pipeline: Pipeline, params: Params, experiment: str) -> list[UnresolvedAssetJobDefinition]:
    """Everything of an experiment; and what is made of its checkpoints alone, where it has any."""
    named, tags = identifier(experiment), {"dod/experiment": experiment}
    found = [
        dg.define_asset_job(
            named,
            selection=selected(pipeline, params, experiment, stages.ORDER),
            description=f"Everything that experiment {experiment} needs, from images to its report.",
            tags=tags,
        )
    ]
    if params.checkpoints_of(experiment):
        evaluation = dg.define_asset_job(
            f"evaluate_{named}",
            selection=selected(pipeline, params, experiment, EVALUATION),
            description=f"Samples, scores and report of all checkpoints of {experiment}, of weights that are there.",
            tags=tags,
        )
        found.append(evaluation)
    return found


def define(*, pools: bool = True) -> tuple[Pipeline, dg.Definitions]:
    """The pipeline of the current folder, and its definitions."""
    params = load_params()
    retraining = schedules.automation(params)  # first: it says of a bad cron where it stands
    pipeline = Pipeline(Graph(Path()), partial(extras, params), run_tags=run_tags, pools=pools, keep=keep(params))
    jobs = [job for experiment in params.experiments for job in jobs_of(pipeline, params, experiment)]
    return pipeline, dg.Definitions(
        assets=pipeline.assets(),
        jobs=[*jobs, *pipeline.jobs, *retraining.jobs],
        schedules=retraining.schedules,
        sensors=[*pipeline.sensors(), *retraining.sensors],
    )


@dg.definitions
def defs() -> dg.Definitions:
    """Those of the current folder."""
    return define()[1]
