"""Stage `sweeps`: scores of variants of a checkpoint's sampling, its reconstructions, and a linear probe of its LEM.

For checkpoints that ask for it. A row is the unit of work: a killed sweep goes on with those that lack. Beside the
table a picture shows the same samples through the stages, and `TOOK` what sampling took, which no two runs have alike.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import PositiveInt, field_validator, model_validator

from dod_models import artifact, cost, probe, source
from dod_models.checkpoint import load_checkpoint
from dod_models.codec import Codec, device
from dod_models.config import TOOK, Frozen
from dod_models.cost import Spent
from dod_models.data import LatentShards
from dod_models.evaluator import Evaluator
from dod_models.flow import Latent
from dod_models.model import DoD
from dod_models.probe import ProbeConfig
from dod_models.reconstruct import Originals, Reconstruction
from dod_models.sample import ALWAYS, Evaluations, SampleConfig, Samples, draw_grid, sample_stage
from dod_models.sample import SCHEMA as SAMPLES_SCHEMA

log = logging.getLogger(__name__)

RECONSTRUCTION = "reconstruction"
PROBE = "probe"
GRID = "grid.png"


class SweepRow(Frozen):
    """One variant of a stage's sampling, or one for each scale of guidance; the rest is as in the experiment.

    Stage 3, and reconstruction, which takes real images for the samples of stage 1, sample as stage 2 does.
    """

    stage: Literal[1, 2, 3, "reconstruction"]
    guidance: float | tuple[float, ...]
    num_steps: PositiveInt | None = None
    null_branch: str | None = None
    guidance_interval: tuple[float, float] | None = None

    @property
    def kind(self) -> str:
        """What the table calls it."""
        return self.stage if isinstance(self.stage, str) else f"stage{self.stage}"

    def variants(self, base: SampleConfig) -> list[SampleConfig]:
        """The full settings, once for each scale of guidance."""
        given = self.model_dump(exclude_none=True, exclude={"stage", "guidance"})
        scales = self.guidance if isinstance(self.guidance, tuple) else (self.guidance,)
        return [SampleConfig.model_validate(base.model_dump() | given | {"guidance": scale}) for scale in scales]


class Variant(NamedTuple):
    """How a row of the table is sampled: as which stage, and with what settings."""

    stage: int
    sampling: SampleConfig


class SweepConfig(Frozen):
    """Variants of the stages; each starts from the experiment's own samples of the stage before."""

    num_samples: PositiveInt
    stage1: SampleConfig
    stage2: SampleConfig
    rows: tuple[SweepRow, ...]
    probe: ProbeConfig | None = None  # true: with its defaults

    @field_validator("probe", mode="before")
    @classmethod
    def check_probe(cls, given: Any) -> Any:
        """True and false stand for its defaults and for none."""
        return ({} if given else None) if isinstance(given, bool) else given

    @model_validator(mode="after")
    def check_rows(self) -> "SweepConfig":
        """Every row must be a valid way to sample, before the first is sampled."""
        for name, (stage, sampling) in self.variants().items():
            if stage == 1 and sampling.guidance != 1 and sampling.null_branch == "prior":
                raise ValueError(f"{name}: there is no prior to drop in stage 1; use null_branch both, or guidance 1")
        return self

    def variants(self) -> dict[str, Variant]:
        """Name of each row of the table but the probe's -> how it is sampled."""
        found: dict[str, Variant] = {}
        for row in self.rows:
            for sampling in row.variants(self.stage1 if row.stage == 1 else self.stage2):
                name = f"{row.kind} guidance={sampling.guidance:g} {sampling.solver}"
                name += f" steps={sampling.num_steps}" if sampling.solver == "euler" else ""
                name += f" null={sampling.null_branch}" if sampling.guidance != 1 else ""
                low, high = sampling.guidance_interval
                name += f" t={low:g}-{high:g}" if sampling.guidance != 1 and (low, high) != ALWAYS else ""
                found[name] = Variant(row.stage if isinstance(row.stage, int) else 2, sampling)
        return found

    def settings(self, name: str) -> str:
        """All that a row depends on beside inputs and code."""
        if name == PROBE:
            assert self.probe is not None
            return f"{PROBE} {self.stage2.ema_decay} {self.probe.canonical()}"
        return f"{name.split()[0]} {self.num_samples} {self.variants()[name].sampling.canonical()}"


class Sweep:
    """What the rows are made with; each thing is loaded when a row first asks for it."""

    def __init__(self, config: SweepConfig, inputs: dict[str, Path], state: Path) -> None:
        self.config, self.inputs = config, inputs
        names = [*config.variants(), *([] if config.probe is None else [PROBE])]
        # Where each row's work lies: its own place, so that a table with a row more goes on from it.
        self.folders = {
            name: state / source.key("sweeps", config.settings(name), [inputs[i] for i in sorted(inputs)])
            for name in names
        }
        self.models: dict[float, DoD] = {}

    def model(self, decay: float) -> DoD:
        """The weights averaged at `decay`."""
        if decay not in self.models:
            self.models[decay] = load_checkpoint(self.inputs["checkpoint"], decay=decay)[0].to(device())
        return self.models[decay]

    @cached_property
    def evaluator(self) -> Evaluator:
        return Evaluator.load(self.inputs["reference"])

    @cached_property
    def codec(self) -> Codec:
        return Codec.load(self.inputs["codec"])

    @cached_property
    def gflops(self) -> dict[str, Any]:
        """What an evaluation of the network costs."""
        return cost.describe(self.model(self.config.stage1.ema_decay).config)

    @cached_property
    def reconstruction(self) -> Reconstruction:
        count = self.config.num_samples
        return Reconstruction(Originals(self.inputs["dataset"], self.inputs["codec"], count=count), self.evaluator)

    def price(self, variant: Variant, own: Evaluations, before: list[Spent]) -> dict[str, float]:
        """Evaluations of the network and GFLOPs of a sample, with those of the stages `before` this one."""
        spent = [*before, Spent(own.conditional, own.null, variant.sampling.null_branch)]
        gflops = cost.per_sample(self.gflops, spent, first=variant.stage - len(before))[-1]
        return {"evaluations": sum(s.conditional + s.null for s in spent), **gflops}

    def timed(self, name: str, sample: Callable[[], tuple[Latent, Evaluations]]) -> tuple[Latent, Evaluations]:
        """Sample a row, and note the seconds."""
        started = time.monotonic()
        found = sample()
        artifact.write_json(self.folders[name] / TOOK, round(time.monotonic() - started, 3))
        return found

    def draw(self, path: Path, *later: Latent) -> None:
        """A picture of the first samples of each class through stages 1, 2 and `later` ones (Fig. 5)."""
        known = [Samples.load(self.inputs[name]) for name in ("stage1", "stage2")]
        stages = enumerate([*(samples.latents for samples in known), *later], 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_grid(path, [(f"stage {number}", latents) for number, latents in stages], known[0].labels, self.codec)

    def publish_picture(self, path: Path) -> None:
        """The picture of the first row of stage 3, or one without it."""
        drawn = next((grid for folder in self.folders.values() if (grid := folder / GRID).exists()), None)
        if drawn is None:
            self.draw(path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(drawn, beside := path.with_name(f".{path.name}.partial"))
            os.replace(beside, path)

    def generate(self, name: str, *, title: str) -> dict[str, Any]:
        """The numbers of a stage."""
        variant = self.config.variants()[name]
        stage, sampling = variant
        earlier = [self.inputs[f"stage{number}"] for number in range(1, stage)]
        before = [Spent.stated(artifact.read_manifest(folder, schema=SAMPLES_SCHEMA)["about"]) for folder in earlier]
        known = Samples.load(earlier[-1] if earlier else self.inputs["stage1"])  # labels are the same in all stages
        model, previous = self.model(sampling.ema_decay), known.latents if earlier else None
        sample = partial(sample_stage, model, sampling, stage=stage, labels=known.labels, title=title)
        latents, own = self.timed(name, partial(sample, previous=previous))
        if stage > 2:
            self.draw(self.folders[name] / GRID, latents)
        count = self.config.num_samples
        scores = self.evaluator.score(self.evaluator.gathered(self.codec, latents, count, name="sweeps"))
        return {**scores, "num_samples": count, **self.price(variant, own, before)}

    def reconstruct(self, name: str, *, title: str) -> dict[str, Any]:
        """The numbers of a reconstruction; what it would take to come by a prior is not counted."""
        variant = self.config.variants()[name]
        model = self.model(variant.sampling.ema_decay)
        latents, own = self.timed(name, partial(self.reconstruction.sample, model, variant.sampling, title=title))
        numbers = self.reconstruction.compare(latents, title=f"{title}, images")
        return {**numbers, "num_samples": len(latents), **self.price(variant, own, [])}

    def probe(self, config: ProbeConfig, *, title: str) -> dict[str, Any]:
        """The probe's numbers; the features lie in its folder meanwhile."""
        model, shards = self.model(self.config.stage2.ema_decay), LatentShards(self.inputs["latents"])
        held_out = Originals(self.inputs["dataset"], self.inputs["codec"])
        sources = {"train": (probe.means(shards), shards.labels), "test": (held_out.encoded(), held_out.labels)}
        train, test = (
            probe.extract(
                model.lem,
                latents,
                labels=labels.numpy(),
                path=self.folders[PROBE] / f"{split}.npy",
                title=f"{title}, {split}",
            )
            for split, (latents, labels) in sources.items()
        )
        found = probe.top1(config, train, test, num_classes=shards.num_classes, title=title)
        return {"top1": found, "num_train": len(train.labels), "num_test": len(test.labels)}

    def row(self, name: str, *, title: str) -> dict[str, Any]:
        """A row of the table."""
        if name == PROBE:
            assert self.config.probe is not None
            return {"kind": PROBE, **self.probe(self.config.probe, title=title)}
        guidance, kind = self.config.variants()[name].sampling.guidance, name.split()[0]
        make = self.reconstruct if kind == RECONSTRUCTION else self.generate
        return {"kind": kind, "guidance": guidance, **make(name, title=title)}


def build_sweeps(
    config: SweepConfig,
    *,
    checkpoint: Path,
    reference: Path,
    codec: Path,
    dataset: Path,
    latents: Path,
    stage1: Path,
    stage2: Path,
    state: Path,
    picture: Path,
    out: Path,
) -> dict[str, Any]:
    """The table: for each row its numbers, their kind, and what a sample of it takes, earlier stages included.

    Rows that are done lie under `state`, each keyed by its settings, inputs and code, until the table stands at `out`.
    """
    inputs = {"checkpoint": checkpoint, "reference": reference, "codec": codec, "dataset": dataset}
    inputs |= {"latents": latents, "stage1": stage1, "stage2": stage2}
    with artifact.locked(state):
        sweep, table = Sweep(config, inputs, state), {}
        for number, (name, folder) in enumerate(sweep.folders.items(), 1):
            note = folder / "row.json"
            if not note.exists():
                folder.mkdir(exist_ok=True)
                title = f"row {number} of {len(sweep.folders)}: {name}"
                log.info(f"sweeps: {title}")
                artifact.write_json(note, sweep.row(name, title=title))
            table[name] = artifact.read_json(note)
        took = {name: artifact.read_json(note) for name, f in sweep.folders.items() if (note := f / TOOK).exists()}
        artifact.write_json(state / TOOK, took)
        sweep.publish_picture(picture)
        artifact.write_json(out, table)
        for folder in sweep.folders.values():
            shutil.rmtree(folder)
    return table
