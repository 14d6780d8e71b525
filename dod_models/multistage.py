"""Stages `stage1` and `stage2`: samples on disk, those of a stage from those of the stage before (eq. 5).

A shard of whole micro-batches is the unit of work: one of several processes makes every so many of them, a killed run
goes on with those that lack. Its bytes depend on its samples alone (on a CPU, the last bits perhaps on the threads).
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from dod_models import artifact, draws, source
from dod_models.checkpoint import load_checkpoint
from dod_models.codec import Codec, device
from dod_models.config import Process, this_process
from dod_models.flow import Latent
from dod_models.model import DoD
from dod_models.packed import packed_weights
from dod_models.sample import SAMPLES_FILE, SCHEMA, Evaluations, SampleConfig, Samples, draw_grid, sample_rows
from dod_models.shards import Shards

log = logging.getLogger(__name__)

SHARDS_SCHEMA = "sample-shards/1"
SHARD_BATCHES = 4  # micro-batches in a shard: what a killed process loses at most


class Work:
    """A stage's samples under work."""

    def __init__(self, folder: Path, config: SampleConfig) -> None:
        self.shards, self.count, self.parts = Shards(folder), config.num_samples, shard_rows(config)

    def make(
        self, model: DoD, sample: Callable[..., tuple[Latent, Evaluations]], process: Process, *, title: str
    ) -> None:
        """Make those of the process's shards that lack, by a `sample_rows` that wants no more than `rows` and `bar`."""
        mine = self.parts[process.rank :: process.world]
        wanted = [rows for rows in mine if not self.shards.has(shard_name(rows))]
        if not wanted:
            return
        total, lack = (sum(map(len, parts)) for parts in (mine, wanted))
        if lack < total:
            log.info(f"{title}: going on from {total - lack} of {total} samples")
        if process.world > 1:
            title += f", process 1 of {process.world}"
        bar = tqdm(total=total, initial=total - lack, desc=title, unit="image", disable=process.rank > 0)
        with packed_weights(model), bar:
            for rows in wanted:
                latents, spent = sample(rows=rows, bar=bar)
                self.shards.save(shard_name(rows), partial(save_file, {"latents": latents}), **spent._asdict())

    def joined(self, shape: tuple[int, int, int]) -> tuple[Latent, Evaluations]:
        """All samples and their evaluations, as `sample_stage` returns them."""
        latents = torch.empty(self.count, *shape)
        for rows in self.parts:
            latents[rows.start : rows.stop] = load_file(self.shards.out / shard_name(rows))["latents"]
        notes = [self.shards.stated(shard_name(rows)) for rows in self.parts]
        return latents, Evaluations.mean([Evaluations(n["conditional"], n["null"]) for n in notes], self.count)


def shard_rows(config: SampleConfig) -> list[range]:
    """The samples of each shard."""
    every, size = range(config.num_samples), SHARD_BATCHES * config.batch_size
    return [every[start:][:size] for start in every[::size]]


def shard_name(rows: range) -> str:
    """File name of a shard."""
    return f"samples-{rows.start:08}.safetensors"


def shards_of(
    config: SampleConfig, *, checkpoint: Path, codec: Path, state: Path, previous: Path | None = None
) -> tuple[Path, int]:
    """Where the shards of this stage lie, keyed by config, inputs and code, and how many there are."""
    inputs = (checkpoint, codec) if previous is None else (checkpoint, codec, previous)
    return state / source.key("multistage", config.digest, inputs), len(shard_rows(config))


def build_stage(
    config: SampleConfig, *, checkpoint: Path, codec: Path, state: Path, out: Path, previous: Path | None = None
) -> dict[str, Any]:
    """Stage `stage1`, or with the samples of a stage in `previous` the next one (eq. 5).

    Writes latents and a grid, in which the stage before stands above this one.

    In the manifest and the facts, of the network and per sample: `evaluations` counts those of all stages so far,
    `stage_evaluations` this stage's own, `null_evaluations` those of its own that guidance made without condition.

    Work in progress lies under `state`. Of several processes each one samples its share and returns nothing; a process
    on its own samples what lacks and puts `out` together, to the same bytes. Its shards stay until the next work under
    `state` is finished or `artifact.forget_finished` is called: nobody has recorded `out` yet.
    """
    model, _ = load_checkpoint(checkpoint, decay=config.ema_decay)
    stage, spent, before = 1, 0.0, None
    labels = draws.labels_for(config.seed, range(config.num_samples), model.config.num_classes)
    if previous is not None:
        about = artifact.read_manifest(previous, schema=SCHEMA)["about"]
        stage, spent, (before, labels) = about["stage"] + 1, about["evaluations"], Samples.load(previous)
    if len(labels) != config.num_samples:
        raise ValueError(f"{previous} holds {len(labels)} samples, num_samples is {config.num_samples}; make it again")
    folder, _ = shards_of(config, checkpoint=checkpoint, codec=codec, state=state, previous=previous)
    process = this_process()
    alone = process.world == 1
    with artifact.locked(folder / ("out" if alone else f"process-{process.rank}")):
        work = Work(folder, config)
        sample = partial(sample_rows, model.to(device()), config, stage=stage, labels=labels, previous=before)
        work.make(model, sample, process, title=f"stage {stage}")
        if not alone:
            return {}
        artifact.forget_finished(state, but=folder.name)
        with artifact.writing(out, schema=SCHEMA, config=config.digest) as target:
            latents, own = work.joined(model.config.latent_shape)
            save_file({"latents": latents, "labels": labels}, target.path / SAMPLES_FILE)
            shown = [] if before is None else [(f"stage {stage - 1}", before)]
            draw_grid(target.path / "grid.png", [*shown, (f"stage {stage}", latents)], labels, Codec.load(codec))
            facts = {
                "stage": stage,
                "evaluations": spent + own.total,
                "stage_evaluations": own.total,
                "null_evaluations": own.null,
            }
            target.about = {
                **facts,
                "sampling": config.model_dump(mode="json"),
                "weights": artifact.sha256_file(checkpoint / artifact.MANIFEST),
                "previous": previous and artifact.sha256_file(previous / artifact.MANIFEST),
            }
        artifact.describe(work.shards.out, schema=SHARDS_SCHEMA, config=config.digest, about={})  # finished
    return {**facts, "num_samples": len(labels)}
