"""Copies of what lies in S3: objects under a prefix, in parallel, resumable, each one checked.

The copy lies where `dod_models.config.local_copy` looks for it, with a journal of the objects that are whole.
"""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tqdm import tqdm

from dod_models import artifact
from dod_models.config import S3, place_of_copy
from dod_models.images import SCHEMA as DATASET_SCHEMA
from dod_models.images import in_order
from dod_models.layout import belongs
from dod_pipeline.s3 import CONNECTIONS, Bucket, Object, reaching
from dod_pipeline.s3_attempts import Progress
from dod_pipeline.stages import Job

JOURNAL = ".objects.jsonl"


def inputs(job: Job) -> None:
    """Bring the copies of what the job reads from S3 up to date.

    What the index names is checked against its digests when it is read, so once complete it isn't listed again.
    """
    settings = job.config.model_dump()
    if job.stage == "dataset" and is_s3(settings["root"]):
        fetch(settings["root"], belongs, again=True)
    if "dataset" in job.inputs and (job.inputs["dataset"] / artifact.MANIFEST).is_file():
        root = artifact.read_manifest(job.inputs["dataset"], schema=DATASET_SCHEMA)["about"]["root"]
        if is_s3(root):
            fetch(root, belongs, again=False)
    if job.stage == "codec" and is_s3(settings["path"]):
        from dod_models.stable_diffusion import CONFIG, WEIGHTS  # late, as below: this imports torch

        fetch(settings["path"], {CONFIG, WEIGHTS}.__contains__, again=True)
    if job.stage == "train" and settings["warm_start"] and is_s3(settings["warm_start"]["path"]):
        folder, _, name = settings["warm_start"]["path"].rpartition("/")
        fetch(folder, {name}.__contains__, again=True)
    if job.stage == "reference" and settings["extractor"] == "inception":
        from dod_models import inception, reference

        for place, name in (("weights", inception.WEIGHTS), ("statistics", reference.STATISTICS)):
            if is_s3(settings[place]):
                fetch(settings[place], {name}.__contains__, again=True)


def is_s3(place: str | None) -> bool:
    """Whether a setting names a prefix in S3."""
    return place is not None and place.startswith(S3)


def fetch(url: str, wanted: Callable[[str], bool], *, again: bool) -> Path:
    """Copy the wanted objects under s3://BUCKET/PREFIX that lack here or have changed.

    A copy that was complete once is compared only if asked `again`. ConnectionError says what S3 said; OSError where
    the disk is too small. Returns the copy's folder.
    """
    target = place_of_copy(url)
    with artifact.locked(target):
        had, complete = read_journal(target / JOURNAL)
        if complete and not again:
            return target
        with reaching(url) as bucket:
            listed = {o.name: o for o in bucket.objects() if wanted(o.name)}
            if not listed:
                raise FileNotFoundError(f"{url}: nothing there that a stage can use; correct it in params.yaml")
            for name in filter(wanted, had.keys() - listed.keys()):  # it was removed there
                (target / name).unlink(missing_ok=True)
            copy(bucket, [o for o in listed.values() if not is_here(target, o, had)], target, total=len(listed))
    return target


def is_here(target: Path, wanted: Object, had: dict[str, Object]) -> bool:
    """Whether this version of an object was fetched, and its file is still of that size."""
    path = target / wanted.name
    return had.get(wanted.name) == wanted and path.is_file() and path.stat().st_size == wanted.size


def copy(bucket: Bucket, objects: list[Object], target: Path, *, total: int) -> None:
    """Fetch the objects, noting each in the journal once it is whole, and at last that all are."""
    size, room = sum(o.size for o in objects), shutil.disk_usage(target).free
    if size > room:
        raise OSError(f"{target}: {size:,} bytes to fetch, {room:,} bytes are free; make room or set DOD_CACHE")
    title = f"fetch {len(objects)} of {total} objects"
    with (
        (target / JOURNAL).open("a") as journal,
        tqdm(total=size, desc=title, unit="B", unit_scale=True, disable=not objects) as bar,
    ):
        get = partial(download, bucket=bucket, target=target, progress=bar.update)
        for done in in_order(get, objects, ahead=CONNECTIONS):
            journal.write("\n" + json.dumps(done._asdict()))
            journal.flush()
        journal.write("\n" + json.dumps("complete"))


def download(wanted: Object, *, bucket: Bucket, target: Path, progress: Progress) -> Object:
    """Bring an object to its place in the copy."""
    bucket.download(wanted, target / wanted.name, progress=progress)
    return wanted


def read_journal(path: Path) -> tuple[dict[str, Object], bool]:
    """The objects that were fetched, and whether they were all. A line that was cut off by a kill doesn't count."""
    found: dict[str, Object] = {}
    complete = False
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        complete = value == "complete"
        if not complete:
            found[value["name"]] = Object(**value)
    return found, complete
