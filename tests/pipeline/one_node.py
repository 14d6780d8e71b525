"""A cluster of one node, which is this process, for the built project."""

from pathlib import Path

from dod_pipeline import cluster, objects, stages
from dod_pipeline.config import load_params
from dod_pipeline.deployment import Deployment
from dod_pipeline.node import Node, lacking
from dod_pipeline.parcel import Parcel
from dod_pipeline.s3 import Bucket
from dod_pipeline.stages import Job

KEYS = {"reference": "tiny", "codec": "tiny", "latents": "tiny", "train": "tiny"} | {
    name: "tiny-6" for name in ("stage1", "stage2", "metrics", "sweeps")
}


class Here:
    """A cluster of one node: this process."""

    made: list[str]  # what was computed

    def __init__(self, parcel: Parcel) -> None:
        self.parcel = parcel

    def follow(self) -> None:
        node = Node(self.parcel)
        if self.parcel.stage == "train":
            node.train()
            Here.made.append("train")
        elif self.parcel.shards:
            for index in lacking(self.parcel, node.bucket):
                node.shard(index)
                Here.made.append(f"shard {index}")
            node.finish(("cpu",), {})
        else:
            node.whole()
            Here.made.append("whole")


def job_of(stage: str) -> Job:
    return stages.resolve(load_params(), stage, KEYS[stage])


def digests(path: Path) -> dict[str, str]:
    return {file.path: file.md5 for file in objects.content_of(path)}


def sharded(job: Job, deployment: Deployment) -> tuple[Parcel, Bucket]:
    """The job sent to the bucket, and all of its shards made there."""
    parcel = cluster.pack(job, deployment)
    bucket = Bucket(parcel.storage)
    cluster.send(parcel, job, bucket)
    for index in range(parcel.shards):
        Node(parcel).shard(index)
    Node(parcel).finish(("cpu",), {})
    return parcel, bucket
