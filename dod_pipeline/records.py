"""What a record of the history holds: the scores of one set of images, and everything that they depend on.

Scores lie in `history/EXPERIMENT/`; verdicts and calibrations of the gate, which are no scores, in folders of their
own (`FOLDERS`); `history/costs/` holds what stages took, `history/settings/` the settings that records name by digest.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeFloat, NonNegativeInt, PositiveInt

from dod_models import artifact
from dod_models.config import Frozen
from dod_pipeline import costs
from dod_pipeline.config import Params
from dod_pipeline.ledger import HISTORY, current_commit, write_once
from dod_pipeline.sources import Source, Sources
from dod_pipeline.stages import Job

FOLDERS = {"score": ".", "verdict": "verdicts", "calibration": "calibrations"}  # below the history, by kind of record


class Named(BaseModel):
    """A name, and the sha256 of what it names (not a `Frozen`, whose own `digest` the field would shadow)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    digest: str


class Record(Frozen):
    """The scores of one set of images, and everything they depend on. None: does not apply, or was not recorded."""

    kind: Literal["score"] = "score"
    time: datetime
    experiment: str
    checkpoint: str
    step: PositiveInt
    provisional: bool = False  # measured while training still ran
    job: Literal["metrics", "sweeps"] = "metrics"  # the stage that measured it
    row: str  # its name in that stage's table
    stage: PositiveInt | Literal["floor", "codec", "reconstruction", "probe"]
    metrics: dict[str, FiniteFloat]
    num_samples: PositiveInt  # of a probe: the images that it is tested on
    num_train: PositiveInt | None = None  # images that a probe is fitted on
    seed: NonNegativeInt | None  # of sampling
    train_seed: NonNegativeInt | None = None
    guidance: NonNegativeFloat | None
    sampler: str | None
    num_steps: PositiveInt | None = None  # of Euler; dopri5 chooses its own
    evaluations: float | None  # of the network, per sample, earlier stages included; so are the next five
    gflops_paper: float | None = None  # per sample
    gflops_true: float | None = None
    seconds: NonNegativeFloat | None = None  # that the sampling stages took, loading and pictures too
    images_per_second: NonNegativeFloat | None = None
    device: str | None = None  # on which they took so long
    extractor: Named | None  # None for a probe, which has none
    reference: str  # sha256 of the reference's manifest; of the data set's, where originals are what is compared with
    config: str  # sha256 of the stage's config
    previous: str | None = None  # the same of the stage before, from whose samples this one starts
    weights: str | None  # sha256 of the averaged weights; of the codec's manifest for its floor
    codec: str | None = None  # sha256 of the codec's manifest
    data: str  # sha256 of the data set's manifest
    sources: dict[str, Source] = Field(
        default_factory=dict
    )  # all files from the images to this number; `sources.INPUTS`
    commit: str | None  # of the code; "-dirty" where files were changed


FIELDS = {"num_samples", "evaluations", "gflops_paper", "gflops_true", "num_train"}  # of a row: not metrics
ABOUT = {"kind", "guidance", "num_test"}  # of a row: said by the record's other fields


def sampler_name(sampling: dict[str, Any]) -> str:
    """Short text for a stage's solver, e.g. `euler-10` or `dopri5`; where guidance is on, its options too."""
    name = f"{sampling['solver']}-{sampling['num_steps']}" if sampling["solver"] == "euler" else str(sampling["solver"])
    if sampling["solver"] == "dopri5" and (sampling["rtol"], sampling["atol"]) != (1e-3, 1e-6):
        name += f" rtol={sampling['rtol']:g} atol={sampling['atol']:g}"
    if sampling["guidance"] == 1:
        return name
    name += f" null={sampling['null_branch']} channels={sampling['channels']}"
    low, high = sampling["guidance_interval"]
    return name if (low, high) == (0, 1) else f"{name} t={low:g}-{high:g}"


class Sampled(NamedTuple):
    """How the samples of a row came about."""

    stage: int
    sampling: dict[str, Any]
    config: str
    previous: str | None  # config of the stage before


def samplings(job: Job) -> dict[str, Sampled]:
    """Those rows of a finished job that are samples of a checkpoint."""
    from dod_models.sweeps import SweepConfig

    if isinstance(job.config, SweepConfig):
        before = {1: None, 2: job.config.stage1.digest}  # later ones start from stage 2
        return {
            name: Sampled(stage, c.model_dump(mode="json"), c.digest, before.get(stage, job.config.stage2.digest))
            for name, (stage, c) in job.config.variants().items()
        }
    found: dict[str, Sampled] = {}
    previous = None
    for name in ("stage1", "stage2"):
        manifest = artifact.read_json(job.inputs[name] / artifact.MANIFEST)
        about = manifest["about"]
        found[name] = Sampled(about["stage"], about["sampling"], manifest["config"], previous)
        previous = manifest["config"]
    return found


def spent(params: Params, job: Job, name: str, row: dict[str, Any]) -> dict[str, Any]:
    """The fields that say what a row's sampling took; nothing for floors and a probe, which sample nothing."""
    kind, pace = row.get("kind", name), None
    if job.stage == "sweeps":
        before = int(kind[-1]) - 1 if kind.startswith("stage") else 0
        pace = costs.row_pace(params, job, name, count=row.get("num_samples", 0), before=before)
    elif kind.startswith("stage"):
        pace = costs.pace(params, job.key, stage=int(kind[-1]))
    return {} if pace is None else pace._asdict()


class Measured(NamedTuple):
    """What a job's rows were measured with: the extractor, and the sha256 of the others' manifests."""

    extractor: dict[str, str]
    reference: str
    codec: str
    data: str

    @classmethod
    def of(cls, job: Job) -> "Measured":
        """Read what the job's inputs state."""
        reference, codec = (job.inputs[name] / artifact.MANIFEST for name in ("reference", "codec"))
        about = artifact.read_json(reference)["about"]
        digests = {"reference": artifact.sha256_file(reference), "codec": artifact.sha256_file(codec)}
        return cls(extractor=about["extractor"], data=about["dataset"], **digests)

    def fields(self, kind: str) -> dict[str, Any]:
        """Those of a row's record; reconstructions and probes are compared with the images themselves."""
        found: dict[str, Any] = self._asdict()
        if kind == "floor":
            found["codec"] = None
        if kind == "probe":
            found["extractor"] = None
        if kind in ("reconstruction", "probe"):
            found["reference"] = self.data
        return found


def records(params: Params, job: Job) -> list[Record]:
    """The records of a finished stage `metrics` (both stages and both floors) or `sweeps` (its rows)."""
    from dod_models.checkpoint import weights_file

    item = params.checkpoints[job.key]
    now, commit = datetime.now(UTC), current_commit()
    checkpoint = artifact.read_json(job.inputs["checkpoint"] / artifact.MANIFEST)
    known, measured, sources, found = samplings(job), Measured.of(job), Sources(params, job), []
    for name, row in artifact.read_json(job.out).items():
        kind = row.get("kind", name)
        sampled = known.get(name)
        stage = sampled.stage if sampled and kind.startswith("stage") else kind
        settings = sampled.sampling if sampled else job.config.model_dump().get("stage2", {})  # as a probe takes them
        average = weights_file(settings["ema_decay"]) if kind not in ("floor", "codec") else None
        values = {
            "time": now,
            "experiment": item.experiment,
            "checkpoint": job.key,
            "step": item.step,
            "job": job.stage,
            "row": name,
            "stage": stage,
            "metrics": {key: value for key, value in row.items() if key not in FIELDS | ABOUT},
            "num_samples": row.get("num_samples", row.get("num_test")),
            **{name: row.get(name) for name in FIELDS - {"num_samples"}},
            "train_seed": checkpoint["about"]["seed"] if average else None,
            **origin(sampled, job, kind),
            **measured.fields(kind),
            **spent(params, job, name, row),
            "sources": sources.of(stage, average),
            "commit": commit,
        }
        if kind == "codec":
            values["weights"] = values["codec"]
        elif average:
            values["weights"] = checkpoint["files"][average]["sha256"]
        found.append(Record.model_validate(values))
    return found


def origin(sampled: Sampled | None, job: Job, kind: str) -> dict[str, Any]:
    """The fields that say how samples were drawn; None for what was not sampled."""
    if sampled is None:
        nothing = dict.fromkeys(("seed", "guidance", "sampler", "weights"))
        return {**nothing, "config": job.config.digest}
    sampling = sampled.sampling
    return {
        "seed": sampling["seed"],
        "guidance": sampling["guidance"],
        "sampler": sampler_name(sampling),
        "num_steps": sampling["num_steps"] if sampling["solver"] == "euler" else None,
        "config": sampled.config,
        "previous": sampled.previous if kind.startswith("stage") else None,  # a reconstruction starts from real images
    }


def append(record: Record, root: Path = HISTORY) -> Path:
    """Write a record; nothing is changed that is there."""
    return write_once(root / record.experiment, record)
