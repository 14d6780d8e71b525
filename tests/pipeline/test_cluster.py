"""What travels to a cluster and back, by a real bucket. Nodes compute in this process; test_ray.py has real ones."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dod_models import artifact
from dod_models.state import TrainConfig, WarmStart
from dod_pipeline import cluster, launch, objects, stages
from dod_pipeline.config import load_params
from dod_pipeline.deployment import Deployment
from dod_pipeline.node import USED, Node, StageError, lacking, tidy
from dod_pipeline.parcel import Parcel
from dod_pipeline.s3 import Bucket
from dod_pipeline.stages import Job

from .bucket import BUCKET, S3
from .project import Project

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


@pytest.fixture
def deployment(
    own: Project,
    images: Path,
    inside: Callable[[Project], None],
    s3: S3,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Deployment:
    """The built project's folder, and a deployment whose cluster is this process."""
    inside(own)
    monkeypatch.setenv("DOD_CACHE", str(tmp_path / "node"))
    monkeypatch.setattr(cluster, "Submission", Here)
    Here.made = []
    values = {
        "compute": "ray",
        "ray": {"gpus": 0, "shared": [str(images)]},
        "storage": {"url": f"s3://{BUCKET}/{tmp_path.name}"},
    }
    return Deployment.model_validate(values)


def job_of(stage: str) -> Job:
    return stages.resolve(load_params(), stage, KEYS[stage])


def digests(path: Path) -> dict[str, str]:
    return {file.path: file.md5 for file in objects.content_of(path)}


def left(deployment: Deployment) -> list[str]:
    """Names of the objects that are not content."""
    assert deployment.storage.url is not None
    return [found.name for found in Bucket(deployment.storage.url).objects() if not found.name.startswith("dvc/")]


@pytest.mark.parametrize("stage", KEYS)
def test_a_stage_comes_back_as_it_is_made_here(stage: str, deployment: Deployment):
    job = job_of(stage)
    assert cluster.takes(stage, deployment)
    before, facts = digests(job.out), job.facts and job.facts.read_bytes()
    objects.clear(job.out)
    for state in stages.state_of(stage, job.key).values():
        shutil.rmtree(state, ignore_errors=True)
    device, processes = cluster.run(job, deployment)
    assert (device, processes) == ("cpu", 1) and Here.made
    assert digests(job.out) == before
    assert facts == (job.facts and job.facts.read_bytes())
    made = list(Here.made)
    objects.clear(job.out)  # as dvc does that was killed before it had recorded the output
    cluster.run(job, deployment)
    assert digests(job.out) == before and Here.made == made  # it was there still
    assert not list((Path(os.environ["DOD_CACHE"]) / "parcels").glob("*/out")), "a node keeps what it delivered"
    cluster.forget(stage, job.key, deployment)
    assert left(deployment) == []


def test_what_stays_here(deployment: Deployment):
    assert not any(cluster.takes(stage, deployment) for stage in ("dataset", "report", "generate"))
    assert not cluster.takes("train", Deployment())


def test_inputs_that_dvc_has_pushed_are_not_sent_again(own: Project, deployment: Deployment, s3: S3):
    url = f"{deployment.storage.url}/dvc"
    own.dvc("remote", "add", "--local", "--default", "there", url)
    own.dvc("remote", "modify", "--local", "there", "endpointurl", s3.endpoint)
    own.dvc("push", "latents@tiny")
    job = job_of("train")
    assert objects.push(Bucket(url), job.inputs["latents"], objects.content_of(job.inputs["latents"])) == 0


def test_a_run_that_was_cut_off_goes_on_with_the_shards_that_lack(deployment: Deployment):
    job = job_of("metrics")
    parcel = cluster.pack(job, deployment)
    assert parcel.shards == 2
    cluster.send(parcel, job, Bucket(parcel.storage))
    Node(parcel).shard(1)
    objects.clear(job.out)
    cluster.run(job, deployment)
    assert Here.made == ["shard 0"] and job.out.exists()


def test_a_result_that_is_there_is_only_fetched(deployment: Deployment):
    job = job_of("reference")
    parcel = cluster.pack(job, deployment)
    cluster.send(parcel, job, Bucket(parcel.storage))
    Node(parcel).whole()
    before = digests(job.out)
    shutil.rmtree(job.out)
    cluster.run(job, deployment)
    assert Here.made == [] and digests(job.out) == before


@pytest.fixture
def computed(deployment: Deployment) -> tuple[Job, Parcel]:
    """A reference that a node has made and nobody has taken yet."""
    job = job_of("reference")
    parcel = cluster.pack(job, deployment)
    cluster.send(parcel, job, Bucket(parcel.storage))
    Node(parcel).whole()
    return job, parcel


def restate(parcel: Parcel, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what the cluster said that it made."""
    bucket = Bucket(parcel.storage)
    told = bucket.read(parcel.result)
    assert told is not None
    stated = json.loads(told[0])
    change(stated)
    bucket.write(parcel.result, json.dumps(stated).encode())


def test_an_object_that_was_replaced_is_refused(computed: tuple[Job, Parcel], deployment: Deployment):
    job, parcel = computed
    before, data = digests(job.out), Bucket(f"{parcel.storage}/dvc")
    data.write(objects.content_of(job.out)[0].object, b"evil")
    with pytest.raises(artifact.DamagedError, match="its md5 is"):
        cluster.run(job, deployment)
    assert digests(job.out) == before
    data.remove([objects.content_of(job.out)[0].object])  # as the message says
    cluster.run(job, deployment)
    assert digests(job.out) == before and Here.made == ["whole"]


@pytest.mark.parametrize("lacking", [artifact.MANIFEST, "extractor.safetensors"])
def test_an_output_that_is_not_whole_is_refused(lacking: str, computed: tuple[Job, Parcel], deployment: Deployment):
    job, parcel = computed
    before = digests(job.out)
    assert lacking in before

    def change(stated: dict[str, Any]) -> None:
        stated["files"]["out"] = [file for file in stated["files"]["out"] if file["path"] != lacking]

    restate(parcel, change)
    with pytest.raises((ValueError, OSError), match=lacking):
        cluster.run(job, deployment)
    assert digests(job.out) == before


def test_an_output_of_other_settings_is_refused(computed: tuple[Job, Parcel], deployment: Deployment):
    job, parcel = computed
    other = job._replace(config=job.config.model_copy(update={"epochs": 3}))
    before = digests(job.out)
    theirs = cluster.pack(other, deployment)
    told = Bucket(parcel.storage).read(parcel.result)
    assert told is not None
    Bucket(parcel.storage).write(theirs.result, told[0])
    with pytest.raises(artifact.DamagedError, match="is of another parcel"):
        cluster.run(other, deployment)
    Bucket(parcel.storage).write(theirs.result, told[0])
    restate(theirs, lambda stated: stated.update(parcel=theirs.digest))
    with pytest.raises(artifact.DamagedError, match="not what its manifest says"):
        cluster.run(other, deployment)
    assert digests(job.out) == before


def sharded(job: Job, deployment: Deployment) -> tuple[Parcel, Bucket]:
    """The job sent to the bucket, and all of its shards made there."""
    parcel = cluster.pack(job, deployment)
    bucket = Bucket(parcel.storage)
    cluster.send(parcel, job, bucket)
    for index in range(parcel.shards):
        Node(parcel).shard(index)
    Node(parcel).finish(("cpu",), {})
    return parcel, bucket


def test_a_mark_that_names_a_file_elsewhere_is_refused(deployment: Deployment, tmp_path: Path):
    job = job_of("latents")
    parcel, bucket = sharded(job, deployment)
    name = parcel.mark(0)
    told = bucket.read(name)
    assert told is not None
    mark = json.loads(told[0])
    mark["objects"][0][0] = f"{parcel.state}/../../../../evil"
    bucket.write(name, json.dumps(mark).encode())
    with pytest.raises(artifact.DamagedError, match="outside of its work"):
        cluster.run(job, deployment)


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


def test_what_only_this_machine_has_is_named(deployment: Deployment, images: Path):
    alone = deployment.model_copy(update={"ray": deployment.ray.model_copy(update={"shared": ()})})
    with pytest.raises(ValueError, match=f"dataset.root: {images} is a place of this machine: upload it"):
        cluster.run(job_of("latents"), alone)
    assert left(deployment) == []


def test_weights_that_the_settings_name_travel(own: Project, deployment: Deployment):
    job, path = job_of("train"), "train/tiny/step-2/ema-0.9.safetensors"
    start = WarmStart(path=path, sha256=artifact.sha256_file(own.root / path))
    warm = job._replace(config=job.config.model_copy(update={"warm_start": start}), out=Path("train/warm"))
    cluster.run(warm, deployment)
    there = digests(warm.out)
    assert launch.run_here(warm._replace(out=Path("train/here"))) == 0
    assert there == digests(Path("train/here")) != digests(job.out)


def test_a_shard_that_was_replaced_is_refused_and_made_anew(deployment: Deployment):
    job = job_of("stage1")
    parcel, bucket = sharded(job, deployment)
    told = bucket.read(parcel.mark(0))
    assert told is not None
    mark = json.loads(told[0])
    place = next(n for n, item in enumerate(mark["objects"]) if "/out/" in item[0])
    etag = bucket.write(mark["objects"][place][0], b"evil")
    mark["objects"][place][1:] = [4, etag]
    bucket.write(parcel.mark(0), json.dumps(mark).encode())
    for state in stages.state_of("stage1", job.key).values():
        shutil.rmtree(state, ignore_errors=True)
    before = digests(job.out)
    with pytest.raises(artifact.DamagedError, match="the shard is not what it says"):
        cluster.run(job, deployment)
    assert digests(job.out) == before
    cluster.run(job, deployment)
    assert digests(job.out) == before and Here.made == ["shard 0"]


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


@pytest.mark.parametrize(
    "change",
    [{"key": "../x"}, {"work": "../z"}, {"inputs": {"../evil": ()}}, {"writes": ("out",)}, {"named": {"../a": ()}}],
)
def test_a_parcel_that_leads_elsewhere_is_refused(change: dict[str, Any], deployment: Deployment):
    values = cluster.pack(job_of("train"), deployment).model_dump()
    with pytest.raises(ValueError, match=next(iter(change))):
        Parcel.parse(values | change, place="parcel.json")


def test_code_that_is_no_commit_s_is_not_sent(own: Project, deployment: Deployment):
    with (own.root / "dod_models" / "flow.py").open("a") as file:
        file.write("# changed\n")
    with pytest.raises(ValueError, match=r"`git commit` them, or set compute: local"):
        cluster.run(job_of("train"), deployment)
    assert left(deployment) == []


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


def test_a_job_is_named_by_what_it_computes(own: Project, deployment: Deployment):
    job = job_of("train")
    name = cluster.pack(job, deployment).id
    own.commit("results")
    assert cluster.pack(job, deployment).id == name  # another commit, the same code
    more = deployment.model_copy(update={"ray": deployment.ray.model_copy(update={"training_workers": 2})})
    assert cluster.pack(job, more).id == name  # other machines, the same result
    assert cluster.pack(job._replace(config=job.config.model_copy(update={"seed": 1})), deployment).id != name
