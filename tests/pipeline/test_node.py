"""What a node does with a parcel: its own errors, its state, what it keeps. It is this process."""

import fcntl
import os

import pytest

from dod_models.state import TrainConfig
from dod_pipeline import cluster
from dod_pipeline.deployment import Deployment
from dod_pipeline.node import USED, Node, StageError, tidy
from dod_pipeline.s3 import Bucket

from .one_node import job_of, sharded


def test_a_node_keeps_nothing_of_parcels_that_are_over(deployment: Deployment):
    parcel, _ = sharded(job_of("latents"), deployment)  # others put its shards together
    other = Node(cluster.pack(job_of("stage1"), deployment))
    cluster.send(other.parcel, job_of("stage1"), other.bucket)
    over = Node(parcel).root
    inside = next(path for path in (over / "inputs").rglob("*.safetensors"))
    assert inside.stat().st_nlink == 2  # in the cache, too
    os.utime(over / USED, (0, 0))
    with (over / USED).open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert other.job.key == "tiny-6" and over.exists()  # as a process computes it
    tidy(other.cache)
    assert not over.exists() and other.root.exists()


def test_a_worker_s_own_error_is_found_by_those_that_begin_again(deployment: Deployment):
    job = job_of("train")
    assert isinstance(job.config, TrainConfig)
    model = job.config.model.model_copy(update={"num_classes": 4})
    parcel = cluster.pack(job._replace(config=job.config.model_copy(update={"model": model})), deployment)
    cluster.send(parcel, job, Bucket(parcel.storage))
    with pytest.raises(StageError):
        Node(parcel).train()
    Node(parcel).train()  # as Ray Train begins all of them again: it returns, and the driver finds no result
    assert Bucket(parcel.storage).find(parcel.result) is None


def test_a_node_that_can_not_reach_its_state_does_not_begin_from_nothing(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
):
    job = job_of("train")
    parcel = cluster.pack(job, deployment)
    cluster.send(parcel, job, Bucket(parcel.storage))

    def refuse(self: Bucket, name: str) -> None:
        raise ConnectionError(f"{name}: SlowDown")

    node = Node(parcel)
    assert node.job.out.parent == node.root  # its inputs are here
    monkeypatch.setattr(Bucket, "read", refuse)
    with pytest.raises(ConnectionError, match=r"index.json: SlowDown"):
        node.train()


def test_a_node_with_other_code_says_so(deployment: Deployment):
    job = job_of("metrics")
    parcel = cluster.pack(job, deployment)
    cluster.send(parcel, job, Bucket(parcel.storage))
    with pytest.raises(StageError, match="is not the sender's"):
        Node(parcel.model_copy(update={"work": "0" * 32})).shard(0)


def test_a_stage_that_fails_says_why_and_leaves_no_result(deployment: Deployment, capsys: pytest.CaptureFixture[str]):
    job = job_of("train")
    assert isinstance(job.config, TrainConfig)
    model = job.config.model.model_copy(update={"num_classes": 4})
    parcel = cluster.pack(job._replace(config=job.config.model_copy(update={"model": model})), deployment)
    cluster.send(parcel, job, Bucket(parcel.storage))
    with pytest.raises(StageError, match="train of tiny failed, as said above"):
        Node(parcel).train()
    assert "latents have 3 classes" in capsys.readouterr().err
    assert Bucket(parcel.storage).find(parcel.result) is None
