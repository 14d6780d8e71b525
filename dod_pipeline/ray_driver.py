"""`python -m dod_pipeline.ray_driver s3://BUCKET/PREFIX ID`: the job of a Ray cluster that computes a parcel.

It runs on the head and computes nothing itself. A training is Ray Train's TorchTrainer around the unchanged stage; any
other stage is a task for each shard, or one for the whole: losing a node costs one of them. A stage's own error ends
the job; what a node's loss breaks is computed again.
"""

import argparse
import logging
import sys
from typing import Any

import ray
from ray.exceptions import RayError

from dod_pipeline.deployment import Ray
from dod_pipeline.node import Node, StageError, lacking
from dod_pipeline.parcel import Parcel
from dod_pipeline.s3 import reaching

PATIENCE = 300.0  # seconds without a shard, after which it is said what shards wait for


def read_parcel(storage: str, name: str) -> Parcel:
    """The parcel that was sent."""
    with reaching(storage) as bucket:
        found = bucket.read(f"parcels/{name}/parcel.json")
    if found is None:
        raise FileNotFoundError(f"{storage}/parcels/{name}/parcel.json: not there; send it again")
    parcel = Parcel.load(found[0].decode())
    if parcel.id != name:
        raise ValueError(f"{storage}/parcels/{name}/parcel.json: is {parcel.id}, not what was asked for; send it again")
    return parcel


def node(parcel: str) -> Node:
    """This machine, with a parcel in JSON."""
    return Node(Parcel.load(parcel))


def make_shard(parcel: str, index: int) -> str:
    """Make a shard on a node."""
    return node(parcel).shard(index)


def make_whole(parcel: str) -> None:
    """Compute a stage on a node."""
    node(parcel).whole()


def train_together(given: dict[str, str]) -> None:
    """What each of Ray Train's workers does. Where one raises, all are begun again: after a stage's own error in one of
    them, to find that out and end."""
    logging.getLogger("dod_models").propagate = False  # Ray prints what comes to the root, and we do
    node(given["parcel"]).train()


def options(cluster: Ray) -> dict[str, Any]:
    """Of a task: what it needs, and how often it is begun again when its node is lost."""
    return {
        "num_cpus": cluster.cpus,
        "num_gpus": cluster.gpus,
        "max_retries": cluster.losses,
        "scheduling_strategy": "SPREAD",
    }


def train(parcel: Parcel) -> None:
    """Train with as many workers as the deployment says; after the loss of one all begin again from the last state."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig  # late: of other jobs the driver needs no torch
    from ray.train.torch import TorchTrainer

    cluster = parcel.cluster
    resources = {"CPU": cluster.cpus} | ({"GPU": cluster.gpus} if cluster.gpus else {})
    trainer = TorchTrainer(
        train_together,
        train_loop_config={"parcel": parcel.model_dump_json()},
        scaling_config=ScalingConfig(
            num_workers=cluster.training_workers, use_gpu=cluster.gpus > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=cluster.losses)),
    )
    with reaching(parcel.storage) as bucket:
        bucket.remove([parcel.failure])
        trainer.fit()
        if bucket.find(parcel.result) is None:
            raise StageError(f"{parcel.id}: no result, for the reason above")


def shards(parcel: Parcel) -> None:
    """Make the shards that lack, as many at a time as the cluster has room for."""
    with reaching(parcel.storage) as bucket:
        lack = lacking(parcel, bucket)
        print(f"{parcel.stage}: {len(lack)} of {parcel.shards} shards to make", flush=True)
        made = ray.remote(make_shard).options(**options(parcel.cluster))
        waiting, devices = [made.remote(parcel.model_dump_json(), index) for index in lack], set()
        while waiting:
            done, waiting = ray.wait(waiting, timeout=PATIENCE)
            devices |= set(ray.get(done))
            there = f"{parcel.shards - len(waiting)} of {parcel.shards} shards are there"
            wants = f"; a shard wants {parcel.cluster.cpus} CPUs and {parcel.cluster.gpus} GPUs of a node"
            has = f", the cluster has {ray.cluster_resources()}"
            print(f"{parcel.stage}: {there}{'' if done else wants + has}", flush=True)
        Node(parcel).finish(tuple(sorted(devices)), {})


def main() -> int:
    """Compute the parcel; what went wrong is said on stderr."""
    given = argparse.ArgumentParser(prog="python -m dod_pipeline.ray_driver", description=__doc__)
    given.add_argument("storage")
    given.add_argument("id")
    named = given.parse_args()
    try:
        parcel = read_parcel(named.storage, named.id)
        ray.init()
        if parcel.stage == "train":
            train(parcel)
        elif parcel.shards:
            shards(parcel)
        else:
            ray.get(ray.remote(make_whole).options(**options(parcel.cluster)).remote(parcel.model_dump_json()))
    except (RayError, StageError, OSError, ValueError) as error:
        print(f"{named.id}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
