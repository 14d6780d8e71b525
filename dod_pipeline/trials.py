"""Seed blocks of checkpoints: what has to be equal for them to be compared, and their scores, each one computed once.

A block's scores are kept under `.state/gate/`, by the digest of everything that they depend on: settings and block,
weights, codec, reference, and the code. An incumbent's blocks are not sampled again, and a killed gate goes on.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from dod_models import artifact
from dod_models.config import Frozen
from dod_pipeline import launch, stages
from dod_pipeline.config import Params, Settings
from dod_pipeline.deployment import Deployment

CACHE = Path(".state", "gate")
STAGE = 2  # the last one: its FID is compared
SAMPLED = ("stage1", "stage2")
# Settings of sampling in which candidates may differ: of all blocks the seed is replaced by the same, the average is a
# choice of weights, and the others change no sample or are the block's.
FREE = ("seed", "num_samples", "ema_decay", "batch_size")


class Measure(Frozen):
    """How blocks are measured: the same for all that are compared."""

    data: str
    reference: str  # sha256 of the manifest, and the next
    codec: str
    stage1: Settings  # of sampling, but for `FREE`
    stage2: Settings
    num_samples: int


class Subject(NamedTuple):
    """A checkpoint that is gated or calibrated with."""

    key: str
    experiment: str
    step: int
    train: Settings  # but for seed and `compute`
    train_seed: int
    sampling: dict[str, Settings]  # of each stage
    weights: dict[str, str]  # sha256 of the averaged weights that each stage samples from
    inputs: dict[str, Path]
    measure: Measure
    extractor: dict[str, str]  # name and digest

    @property
    def trained_as(self) -> Settings:
        """Settings of training but for its seed, the step, and the averages that are sampled."""
        averages = {name: sampling["ema_decay"] for name, sampling in self.sampling.items()}
        return {"train": self.train, "step": self.step, "ema_decay": averages}

    @property
    def configuration(self) -> str:
        """Digest of what retrains have in common: everything but the seed of training."""
        common = {**self.trained_as, "measure": self.measure.model_dump()}
        return hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()


def manifest(folder: Path) -> tuple[dict[str, Any], str]:
    """A finished folder's manifest, and its sha256."""
    path = folder / artifact.MANIFEST
    return artifact.read_json(path), artifact.sha256_file(path)


def trained(params: Params, experiment: str) -> Frozen:
    """An experiment's settings of training; ValueError if what lies there was made with others."""
    config = stages.resolve(params, "train", experiment).config
    if manifest(Path("train", experiment))[0]["config"] != config.digest:
        raise ValueError(
            f"train/{experiment}: was made with other settings than params.yaml has now; "
            f"`dod run {experiment} --until train` makes it anew"
        )
    return config


def subject(params: Params, key: str) -> Subject:
    """A finished checkpoint of params.yaml."""
    from dod_models.checkpoint import weights_file

    stages.check_key(params, "metrics", key)
    item = params.checkpoints[key]
    experiment = params.experiments[item.experiment]
    train: Settings = json.loads(trained(params, item.experiment).canonical())
    seed: int = train.pop("seed")
    inputs, _, _ = stages.paths(params, "trial", key)
    sampling = {name: stages.resolve(params, name, key).config.model_dump(mode="json") for name in SAMPLED}
    evaluation = stages.resolve(params, "metrics", key).config.model_dump()
    files = manifest(inputs["checkpoint"])[0]["files"]
    reference, digest = manifest(inputs["reference"])
    measure = Measure(
        data=item.data,
        reference=digest,
        codec=manifest(inputs["codec"])[1],
        **{name: {n: v for n, v in sampling[name].items() if n not in FREE} for name in SAMPLED},
        num_samples=experiment.gate.num_samples or evaluation["num_samples"],
    )
    return Subject(
        key=key,
        experiment=item.experiment,
        step=item.step,
        train=train,
        train_seed=seed,
        sampling=sampling,
        weights={name: files[weights_file(sampling[name]["ema_decay"])]["sha256"] for name in SAMPLED},
        inputs=inputs,
        measure=measure,
        extractor=reference["about"]["extractor"],
    )


def differences(a: Settings, b: Settings, place: str = "") -> list[str]:
    """Settings of two mappings that differ, with both values."""
    found = []
    for name in sorted({*a, *b}):
        ours, theirs = a.get(name), b.get(name)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            found += differences(ours, theirs, f"{place}{name}.")
        elif ours != theirs:
            found.append(f"{place}{name} is {ours!r} and {theirs!r}")
    return found


def check_alike(subjects: list[Subject]) -> None:
    """ValueError unless all are measured in the same way."""
    first = subjects[0]
    for other in subjects[1:]:
        if found := differences(first.measure.model_dump(), other.measure.model_dump()):
            raise ValueError(
                f"{first.key} and {other.key} cannot be compared: {'; '.join(found)}; "
                f"make these equal in params.yaml, for {first.experiment} and {other.experiment}"
            )


def check_retrains(subjects: list[Subject]) -> None:
    """ValueError unless all are of one configuration, each one of another training seed."""
    first = subjects[0]
    for other in subjects[1:]:
        if found := differences(first.trained_as, other.trained_as):
            raise ValueError(
                f"{first.key} and {other.key} are not retrains of one configuration: {'; '.join(found)}; "
                "only train.seed may differ"
            )
    seeds = [one.train_seed for one in subjects]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"the training seeds are {', '.join(map(str, seeds))}; each must be another one")


def job(one: Subject, block: int, *, seeds: dict[str, int]) -> stages.Job:
    """The computation of a block, under the sampling seeds that all compared ones share."""
    from dod_models import source  # late, as the next: this imports torch
    from dod_models.trial import TrialConfig

    sampling = {name: one.sampling[name] | {"seed": seeds[name]} for name in SAMPLED}
    values = {"block": block, "num_samples": one.measure.num_samples, **sampling}
    config = TrialConfig.parse(values, place=f"params.yaml: sampling of {one.key}")
    name = source.key("trial", config.digest, one.inputs.values())
    return stages.Job("trial", one.key, config, one.inputs, CACHE / f"{name}.json", None)


def expected(one: Subject) -> dict[str, Any]:
    """What a trial says that it was measured on."""
    return {"weights": one.weights, "reference": one.measure.reference, "codec": one.measure.codec}


def scores(one: Subject, block: int, *, seeds: dict[str, int], deployment: Deployment) -> dict[str, dict[str, float]]:
    """Scores of each stage in a block, from `.state/gate/` or computed now."""
    wanted = job(one, block, seeds=seeds)
    if not wanted.out.is_file():
        print(f"block {block} of {one.key}", flush=True)
        if launch.run(wanted, deployment).code != 0:
            raise OSError(f"block {block} of {one.key} failed, as said above; what was finished stays: run it again")
    trial = artifact.read_json(wanted.out)
    if {name: trial[name] for name in expected(one)} != expected(one):
        wanted.out.unlink()
        raise OSError(f"{one.key}: its weights, codec or reference were made anew meanwhile; run it again")
    found: dict[str, dict[str, float]] = trial["scores"]
    return found


def seeds_of(one: Subject) -> dict[str, int]:
    """The sampling seeds from which those of the blocks are derived."""
    return {name: one.sampling[name]["seed"] for name in SAMPLED}


def block_seeds(seeds: dict[str, int], num_blocks: int) -> list[int]:
    """Each block's seed of the gated stage."""
    from dod_models.trial import block_seed

    return [block_seed(seeds[f"stage{STAGE}"], block) for block in range(num_blocks)]
