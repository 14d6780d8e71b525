"""Stages `metrics` and `sweeps`: scores of a checkpoint's samples, beside two floors at the same count."""

from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt, model_validator

from dod_models import artifact
from dod_models.checkpoint import load_checkpoint
from dod_models.codec import RECONSTRUCTIONS, Codec, device
from dod_models.codec import SCHEMA as CODEC_SCHEMA
from dod_models.config import Frozen
from dod_models.evaluate import score
from dod_models.features import SCHEMA as REFERENCE_SCHEMA
from dod_models.features import Extractor, FeatureSet
from dod_models.flow import Latent
from dod_models.sample import ALWAYS, SampleConfig, Samples, sample_stage
from dod_models.sample import SCHEMA as SAMPLES_SCHEMA


class ScoreConfig(Frozen):
    """What is compared with what."""

    num_samples: PositiveInt = 50_000  # of every generated set and of the floors: FID depends on it


class SweepRow(Frozen):
    """One variant of a stage's sampling; what is not given is as in the experiment."""

    stage: Literal[1, 2]
    guidance: float
    num_steps: PositiveInt | None = None
    null_branch: str | None = None
    guidance_interval: tuple[float, float] | None = None


class SweepConfig(Frozen):
    """Variants of stage 1 and stage 2; stage 2 starts from the experiment's own stage 1."""

    num_samples: PositiveInt
    stage1: SampleConfig
    stage2: SampleConfig
    rows: tuple[SweepRow, ...]

    @model_validator(mode="after")
    def check_rows(self) -> "SweepConfig":
        """Every row must be a valid way to sample, before the first is sampled."""
        self.variants()
        return self

    def variants(self) -> dict[str, tuple[int, SampleConfig]]:
        """Name of each row -> its stage and full settings."""
        found: dict[str, tuple[int, SampleConfig]] = {}
        for row in self.rows:
            base = self.stage1 if row.stage == 1 else self.stage2
            given = row.model_dump(exclude_none=True, exclude={"stage"})
            variant = SampleConfig.model_validate(base.model_dump() | given)
            name = f"stage{row.stage} guidance={variant.guidance:g} {variant.solver}"
            name += f" steps={variant.num_steps}" if variant.solver == "euler" else ""
            name += f" null={variant.null_branch}" if variant.guidance != 1 else ""
            low, high = variant.guidance_interval
            name += f" t={low:g}-{high:g}" if variant.guidance != 1 and (low, high) != ALWAYS else ""
            found[name] = (row.stage, variant)
        return found


def decoded(extractor: Extractor, codec: Codec, latents: Latent, count: int, *, name: str) -> FeatureSet:
    """Features of the first `count` samples, decoded in blocks; ValueError if there are fewer."""
    if len(latents) < count:
        raise ValueError(
            f"{name}: {len(latents)} samples, evaluation.num_samples is {count}; sample more, or ask for fewer"
        )
    return extractor(codec.decode_all(latents[:count]))


def floors(reference: Path, codec: Path, count: int) -> dict[str, FeatureSet]:
    """Held-out real images and their reconstructions, at most `count` of each."""
    return {
        "floor": FeatureSet.load(reference, "val.safetensors", schema=REFERENCE_SCHEMA).mixed(count),
        "codec": FeatureSet.load(codec, RECONSTRUCTIONS, schema=CODEC_SCHEMA).mixed(count),
    }


def build_metrics(
    config: ScoreConfig, *, reference: Path, codec: Path, stage1: Path, stage2: Path, out: Path
) -> dict[str, Any]:
    """FID, inception score, precision and recall of both stages and both floors, and how many images each one has."""
    real = FeatureSet.load(reference, "train.safetensors", schema=REFERENCE_SCHEMA)
    extractor, decoder = Extractor.load(reference), Codec.load(codec)
    sets = floors(reference, codec, config.num_samples)
    rows = {}
    for name, folder in (("stage1", stage1), ("stage2", stage2)):
        latents = Samples.load(folder).latents
        sets[name] = decoded(extractor, decoder, latents, config.num_samples, name=str(folder))
    for name, found in sets.items():
        rows[name] = {**score(found, real), "num_samples": len(found.features)}
    for name, folder in (("stage1", stage1), ("stage2", stage2)):
        rows[name]["evaluations"] = artifact.read_manifest(folder, schema=SAMPLES_SCHEMA)["about"]["evaluations"]
    artifact.write_json(out, rows)
    return rows


def build_sweeps(
    config: SweepConfig, *, checkpoint: Path, reference: Path, codec: Path, stage1: Path, out: Path
) -> dict[str, Any]:
    """Scores of every row of the sweep, with the network evaluations per sample that it takes, stage 1's included."""
    real = FeatureSet.load(reference, "train.safetensors", schema=REFERENCE_SCHEMA)
    extractor, decoder = Extractor.load(reference), Codec.load(codec)
    before = Samples.load(stage1)
    spent = artifact.read_manifest(stage1, schema=SAMPLES_SCHEMA)["about"]["evaluations"]
    model, _ = load_checkpoint(checkpoint, decay=config.stage1.ema_decay)
    model.to(device())
    table = {}
    for name, (stage, variant) in config.variants().items():
        previous = None if stage == 1 else before.latents
        latents, own = sample_stage(model, variant, stage=stage, labels=before.labels, previous=previous)
        found = decoded(extractor, decoder, latents, config.num_samples, name="sweeps")
        total = own.total + (spent if stage > 1 else 0)
        table[name] = {**score(found, real), "num_samples": len(found.features), "evaluations": total}
    artifact.write_json(out, table)
    return table
