"""`make bench-gate`: the gate on the demo under six training seeds: its tolerance, its false alarms, its power.

A false alarm is a FAIL of a retrain of the same configuration: every ordered pair of seeds is gated. Power is how often
a candidate that was trained half as long FAILs against another seed's whole training. For each pair the tolerance is
calibrated without its two seeds, as it would be for checkpoints that come later. Blocks are sampled when they are asked
for and kept below `.state/`: a study that was stopped goes on. Writes Markdown to stdout.
"""

import os
import platform
import subprocess
from collections import Counter
from collections.abc import Callable
from datetime import date
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from benchmarks import clone
from dod_pipeline import gate, paired, trials
from dod_pipeline.config import Gate, load_params
from dod_pipeline.deployment import Deployment

SEEDS = tuple(range(6))
FULL, HALF = 1500, 750  # steps
BLOCKS = Gate()  # as the gate's own defaults

Fids = Callable[[int, int, int], float]  # training seed, step, block -> FID of stage 2


class Pair(NamedTuple):
    """One run of the gate."""

    candidate: int  # training seed
    incumbent: int
    ruling: paired.Ruling
    num_blocks: int
    tolerance: float


def mean_fid(fids: Fids, seed: int, step: int) -> float:
    """Over the blocks that a calibration draws."""
    return fmean(fids(seed, step, block) for block in range(BLOCKS.min_blocks))


def pairs(fids: Fids, *, step: int, calibrated: bool = True) -> list[Pair]:
    """Every seed's checkpoint at `step` against every other seed's whole training; the tolerance from the other seeds,
    or from the share of FID alone."""
    found = []
    for candidate in SEEDS:
        for incumbent in SEEDS:
            if candidate == incumbent:
                continue
            others = [mean_fid(fids, seed, FULL) for seed in SEEDS if seed not in (candidate, incumbent)]
            *_, last = paired.looks(
                partial(fids, candidate, step),
                partial(fids, incumbent, FULL),
                calibrated=paired.calibrated_tolerance(others)[0] if calibrated else 0.0,
                min_blocks=BLOCKS.min_blocks,
                max_blocks=BLOCKS.max_blocks,
                level=BLOCKS.level,
            )
            found.append(Pair(candidate, incumbent, last.ruling, len(last.candidate), last.tolerance))
    return found


def line(title: str, found: list[Pair]) -> str:
    """A row of the table of verdicts."""
    count = Counter(pair.ruling for pair in found)
    rulings = " | ".join(f"{count[ruling]} of {len(found)}" for ruling in ("FAIL", "INCONCLUSIVE", "PASS"))
    tolerances = [pair.tolerance for pair in found]
    spread = f"{min(tolerances):.2f} to {max(tolerances):.2f}"
    return f"| {title} | {spread} | {rulings} | {fmean(pair.num_blocks for pair in found):.1f} |"


def tables(fids: Fids) -> str:
    """The whole study in Markdown."""
    fulls, halves = ([mean_fid(fids, seed, step) for seed in SEEDS] for step in (FULL, HALF))
    tolerance, spread = paired.calibrated_tolerance(fulls)
    rows = [f"| {seed} | {full:.3f} | {half:.3f} |" for seed, full, half in zip(SEEDS, fulls, halves, strict=True)]
    retrains, share = pairs(fids, step=FULL), pairs(fids, step=FULL, calibrated=False)
    return "\n".join(
        [
            f"| training seed | FID at {FULL} steps | FID at {HALF} steps |",
            "|---|---|---|",
            *rows,
            f"| mean | {fmean(fulls):.3f} | {fmean(halves):.3f} |",
            "",
            f"Each the mean of {BLOCKS.min_blocks} blocks. All {len(SEEDS)} whole trainings calibrate a tolerance of "
            f"{tolerance:.3f} ({tolerance / fmean(fulls):.0%} of their mean FID); their standard deviation is "
            f"{spread:.3f}.",
            "",
            "| candidate, incumbent | tolerance | FAIL | INCONCLUSIVE | PASS | blocks, mean |",
            "|---|---|---|---|---|---|",
            line(f"{FULL} steps, {FULL} steps of another seed (FAIL is a false alarm)", retrains),
            line(f"{HALF} steps, {FULL} steps of another seed (FAIL is right)", pairs(fids, step=HALF)),
            line(f"{FULL} steps, {FULL} steps of another seed, without a calibration", share),
            "",
            f"The tolerance is calibrated without the pair's two seeds, on {len(SEEDS) - 2}. The pairs share their "
            "trainings, and are not independent.",
        ]
    )


def write_params(folder: Path) -> list[str]:
    """Give the clone an experiment for each seed, with both checkpoints; returns the experiments."""
    params = clone.read_params(folder)
    base, checkpoint = params["experiments"]["mnist"], params["checkpoints"]["mnist-1500"]
    for seed in SEEDS:
        params["experiments"][experiment_of(seed)] = base | {"train": base["train"] | {"seed": seed}}
        for step in (FULL, HALF):
            item = checkpoint | {"experiment": experiment_of(seed), "step": step}
            params["checkpoints"][f"{experiment_of(seed)}-{step}"] = item
    clone.write_params(folder, params)
    return [experiment_of(seed) for seed in SEEDS]


def experiment_of(seed: int) -> str:
    """Seed 0 is the demo's own, which need not be trained again."""
    return f"mnist-seed{seed}" if seed else "mnist"


def sampled(folder: Path) -> Fids:
    """The FIDs of the clone, which must be the current folder."""
    params = load_params(folder / "params.yaml")
    subjects = {
        (seed, step): trials.subject(params, f"{experiment_of(seed)}-{step}") for seed in SEEDS for step in (FULL, HALF)
    }
    trials.check_alike(list(subjects.values()))
    trials.check_retrains([subjects[seed, FULL] for seed in SEEDS])
    seeds = trials.seeds_of(subjects[0, FULL])
    return cache(lambda seed, step, block: gate.fid_of(subjects[seed, step], seeds, Deployment())(block))


def main() -> None:
    """Train what is missing, sample what is missing, and print the tables."""
    folder = clone.at_this_commit("gate-study")
    experiments = write_params(folder)
    os.chdir(folder)
    subprocess.run([clone.ROOT / ".venv/bin/dod", "run", *experiments, "--until", "train"], check=True)
    found = tables(sampled(folder))
    commit = clone.call("git", "rev-parse", "--short", "HEAD")
    print(
        f"\n# The gate on the demo\n\n{date.today()}, commit {commit}, {platform.machine()}, {os.cpu_count()} CPUs.\n"
    )
    print(found)


if __name__ == "__main__":
    main()
