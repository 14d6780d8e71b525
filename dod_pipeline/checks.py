"""What must hold of an output before anything is built on it. Numbers only, without torch: Dagster calls this often.

A data set's index is counted by DuckDB (a quarter of a second for ImageNet's), of latents the headers of all shards and
a bounded number of rows are read.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from dod_models import artifact
from dod_pipeline import ledger, stages
from dod_pipeline.config import Params
from dod_pipeline.records import FOLDERS

# Latents are scaled to a standard deviation of about 1 (`Codec.scale`), and nothing centres them.
MEAN, STD = 1.0, (0.5, 2.0)
LARGEST = 25.0  # beyond it the solver has diverged
SPREAD = 0.05  # standard deviation over the samples, below which they are all alike
ROWS = 1024  # samples held in memory at a time


class Outcome(NamedTuple):
    """Whether a check passed, and on what grounds."""

    name: str
    passed: bool
    grounds: str
    blocks: bool = True  # whether what follows is stopped where it failed


def check_dataset(folder: Path, *, limit: float) -> list[Outcome]:
    """Images in every class of the train split, and few enough that could not be read."""
    import duckdb  # late: definitions load without it

    about = artifact.read_json(folder / artifact.MANIFEST)["about"]
    names = artifact.read_json(folder / "classes.json")
    sql = "SELECT label, count(*) FROM read_json(?, format='newline_delimited', columns={label: 'BIGINT'}) GROUP BY 1"
    counts = dict(duckdb.execute(sql, [str(folder / "train.jsonl")]).fetchall())
    by_class = {name: counts.pop(label, 0) for label, name in enumerate(names)}
    empty = [name for name, count in by_class.items() if count == 0]
    grounds = (
        f"{len(names)} classes of {min(by_class.values(), default=0)} to {max(by_class.values(), default=0)} images"
    )
    if empty:
        grounds += f"; none in {', '.join(empty[:5])}" + f" and {len(empty) - 5} more" * (len(empty) > 5)
    if counts:
        grounds += f"; labels without a class: {sorted(counts)[:5]}"
    bad, total = about["quarantined"], about["train"] + about["val"] + about["quarantined"]
    return [
        Outcome("classes", bool(names) and not empty and not counts, grounds),
        Outcome(
            "quarantine", bad <= limit * total, f"{bad:,} of {total:,} images could not be read, {limit:.2%} may be so"
        ),
    ]


def check_latents(folder: Path, *, images: int) -> list[Outcome]:
    """As many as the index has, in every view; of some of them, finite values, and a mean and spread as scaled."""
    about = artifact.read_json(folder / artifact.MANIFEST)["about"]
    shape = (about["views"], 2, *about["latent_shape"])
    shards = [np.load(path, mmap_mode="r") for path in sorted(folder.glob("shard-*.npy"))]
    labels = len(np.load(folder / "labels.npy", mmap_mode="r"))
    count = sum(len(shard) for shard in shards)
    whole = count == labels == images and all(shard.shape[1:] == shape for shard in shards)
    each = -(-ROWS // max(len(shards), 1))  # rows of a shard that are looked at, evenly spread
    rows = [shard[:: -(-len(shard) // each)].astype(np.float64) for shard in shards] if whole else []
    block = np.concatenate([np.zeros((0, *shape)), *rows])
    mean, std = block[:, :, 0], block[:, :, 1]
    centre = float(mean.mean()) if len(block) else math.nan
    spread = float(np.sqrt(mean.var() + (std**2).mean())) if len(block) else math.nan
    seen = f"of {len(block):,} images"
    return [
        Outcome(
            "count", whole, f"{count:,} latents x {shape[0]} views, {labels:,} labels, {images:,} images in the index"
        ),
        Outcome("finite", bool(np.isfinite(block).all()), f"looked at {seen}"),
        Outcome("mean", abs(centre) <= MEAN, f"the mean is {centre:.3g} {seen}, {MEAN:g} to either side is allowed"),
        Outcome("spread", STD[0] <= spread <= STD[1], f"values drawn vary by {spread:.3g} {seen}, {STD} is allowed"),
    ]


def check_samples(folder: Path) -> list[Outcome]:
    """Count, finite values, range and variety of the samples of a stage."""
    wanted = artifact.read_json(folder / artifact.MANIFEST)["about"]["sampling"]["num_samples"]
    with safe_open(folder / "samples.safetensors", framework="numpy") as file:
        latents, labels = file.get_slice("latents"), file.get_slice("labels")
        count, num_labels = latents.get_shape()[0], labels.get_shape()[0]
        totals, squares, finite, largest = 0.0, 0.0, True, 0.0
        for start in range(0, count, ROWS):
            block = latents[start : min(start + ROWS, count)].astype(np.float64)
            finite = finite and bool(np.isfinite(block).all())
            largest = max(largest, float(np.abs(block).max()))
            totals, squares = totals + block.sum(0), squares + (block**2).sum(0)
    with np.errstate(invalid="ignore"):
        variance = squares / max(count, 1) - (totals / max(count, 1)) ** 2
    spread = float(np.sqrt(np.maximum(variance, 0)).mean())
    return [
        Outcome("count", count == num_labels == wanted, f"{count} samples, {num_labels} labels, {wanted} asked for"),
        Outcome("finite", finite, "every value is a finite number" if finite else "some values are not finite numbers"),
        Outcome("range", largest <= LARGEST, f"the largest value is {largest:.3g}, {LARGEST:g} is allowed"),
        Outcome("variety", spread >= SPREAD, f"values vary by {spread:.3g} between samples, {SPREAD:g} is the least"),
    ]


def check_metrics(file: Path) -> list[Outcome]:
    """Finite numbers, and an FID of real held-out images below that of every set of as many images."""
    scores = artifact.read_json(file)
    odd = [f"{row}.{name}" for row, found in scores.items() for name, x in found.items() if not math.isfinite(x)]
    floor = scores["floor"].get("fid")  # none, if the held-out images are too few for one
    alike = {row: x for row, x in scores.items() if x.get("num_samples") == scores["floor"].get("num_samples")}
    fids = {row: x["fid"] for row, x in alike.items() if row != "floor" and "fid" in x}
    under = [] if floor is None else [f"{row} {fid:.4g}" for row, fid in fids.items() if fid <= floor]
    grounds = "real images have no FID" if floor is None else f"FID of real images is {floor:.4g}"
    if under:
        grounds += f", and these are not above it: {', '.join(under)}: the evaluator can't be trusted"
    return [
        Outcome("finite", not odd, f"not finite: {', '.join(odd)}" if odd else "every number is finite"),
        Outcome("floor", not under, grounds),
    ]


def check_verdict(verdicts: list[dict[str, Any]], *, checkpoint: Path) -> Outcome:
    """That the gate's newest verdict on these weights, of those given oldest first, is no FAIL. It stops nothing: the
    report shows what failed too, and the gate itself keeps it from promotion."""
    name = "not_worse_than_incumbent"
    files = artifact.read_json(checkpoint / artifact.MANIFEST)["files"].values()
    weights = {file["sha256"] for file in files}
    found = [verdict for verdict in verdicts if verdict["candidate"]["weights"] in weights]
    if not found:
        return Outcome(name, True, "the gate has not judged these weights; `dod gate` does", blocks=False)
    newest = found[-1]
    grounds = (
        f"{newest['verdict']} against {newest['incumbent']['checkpoint']} at {newest['time'][:16]}: FID "
        f"{newest['mean']:+.3f} ({newest['lower']:+.3f} to {newest['upper']:+.3f}), tolerance {newest['tolerance']:.3f}"
    )
    return Outcome(name, newest["verdict"] != "FAIL", grounds, blocks=False)


NAMES = {
    "dataset": ("classes", "quarantine"),
    "latents": ("count", "finite", "mean", "spread"),
    "stage1": ("count", "finite", "range", "variety"),
    "stage2": ("count", "finite", "range", "variety"),
    "metrics": ("finite", "floor", "not_worse_than_incumbent"),
}


def outcomes(params: Params, stage: str, key: str) -> list[Outcome]:
    """Of all checks on what a stage instance made, in the order of `NAMES`."""
    inputs, out, _ = stages.paths(params, stage, key)
    if stage == "dataset":
        return check_dataset(out, limit=stages.resolve(params, stage, key).config.model_dump()["max_quarantined"])
    if stage == "latents":
        return check_latents(out, images=artifact.read_json(inputs["dataset"] / artifact.MANIFEST)["about"]["train"])
    if stage in ("stage1", "stage2"):
        return check_samples(out)
    if stage == "metrics":
        item = params.checkpoints[key]
        known = ledger.records_in(ledger.HISTORY / FOLDERS["verdict"] / item.experiment)
        verdicts = sorted((row for row in known if row["checkpoint"] == key), key=lambda row: str(row["time"]))
        return [*check_metrics(out), check_verdict(verdicts, checkpoint=inputs["checkpoint"])]
    return []
