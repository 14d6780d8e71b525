"""Stage `metrics`: scores of a checkpoint's samples, beside two floors at the same count.

Samples are decoded and their features taken in shards, without a picture on disk; one of several processes takes every
so many of them. A sample's features depend on its batch alone, and batches start at fixed places whatever the shards,
on one thread of a CPU: the scores are the same for any number of processes.
"""

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import PositiveInt
from tqdm import tqdm

from dod_models import artifact, cost, source
from dod_models.checkpoint import SCHEMA as CHECKPOINT_SCHEMA
from dod_models.codec import RECONSTRUCTIONS, Codec, batch_size
from dod_models.codec import SCHEMA as CODEC_SCHEMA
from dod_models.config import Frozen, Process, this_process
from dod_models.evaluator import HELD_OUT_FILE, Evaluator, Gathered, check_samples
from dod_models.features import SCHEMA as REFERENCE_SCHEMA
from dod_models.features import FeatureSet
from dod_models.model import ModelConfig
from dod_models.shards import Shards
from dod_models.stored import StoredSamples


class ScoreConfig(Frozen):
    """What is compared with what."""

    num_samples: PositiveInt = 50_000  # of every generated set and of the floors: FID depends on it
    shard_size: PositiveInt = 1000  # samples whose features are written at a time, rounded up to whole batches


class Part(NamedTuple):
    """Samples whose features make one file."""

    stage: str
    rows: range

    @property
    def name(self) -> str:
        """The file's name, which sorts as the rows do."""
        return f"{self.stage}-{self.rows.start:08}.safetensors"


class Work:
    """The features under work: of which samples, and in which shards."""

    def __init__(self, folder: Path, parts: list[Part], samples: dict[str, StoredSamples], codec: Codec) -> None:
        self.shards, self.parts, self.samples, self.codec = Shards(folder), parts, samples, codec

    def extract(self, evaluator: Evaluator, process: Process) -> None:
        """Take the features of those of the process's parts that lack."""
        mine = self.parts[process.rank :: process.world]
        wanted = [part for part in mine if not self.shards.has(part.name)]
        total, lack = (sum(len(part.rows) for part in parts) for parts in (mine, wanted))
        title = "score" if process.world == 1 else f"score, process 1 of {process.world}"
        with tqdm(total=total, initial=total - lack, desc=title, unit="image", disable=process.rank > 0) as bar:
            for part in wanted:
                found = evaluator.features(self.decoded(part, bar))
                self.shards.save(part.name, found.save)

    def decoded(self, part: Part, bar: "tqdm[Any]") -> Iterator[np.ndarray]:
        """A part's images in batches."""
        for pixels in self.samples[part.stage].decoded(self.codec, part.rows):
            yield pixels
            bar.update(len(pixels))

    def gathered(self, stage: str) -> Gathered:
        """A stage's features, put together in the order of the samples."""
        parts = [part for part in self.parts if part.stage == stage]
        found = (FeatureSet.read(self.shards.out / part.name) for part in parts)
        return Gathered.of(found, count=sum(len(part.rows) for part in parts))


def parts_of(config: ScoreConfig, codec: Path) -> list[Part]:
    """The samples of both stages in order, in whole batches of the codec's."""
    batch = batch_size(artifact.read_manifest(codec, schema=CODEC_SCHEMA)["about"]["image_size"])
    every, size = range(config.num_samples), -(-config.shard_size // batch) * batch
    return [Part(stage, every[start:][:size]) for stage in ("stage1", "stage2") for start in every[::size]]


def shards_of(
    config: ScoreConfig, *, checkpoint: Path, reference: Path, codec: Path, stage1: Path, stage2: Path, state: Path
) -> tuple[Path, int]:
    """Where the shards of this stage lie, keyed by config, inputs and code, and how many both stages have."""
    inputs = (checkpoint, reference, codec, stage1, stage2)
    return state / source.key("score", config.digest, inputs), len(parts_of(config, codec))


def scored(score: Callable[[Gathered], dict[str, float]], found: Gathered) -> dict[str, float]:
    """A row of the scores. No caller may name what is gathered: it is freed on return, before the next set is read.

    In Inception's widths, over imports and as measured: reading or gathering 50,000 images peaks at 1.24 GB, of which
    0.3 GB are the evaluator; scoring 20,000 peaks at 1.28 GB, and 12 KB an image make that 1.7 GB at 50,000.
    """
    return {**score(found), "num_samples": len(found.features)}


def floors(evaluator: Evaluator, reference: Path, codec: Path, count: int) -> dict[str, dict[str, float]]:
    """Scores of held-out real images and of their reconstructions, at most `count` of each.

    Where the held-out split is too small for an FID, a floor has none, and a warning says so.
    """
    files = {
        "floor": (reference, HELD_OUT_FILE, REFERENCE_SCHEMA),
        "codec": (codec, RECONSTRUCTIONS, CODEC_SCHEMA),
    }
    for folder, name, schema in files.values():
        artifact.verify(folder, schema=schema, only=name)
    return {
        row: scored(
            partial(evaluator.score_held_out, name=f"{folder / name} (split val)"),
            Gathered.mixed(folder / name, count=count),
        )
        for row, (folder, name, _) in files.items()
    }


def build_metrics(
    config: ScoreConfig,
    *,
    checkpoint: Path,
    reference: Path,
    codec: Path,
    stage1: Path,
    stage2: Path,
    state: Path,
    out: Path,
) -> dict[str, Any]:
    """Every metric of both stages and both floors, how many images each one has, and what a sample of a stage cost.

    Features under work lie under `state`, keyed by config, inputs and code, until `out` is written. Of several
    processes each one takes its share and returns nothing; a process on its own takes what lacks and writes `out`.
    """
    evaluator, decoder = Evaluator.load(reference), Codec.load(codec)
    samples = {"stage1": StoredSamples(stage1), "stage2": StoredSamples(stage2)}
    for stored in samples.values():
        check_samples(stored.count, config.num_samples, name=str(stored.folder))
    inputs = {"checkpoint": checkpoint, "reference": reference, "codec": codec, "stage1": stage1, "stage2": stage2}
    folder, _ = shards_of(config, **inputs, state=state)
    process = this_process()
    alone = process.world == 1
    with artifact.locked(folder / ("out" if alone else f"process-{process.rank}")):
        work = Work(folder, parts_of(config, codec), samples, decoder)
        work.extract(evaluator, process)
        if not alone:
            return {}
        rows: dict[str, Any] = floors(evaluator, reference, codec, config.num_samples)
        for name, spent in zip(samples, costs(checkpoint, samples), strict=True):
            rows[name] = scored(evaluator.score, work.gathered(name)) | spent
        artifact.write_json(out, rows)
        shutil.rmtree(folder)
    return rows


def costs(checkpoint: Path, samples: dict[str, StoredSamples]) -> list[dict[str, float]]:
    """Evaluations of the network, and GFLOPs in both conventions, of a sample after each stage with all before it."""
    model = artifact.read_manifest(checkpoint, schema=CHECKPOINT_SCHEMA)["about"]["model"]
    config = ModelConfig.parse(model, place=str(checkpoint / artifact.MANIFEST))
    stated = [stored.about for stored in samples.values()]
    gflops = cost.per_sample(cost.describe(config), [cost.Spent.stated(about) for about in stated])
    return [{"evaluations": about["evaluations"], **row} for about, row in zip(stated, gflops, strict=True)]
