"""`python -m dod_models.cli STAGE --config JSON --INPUT PATH ... --out PATH`: every computation of the project.

A stage reads its inputs' folders, and writes one output folder (or JSON file) atomically; `--facts` names a JSON file
for the numbers that it returns. Torch is imported by the stage, not by `--help`.
"""

import argparse
import importlib
import json
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from dod_models import artifact
from dod_models.config import Frozen

# OpenMP's threads spin while they wait for each other, by default so long that stages crawl where a core is also busy
# with something else; sleeping at once costs half the speed of an idle machine. Between the two, as measured in
# benchmarks/2026-11-23-demo.md. Read when torch is loaded, so it is set before any stage is.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")


class Stage(NamedTuple):
    """Where a stage lives: its module, config class and function, and the names of its input paths."""

    module: str
    config: str
    function: str
    inputs: tuple[str, ...]

    def load(self) -> tuple[type[Frozen], Any]:
        """The config class and the function."""
        module = importlib.import_module(f"dod_models.{self.module}")
        return getattr(module, self.config), getattr(module, self.function)


STAGES = {
    "dataset": Stage("dataset", "DatasetConfig", "build_dataset", ()),
    "reference": Stage("reference", "ReferenceConfig", "build_reference", ("dataset",)),
    "codec": Stage("fit_codec", "CodecConfig", "build_codec", ("dataset", "reference")),
    "latents": Stage("encode", "EncodeConfig", "build_latents", ("dataset", "codec", "state")),
    "train": Stage("train", "TrainConfig", "fit", ("latents", "state")),
    "stage1": Stage("multistage", "SampleConfig", "build_stage", ("checkpoint", "codec", "state")),
    "stage2": Stage("multistage", "SampleConfig", "build_stage", ("checkpoint", "previous", "codec", "state")),
    "metrics": Stage(
        "score", "ScoreConfig", "build_metrics", ("checkpoint", "reference", "codec", "stage1", "stage2", "state")
    ),
    "sweeps": Stage(
        "sweeps",
        "SweepConfig",
        "build_sweeps",
        ("checkpoint", "reference", "codec", "dataset", "latents", "stage1", "stage2", "state", "picture"),
    ),
    "trial": Stage("trial", "TrialConfig", "build_trial", ("checkpoint", "reference", "codec")),
    "generate": Stage("generate", "GenerateConfig", "generate", ("checkpoint", "codec")),
    "export": Stage("export", "ExportConfig", "export", ("samples", "codec")),
    "fitv2": Stage("fitv2", "Fitv2Config", "convert", ("weights",)),
}

# What a user or a machine can cause; anything else is a bug of ours and shows its traceback.
EXPECTED_ERRORS = (ValueError, OSError, ArithmeticError, SafetensorError)
FULL, ROOM = "No space left on device", 64 * 1024  # bytes: a disk with less is full


def parser() -> argparse.ArgumentParser:
    """One sub-command per stage."""
    top = argparse.ArgumentParser(prog="python -m dod_models.cli", description=__doc__)
    commands = top.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, stage in STAGES.items():
        command = commands.add_parser(name, help=f"dod_models.{stage.module}.{stage.function}")
        command.add_argument("--config", required=True, help="JSON text or file")
        command.add_argument("--out", required=True, type=Path)
        command.add_argument("--facts", type=Path, help="JSON file for the numbers of the run")
        for path in stage.inputs:
            command.add_argument(f"--{path}", required=True, type=Path)
    return top


@contextmanager
def reporting() -> Iterator[None]:
    """Print what the modules log; tell Dagster too, and how far progress bars are, where it waits for this process.

    Dagster Pipes says so in the environment. Messages are for the eye: the truth is the output's manifest.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    with ExitStack() as stack:
        if "DAGSTER_PIPES_CONTEXT" in os.environ and os.environ.get("RANK", "0") == "0":
            from dagster_pipes import open_dagster_pipes

            told = stack.enter_context(open_dagster_pipes()).log
            handlers += told.handlers
            stack.enter_context(following(told.info))
        logger = logging.getLogger("dod_models")
        logger.setLevel(logging.INFO)
        for handler in handlers:
            logger.addHandler(handler)
            stack.callback(logger.removeHandler, handler)
        yield


def open_bars() -> list[Any]:
    """The progress bars that are shown."""
    return list(getattr(sys.modules["tqdm"].tqdm, "_instances", [])) if "tqdm" in sys.modules else []


@contextmanager
def following(tell: Callable[[str], None], *, seconds: float = 5.0) -> Iterator[None]:
    """Tell how far the progress bars that moved are, every 5 seconds at first, ever more seldom later."""
    over, begun, seen = threading.Event(), time.monotonic(), dict[int, float]()

    def follow() -> None:
        while not over.wait(max(seconds, (time.monotonic() - begun) / 20)):
            for bar in open_bars():
                if seen.get(id(bar)) != bar.n:
                    seen[id(bar)] = bar.n
                    tell(str(bar))

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        over.set()
        follower.join()


def explain(error: Exception, out: Path) -> str:
    """The error's message; on a full disk also the output's path, and the reason, which numpy doesn't give."""
    text = str(error) or type(error).__name__
    if not isinstance(error, OSError | SafetensorError):
        return text
    if FULL in text:
        return f"{out}: {text}"
    disk = next(folder for folder in out.absolute().parents if folder.exists())
    return f"{out}: {text}: {FULL}" if shutil.disk_usage(disk).free < ROOM else text


def main(arguments: list[str] | None = None) -> int:
    """Run one stage; an expected error is one message on stderr and exit status 1."""
    given = parser().parse_args(arguments)
    stage = STAGES[given.stage]
    try:
        with reporting():
            config_class, function = stage.load()
            config = config_class.load(given.config)
            facts = function(config, **{name: getattr(given, name) for name in stage.inputs}, out=given.out)
        # One of several processes writes; where all have returned nothing, it is another that sums up.
        if given.facts is not None and facts and os.environ.get("RANK", "0") == "0":
            artifact.write_json(given.facts, facts)
    except EXPECTED_ERRORS as error:
        for bar in open_bars():  # else the message stands in the middle of one
            bar.close()
        print(f"{given.stage}: {explain(error, given.out)}", file=sys.stderr)
        return 1
    print(f"{given.stage}: {json.dumps(facts)}" if given.facts and facts else f"{given.stage}: wrote {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
