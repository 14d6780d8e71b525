"""Stage name + key -> typed config, inputs and outputs. dvc.yaml states the same paths, and a test compares the two."""

import json
from pathlib import Path
from typing import NamedTuple

from dod_models.artifact import MANIFEST, sha256_file
from dod_models.cli import STAGES as COMPUTATIONS
from dod_models.config import Frozen
from dod_pipeline.config import Params, Settings

BY_DATASET = ("dataset", "reference", "codec", "latents")
BY_EXPERIMENT = ("train", "report")
BY_CHECKPOINT = ("stage1", "stage2", "metrics", "sweeps")
ORDER = (*BY_DATASET, "train", "stage1", "stage2", "metrics", "sweeps", "report")
LAST = ORDER[-1]
SWEEP_PICTURE = "sweep.png"  # beside a checkpoint's samples: the same samples through the stages, the third one too


class Job(NamedTuple):
    """One stage instance, ready to be run."""

    stage: str
    key: str
    config: Frozen
    inputs: dict[str, Path]
    out: Path
    facts: Path | None  # None: the output is the numbers

    def arguments(self) -> list[str]:
        """The command line of dod_models.cli, which knows every stage but the report."""
        paths = [part for name, path in self.inputs.items() for part in (f"--{name}", str(path))]
        facts = [] if self.facts is None else ["--facts", str(self.facts)]
        return [self.stage, "--config", self.config.model_dump_json(), "--out", str(self.out), *paths, *facts]


def check_key(params: Params, stage: str, key: str) -> None:
    """ValueError that lists what there is."""
    if stage not in ORDER:
        raise ValueError(f"stage {stage!r} is unknown; choose one of {', '.join(ORDER)}")
    known = list(keys_of(params, stage))
    if key not in known:
        raise ValueError(f"{stage}: key {key!r} is not in params.yaml; it has {', '.join(known) or 'none'}")


def keys_of(params: Params, stage: str) -> list[str]:
    """The keys for which the stage exists."""
    if stage in BY_DATASET:
        return list(params.datasets)
    if stage in BY_EXPERIMENT:
        return list(params.experiments)
    return list(params.sweeps if stage == "sweeps" else params.checkpoints)


def settings(params: Params, stage: str, key: str) -> Settings:
    """The part of params.yaml that configures a stage."""
    if stage in BY_DATASET:
        found: Settings = getattr(params.datasets[key], stage)
        return found
    if stage == "train":
        experiment = params.experiments[key]
        return experiment.train | ({"compute": experiment.compute} if experiment.compute else {})
    if stage == "report":
        return params.only(key).model_dump()
    experiment = params.experiments[params.checkpoints[key].experiment]
    if stage == "metrics":
        return experiment.evaluation
    stages: dict[str, Settings] = {"stage1": experiment.stage1, "stage2": experiment.stage2}
    sampling = {name: experiment.sampling | changes for name, changes in stages.items()}
    if stage == "sweeps":
        asked = params.sweeps[key]
        shared = {name: value for name, value in experiment.evaluation.items() if name == "num_samples"}
        return {**sampling, **shared, "rows": asked.rows, "probe": asked.probe}
    return sampling[stage]


def paths(params: Params, stage: str, key: str) -> tuple[dict[str, Path], Path, Path | None]:
    """Inputs, output, and the file for the numbers."""
    facts = Path("facts", stage, f"{key}.json")
    if stage in BY_DATASET:
        inputs = {name: Path(name, key) for name in COMPUTATIONS[stage].inputs if name != "state"}
        return inputs | state_of(stage, key), Path(stage, key), facts
    if stage == "report":
        return shown(params.experiments[key].data, key), Path(stage, f"{key}.html"), None
    if stage == "train":
        latents = Path("latents", params.experiments[key].data)
        return {"latents": latents} | state_of(stage, key), Path(stage, key), facts
    item = params.checkpoints[key]
    samples = Path("samples", item.experiment, key)
    known = state_of(stage, key) | {
        "checkpoint": Path("train", item.experiment, f"step-{item.step}"),
        **{name: Path(name, item.data) for name in BY_DATASET},
        "stage1": samples / "stage1",
        "stage2": samples / "stage2",
        "previous": samples / "stage1",
        "picture": samples / SWEEP_PICTURE,  # a second output
    }
    inputs = {name: known[name] for name in COMPUTATIONS[stage].inputs if name != "state"} | state_of(stage, key)
    if stage in ("metrics", "sweeps"):  # beside each other: a report needs all of its experiment's
        name = f"{key}.json" if stage == "metrics" else f"{key}.sweep.json"
        return inputs, Path("metrics", item.experiment, name), None
    return inputs, samples / stage, Path("facts", stage, f"{key}.json")


def state_of(stage: str, key: str) -> dict[str, Path]:
    """Where a stage that can go on after a kill keeps its work in progress."""
    resumes = stage in COMPUTATIONS and "state" in COMPUTATIONS[stage].inputs
    return {"state": Path(".state", stage, key)} if resumes else {}


def work_of(job: Job) -> Path | None:
    """The folder, below its state, in which a training with these inputs works; None of other stages, and without
    inputs."""
    manifest = job.inputs.get("latents", Path()) / MANIFEST
    if job.stage != "train" or not manifest.is_file():
        return None
    return job.inputs["state"] / f"{job.config.digest[:16]}-{sha256_file(manifest)[:16]}"


def shown(data: str, experiment: str) -> dict[str, Path]:
    """What a report reads: manifests and facts, and the experiment's own folders of samples and metrics."""
    keys = {name: data for name in BY_DATASET} | {"train": experiment}
    manifests = {name: Path(name, key, MANIFEST) for name, key in keys.items()}
    facts = {f"{name}_facts": Path("facts", name, f"{key}.json") for name, key in keys.items()}
    folders = {name: Path(name, experiment) for name in ("samples", "metrics")}
    return {**manifests, **facts, **folders, "curve": Path("curves", f"{experiment}.json")}


def resolve(params: Params, stage: str, key: str) -> Job:
    """The job of a stage instance, its settings checked by their config class (this imports torch)."""
    check_key(params, stage, key)
    config_class = Params if stage == "report" else COMPUTATIONS[stage].load()[0]
    place = f"params.yaml: {stage} of {key}"
    return Job(stage, key, config_class.parse(settings(params, stage, key), place=place), *paths(params, stage, key))


def training_curve(job: Job) -> list[dict[str, float]]:
    """The rows of a finished training's curve."""
    return [json.loads(line) for line in (job.out / "curve.jsonl").read_text().splitlines()]


def instances(params: Params, experiment: str, until: str) -> list[tuple[str, str]]:
    """The stages of an experiment up to `until`, in order, as (stage, key)."""
    if experiment not in params.experiments:
        raise ValueError(f"experiment {experiment!r} is not in params.yaml; it has {', '.join(params.experiments)}")
    if until not in ORDER:
        raise ValueError(f"--until {until!r} is unknown; choose one of {', '.join(ORDER)}")
    data, checkpoints = params.experiments[experiment].data, list(params.checkpoints_of(experiment))
    keys = {stage: [data] for stage in BY_DATASET} | {stage: [experiment] for stage in BY_EXPERIMENT}
    keys |= {stage: checkpoints for stage in BY_CHECKPOINT} | {"sweeps": [c for c in checkpoints if c in params.sweeps]}
    keys |= {"report": [experiment] if checkpoints else []}  # without an evaluation there is nothing to report
    wanted = ORDER[: ORDER.index(until) + 1]
    return [(stage, key) for stage in wanted for key in keys[stage]]
