"""What a machine of a cluster does for a parcel: it brings the inputs, computes, uploads the result.

Several processes of a machine share its copy of the inputs, and all parcels its cache. Ray is not imported here.
"""

import fcntl
import os
import shutil
import time
import weakref
from collections.abc import Iterator
from contextlib import chdir, contextmanager, nullcontext, suppress
from functools import cached_property
from pathlib import Path

from dod_models import cli
from dod_models.config import CACHE, TOOK, this_process
from dod_pipeline import fetch, objects
from dod_pipeline.launch import device_name
from dod_pipeline.mirror import Mirror, mirrored
from dod_pipeline.objects import Content
from dod_pipeline.parcel import Mark, Parcel, Result
from dod_pipeline.s3 import Bucket
from dod_pipeline.stages import Job

USED = "used"  # in a parcel's folder: locked by those who compute it, as old as the last of them


class StageError(Exception):
    """The stage has said why on stderr; another machine would say the same."""


class Node:
    """This machine, with a parcel."""

    def __init__(self, parcel: Parcel) -> None:
        cache = Path(os.environ.get(CACHE, Path.home() / ".cache" / "dod")).absolute()
        os.environ[CACHE] = str(cache)  # of copies of what configs name in s3://
        self.parcel, self.cache = parcel, cache
        self.root, self.bucket = cache / "parcels" / parcel.id, Bucket(parcel.storage)

    @cached_property
    def job(self) -> Job:
        """The job on this machine, its inputs brought here by one process at a time."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.cache / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            used = os.open(self.root / USED, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            weakref.finalize(self, os.close, used)
            fcntl.flock(used, fcntl.LOCK_SH)
            tidy(self.cache)
            data = Bucket(f"{self.parcel.storage}/{objects.FOLDER}")
            for name, content in self.parcel.inputs.items():
                objects.pull(data, content, self.root / "inputs" / name, cache=self.cache)
            for path, content in self.parcel.named.items():
                objects.pull(data, content, self.root / path, cache=self.cache)
            job = self.parcel.job(self.root)
            fetch.inputs(job)
        return job

    def compute(self, job: Job) -> None:
        """Run the stage in this process, in the folder where what the settings name lies."""
        with chdir(self.root):
            code = cli.main(job.arguments())
        if code != 0:
            raise StageError(f"{self.parcel.stage} of {self.parcel.key} failed, as said above")

    def shard(self, index: int) -> str:
        """Make one shard in a folder of its own, upload it, then its mark; returns what computed it."""
        print(f"{self.parcel.stage}: making shard {index}", flush=True)
        state = self.root / "shards" / str(index)
        job = self.job._replace(inputs=self.job.inputs | {"state": state})
        with process(index, max(2, self.parcel.shards)):  # a process on its own would put the shards together, too
            self.compute(job)
        work = state / self.parcel.work
        notes = sorted((work / "done").glob("[!.]*.json"))
        found = [path for note in notes for path in (work / "out" / note.stem, note)]
        if not found:
            raise StageError(
                f"{self.parcel.id}: no {work.name} in {state}: torch or the code here is not the sender's; "
                "start the cluster from the image of the same commit"
            )
        names = {path: f"{self.parcel.state}/{path.relative_to(work).as_posix()}" for path in found}
        mark = Mark(objects=tuple(self.bucket.upload(path, name) for path, name in names.items()), device=device_name())
        self.bucket.write(self.parcel.mark(index), mark.canonical().encode())
        shutil.rmtree(state)
        return mark.device

    def train(self) -> None:
        """Train as one of several processes; the first one's states and checkpoints are mirrored to the bucket."""
        if self.bucket.find(self.parcel.failure) is not None:  # one of the workers has said why
            return
        try:
            self.train_on()
        except StageError as error:
            self.bucket.write(self.parcel.failure, str(error).encode())
            raise

    def train_on(self) -> None:
        """Train from the newest state; where S3 can't be asked for it, that is an error, not a beginning."""
        process = this_process()
        first = process.rank == 0
        work = self.job.inputs["state"] / self.parcel.work
        mirror = Mirror(f"{self.parcel.storage}/{self.parcel.state}", work, strict=True) if first else None
        with mirrored(mirror) if mirror else nullcontext():
            self.compute(self.job)
        if first:
            self.deliver()
        if process.local_rank == 0:  # all of this machine's have ended together
            shutil.rmtree(self.root)

    def whole(self) -> None:
        """Compute the stage in one piece."""
        self.compute(self.job)
        self.deliver()
        shutil.rmtree(self.root)

    def deliver(self) -> None:
        """Upload what was made, then the result that names it."""
        made = {"out": self.job.out, "facts": self.job.facts, "picture": self.job.inputs.get("picture")}
        if self.parcel.stage == "sweeps":
            made["took"] = self.job.inputs["state"] / TOOK
        files = {name: objects.content_of(path) for name, path in made.items() if path is not None and path.exists()}
        data = Bucket(f"{self.parcel.storage}/{objects.FOLDER}")
        for name, content in files.items():
            path = made[name]
            assert path is not None
            objects.push(data, path, content)
        self.finish((device_name(),), files)

    def finish(self, devices: tuple[str, ...], files: dict[str, Content]) -> None:
        """Say that all is there."""
        result = Result(parcel=self.parcel.digest, devices=devices, files=files)
        self.bucket.write(self.parcel.result, result.canonical().encode())


def tidy(cache: Path) -> None:
    """Remove parcels that nobody computes any more, as after a loss, or once others have put the shards together."""
    for used in cache.glob(f"parcels/*/{USED}"):
        with suppress(BlockingIOError, FileNotFoundError), used.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if used.stat().st_mtime < time.time() - objects.UNUSED:
                shutil.rmtree(used.parent)


def lacking(parcel: Parcel, bucket: Bucket) -> list[int]:
    """The shards that nobody has uploaded yet."""
    there = {mark.name for mark in bucket.objects(f"{parcel.state}/shards")}
    return [index for index in range(parcel.shards) if parcel.mark(index) not in there]


@contextmanager
def process(rank: int, world: int) -> Iterator[None]:
    """Be one of several processes, as the environment states it; the GPUs that this one sees are its own."""
    stated = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}
    before = {name: os.environ.get(name) for name in stated}
    os.environ.update(stated)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
