"""Stage `sweeps`: scores of variants of a checkpoint's sampling, for checkpoints that ask for it."""

from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt, model_validator

from dod_models import artifact
from dod_models.checkpoint import load_checkpoint
from dod_models.codec import Codec, device
from dod_models.config import Frozen
from dod_models.evaluator import Evaluator
from dod_models.sample import ALWAYS, SampleConfig, Samples, sample_stage
from dod_models.sample import SCHEMA as SAMPLES_SCHEMA


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


def build_sweeps(
    config: SweepConfig, *, checkpoint: Path, reference: Path, codec: Path, stage1: Path, out: Path
) -> dict[str, Any]:
    """Scores of every row of the sweep, with the network evaluations per sample that it takes, stage 1's included."""
    evaluator, decoder = Evaluator.load(reference), Codec.load(codec)
    before = Samples.load(stage1)
    spent = artifact.read_manifest(stage1, schema=SAMPLES_SCHEMA)["about"]["evaluations"]
    model, _ = load_checkpoint(checkpoint, decay=config.stage1.ema_decay)
    model.to(device())
    table = {}
    for name, (stage, variant) in config.variants().items():
        previous = None if stage == 1 else before.latents
        latents, own = sample_stage(model, variant, stage=stage, labels=before.labels, previous=previous)
        found = evaluator.decoded(decoder, latents, config.num_samples, name="sweeps")
        total = own.total + (spent if stage > 1 else 0)
        table[name] = {**evaluator.score(found), "num_samples": len(found.features), "evaluations": total}
    artifact.write_json(out, table)
    return table
