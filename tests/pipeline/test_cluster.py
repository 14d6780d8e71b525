"""What travels to a cluster and back, by a real bucket. Nodes compute in this process; test_ray.py has real ones."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dod_models import artifact
from dod_models.state import WarmStart
from dod_pipeline import cluster, launch, objects, stages
from dod_pipeline.deployment import Deployment
from dod_pipeline.node import Node
from dod_pipeline.parcel import Parcel
from dod_pipeline.s3 import Bucket
from dod_pipeline.stages import Job

from .bucket import S3
from .one_node import KEYS, Here, digests, job_of, sharded
from .project import Project


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


def test_a_job_is_named_by_what_it_computes(own: Project, deployment: Deployment):
    job = job_of("train")
    name = cluster.pack(job, deployment).id
    own.commit("results")
    assert cluster.pack(job, deployment).id == name  # another commit, the same code
    more = deployment.model_copy(update={"ray": deployment.ray.model_copy(update={"training_workers": 2})})
    assert cluster.pack(job, more).id == name  # other machines, the same result
    assert cluster.pack(job._replace(config=job.config.model_copy(update={"seed": 1})), deployment).id != name
