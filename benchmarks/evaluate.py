"""`make bench-evaluate`: the metrics' errors on closed forms, and their time and memory beside torch-fidelity's.

Prints Markdown. Times are medians of pairs (ours, then torch-fidelity's, on the same inputs) in one process; memory is
the peak that a call adds to a fresh process, for each of both. Errors are divided by the sum of the traces.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from benchmarks.closed_forms import gaussians
from dod_models.evaluate import (
    Vector,
    covariance_root,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    psnr,
    ssim,
)

WIDTH, NEIGHBOURS = 2048, 3
OURS, THEIRS = "ours", "torch-fidelity"
Call = Callable[[], object]


def seconds(call: Call) -> float:
    """How long a call takes."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def paired(work: str, ours: Call, theirs: Call, *, repeats: int) -> str:
    """A line of the table of times."""
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(repeats)]
    ratio = statistics.median(mine / other for mine, other in pairs)
    mine, other = (statistics.median(times) for times in zip(*pairs, strict=True))
    return f"| {work} | {mine:.2f} | {other:.2f} | {ratio:.2f} |"


def frechet_errors(width: int) -> Iterator[str]:
    """Each case's error, of ours and of torch-fidelity's function, relative to the traces."""
    yield f"\n| Frechet distance, width {width} | exact | error | {THEIRS}'s |\n|---|---|---|---|"
    for case in gaussians(width):
        first, second = {"mu": case.mu1, "sigma": case.sigma1}, {"mu": case.mu2, "sigma": case.sigma2}
        found = frechet_distance(case.mu1, case.sigma1, case.mu2, case.sigma2)
        theirs = fid_statistics_to_metric(first, second, False)["frechet_inception_distance"]
        errors = (f"{abs(value - case.distance) / case.size:.1e}" for value in (found, theirs))
        yield f"| {case.name} | {case.distance:.6g} | {' | '.join(errors)} |"


def other_errors() -> Iterator[str]:
    """One case of each other metric."""
    known = np.log([[0.7, 0.3], [0.3, 0.7]] * 20)
    points = [np.array(values)[:, None] for values in ([0.0, 1], [1.0, 2], [0.5, 1, 90.5], [0.0, 1, 9, 21])]
    plain = [np.full((1, 16, 16, 1), value, dtype=np.uint8) for value in (51, 204)]
    found = precision_recall(points[2], points[3], 1)
    cases = [
        ("inception score of (0.7, 0.3) and (0.3, 0.7)", inception_score(known, 5, False), 2 * 0.7**0.7 * 0.3**0.3),
        ("kernel distance of {0, 1} and {1, 2}", kernel_distance(points[0], points[1], 2, 1, 0), 9.5),
        ("precision of {.5, 1, 90.5} in {0, 1, 9, 21}, k = 1", found.precision, 2 / 3),
        ("recall of the same", found.recall, 1.0),
        ("PSNR of plain images 0.2 and 0.8, dB", psnr(*plain)[0], -20 * np.log10(0.6)),
        ("SSIM of the same", ssim(*plain)[0], (2 * 0.16 + 1e-4) / (0.04 + 0.64 + 1e-4)),
    ]
    yield "\n| other metrics | exact | error |\n|---|---|---|"
    for name, value, exact in cases:
        yield f"| {name} | {exact:.6g} | {abs(value - exact):.1e} |"


def moments(spectrum: Vector, seed: int) -> dict[str, np.ndarray]:
    """Mean and covariance of 2 D rows of normal features with these standard deviations."""
    rows = np.random.default_rng(seed).standard_normal((2 * len(spectrum), len(spectrum))) * spectrum
    return {"mu": rows.mean(axis=0), "sigma": np.cov(rows, rowvar=False)}


def frechet_times(repeats: int) -> Iterator[str]:
    """Ours with and without the reference's root, for a flat and for a falling spectrum."""
    for name, spectrum in (("equal variances", np.ones(WIDTH)), ("variances 1 to 1e-6", np.logspace(0, -3, WIDTH))):
        first, second = moments(spectrum, 0), moments(spectrum, 1)
        ours = partial(frechet_distance, first["mu"], first["sigma"], second["mu"], second["sigma"])
        theirs = partial(fid_statistics_to_metric, first, second, False)
        work = f"Frechet distance, width {WIDTH}, {name}, root"
        yield paired(f"{work} cached", partial(ours, root2=covariance_root(second["sigma"])), theirs, repeats=repeats)
        yield paired(f"{work} not cached", ours, theirs, repeats=repeats)


def manifolds(who: str, count: int, width: int) -> Call:
    """A call of precision and recall on float32 features."""
    rng = np.random.default_rng(0)
    generated, real = (rng.standard_normal((count, width), dtype=np.float32) * scale for scale in (0.9, 1))
    if who == OURS:
        return lambda: precision_recall(generated, real, NEIGHBOURS)
    first, second = torch.from_numpy(generated), torch.from_numpy(real)
    return lambda: prc_features_to_metric(first, second, prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False)


def peak() -> int:
    """The most memory that this process has had, in KiB; getrusage would begin with its parent's peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def added(who: str, count: int, width: int) -> int:
    """MiB that a call adds to a fresh process."""
    command = [sys.executable, "-m", "benchmarks.evaluate", "--memory", who, str(count), str(width)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def manifold_lines(count: int, repeats: int) -> Iterator[str]:
    """Times of precision and recall, then the memory of both."""
    for width in (64, WIDTH):
        ours, theirs = manifolds(OURS, count, width), manifolds(THEIRS, count, width)
        yield paired(f"precision and recall, {count} x {count}, width {width}", ours, theirs, repeats=repeats)
    yield f"\n| memory that precision and recall add, MiB | ours | {THEIRS}'s |\n|---|---|---|"
    for width in (64, WIDTH):
        yield f"| {count} x {count}, width {width} | {added(OURS, count, width)} | {added(THEIRS, count, width)} |"


def main() -> None:
    """Print everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="pairs of each line")
    parser.add_argument("--count", type=int, default=10_000, help="images of precision and recall")
    parser.add_argument("--memory", nargs=3, metavar=("WHO", "COUNT", "WIDTH"), help="print what one call adds, in MiB")
    arguments = parser.parse_args()
    if arguments.memory:
        who, count, width = arguments.memory
        call = manifolds(who, int(count), int(width))
        before = peak()
        call()
        print((peak() - before) // 2**10)
        return
    print(
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads; torch {torch.__version__}, numpy {np.__version__}"
    )
    print(*frechet_errors(64), *other_errors(), sep="\n")
    print(f"\n| work | ours s | {THEIRS}'s s | ratio |\n|---|---|---|---|")
    for lines in (frechet_times(arguments.repeats), manifold_lines(arguments.count, arguments.repeats)):
        for line in lines:
            print(line, flush=True)
    print(*frechet_errors(WIDTH), sep="\n")


if __name__ == "__main__":
    main()
