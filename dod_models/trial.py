"""Command `trial`: one seed block of a checkpoint, sampled and scored. What `dod gate` and `dod calibrate` compare."""

from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, PositiveInt

from dod_models import artifact, draws
from dod_models.checkpoint import load_checkpoint, weights_file
from dod_models.codec import Codec, device
from dod_models.config import Frozen
from dod_models.evaluator import Evaluator
from dod_models.sample import SampleConfig, sample_stage


class TrialConfig(Frozen):
    """Which block, of how many samples; `seed` and `num_samples` of both stages are replaced by the block's."""

    block: NonNegativeInt
    num_samples: PositiveInt
    stage1: SampleConfig
    stage2: SampleConfig

    def stages(self) -> dict[str, SampleConfig]:
        """Both stages' settings in this block."""
        return {
            name: base.model_copy(update={"seed": block_seed(base.seed, self.block), "num_samples": self.num_samples})
            for name, base in (("stage1", self.stage1), ("stage2", self.stage2))
        }


def block_seed(seed: int, block: int) -> int:
    """The sampling seed of a block, below 2**63: neither `seed` nor that of another block, but by a chance of 1e-17."""
    return int(draws.generator(seed, "block", block).integers(2**63))


def build_trial(config: TrialConfig, *, checkpoint: Path, reference: Path, codec: Path, out: Path) -> dict[str, Any]:
    """FID of both stages, as sampling with the block's seed and stage `metrics` would give them.

    Writes them with the settings, and the digests of what they were measured on. Samples are not kept.
    """
    measured = {
        name: artifact.sha256_file(path / artifact.MANIFEST)
        for name, path in (("reference", reference), ("codec", codec))
    }
    evaluator, decoder = Evaluator.load(reference), Codec.load(codec)
    labels = previous = None
    scores: dict[str, dict[str, float]] = {}
    weights, spent = {}, 0.0
    for number, (name, settings) in enumerate(config.stages().items(), start=1):
        model, manifest = load_checkpoint(checkpoint, decay=settings.ema_decay)
        weights[name] = manifest["files"][weights_file(settings.ema_decay)]["sha256"]
        if labels is None:
            labels = draws.labels_for(settings.seed, range(config.num_samples), model.config.num_classes)
        previous, own = sample_stage(model.to(device()), settings, stage=number, labels=labels, previous=previous)
        found = evaluator.gathered(decoder, previous, config.num_samples, name=f"block {config.block}")
        spent += own.total
        scores[name] = {"fid": evaluator.distance(found), "num_samples": config.num_samples, "evaluations": spent}
    trial = {"config": config.model_dump(mode="json"), "weights": weights, **measured, "scores": scores}
    artifact.write_json(out, trial)
    return trial
