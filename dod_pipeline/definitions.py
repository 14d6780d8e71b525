"""What Dagster loads: the assets of dvc.yaml, a job for each experiment, the sensor. Nothing is computed on import."""

import base64
import io
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import dagster as dg

from dod_pipeline import checks, dvc_repo, ledger, stages
from dod_pipeline.config import Params, identifier, load_params
from dod_pipeline.dvc_assets import Extras, Pipeline
from dod_pipeline.dvc_graph import Graph, Instance
from dod_pipeline.dvc_keep import Keep

COMMITTED = ("dvc.lock", "metrics", "facts", "curves", "history")  # what git keeps of a run
PICTURE_WIDTH = 640  # pixels of a picture in Dagster, which keeps it in its event log


class Line(NamedTuple):
    """What Dagster adds to a stage: what it is made with, and the pool whose slots it needs."""

    kind: str
    pool: str


LINES = {name: Line("pytorch", "gpu") for name in stages.ORDER} | {
    "dataset": Line("python", "dvc_repo"),
    "report": Line("html", "dvc_repo"),
}


def group_of(params: Params, stage: str, key: str) -> str:
    """The group of a stage instance: its experiment, or its data set where several experiments share it."""
    if stage in stages.BY_CHECKPOINT:
        return params.checkpoints[key].experiment
    return key


def extras(params: Params, instance: Instance) -> Extras:
    """A stage instance's line, checks and pictures."""
    stage, key = instance.stage, instance.key or ""
    line = LINES[stage]
    check, names = checks.CHECKS.get(stage, (None, ()))
    _, out, _ = stages.paths(params, stage, key)
    return Extras(
        group=identifier(group_of(params, stage, key)),
        kinds=frozenset({stage, line.kind}),  # the page shows a key's last part alone, and the kinds under it
        pool=line.pool,
        checks=names,
        check=lambda: [] if check is None else [result(outcome) for outcome in check(out)],
        metadata=lambda: dict(pictures(stage, key, out)),
    )


def result(outcome: checks.Outcome) -> dg.AssetCheckResult:
    """A check's outcome as Dagster has it."""
    return dg.AssetCheckResult(check_name=outcome.name, passed=outcome.passed, description=outcome.grounds)


def pictures(stage: str, key: str, out: Path) -> dict[str, Any]:
    """The samples' grid, or the training's curve, as Markdown with the picture in it."""
    if stage == "train":
        from dod_models import artifact
        from dod_pipeline import canvas, plots

        curve = canvas.png(plots.loss_curve(artifact.read_json(Path("curves", f"{key}.json"))))
        return {"loss curve": markdown(curve)}
    grid = out / "grid.png"
    return {"grid": markdown(grid.read_bytes())} if grid.is_file() else {}


def markdown(png: bytes) -> dg.MarkdownMetadataValue:
    """A picture in Markdown, made small."""
    from PIL import Image

    image = Image.open(io.BytesIO(png))
    image.thumbnail((PICTURE_WIDTH, 4 * PICTURE_WIDTH))
    small = io.BytesIO()
    image.save(small, "PNG", optimize=True)
    return dg.MetadataValue.md(f"![picture](data:image/png;base64,{base64.b64encode(small.getvalue()).decode()})")


def run_tags() -> dict[str, str]:
    """Tags of a run that makes something: the commit of the code."""
    commit = ledger.current_commit()
    return {} if commit is None else {"dod/commit": commit}


def keep(params: Params) -> Keep:
    """What a run's end keeps elsewhere, as params.yaml's `deployment` says."""
    storage, versioning = params.deployment.storage, params.deployment.versioning
    return Keep(storage.push, storage.timeout, COMMITTED if versioning.git_commit else ())


def everything(pipeline: Pipeline, params: Params, experiment: str) -> dg.AssetSelection:
    """All assets of an experiment."""
    names = [dvc_repo.address(*pair) for pair in stages.instances(params, experiment, stages.LAST)]
    return dg.AssetSelection.assets(*(pipeline.keys[name] for name in names))


def define(*, pools: bool = True) -> tuple[Pipeline, dg.Definitions]:
    """The pipeline of the current folder, and its definitions."""
    params = load_params()
    pipeline = Pipeline(Graph(Path()), partial(extras, params), run_tags=run_tags, pools=pools, keep=keep(params))
    jobs = [
        dg.define_asset_job(
            identifier(experiment),
            selection=everything(pipeline, params, experiment),
            description=f"Everything that experiment {experiment} needs, from images to its report.",
            tags={"dod/experiment": experiment},
        )
        for experiment in params.experiments
    ]
    return pipeline, dg.Definitions(assets=pipeline.assets(), jobs=[*jobs, *pipeline.jobs], sensors=pipeline.sensors())


@dg.definitions
def defs() -> dg.Definitions:
    """Those of the current folder."""
    return define()[1]
