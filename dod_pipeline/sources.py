"""What a number rests on: the files on the way to it from the images, by digest, and the settings that made them."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from dod_models import artifact
from dod_pipeline.config import Params
from dod_pipeline.ledger import HISTORY, write_once
from dod_pipeline.stages import BY_DATASET, Job

SETTINGS = "settings"  # below the history: a folder for each stage, a file for each digest

# What each source is made from: the graph of dvc.yaml, with the averages that were sampled and the index of the images.
INPUTS = {
    "stage2": ("stage1", "weights2"),
    "stage1": ("weights1",),
    "weights": ("train",),  # of a sweep's row
    "weights2": ("train",),
    "weights1": ("train",),
    "train": ("latents",),
    "latents": ("codec", "dataset"),
    "codec": ("reference", "dataset"),
    "reference": ("dataset",),
    "dataset": ("train.jsonl", "val.jsonl"),
    "train.jsonl": (),
    "val.jsonl": (),
}


class Source(BaseModel):
    """A file that a number rests on: for an output folder its manifest, which has the digest of every file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    sha256: str
    config: str | None = None  # sha256 of the settings that it was made with


def behind(job: str, stage: object) -> tuple[str, ...]:
    """What a row of that job's table is made from; the samples of a sweep are not kept, so they are no source."""
    if stage == "floor":
        return ("reference",)
    if stage == "codec":
        return ("codec", "reference")
    if stage == "probe":
        return ("weights", "latents", "dataset")
    if not isinstance(stage, int):
        return ("weights", "codec", "reference", "dataset")
    if job == "metrics":
        return (f"stage{stage}", "codec", "reference")
    before = (f"stage{min(stage - 1, 2)}",) if stage > 1 else ()
    return ("weights", *before, "codec", "reference")


class Sources:
    """The files that the rows of a finished `metrics` or `sweeps` rest on, each digested once."""

    def __init__(self, params: Params, job: Job) -> None:
        item = params.checkpoints[job.key]
        self.job, self.checkpoint = job, job.inputs["checkpoint"]
        folders = {name: Path(name, item.data) for name in BY_DATASET} | {"train": Path("train", item.experiment)}
        folders |= {name: job.inputs[name] for name in ("stage1", "stage2")}
        self.found = {
            job.stage: Source(path=str(job.out), sha256=artifact.sha256_file(job.out), config=job.config.digest)
        }
        for name, folder in folders.items():
            self.add(name, folder)

    def add(self, name: str, folder: Path) -> None:
        """A finished folder, and what its manifest says of others; a clone need not have all of them."""
        path = folder / artifact.MANIFEST
        if not path.exists():
            return
        manifest = artifact.read_json(path)
        self.found[name] = Source(path=str(path), sha256=artifact.sha256_file(path), config=manifest.get("config"))
        if name == "dataset":
            for index in (name for name in INPUTS["dataset"] if name in manifest["files"]):
                self.found[index] = Source(path=str(folder / index), sha256=manifest["files"][index]["sha256"])
        if name in ("stage1", "stage2"):
            from dod_models.checkpoint import weights_file

            average = weights_file(manifest["about"]["sampling"]["ema_decay"])
            self.found[f"weights{name[-1]}"] = self.average(average)

    def average(self, name: str) -> Source:
        """Averaged weights of the checkpoint."""
        manifest = artifact.read_json(self.checkpoint / artifact.MANIFEST)
        return Source(path=str(self.checkpoint / name), sha256=manifest["files"][name]["sha256"])

    def of(self, stage: object, average: str | None) -> dict[str, Source]:
        """All that a row rests on, from its table back to the images."""
        known = self.found if average is None else {**self.found, "weights": self.average(average)}
        wanted = list(behind(self.job.stage, stage))
        for name in wanted:  # grows while it is gone through
            wanted += [before for before in INPUTS[name] if before not in wanted]
        return {name: known[name] for name in (self.job.stage, *wanted) if name in known}


def keep_settings(job: Job, root: Path = HISTORY) -> Path:
    """Keep the settings of a finished stage under their digest, by which records name them."""
    return write_once(root / SETTINGS / job.stage, job.config)
