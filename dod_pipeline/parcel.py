"""A stage's computation as it travels to machines of a cluster: settings, and inputs by content.

In the bucket, below the storage's URL:

    parcels/ID/parcel.json      this, written first
    parcels/ID/failed           a training's worker has failed
    parcels/ID/result.json      what was made, by content; written last, so that it stands for the whole
    state/STAGE/KEY/WORK/...    work in progress: the mirror of a training, the shards of other stages
    dvc/files/md5/...           the content of both
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, NonNegativeInt, StringConstraints

from dod_models import cli
from dod_models.config import Frozen
from dod_pipeline.deployment import Ray
from dod_pipeline.objects import Content, check_below
from dod_pipeline.s3 import Object
from dod_pipeline.stages import Job

PARCELS = "parcels/"
Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_-]*$")]  # of a stage, a key, a folder
Relative = Annotated[str, AfterValidator(check_below)]
NO_INPUT: tuple[Literal["state", "picture"], ...] = ("state", "picture")  # paths among a job's inputs that it writes to


def prefix(stage: str, key: str) -> str:
    """What the names of a stage instance's parcels begin with, whatever its settings and inputs."""
    return f"{PARCELS}dod-{stage}-{key}-"


class Parcel(Frozen):
    """A job that any machine can compute that reaches the bucket and has the code of the commit."""

    stage: Name
    key: Name
    config: dict[str, Any]
    inputs: dict[Name, Content]
    named: dict[Relative, Content]  # what the settings name in the project's folder, by its path there
    writes: tuple[Literal["state", "picture"], ...]  # of NO_INPUT, those that the stage has
    facts: bool  # whether its numbers make a file of their own
    work: Name | Literal[""] = ""  # name of the work folder under its state; "": it has none that lasts
    shards: NonNegativeInt = 0  # 0: computed in one piece
    code: str  # git's names of the trees that it runs
    storage: str  # s3://BUCKET/PREFIX
    endpoint: str | None = None  # of an S3 server that isn't AWS's
    cluster: Ray

    def canonical(self) -> str:
        """Without the machines, on which no result depends."""
        return json.dumps(self.model_dump(mode="json", exclude={"cluster", "endpoint"}), sort_keys=True)

    @property
    def id(self) -> str:
        """The name of the cluster's job: whoever wants the same finds it running."""
        return f"{prefix(self.stage, self.key).removeprefix(PARCELS)}{self.digest[:16]}"

    @property
    def folder(self) -> str:
        """Below the storage's URL, as the next ones."""
        return f"{PARCELS}{self.id}"

    @property
    def result(self) -> str:
        """What was made; where it stands, all is there."""
        return f"{self.folder}/result.json"

    @property
    def failure(self) -> str:
        """Stands where a worker of a training has failed for a reason of its own: no other need begin again."""
        return f"{self.folder}/failed"

    @property
    def state(self) -> str:
        """Work in progress, which outlives the cluster."""
        return f"state/{self.stage}/{self.key}/{self.work}"

    def mark(self, index: int) -> str:
        """Stands for a shard that is there."""
        return f"{self.state}/shards/{index}.json"

    def job(self, root: Path) -> Job:
        """The job with all its paths below `root`."""
        config_class, _ = cli.STAGES[self.stage].load()
        paths = {name: root / "inputs" / name for name in self.inputs} | {name: root / name for name in self.writes}
        ordered = {name: paths[name] for name in cli.STAGES[self.stage].inputs if name in paths}
        config = config_class.parse(self.config, place=f"{self.id}: {self.stage}")
        return Job(self.stage, self.key, config, ordered, root / "out", root / "facts.json" if self.facts else None)


class Mark(Frozen):
    """A shard that was uploaded."""

    objects: tuple[Object, ...]  # its files, named below the storage's URL
    device: str


class Result(Frozen):
    """What a cluster has made of a parcel."""

    parcel: str  # its digest
    devices: tuple[str, ...]
    files: Mapping[str, Content]  # out, facts, picture, took; none where the shards are put together elsewhere
