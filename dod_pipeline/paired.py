"""The arithmetic of the gate: pairs of FIDs, block by block, and how far retrains of one configuration differ.

A block gives d = FID of the candidate - FID of the incumbent, both sampled from the same seeds and labels. Let m be the
mean of d over all blocks that might be drawn. With one-sided t bounds for m, the candidate FAILs if the lower one is
above the tolerance, and PASSes if the upper one is below it; otherwise another block is drawn, up to a limit.

**The level.** Each look has one-sided 95 % bounds (EVALUATION.md). With looks after 3, 4, ... and 8 blocks, a candidate
that is worse by exactly the tolerance is failed in 12.9 % of cases, and passed in as many (simulated); at a level of
0.05 / 6, one that asks for either error below 5 % over all looks (Bonferroni), in 2.8 %.

**The tolerance.** The blocks say nothing of another training: a retrain under another seed has another m. Of R retrains
of one configuration let s be the standard deviation of their mean FIDs. For two further retrains the difference of mean
FIDs is N(0, 2 sigma**2), so the difference over s * sqrt(2) follows t with R - 1 degrees of freedom: a fresh retrain is
worse than a fresh incumbent by more than t(0.95, R - 1) * s * sqrt(2) in 5 % of cases. The noise of the blocks is
inside s, as it is inside the gate's means; what all retrains share in a block cancels.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

ERROR = 0.05  # of a fresh retrain to be worse than the calibrated tolerance
SHARE = 0.02  # of the incumbent's FID: the least tolerance (EVALUATION.md)
RETRAINS = 3  # the least that can be calibrated with

Fid = Callable[[int], float]  # block -> FID
Ruling = Literal["PASS", "FAIL", "INCONCLUSIVE"]


class Look(NamedTuple):
    """What is known after some blocks."""

    ruling: Ruling
    candidate: list[float]  # FID of each block
    incumbent: list[float]
    mean: float  # of the differences
    lower: float  # bounds of their true mean, each one one-sided
    upper: float
    level: float  # with which either bound may be wrong
    tolerance: float

    @property
    def differences(self) -> list[float]:
        return [ours - theirs for ours, theirs in zip(self.candidate, self.incumbent, strict=True)]


def quantile(level: float, freedom: int) -> float:
    """That of Student's t which is exceeded with probability `level`."""
    from scipy.stats import t  # late: commands that only list need no scipy

    return float(t.isf(level, freedom))


def bounds(values: Sequence[float], level: float) -> tuple[float, float]:
    """Of the mean of what `values` are drawn from: it is below the first, or above the second, with probability
    `level` each, if they are normal. At least two values."""
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    reach = quantile(level, len(values) - 1) * error
    return mean - reach, mean + reach


def rule(differences: Sequence[float], *, tolerance: float, level: float) -> tuple[Ruling, float, float]:
    """The ruling on these blocks, and the bounds."""
    lower, upper = bounds(differences, level)
    ruling: Ruling = "FAIL" if lower > tolerance else "PASS" if upper < tolerance else "INCONCLUSIVE"
    return ruling, lower, upper


def looks(
    candidate: Fid, incumbent: Fid, *, calibrated: float, min_blocks: int, max_blocks: int, level: float
) -> Iterator[Look]:
    """Draw blocks 0, 1, ..., and look after each one from `min_blocks` on, until it is decided or `max_blocks` are
    drawn: the last look holds the verdict.

    The tolerance is the larger of `calibrated` and a share of the incumbent's mean FID over the first `min_blocks`.
    """
    ours: list[float] = []
    theirs: list[float] = []
    tolerance = calibrated
    for block in range(max_blocks):
        theirs.append(incumbent(block))
        ours.append(candidate(block))
        if block + 1 < min_blocks:
            continue
        if block + 1 == min_blocks:
            tolerance = max(calibrated, SHARE * statistics.fmean(theirs))
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        ruling, lower, upper = rule(differences, tolerance=tolerance, level=level)
        mean = statistics.fmean(differences)
        yield Look(ruling, list(ours), list(theirs), mean, lower, upper, level, tolerance)
        if ruling != "INCONCLUSIVE":
            return


def calibrated_tolerance(means: Sequence[float]) -> tuple[float, float]:
    """Tolerance, and the standard deviation s that it comes from, of the mean FIDs of retrains."""
    if len(means) < RETRAINS:
        raise ValueError(f"{len(means)} retrains: give at least {RETRAINS}, under different training seeds")
    spread = statistics.stdev(means)
    return quantile(ERROR, len(means) - 1) * spread * math.sqrt(2), spread
