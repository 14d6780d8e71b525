"""How long questions to a history of 100,000 records take: python -m benchmarks.history [--records N]

Makes plausible records in a temporary folder, builds the index once, and asks each question five times in this process
and three times as `dod history ...` from a cold start (of the interpreter; the files lie in the page cache by then).
"""

import argparse
import contextlib
import io
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from hashlib import sha256
from pathlib import Path

from dod_pipeline import catalogue, cli, records
from dod_pipeline.records import Record

START = datetime(2026, 1, 1, tzinfo=UTC)
STEPS = range(100_000, 1_100_000, 100_000)  # checkpoints of an experiment
WARM, COLD = 5, 3  # times that a question is asked
QUESTIONS = {
    "the newest records": [],
    "FID by stage of a checkpoint over its retrainings": ["--checkpoint", "exp3-500000", "--by-stage"],
    "best FID at 50,000 images and guidance 2": [
        *("--best", "fid", "--where", "num_samples=50000", "--where", "guidance=2", "--where", "extractor=inception*"),
        *("--where", "experiment=exp3"),
    ],
    "best FID of all experiments on one data set": ["--best", "fid", "--where", "guidance=2"],
    "the curve of an experiment": ["--experiment", "exp3", "--curve"],
    "the plot of an experiment": ["--experiment", "exp3", "--plot", "fid.png"],
    "what changed between two records": ["--diff", "exp3-500000", "exp4-500000"],
    "SQL: mean FID by experiment": [
        "--sql",
        "SELECT experiment, stage, avg(fid), count(*) FROM records GROUP BY ALL ORDER BY ALL",
    ],
    "CSV of one experiment": ["--experiment", "exp3", "--csv"],
    "CSV of everything": ["--csv"],
}


def digest(*parts: object) -> str:
    """A sha256 that equal parts share."""
    return sha256(repr(parts).encode()).hexdigest()


def made_up(number: int, num_experiments: int) -> Record:
    """The record of that number: evaluations of two stages and two floors, over checkpoints, over retrainings."""
    rng = random.Random(number)
    evaluation, row = divmod(number, 4)
    checkpoint, retraining = evaluation % (num_experiments * len(STEPS)), evaluation // (num_experiments * len(STEPS))
    experiment, step = f"exp{checkpoint % num_experiments}", STEPS[checkpoint // num_experiments]
    name = ("floor", "codec", "stage1", "stage2")[row]
    stage = int(name[-1]) if row > 1 else name
    fid = 4e6 / (max(row, 1) * step) + 5 + rng.gauss(0, 0.3) if row > 1 else 2.1 + row
    sources = {
        source: {"path": f"{source}/{experiment}/manifest.json", "sha256": digest(source, experiment, retraining, step)}
        | {"config": digest(source, experiment)}
        for source in ("metrics", "stage1", "stage2", "weights", "train", "latents", "codec", "reference", "dataset")
    }
    return Record.model_validate(
        {
            "time": START + timedelta(minutes=evaluation),
            "experiment": experiment,
            "checkpoint": f"{experiment}-{step}",
            "step": step,
            "row": name,
            "stage": stage,
            "metrics": {"fid": fid, "fid_error": 0.2, "sfid": fid / 2, "inception_score": 99.0, "precision": 0.7},
            "num_samples": 50_000,
            "seed": 0 if row > 1 else None,
            "train_seed": retraining if row > 1 else None,
            "guidance": (1.0, 2.0)[row - 2] if row > 1 else None,
            "sampler": "dopri5" if row > 1 else None,
            "evaluations": 120.5 if row > 1 else None,
            "extractor": {"name": "inception-2015-12-05", "digest": digest("inception")},
            "reference": digest("reference"),
            "config": digest("sampling", experiment, row),
            "weights": digest("weights", experiment, step, retraining) if row else None,
            "codec": digest("codec"),
            "data": digest("data"),
            "sources": sources,
            "commit": digest("commit", evaluation // 100)[:40],
        }
    )


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def asked(arguments: list[str]) -> None:
    """A question in this process, its answer thrown away; RuntimeError if there is none."""
    with contextlib.redirect_stdout(io.StringIO()):
        if cli.main(["history", *arguments]) != 0:
            raise RuntimeError(f"dod history {arguments} failed")


def cold(arguments: list[str]) -> float:
    """Seconds of a processor that a question takes as a process of its own: what the neighbours do doesn't count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [str(Path(sys.executable).with_name("dod")), "history", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def write(count: int, root: Path) -> None:
    """That many records, without waiting for the disk after each."""
    for number in range(count):
        record = made_up(number, 20)
        path = root / record.experiment / f"{record.digest}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(record.canonical())


def measured(arguments: list[str]) -> tuple[float, float]:
    """Seconds of a process, by the clock and of a processor."""
    start = time.perf_counter()
    processor = cold(arguments)
    return time.perf_counter() - start, processor


def ask() -> None:
    """Print a table: each question to the current folder's history, and how long it took."""
    print(f"| question | median of {WARM}, s | as a process, median of {COLD}, s | its processor time, s |")
    print("|---|---|---|---|")
    for question, arguments in QUESTIONS.items():
        warm = statistics.median(seconds(partial(asked, arguments)) for _ in range(WARM))
        walls, processors = zip(*(measured(arguments) for _ in range(COLD)), strict=True)
        cells = [warm, statistics.median(walls), statistics.median(processors)]
        print(f"| {question} | {' | '.join(f'{cell:.2f}' for cell in cells)} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=100_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        root = Path("history")
        made = seconds(lambda: write(given.records, root))
        size = sum(file.size for file in catalogue.scan(root))
        print(f"{given.records:,} records, {size / 2**20:.0f} MiB, written in {made:.0f} s")
        print(f"first index: {seconds(lambda: catalogue.opened(root)):.1f} s", end=", ")
        print(f"{sum(p.stat().st_size for p in catalogue.INDEXES.iterdir()) / 2**20:.1f} MiB")
        records.append(made_up(given.records, 20), root)
        print(f"index after one more record: {seconds(lambda: catalogue.opened(root)):.2f} s\n")
        ask()


if __name__ == "__main__":
    main()
