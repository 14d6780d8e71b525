"""Stage `metrics`: scores of a checkpoint's samples, beside two floors at the same count."""

from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from dod_models import artifact
from dod_models.codec import RECONSTRUCTIONS, Codec
from dod_models.codec import SCHEMA as CODEC_SCHEMA
from dod_models.config import Frozen
from dod_models.evaluator import Evaluator
from dod_models.features import SCHEMA as REFERENCE_SCHEMA
from dod_models.features import FeatureSet
from dod_models.sample import SCHEMA as SAMPLES_SCHEMA
from dod_models.sample import Samples


class ScoreConfig(Frozen):
    """What is compared with what."""

    num_samples: PositiveInt = 50_000  # of every generated set and of the floors: FID depends on it


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
    evaluator, decoder = Evaluator.load(reference), Codec.load(codec)
    sets = floors(reference, codec, config.num_samples)
    rows = {}
    for name, folder in (("stage1", stage1), ("stage2", stage2)):
        latents = Samples.load(folder).latents
        sets[name] = evaluator.decoded(decoder, latents, config.num_samples, name=str(folder))
    for name, found in sets.items():
        rows[name] = {**evaluator.score(found), "num_samples": len(found.features)}
    for name, folder in (("stage1", stage1), ("stage2", stage2)):
        rows[name]["evaluations"] = artifact.read_manifest(folder, schema=SAMPLES_SCHEMA)["about"]["evaluations"]
    artifact.write_json(out, rows)
    return rows
