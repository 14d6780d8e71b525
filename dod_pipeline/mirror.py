"""The mirror of work in progress in S3, from which another machine goes on when this one is lost.

Beside a computation a thread uploads what is whole in its work folder: a training's newest resume state and its saved
steps, the shards of other stages. Files go first, under their sha256, so that nothing is ever overwritten; then
`index.json`, which names them all, in one conditional write; what it doesn't name any more goes last. Whoever is killed
in between leaves the index before. A mirror that fails is told on stderr, tries again, and stops no computation.
"""

import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from dod_models import artifact
from dod_models.artifact import MANIFEST, DamagedError
from dod_pipeline import cluster, launch, lifeline, stages
from dod_pipeline.config import Params
from dod_pipeline.s3 import CONNECTIONS, reaching
from dod_pipeline.stages import Job

INDEX, FILES = "index.json", "files"  # objects; the latter is a folder of them
SCHEMA = "mirror/1"
BESIDE = ".mirror"  # in the work folder: links to what is uploaded, and what was fetched so far
EVERY = 5.0  # seconds between two looks at what is whole
LAST = 60.0  # seconds for what was saved last: a machine that is taken away gives notice of 120, and saving comes first
NAME = re.compile(r"(resume|out|done)(/[A-Za-z0-9][A-Za-z0-9_.-]*)+")
STATE = re.compile(rf"resume/step-(\d+)/{re.escape(MANIFEST)}")
DIGEST = re.compile("[0-9a-f]{64}")


class File(NamedTuple):
    """What a whole file holds."""

    size: int  # bytes
    sha256: str


Files = dict[str, File]  # by path in the work folder; what makes others whole, manifests and notes, comes after these


def whole(work: Path) -> Files:
    """What is whole: the newest resume state and the steps that were saved up to it at least; shards with a note."""
    found: Files = {}
    states = sorted(work.glob(f"resume/step-*/{MANIFEST}"))  # first: whatever it wants saved was saved before
    for manifest in [*sorted(work.glob(f"out/step-*/{MANIFEST}")), *states[-1:]]:
        with suppress(OSError, ValueError, KeyError):  # an old one, which is being removed
            text = manifest.read_bytes()
            folder = manifest.parent.relative_to(work).as_posix()
            inside = {f"{folder}/{name}": of["sha256"] for name, of in json.loads(text)["files"].items()}
            sizes = {name: (work / name).stat().st_size for name in inside}
            found |= {name: File(sizes[name], digest) for name, digest in inside.items()}
            found[f"{folder}/{MANIFEST}"] = File(len(text), sha256(text).hexdigest())
    for note in sorted((work / "done").rglob("[!.]*.json")):
        text, name = note.read_bytes(), note.relative_to(work / "done").as_posix().removesuffix(".json")
        found[f"out/{name}"] = File((work / "out" / name).stat().st_size, json.loads(text)["sha256"])
        found[f"done/{name}.json"] = File(len(text), sha256(text).hexdigest())
    return found


def progress(files: Files) -> tuple[int, int]:
    """How far these files bring a computation: the step of the resume state, and how many there are."""
    steps = [int(match[1]) for name in files if (match := STATE.fullmatch(name))]
    return max(steps, default=0), len(files)


class Mirror:
    """The mirror of a work folder at s3://BUCKET/PREFIX; several threads may use it.

    `strict`: not to reach S3 is an error before work begins; a new machine has nothing else to go on from.
    """

    def __init__(self, url: str, work: Path, *, strict: bool = False) -> None:
        with reaching(url) as bucket:
            self.bucket, self.work, self.strict = bucket, work, strict
        self.lock, self.over = threading.Lock(), False
        self.index: tuple[Files, str | None] | None = None  # what S3 has, and its ETag; None: not read yet
        self.failing: set[str] = set()  # what was told

    def restore(self) -> None:
        """Fetch what S3 has, if that goes further than what lies here; what is damaged there is named and passed over,
        and will be replaced."""
        with self.lock, self.telling("the work begins from what lies here", but=OSError if self.strict else ()):
            there, etag = self.read()
            here = whole(self.work)
            if progress(there) <= progress(here):
                return
            with artifact.locked(self.work / "out"), self.beside() as folder:
                try:
                    lacking = {name: file for name, file in there.items() if here.get(name) != file}
                    with ThreadPoolExecutor(CONNECTIONS) as pool:
                        list(pool.map(lambda item: self.fetch(item[0], item[1], folder / item[0]), lacking.items()))
                except DamagedError:
                    self.index = {}, etag
                    raise
                for name in lacking:
                    (self.work / name).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(folder / name, self.work / name)
            print(f"{self.bucket.url}: fetched the work up to step {progress(there)[0]}", flush=True)

    def fetch(self, name: str, file: File, path: Path) -> None:
        """One file; DamagedError if it isn't what the index says."""
        found = self.bucket.find(f"{FILES}/{file.sha256}")
        if found is None:
            raise DamagedError(f"{self.bucket.url}/{FILES}/{file.sha256}: is not there, and {INDEX} names it as {name}")
        self.bucket.download(found, path)
        if artifact.sha256_file(path) != file.sha256:
            raise DamagedError(f"{self.bucket.url}/{FILES}/{file.sha256}: is damaged: its name is not its sha256")
        artifact.flush(path)

    def upload(self) -> None:
        """Upload what is whole and goes further than what S3 has. ConnectionError says what S3 said."""
        with self.lock:
            found = whole(self.work)
            if self.over or (self.index and progress(found) <= progress(self.index[0])):
                return
            known, etag = self.index or self.read()
            if progress(found) <= progress(known):
                return
            have = {file.sha256 for file in known.values()}
            new = {file.sha256: name for name, file in found.items() if file.sha256 not in have}
            with self.beside() as folder:
                for digest, name in new.items():  # links: a training removes old states, however long this takes
                    os.link(self.work / name, folder / digest)
                for digest in new:
                    if self.over:
                        return
                    self.bucket.upload(folder / digest, f"{FILES}/{digest}")
            text = json.dumps({"schema": SCHEMA, "files": found})
            self.index = None  # if the answer gets lost, it is read again
            self.index = found, self.bucket.write(INDEX, text.encode(), etag=etag)
            with self.telling("older states stay there, too"):  # a worker may have no right to remove
                self.bucket.remove(f"{FILES}/{digest}" for digest in have - {file.sha256 for file in found.values()})

    def forget(self) -> None:
        """Remove everything: the output is in place."""
        self.over = True  # an upload ends after its present file
        with self.lock, self.telling("remove it by hand"):
            self.bucket.remove([INDEX])
            self.bucket.remove([item.name for item in self.bucket.objects()])

    def read(self) -> tuple[Files, str | None]:
        """What S3 has, and the ETag of its index. An index that is none counts as nothing, and will be replaced."""
        found = self.bucket.read(INDEX)
        self.index = {}, found and found[1]
        if found is not None:
            try:
                self.index = parsed(found[0]), found[1]
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise DamagedError(f"{self.bucket.url}/{INDEX}: not an index of version {SCHEMA}: {error}") from None
        return self.index

    @contextmanager
    def beside(self) -> Iterator[Path]:
        """An empty folder beside what is whole."""
        folder = self.work / BESIDE
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def telling(self, consequence: str, *, but: type[OSError] | tuple[()] = ()) -> Iterator[None]:
        """What goes wrong is told, once until it goes well, and stops nothing, `but` for this."""
        try:
            yield
            self.failing.discard(consequence)
        except but:
            raise
        except (OSError, ValueError) as error:
            if consequence not in self.failing:
                print(f"warning: {self.bucket.url}: {error}; {consequence}", file=sys.stderr, flush=True)
            self.failing.add(consequence)

    def follow(self, stop: threading.Event) -> None:
        """Upload again and again, and once more when told to stop."""
        last = False
        while not last:
            last = stop.wait(EVERY)
            with self.telling("the state in S3 stays as it is, which is tried again"):
                self.upload()


def parsed(text: bytes) -> Files:
    """The files that an index names; ValueError if it is none."""
    values = json.loads(text)
    if values["schema"] != SCHEMA:
        raise ValueError(f"its schema is {values['schema']!r}")
    found = {str(name): File(int(size), str(digest)) for name, (size, digest) in values["files"].items()}
    for name, file in found.items():
        if not NAME.fullmatch(name) or not DIGEST.fullmatch(file.sha256):
            raise ValueError(f"it names {name!r}, sha256 {file.sha256!r}")
    return found


@contextmanager
def mirrored(mirror: Mirror) -> Iterator[Mirror]:
    """Fetch what is there, then mirror what the block makes. However it ends, what it saved last is uploaded, for which
    there is a limited time and in which signals to stop are not heeded."""
    mirror.restore()
    stop = threading.Event()
    thread = threading.Thread(target=mirror.follow, args=(stop,), daemon=True)
    thread.start()
    try:
        yield mirror
    finally:
        with lifeline.unheeding():
            stop.set()
            thread.join(LAST)
            if thread.is_alive():
                print(f"warning: {mirror.bucket.url}: took more than {LAST:g} s; left as it is", file=sys.stderr)


@contextmanager
def beside(params: Params, job: Job) -> Iterator[None]:
    """While a training runs here, mirror it where `deployment.storage` says."""
    work = stages.work_of(job)
    elsewhere = launch.is_helper(job.stage) or cluster.takes(job.stage, params.deployment)
    if params.deployment.storage.url is None or work is None or elsewhere:
        yield
        return
    forget_finished(params, job.stage, job.key, but=work.name)
    with mirrored(of(params, job.stage, job.key, work)):
        yield


def of(params: Params, stage: str, key: str, work: Path) -> Mirror:
    """The mirror of a work folder of a stage instance, where a place in S3 is given."""
    return Mirror(f"{params.deployment.storage.url}/state/{stage}/{key}/{work.name}", work)


def forget_finished(params: Params, stage: str, key: str, *, but: str | None = None) -> None:
    """Remove a stage instance's work that was published, here and in S3: DVC has recorded its output, and pushed it if
    it is to. Until then a machine that is lost may leave nothing else of it."""
    for state in stages.state_of(stage, key).values():
        if stage == "train" and params.deployment.storage.url is not None:
            for manifest in state.glob(f"*/out/{MANIFEST}"):
                work = manifest.parents[1]
                if work.name != but:
                    of(params, stage, key, work).forget()
        artifact.forget_finished(state, but=but)
