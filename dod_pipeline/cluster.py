"""`deployment.compute: ray`: a stage computed as a job of a Ray cluster, and its output brought back.

The job is named by what it computes, so that a stage that is run again, after this process was killed, finds it running
and waits for it. Ctrl-C and SIGTERM stop it. Ray's job API does both over HTTP, with nothing of Ray's in this process
but its client; dagster-ray would start the job from a Dagster op, where here a stage does, whoever started that.
"""

import inspect
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from dod_models import artifact, cli
from dod_models.config import S3, TOOK
from dod_models.images import in_order
from dod_pipeline import ledger, objects, stages
from dod_pipeline.deployment import Deployment
from dod_pipeline.objects import Content, File
from dod_pipeline.parcel import NO_INPUT, Mark, Parcel, Result, prefix
from dod_pipeline.ray_client import SHIPPED, Submission, log
from dod_pipeline.s3 import Bucket, Object, reaching
from dod_pipeline.stages import Job

# What a deployment may send to the cluster: everything with a network in it. What remains reads files.
SENT = ("reference", "codec", "latents", "train", "stage1", "stage2", "metrics", "sweeps", "trial")


def takes(stage: str, deployment: Deployment) -> bool:
    """Whether the deployment has a stage computed on its cluster."""
    return deployment.compute == "ray" and stage in SENT


def run(job: Job, deployment: Deployment) -> tuple[str, int]:
    """Have the cluster compute the job, and put its output in place; returns what computed it, and in how many
    processes.

    ConnectionError where cluster or bucket can't be reached: what was made stays there, and running it again goes on.
    """
    parcel = pack(job, deployment)
    with reaching(parcel.storage) as bucket:
        if bucket.find(parcel.result) is None:
            with cli.reporting():
                send(parcel, job, bucket)
                Submission(parcel).follow()
        try:
            result = read_result(parcel, bucket)
            take(parcel, result, job, bucket)
        except artifact.DamagedError:
            bucket.remove([parcel.result])  # so that the next run has it made anew
            raise
    processes = parcel.cluster.training_workers if parcel.stage == "train" else max(1, len(result.devices))
    return ", ".join(result.devices) or "ray", processes


def forget(stage: str, key: str, deployment: Deployment) -> None:
    """Remove what the bucket keeps of a stage instance's computation: DVC has recorded its output, and pushed it if it
    is to. Content stays, for it is DVC's. What can't be removed now is told, and removed the next time."""
    if not takes(stage, deployment):
        return
    assert deployment.storage.url is not None  # as takes has it
    try:
        with reaching(deployment.storage.url) as bucket:
            parcels = (found.name for found in bucket.objects("parcels") if found.name.startswith(prefix(stage, key)))
            bucket.remove([*parcels, *(found.name for found in bucket.objects(f"state/{stage}/{key}"))])
    except OSError as error:
        print(f"warning: what the cluster used for {stage} of {key} is left there: {error}", file=sys.stderr)


def pack(job: Job, deployment: Deployment) -> Parcel:
    """The job as it travels. ValueError where the code isn't that of a commit."""
    commit = ledger.current_commit(SHIPPED)
    if commit is None or commit.endswith("-dirty"):
        raise ValueError(
            f"deployment.compute: ray runs the code of a commit, and {' or '.join(SHIPPED)} has other changes: "
            "`git commit` them, or set compute: local"
        )
    assert deployment.storage.url is not None  # as config.py has it
    paths = {name: path for name, path in job.inputs.items() if name not in NO_INPUT}
    work, shards = work_of(job)
    return Parcel(
        stage=job.stage,
        key=job.key,
        config=job.config.model_dump(mode="json"),
        inputs={name: objects.content_of(path) for name, path in paths.items()},
        named={path: objects.content_of(Path(path)) for path in named(job, deployment.ray.shared)},
        writes=tuple(name for name in NO_INPUT if name in job.inputs),
        facts=job.facts is not None,
        work=work,
        shards=shards,
        code=ledger.git("rev-parse", *(f"HEAD:{folder}" for folder in SHIPPED)).stdout.strip(),
        storage=deployment.storage.url.rstrip("/"),
        endpoint=deployment.storage.endpoint,
        cluster=deployment.ray,
    )


def named(job: Job, shared: Sequence[str]) -> list[str]:
    """Files and folders of this project that the settings name. ValueError for what other machines can't reach."""
    settings = job.config.model_dump()
    start = settings.get("warm_start") or {}
    places = {f"{job.stage}.{name}": settings.get(name) for name in ("path", "weights", "statistics")}
    places["train.warm_start.path"] = start.get("path")
    if "dataset" in job.inputs:
        manifest = artifact.read_json(job.inputs["dataset"] / artifact.MANIFEST)
        places["dataset.root"] = manifest["about"]["root"]
    found = []
    for place, path in places.items():
        if path is None or path.startswith(S3) or any(Path(path).is_relative_to(folder) for folder in shared):
            continue
        if Path(path).is_absolute() or ".." in Path(path).parts or place == "dataset.root":
            raise ValueError(
                f"{place}: {path} is a place of this machine: upload it and name its s3://..., or name it in "
                "deployment.ray.shared if every machine has it"
            )
        found.append(path)
    return found


def work_of(job: Job) -> tuple[str, int]:
    """Name of the folder under the job's state in which its work lies, and in how many shards; ("", 0) without one."""
    training = stages.work_of(job)
    if training is not None:
        return training.name, 0
    _, function = cli.STAGES[job.stage].load()
    module = sys.modules[function.__module__]
    if not hasattr(module, "shards_of"):
        return "", 0
    wanted = inspect.signature(module.shards_of).parameters
    folder, count = module.shards_of(job.config, **{name: path for name, path in job.inputs.items() if name in wanted})
    return folder.name, count


def send(parcel: Parcel, job: Job, bucket: Bucket) -> None:
    """Upload what the bucket lacks of the inputs, then the parcel."""
    data = Bucket(f"{parcel.storage}/{objects.FOLDER}")
    sent = sum(objects.push(data, job.inputs[name], content) for name, content in parcel.inputs.items())
    sent += sum(objects.push(data, Path(path), content) for path, content in parcel.named.items())
    log.info(f"{parcel.stage}: sent {sent} files of the inputs; the bucket had the others")
    bucket.write(f"{parcel.folder}/parcel.json", parcel.model_dump_json().encode())


def read_result(parcel: Parcel, bucket: Bucket) -> Result:
    """What the cluster says that it made; DamagedError where that is of something else."""
    found = bucket.read(parcel.result)
    place = f"{bucket.url}/{parcel.result}"
    if found is None:
        raise artifact.DamagedError(f"{place}: not there, though the job ended well; run it again")
    result = Result.parse(json.loads(found[0]), place=place)
    if result.parcel != parcel.digest:
        raise artifact.DamagedError(f"{place}: is of another parcel; remove it and run the stage again")
    return result


def take(parcel: Parcel, result: Result, job: Job, bucket: Bucket) -> None:
    """Put what was made in its places: the output last, and only if its manifest verifies."""
    if parcel.shards:
        gather(parcel, job, bucket)
        if cli.main(job.arguments()) != 0:
            raise OSError(f"{parcel.stage} of {parcel.key}: the shards could not be put together, as said above")
        return
    places = {"took": None, "facts": job.facts, "picture": job.inputs.get("picture"), "out": job.out}
    if "took" in result.files:
        places["took"] = job.inputs["state"] / TOOK
    data = Bucket(f"{parcel.storage}/{objects.FOLDER}")
    for name, path in places.items():
        if path is not None and name in result.files:
            fetch_output(data, result.files[name], path, config=job.config.digest)


def gather(parcel: Parcel, job: Job, bucket: Bucket) -> None:
    """Fetch the shards to where the stage looks for them; it checks each against its note."""
    from dod_models.shards import Shards  # late: this imports torch

    folder = job.inputs["state"] / parcel.work
    found = [Mark.parse(json.loads(told[0]), place=name) for name, told in marks(parcel, bucket)]
    wanted = [item for mark in found for item in mark.objects]

    def fetch(item: Object) -> None:
        path = folder / item.name.removeprefix(f"{parcel.state}/")
        if not path.is_relative_to(folder) or ".." in path.parts:
            raise artifact.DamagedError(f"{bucket.url}: a shard's mark names {item.name}, which is outside of its work")
        path.parent.mkdir(parents=True, exist_ok=True)
        bucket.download(item, path)

    for _ in in_order(fetch, wanted, ahead=objects.AHEAD):
        pass
    shards = Shards(folder)
    for index, mark in enumerate(found):
        names = [Path(item.name).stem for item in mark.objects if "/done/" in item.name]
        if not names or not all(shards.has(name) for name in names):
            bucket.remove([parcel.mark(index)])
            raise artifact.DamagedError(
                f"{bucket.url}/{parcel.mark(index)}: the shard is not what it says; run it again"
            )


def marks(parcel: Parcel, bucket: Bucket) -> Iterator[tuple[str, tuple[bytes, str]]]:
    """The marks of all shards; DamagedError names one that is not there."""
    for index in range(parcel.shards):
        name = parcel.mark(index)
        told = bucket.read(name)
        if told is None:
            raise artifact.DamagedError(f"{bucket.url}/{name}: not there, though the job ended well; run it again")
        yield name, told


def fetch_output(data: Bucket, content: Content, target: Path, *, config: str) -> None:
    """Bring an output beside its place, check it against its manifest, and rename it."""
    beside = target.with_name(f".{target.name}.partial")
    objects.clear(beside)
    beside.parent.mkdir(parents=True, exist_ok=True)

    def fetch(file: File) -> None:
        objects.fetch(data, file, objects.place(beside, file))

    for _ in in_order(fetch, content, ahead=objects.AHEAD):
        pass
    if not beside.is_dir():  # numbers and pictures have no manifest; their digest was checked
        os.replace(beside, target)
        return
    manifest = artifact.read_json(beside / artifact.MANIFEST)
    artifact.verify(beside, schema=manifest["schema"])
    if manifest["config"] != config or {file.path for file in content} != {*manifest["files"], artifact.MANIFEST}:
        raise artifact.DamagedError(f"{data.url}: what came for {target} is not what its manifest says; run it again")
    artifact.put_in_place(beside, target)
