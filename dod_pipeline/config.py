"""params.yaml: data sets, experiments, checkpoints and sweeps, loaded and checked as a whole.

The settings of the stages themselves are typed by the config classes of `dod_models`, which need torch; they are
checked by `stages.resolve`, so that commands which only list things stay fast.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    field_validator,
    model_validator,
)

from dod_models.config import Frozen
from dod_pipeline.deployment import Deployment, Storage

# Keys become names of stages, files and DVC targets, and reach a shell through dvc.yaml. No dots: to DVC, the setting
# `checkpoints.v1.5` is 5 in v1.
Key = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_-]*$")]
Settings = dict[str, Any]

PARAMS_FILE = Path("params.yaml")
ENDPOINT = "AWS_ENDPOINT_URL_S3"  # environment: whom boto3 and the aws command ask in AWS's place


class DataSet(Frozen):
    """Settings of the stages that are keyed by data set."""

    dataset: Settings
    reference: Settings
    codec: Settings
    latents: Settings


class Gate(Frozen):
    """How `dod gate` and `dod calibrate` compare checkpoints, in blocks of samples that each have a seed."""

    num_samples: PositiveInt | None = None  # of a block; None: as many as the evaluation's
    min_blocks: int = Field(3, ge=3)
    max_blocks: PositiveInt = 8
    level: float = Field(0.05, gt=0, lt=0.5)  # of either bound at each look; 0.05 / 6 holds for all looks together
    tolerance: NonNegativeFloat | None = None  # FID; None: what the newest fitting calibration gave

    @model_validator(mode="after")
    def check_blocks(self) -> Self:
        """There is a first look, and then a last one."""
        if self.max_blocks < self.min_blocks:
            raise ValueError(f"max_blocks: {self.max_blocks} is below min_blocks: {self.min_blocks}; raise it")
        return self


class Provisional(Frozen):
    """Scores of saved steps while training runs: of how many samples, and where."""

    num_samples: PositiveInt  # more than the evaluator has features: 2,048 of Inception's
    every: PositiveInt | None = None  # steps; None: each one that is saved
    devices: str = ""  # GPUs, as CUDA_VISIBLE_DEVICES has them; "": the CPU, so that training has its GPUs alone


class Retrain(Frozen):
    """`dod retrain`: a training that goes on from the champion's weights, and when Dagster begins one by itself."""

    cron: str | None = Field(None, pattern=r"^\S+( \S+){4}$")  # minute hour day month weekday, UTC; None: no schedule
    watch: bool = False  # a sensor that begins one when the images have changed
    watch_every: PositiveInt = 60  # seconds between two looks at them
    steps: PositiveInt | None = None  # as the experiment's; the next two as well
    learning_rate: PositiveFloat | None = None
    warmup_steps: int | None = Field(None, ge=0)


class Experiment(Frozen):
    """Settings of training, of sampling (of every stage, then what stage 1 and the later ones change), of scoring.

    `compute` lays training out over the hardware, `gate` compares what was made, `provisional` looks at it while it is
    made, `retrain` makes another experiment. No stage's result depends on these, so DVC isn't told of them.
    """

    data: Key
    train: Settings
    compute: Settings = Field(default_factory=dict)
    sampling: Settings
    stage1: Settings
    stage2: Settings
    evaluation: Settings
    gate: Gate = Gate()
    provisional: Provisional | None = Field(default=None, exclude=True)  # None: no such scores
    retrain: Retrain = Retrain()

    @model_validator(mode="after")
    def check_averages(self) -> Self:
        """The weights to be sampled from are held in training, as far as both are given here."""
        held = self.train.get("ema_decays")
        for place in ("sampling", "stage1", "stage2"):
            wanted = getattr(self, place).get("ema_decay")
            if held and isinstance(wanted, float) and wanted not in held:
                raise ValueError(f"{place}.ema_decay: {wanted} is not one of train.ema_decays: {held}")
        return self

    @field_validator("train")
    @classmethod
    def check_compute(cls, train: Settings) -> Settings:
        """What changes no result must not stand where DVC looks."""
        if "compute" in train:
            raise ValueError("compute stands beside train, not in it, so that a change of it makes nothing stale")
        return train


class Checkpoint(Frozen):
    """A saved step of an experiment that is evaluated."""

    experiment: Key
    data: Key  # of the experiment: dvc.yaml can't look it up
    step: PositiveInt


class Sweep(Checkpoint):
    """Variants of the checkpoint's sampling to be scored, and whether, or how, a linear layer probes its LEM."""

    rows: list[Settings]
    probe: bool | Settings = False


def identifier(key: str) -> str:
    """A key as Dagster allows it in names of groups, jobs and steps."""
    return re.sub(r"\W", "_", key)


def check_apart(place: str, keys: list[str]) -> None:
    """ValueError if two keys differ in punctuation alone: Dagster couldn't tell them apart."""
    seen: dict[str, str] = {}
    for key in keys:
        other = seen.setdefault(identifier(key), key)
        if other != key:
            raise ValueError(f"{place}: {other!r} and {key!r} differ in punctuation alone; rename one of them")


class Params(Frozen):
    """The whole of params.yaml."""

    datasets: dict[Key, DataSet]
    experiments: dict[Key, Experiment]
    checkpoints: dict[Key, Checkpoint]
    sweeps: dict[Key, Sweep] = Field(default_factory=dict)
    deployment: Deployment = Field(default=Deployment(), exclude=True)  # no part of digests and of what pages show

    @model_validator(mode="after")
    def check_references(self) -> Self:
        """Every name that is referred to exists, and repeated facts agree."""
        for place in ("datasets", "experiments", "checkpoints"):
            check_apart(place, list(getattr(self, place)))
        for name, experiment in self.experiments.items():
            if experiment.data not in self.datasets:
                raise ValueError(
                    f"experiments.{name}.data: {experiment.data!r} is not one of datasets: {list(self.datasets)}"
                )
        for place, mapping in (("checkpoints", self.checkpoints), ("sweeps", self.sweeps)):
            for name, item in mapping.items():
                self.check_checkpoint(f"{place}.{name}", item)
        for name, sweep in self.sweeps.items():
            base = self.checkpoints.get(name)
            if base is None or (base.experiment, base.step) != (sweep.experiment, sweep.step):
                raise ValueError(
                    f"sweeps.{name}: experiment and step are not those of checkpoints.{name}; correct one of them"
                )
        return self

    def check_checkpoint(self, place: str, item: Checkpoint) -> None:
        """ValueError unless the checkpoint is one that its experiment saves."""
        experiment = self.experiments.get(item.experiment)
        if experiment is None:
            raise ValueError(
                f"{place}.experiment: {item.experiment!r} is not one of experiments: {list(self.experiments)}"
            )
        if item.data != experiment.data:
            raise ValueError(
                f"{place}.data: is {item.data!r}, its experiment's data is {experiment.data!r}; make them equal"
            )
        every, last = experiment.train.get("save_every"), experiment.train.get("steps")
        if isinstance(every, int) and isinstance(last, int) and every > 0 and (item.step % every or item.step > last):
            raise ValueError(
                f"{place}.step: {item.step} is never saved: {item.experiment} saves every {every} steps up to {last}"
            )

    def checkpoints_of(self, experiment: str) -> dict[str, Checkpoint]:
        """The evaluated checkpoints of an experiment, by step."""
        found = {name: c for name, c in self.checkpoints.items() if c.experiment == experiment}
        return dict(sorted(found.items(), key=lambda item: item[1].step))

    def only(self, experiment: str) -> "Params":
        """The part that concerns one experiment: its data, checkpoints and sweeps, of what configures stages."""
        rest = {"compute": {}, "gate": Gate(), "retrain": Retrain()}
        found = self.experiments[experiment].model_copy(update=rest)
        return Params(
            datasets={found.data: self.datasets[found.data]},
            experiments={experiment: found},
            checkpoints=self.checkpoints_of(experiment),
            sweeps={name: sweep for name, sweep in self.sweeps.items() if sweep.experiment == experiment},
        )


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Read and check params.yaml; a ValueError names file, key, value and remedy.

    `deployment.storage.endpoint` is put into the environment, unless it names another: boto3 finds it there, in this
    process and in those that it starts.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.absolute()}: not found; run dod in the folder that holds params.yaml") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from None
    params = Params.parse(values, place=str(path))
    if params.deployment.storage.endpoint is not None:
        os.environ.setdefault(ENDPOINT, params.deployment.storage.endpoint)
    return params


def storage() -> Storage:
    """The storage of this folder's installation; that of none where it has no params.yaml, as the history can be read
    anywhere."""
    return load_params().deployment.storage if PARAMS_FILE.exists() else Storage()
