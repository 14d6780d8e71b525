"""Stages `metrics` and `sweeps`: scores of a checkpoint's samples, beside two floors at the same count."""

from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from dod_models import artifact
from dod_models.checkpoint import load_checkpoint
from dod_models.codec import RECONSTRUCTIONS, Codec, device
from dod_models.codec import SCHEMA as CODEC_SCHEMA
from dod_models.config import Frozen
from dod_models.evaluate import score
from dod_models.features import SCHEMA as REFERENCE_SCHEMA
from dod_models.features import Extractor, FeatureSet
from dod_models.flow import Latent
from dod_models.sample import SCHEMA as SAMPLES_SCHEMA
from dod_models.sample import SampleConfig, Samples, sample_stage

DECODE_BATCH = 100  # latents through the decoder at a time


class ScoreConfig(Frozen):
    """What is compared with what."""

    num_samples: PositiveInt = 50_000  # of every generated set and of the floors: FID depends on it


class SweepRow(Frozen):
    """One variant of a stage's sampling; what is not given is as in the experiment."""

    stage: PositiveInt
    guidance: float
    num_steps: PositiveInt | None = None
    null_branch: str | None = None


class SweepConfig(Frozen):
    """Variants of stage 1 and stage 2; stage 2 starts from the experiment's own stage 1."""

    num_samples: PositiveInt
    stage1: SampleConfig
    stage2: SampleConfig
    rows: tuple[SweepRow, ...]


def decoded(extractor: Extractor, codec: Codec, latents: Latent, count: int, *, name: str) -> FeatureSet:
    """Features of the first `count` samples, decoded in blocks; ValueError if there are fewer."""
    if len(latents) < count:
        raise ValueError(
            f"{name}: {len(latents)} samples, evaluation.num_samples is {count}; sample more, or ask for fewer"
        )
    return extractor(codec.decode(part) for part in latents[:count].split(DECODE_BATCH))


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
    for row in config.rows:
        given = {k: v for k, v in row.model_dump(exclude_none=True).items() if k != "stage"}
        base = config.stage1 if row.stage == 1 else config.stage2
        variant = SampleConfig.parse({**base.model_dump(), **given}, place="sweeps")
        previous = None if row.stage == 1 else before.latents
        latents, evaluations = sample_stage(model, variant, stage=row.stage, labels=before.labels, previous=previous)
        found = decoded(extractor, decoder, latents, config.num_samples, name="sweeps")
        name = f"stage{row.stage} guidance={variant.guidance:g} steps={variant.num_steps} null={variant.null_branch}"
        total = evaluations + (spent if row.stage > 1 else 0)
        table[name] = {**score(found, real), "num_samples": len(found.features), "evaluations": total, **given}
    artifact.write_json(out, table)
    return table
