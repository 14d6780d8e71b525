"""`dod gate` and `dod calibrate`: whether a candidate is worse than the incumbent by more than retrains differ.

The arithmetic is that of `paired`. A verdict and a calibration are records, as immutable as an evaluation's.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveInt

from dod_models import artifact
from dod_models.config import Frozen
from dod_pipeline import history, ledger, paired, trials
from dod_pipeline.config import Params
from dod_pipeline.deployment import Deployment
from dod_pipeline.ledger import HISTORY, current_commit, write_once
from dod_pipeline.records import FOLDERS, Named, sampler_name
from dod_pipeline.trials import Subject

STATUS = {"PASS": 0, "FAIL": 2, "INCONCLUSIVE": 3}  # exit status of `dod gate`; 1 is an error


class Measured(BaseModel):
    """A checkpoint, and its FID in each block."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: str
    weights: str  # sha256 of the averaged weights, of the gated stage
    train_seed: NonNegativeInt
    fids: tuple[float, ...]


class Comparison(Frozen):
    """What a verdict and a calibration have in common: how their blocks were sampled and measured."""

    time: datetime
    experiment: str  # of the candidate; the first one's of a calibration
    checkpoint: str
    step: PositiveInt
    stage: PositiveInt
    tolerance: NonNegativeFloat  # FID
    num_samples: PositiveInt  # of each block
    seeds: tuple[NonNegativeInt, ...]  # of sampling, one for each block
    guidance: NonNegativeFloat
    sampler: str
    extractor: Named
    reference: str  # sha256 of the reference's manifest
    codec: str  # sha256 of the codec's manifest
    measure: str  # sha256 of all settings of measuring
    commit: str | None


class Verdict(Comparison):
    """What `dod gate` found."""

    kind: Literal["verdict"] = "verdict"
    verdict: paired.Ruling
    candidate: Measured
    incumbent: Measured
    differences: tuple[float, ...]  # FID of the candidate - FID of the incumbent, by block
    mean: float
    lower: float  # one-sided bounds of the mean
    upper: float
    level: float  # at which each of them was taken
    tolerance_from: str
    calibration: str | None  # id of the calibration that was found, whether it or the share of FID was larger


class Calibration(Comparison):
    """What `dod calibrate` found."""

    kind: Literal["calibration"] = "calibration"
    retrains: tuple[Measured, ...]
    spread: NonNegativeFloat  # standard deviation of their mean FIDs
    configuration: str  # sha256 of what they have in common


def fid_of(one: Subject, seeds: dict[str, int], deployment: Deployment) -> Callable[[int], float]:
    """The FID of a block, sampled when it is asked for."""
    return lambda block: trials.scores(one, block, seeds=seeds, deployment=deployment)[f"stage{trials.STAGE}"]["fid"]


def common(first: Subject, *, seeds: list[int], tolerance: float) -> dict[str, object]:
    """The fields of any comparison, whose blocks have these seeds."""
    sampling = first.sampling[f"stage{trials.STAGE}"]
    return {
        "time": datetime.now(UTC),
        "experiment": first.experiment,
        "checkpoint": first.key,
        "step": first.step,
        "stage": trials.STAGE,
        "tolerance": tolerance,
        "num_samples": first.measure.num_samples,
        "seeds": tuple(seeds),
        "guidance": sampling["guidance"],
        "sampler": sampler_name(sampling),
        "extractor": first.extractor,
        "reference": first.measure.reference,
        "codec": first.measure.codec,
        "measure": first.measure.digest,
        "commit": current_commit(),
    }


def measured(one: Subject, fids: list[float]) -> Measured:
    """The part of a record that is about one checkpoint."""
    weights = one.weights[f"stage{trials.STAGE}"]
    return Measured(checkpoint=one.key, weights=weights, train_seed=one.train_seed, fids=tuple(fids))


def append(record: Verdict | Calibration, root: Path = HISTORY) -> Path:
    """Write a record; FileExistsError rather than change one that is there."""
    return write_once(root / FOLDERS[record.kind] / record.experiment, record)


def newest_calibration(incumbent: Subject, root: Path = HISTORY) -> Calibration | None:
    """The newest calibration with retrains of the incumbent's configuration, or None."""
    rows = [row for row in history.query(root, kind="calibration") if row["configuration"] == incumbent.configuration]
    return ledger.typed(Calibration, rows[-1]) if rows else None


def calibrated_for(params: Params, incumbent: Subject) -> tuple[float, str, str | None]:
    """The tolerance beside the share of FID, where it comes from, and the id of the calibration."""
    place = f"experiments.{incumbent.experiment}.gate.tolerance"
    if (given := params.experiments[incumbent.experiment].gate.tolerance) is not None:
        return given, f"{place} in params.yaml", None
    found = newest_calibration(incumbent)
    if found is None:
        return 0.0, f"no calibration of this configuration, nor {place}", None
    return found.tolerance, f"calibration over {len(found.retrains)} retrains", found.digest


def gate(params: Params, candidate: str, incumbent: str) -> Verdict:
    """Compare block by block until it is decided; says so as it goes. The caller appends the verdict."""
    ours, theirs = (trials.subject(params, key) for key in (candidate, incumbent))
    trials.check_alike([theirs, ours])
    if ours.weights == theirs.weights:
        raise ValueError(f"{candidate} and {incumbent} are the same weights; gate a checkpoint against another one")
    settings, seeds = params.experiments[theirs.experiment].gate, trials.seeds_of(theirs)
    calibrated, source, calibration = calibrated_for(params, theirs)
    with artifact.locked(trials.CACHE):
        for look in paired.looks(
            fid_of(ours, seeds, params.deployment),
            fid_of(theirs, seeds, params.deployment),
            calibrated=calibrated,
            min_blocks=settings.min_blocks,
            max_blocks=settings.max_blocks,
            level=settings.level,
        ):
            print(described(look), flush=True)
    if look.tolerance > calibrated:
        source = f"{paired.SHARE:.0%} of the incumbent's FID, which is more than {calibrated:.3f}: {source}"
    block_seeds = trials.block_seeds(seeds, len(look.candidate))
    return Verdict.model_validate(
        common(ours, seeds=block_seeds, tolerance=look.tolerance)
        | {
            "verdict": look.ruling,
            "candidate": measured(ours, look.candidate),
            "incumbent": measured(theirs, look.incumbent),
            "differences": tuple(look.differences),
            "mean": look.mean,
            "lower": look.lower,
            "upper": look.upper,
            "level": look.level,
            "tolerance_from": source,
            "calibration": calibration,
        }
    )


def described(look: paired.Look) -> str:
    """A look, on a line."""
    shown = (
        f"{len(look.candidate)} blocks: candidate {fmean(look.candidate):.3f}, incumbent {fmean(look.incumbent):.3f}"
    )
    interval = f"difference {look.mean:+.3f} in ({look.lower:+.3f}, {look.upper:+.3f})"
    return f"{shown}, {interval}, tolerance {look.tolerance:.3f}: {look.ruling}"


def calibrate(params: Params, keys: list[str]) -> Calibration:
    """Measure how far retrains differ. The caller appends the calibration."""
    if len(keys) < paired.RETRAINS:
        raise ValueError(f"{len(keys)} checkpoints: give at least {paired.RETRAINS}, of different training seeds")
    retrains = [trials.subject(params, key) for key in keys]
    first = retrains[0]
    trials.check_alike(retrains)
    trials.check_retrains(retrains)
    seeds, num_blocks = trials.seeds_of(first), params.experiments[first.experiment].gate.min_blocks
    with artifact.locked(trials.CACHE):
        asked = {one.key: fid_of(one, seeds, params.deployment) for one in retrains}
        fids = {key: [fid(block) for block in range(num_blocks)] for key, fid in asked.items()}
    tolerance, spread = paired.calibrated_tolerance([fmean(found) for found in fids.values()])
    block_seeds = trials.block_seeds(seeds, num_blocks)
    return Calibration.model_validate(
        common(first, seeds=block_seeds, tolerance=tolerance)
        | {
            "retrains": tuple(measured(one, fids[one.key]) for one in retrains),
            "spread": spread,
            "configuration": first.configuration,
        }
    )
