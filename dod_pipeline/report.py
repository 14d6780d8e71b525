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
from dod_pipeline import costs, ledger, plots, stages
from dod_pipeline.config import Checkpoint, Params
from dod_pipeline.stages import Job
from dod_pipeline.tables import METRICS, NAMES

TEMPLATE = "report.html"
SHORT_NAMES = {"floor": "held-out", "codec": "codec"}  # of the floors, in figures
Scores = dict[str, dict[str, float]]


class Subject:
    """What a report is about: an experiment's part of params.yaml, and the files that its stages left."""

    def __init__(self, job: Job) -> None:
        if not isinstance(job.config, Params):
            raise TypeError(f"{job.stage}@{job.key} is not a report")
        self.params, self.inputs, self.key = job.config, job.inputs, job.key
        self.data = self.params.experiments[self.key].data
        self.scores: dict[str, Scores] = {}
        self.pending: list[str] = []
        for name in self.checkpoints:
            path = self.inputs["metrics"] / f"{name}.json"
            if path.is_file():
                self.scores[name] = artifact.read_json(path)
            else:
                self.pending.append(name)

    @property
    def checkpoints(self) -> dict[str, Checkpoint]:
        return self.params.checkpoints_of(self.key)

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
        """The picture of a checkpoint's samples, stage 2 under stage 1."""
        return self.inputs["samples"] / checkpoint / "stage2" / "grid.png"

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
    newest = list(subject.scores)[-1]
    described = model(subject)
    spent = [(stage, key, costs.newest(subject.job(stage, key))) for stage, key in instances(subject)]
    return environment.get_template(TEMPLATE).render(
        key=subject.key,
        data=subject.data,
        newest=newest,
        steps={name: item.step for name, item in subject.checkpoints.items()},
        scores=subject.scores,
        pending=subject.pending,
        metrics=METRICS,
        names=NAMES,
        floors=floors(subject),
        floors_equal=all(floors_of(scores) == floors(subject) for scores in subject.scores.values()),
        outdated=outdated(subject),
        grids={name: image(subject.grid(name)) for name in subject.scores},
        figures=figures(subject),
        counts=subject.facts("dataset"),
        codec=subject.facts("codec"),
        evaluator=subject.facts("reference"),
        extractor=subject.manifest("reference", subject.data)["about"]["extractor"],
        train=subject.job("train", subject.key).config.model_dump(mode="json"),
        params=described["params"],
        gflops=described["gflops"],
        per_sample={name: per_sample(subject, name, described) for name in subject.scores},
        settings=settings(subject),
        costs=spent,
        seconds=sum(found.seconds for *_, found in spent if found),
        unknown=sum(found is None for *_, found in spent),
        digests=list(digests(subject)),
        commit=ledger.current_commit(),
    )


def instances(subject: Subject) -> list[tuple[str, str]]:
    """The stage instances whose outputs the page shows."""
    found = stages.instances(subject.params, subject.key, until="metrics")
    return [(stage, key) for stage, key in found if key not in subject.pending]


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


def figures(subject: Subject) -> dict[str, str]:
    """The plots as data URIs: as images of their own, so that the ids inside them can't meet."""
    count = list(subject.scores.values())[-1]["stage2"]["num_samples"]  # never draw scores of other counts beside it
    fid: dict[str, list[tuple[float, float]]] = {}
    plane: dict[str, list[tuple[float, float, float]]] = {}
    for checkpoint, scores in subject.scores.items():
        step = subject.checkpoints[checkpoint].step
        for name, row in scores.items():
            if name not in SHORT_NAMES and row["num_samples"] == count:
                title = name.replace("stage", "stage ")
                fid.setdefault(title, []).append((step, row["fid"]))
                plane.setdefault(title, []).append((step, row["precision"], row["recall"]))
    rows = {SHORT_NAMES[name]: row for name, row in floors(subject).items() if row["num_samples"] == count}
    drawn = {
        "fid": plots.over_steps(fid, {name: row["fid"] for name, row in rows.items()}, metric="fid"),
        "plane": plots.precision_recall(plane, {n: (row["precision"], row["recall"]) for n, row in rows.items()}),
        "loss": plots.loss_curve(artifact.read_json(subject.inputs["curve"])),
    }
    encoded = {name: base64.b64encode(plots.svg(figure).encode()).decode() for name, figure in drawn.items()}
    return {name: f"data:image/svg+xml;base64,{text}" for name, text in encoded.items()}


def model(subject: Subject) -> dict[str, Any]:
    """Parameters and GFLOPs of the experiment's model."""
    config = subject.job("train", subject.key).config.model_dump()["model"]
    return cost.describe(ModelConfig.parse(config, place=f"params.yaml: train of {subject.key}"))


def per_sample(subject: Subject, checkpoint: str, described: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """GFLOPs of a sample in either convention, after stage 1, and after stage 2 with all before it."""
    names = ("stage1", "stage2")
    spent = [cost.Spent.stated(subject.manifest(name, checkpoint)["about"]) for name in names]
    found = dict(zip(names, cost.per_sample(described, spent), strict=True))
    return {kind: {name: row[f"gflops_{kind}"] for name, row in found.items()} for kind in described["gflops"]}


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
    files = [subject.inputs["metrics"] / f"{name}.json" for name in subject.scores]
    files += [path for name, path in subject.inputs.items() if name == "curve" or name.endswith("_facts")]
    for path in files:
        yield "numbers on this page", str(path), artifact.sha256_file(path)
