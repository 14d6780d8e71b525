"""Stage `report`: one HTML page about an experiment, from the files that its other stages left. It needs no network.

The page also shows what each stage took on the machine that ran it, so it is the one output that may differ between
two clones.
"""

import base64
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dod_models import artifact, cost
from dod_models.model import ModelConfig
from dod_pipeline import canvas, costs, figures, ledger, plots, stages, tables
from dod_pipeline.config import Checkpoint, Params
from dod_pipeline.figures import SHORT_NAMES, Evaluated
from dod_pipeline.stages import Job

TEMPLATE = "report.html"
Scores = dict[str, dict[str, Any]]


class Subject:
    """What a report is about: an experiment's part of params.yaml, and the files that its stages left."""

    def __init__(self, job: Job) -> None:
        if not isinstance(job.config, Params):
            raise TypeError(f"{job.stage}@{job.key} is not a report")
        self.params, self.inputs, self.key = job.config, job.inputs, job.key
        self.data = self.params.experiments[self.key].data
        self.scores: dict[str, Scores] = {}
        self.sweeps: dict[str, Scores] = {}
        for name in self.checkpoints:
            if self.table(name).is_file():
                self.scores[name] = artifact.read_json(self.table(name))
            if name in self.scores and name in self.params.sweeps and self.sweep_table(name).is_file():
                found = artifact.read_json(self.sweep_table(name))
                if all("kind" in row for row in found.values()):  # an older table's rows name none
                    self.sweeps[name] = found
        self.pending = [name for name in self.checkpoints if name not in self.scores]
        self.unswept = [name for name in self.params.sweeps if name not in self.sweeps]

    @property
    def checkpoints(self) -> dict[str, Checkpoint]:
        return self.params.checkpoints_of(self.key)

    def table(self, checkpoint: str) -> Path:
        """The file of a checkpoint's scores."""
        return self.inputs["metrics"] / f"{checkpoint}.json"

    def sweep_table(self, checkpoint: str) -> Path:
        """The file of a checkpoint's sweep."""
        return self.inputs["metrics"] / f"{checkpoint}.sweep.json"

    def evaluated(self, checkpoint: str) -> Evaluated:
        """What figures show of a checkpoint."""
        sampling = {name: self.manifest(name, checkpoint)["about"]["sampling"] for name in ("stage1", "stage2")}
        step, sweep = self.checkpoints[checkpoint].step, self.sweeps.get(checkpoint, {})
        return Evaluated(step, self.scores[checkpoint], sampling, sweep)

    def job(self, stage: str, key: str) -> Job:
        """Another stage's job, with its settings in full."""
        return stages.resolve(self.params, stage, key)

    def manifest_paths(self) -> dict[tuple[str, str], Path]:
        """The manifest of every stage instance that has one, of evaluated checkpoints only."""
        keys = {name: self.data for name in stages.BY_DATASET} | {"train": self.key}
        found = {(stage, key): self.inputs[stage] for stage, key in keys.items()}
        for name in self.scores:
            for stage in ("stage1", "stage2"):
                found[stage, name] = self.inputs["samples"] / name / stage / artifact.MANIFEST
        return found

    def grid(self, checkpoint: str) -> Path:
        """The picture of a checkpoint's samples, stage 2 under stage 1; under both stage 3, where a sweep has it."""
        folder = self.inputs["samples"] / checkpoint
        return folder / (stages.SWEEP_PICTURE if checkpoint in self.sweeps else Path("stage2", "grid.png"))

    def stages_shown(self, checkpoint: str) -> str:
        """Which stages the picture shows."""
        swept = self.sweeps.get(checkpoint, {}).values()
        return "1, 2 and 3" if any(row["kind"] == "stage3" for row in swept) else "1 and 2"

    def manifest(self, stage: str, key: str) -> dict[str, Any]:
        """The manifest of a stage instance."""
        found: dict[str, Any] = artifact.read_json(self.manifest_paths()[stage, key])
        return found

    def facts(self, stage: str) -> dict[str, float]:
        """The numbers that a stage of the data set, or training, returned."""
        found: dict[str, float] = artifact.read_json(self.inputs[f"{stage}_facts"])
        return found

    def weights(self, checkpoint: str) -> dict[str, str]:
        """sha256 of a checkpoint's averaged weights, by path."""
        folder = f"step-{self.checkpoints[checkpoint].step}"
        files = self.manifest("train", self.key)["files"]
        found = {name: stated["sha256"] for name, stated in files.items() if name.startswith(f"{folder}/ema-")}
        return {f"train/{self.key}/{name}": digest for name, digest in found.items()}


def open_subject(job: Job) -> Subject:
    """What is to be reported; OSError that names a command if something is missing that the page can't do without."""
    subject = Subject(job)
    if not subject.checkpoints:
        raise FileNotFoundError(f"params.yaml: no checkpoint of {job.key} to report; add one, then `dod run {job.key}`")
    if not subject.scores:
        raise FileNotFoundError(
            f"{job.inputs['metrics']}: no checkpoint of {job.key} has been evaluated; `dod run {job.key}` does it"
        )
    for path in (*job.inputs.values(), *subject.manifest_paths().values(), *map(subject.grid, subject.scores)):
        if not path.exists():
            raise FileNotFoundError(f"{path}: missing; `dod run {job.key}` makes it, `dvc pull` fetches what was made")
    return subject


def write(job: Job) -> None:
    """Make the page beside its target, and rename it into place."""
    text = page(open_subject(job))
    job.out.parent.mkdir(parents=True, exist_ok=True)
    partial = job.out.with_name(f".{job.out.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, job.out)


def page(subject: Subject) -> str:
    """The whole page, about a subject of which everything is there."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    described = model(subject)
    spent = [(stage, key, costs.newest(subject.job(stage, key))) for stage, key in instances(subject)]
    return environment.get_template(TEMPLATE).render(
        key=subject.key,
        data=subject.data,
        newest=list(subject.scores)[-1],
        varied=varied(subject),
        steps={name: item.step for name, item in subject.checkpoints.items()},
        scores=subject.scores,
        sweeps=subject.sweeps,
        pending=subject.pending,
        unswept=subject.unswept,
        tables=tables,
        way=figures.way,
        floors=floors(subject),
        floors_equal=all(floors_of(scores) == floors(subject) for scores in subject.scores.values()),
        outdated=outdated(subject),
        grids={name: image(subject.grid(name)) for name in subject.scores},
        through=subject.stages_shown(list(subject.scores)[-1]),
        figures=drawn(subject),
        counts=subject.facts("dataset"),
        codec=subject.facts("codec"),
        evaluator=subject.facts("reference"),
        extractor=subject.manifest("reference", subject.data)["about"]["extractor"],
        train=subject.job("train", subject.key).config.model_dump(mode="json"),
        params=described["params"],
        gflops=described["gflops"],
        paces={
            name: {f"stage{number}": costs.pace(subject.params, name, stage=number) for number in (1, 2)}
            for name in subject.scores
        },
        settings=settings(subject),
        costs=spent,
        seconds=sum(found.seconds for *_, found in spent if found),
        unknown=sum(found is None for *_, found in spent),
        digests=list(digests(subject)),
        commit=ledger.current_commit(),
    )


def instances(subject: Subject) -> list[tuple[str, str]]:
    """The stage instances whose outputs the page shows."""
    found = stages.instances(subject.params, subject.key, until="sweeps")
    left_out = {("sweeps", name) for name in subject.unswept}
    return [(stage, key) for stage, key in found if key not in subject.pending and (stage, key) not in left_out]


def varied(subject: Subject) -> str:
    """The checkpoint whose costs and guidance are drawn: the newest one with a sweep, or else the newest."""
    return next((name for name in reversed(subject.scores) if name in subject.sweeps), list(subject.scores)[-1])


def floors_of(scores: Scores) -> Scores:
    """The rows that no stage made, the lowest first."""
    return {name: scores[name] for name in SHORT_NAMES}


def floors(subject: Subject) -> Scores:
    """The floors beside the newest evaluated checkpoint."""
    return floors_of(list(subject.scores.values())[-1])


def outdated(subject: Subject) -> list[str]:
    """Stage instances that params.yaml has since changed: what the page shows of them was made with other settings."""
    found = []
    for stage, key in subject.manifest_paths():
        if subject.manifest(stage, key)["config"] != subject.job(stage, key).config.digest:
            found.append(f"{stage}@{key}")
    return found


def image(path: Path) -> str:
    """A PNG as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def drawn(subject: Subject) -> dict[str, str]:
    """The plots as data URIs: as images of their own, so that the ids inside them can't meet."""
    all_of_them, one = [subject.evaluated(name) for name in subject.scores], subject.evaluated(varied(subject))
    found = {
        "fid": figures.over_steps(all_of_them),
        "plane": figures.plane(all_of_them),
        "bars": figures.stage_bars(one),
        "cost": figures.over_gflops(one),
        "guidance": figures.over_guidance(one),
        "loss": plots.loss_curve(artifact.read_json(subject.inputs["curve"])),
    }
    encoded = {name: base64.b64encode(canvas.svg(figure).encode()).decode() for name, figure in found.items() if figure}
    return {name: f"data:image/svg+xml;base64,{text}" for name, text in encoded.items()}


def model(subject: Subject) -> dict[str, Any]:
    """Parameters and GFLOPs of the experiment's model."""
    config = subject.job("train", subject.key).config.model_dump()["model"]
    return cost.describe(ModelConfig.parse(config, place=f"params.yaml: train of {subject.key}"))


def leaves(values: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of everything that is not a mapping."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{place}{name}.")
        else:
            yield f"{place}{name}", value


def settings(subject: Subject) -> list[dict[str, Any]]:
    """Of each stage, every setting in full: name, value, and whether params.yaml states it. Then the digest of all."""
    found = []
    for stage, key in dict(instances(subject)).items():  # of checkpoints, which share them, the newest
        config = subject.job(stage, key).config
        given = dict(leaves(stages.settings(subject.params, stage, key)))
        full = dict(leaves(config.model_dump(mode="json")))
        rows = [(name, shown(value), name in given) for name, value in (given | full).items()]
        found.append({"stage": stage, "rows": rows, "digest": config.digest})
    return found


def shown(value: Any) -> str:
    """A setting as text, as YAML would have it."""
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value)) or "none"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def digests(subject: Subject) -> Iterator[tuple[str, str, str]]:
    """Of everything that the page rests on: what it is, its path, its sha256."""
    yield "settings of this experiment", "params.yaml", subject.params.digest
    for (stage, key), path in subject.manifest_paths().items():
        yield f"{stage} of {key}: manifest, which has the digest of every file", str(path), artifact.sha256_file(path)
        if stage == "reference":
            extractor = artifact.read_json(path)["about"]["extractor"]
            yield f"the evaluator {extractor['name']}", f"{path.parent}/extractor.safetensors", extractor["digest"]
    for checkpoint in subject.scores:
        for name, digest in subject.weights(checkpoint).items():
            yield f"averaged weights of {checkpoint}", name, digest
    files = [*map(subject.table, subject.scores), *map(subject.sweep_table, subject.sweeps)]
    files += [path for name, path in subject.inputs.items() if name == "curve" or name.endswith("_facts")]
    for path in files:
        yield "numbers on this page", str(path), artifact.sha256_file(path)
