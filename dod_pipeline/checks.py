"""What must hold of an output before anything is built on it. Numbers only, without torch: Dagster calls this often."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import safe_open

from dod_models import artifact

# Latents are scaled to a standard deviation of about 1 (`Codec.scale`).
LARGEST = 25.0  # beyond it the solver has diverged
SPREAD = 0.05  # standard deviation over the samples, below which they are all alike
ROWS = 1024  # samples held in memory at a time


class Outcome(NamedTuple):
    """Whether a check passed, and on what grounds."""

    name: str
    passed: bool
    grounds: str


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


CHECKS: dict[str, tuple[Callable[[Path], list[Outcome]], tuple[str, ...]]] = {
    "stage1": (check_samples, ("count", "finite", "range", "variety")),
    "stage2": (check_samples, ("count", "finite", "range", "variety")),
    "metrics": (check_metrics, ("finite", "floor")),
}
