"""The frozen base of every config class: load, validate, digest; and the little that the environment says.

A config class stands beside the function that it configures; this file holds only what they share.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

S3 = "s3://"
BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]+")
SECRET = re.compile(r"://\S*@")  # in a URL: user and password, which no message repeats
TOOK = "took.json"  # below a sweep's `state`: name of a row -> seconds that its own stage's sampling took
CACHE = "DOD_CACHE"  # environment: folder that keeps local copies of what lies in S3; clones may share it

Config = TypeVar("Config", bound="Frozen")  # typing.Self is beyond beartype in a class it doesn't decorate


class Frozen(BaseModel):
    """A small, closed, immutable config: an unknown key is an error that names it."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def parse(cls: type[Config], values: object, *, place: str) -> Config:
        """Validate `values`; a ValueError names `place`, each bad key, its value and what was expected."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ValueError(explain(error, place=place)) from None

    @classmethod
    def load(cls: type[Config], text_or_path: str) -> Config:
        """Read a config from a JSON file, or from the JSON text itself."""
        is_text = text_or_path.lstrip().startswith("{")
        place = "the command line" if is_text else text_or_path
        text = text_or_path if is_text else Path(text_or_path).read_text()
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: not JSON ({error}); write an object such as {{}}") from None
        return cls.parse(values, place=place)

    def canonical(self) -> str:
        """JSON with sorted keys: equal configs give equal text."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON, in hexadecimal."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()


def explain(error: ValidationError, *, place: str) -> str:
    """Turn a pydantic error into lines of `place: key: what is wrong (value)`."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "(the whole)"
        if item["type"] == "extra_forbidden":
            lines.append(f"{place}: {key}: unknown key; remove it or correct its spelling")
        elif item["type"] == "missing":
            lines.append(f"{place}: {key}: missing; add it")
        else:
            given = SECRET.sub("://***@", repr(item["input"]))
            lines.append(f"{place}: {key}: {item['msg'].removeprefix('Value error, ')} (got {given})")
    return "\n".join(lines)


def local_copy(place: str) -> Path:
    """The folder that a config names, or for s3://BUCKET/PREFIX that of its copy; FileNotFoundError if it has none."""
    found = place_of_copy(place) if place.startswith(S3) else Path(place)
    if place.startswith(S3) and not found.is_dir():
        raise FileNotFoundError(
            f"{place}: no copy of it in {found}; `dod stage` fetches it, `python -m dod_models.cli` does not"
        )
    return found


def local_file(place: str) -> Path:
    """The same for a file; s3://BUCKET/PREFIX/NAME is that of the prefix's copy."""
    folder, _, name = place.rpartition("/")
    return local_copy(folder) / name if place.startswith(S3) else Path(place)


def place_of_copy(url: str) -> Path:
    """Where the copy of s3://BUCKET/PREFIX lies on this machine; ValueError if the URL is none."""
    bucket, *prefix = url.removeprefix(S3).rstrip("/").split("/")
    if not BUCKET.fullmatch(bucket) or {"", ".", ".."} & set(prefix):
        raise ValueError(f"{url}: not of the form s3://BUCKET/PREFIX")
    return Path(os.environ.get(CACHE, ".state"), "s3", bucket, *prefix)


STOPPED = 143  # exit status after SIGTERM, as a shell reports it


class Process(NamedTuple):
    """This process among those that share a stage's work."""

    rank: int  # from 0
    world: int  # how many there are
    local_rank: int  # among those on this machine: which GPU is whose


def this_process() -> Process:
    """As torchrun, accelerate and Ray Train state it in the environment; without them, the only one."""
    said = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} | os.environ
    return Process(int(said["RANK"]), int(said["WORLD_SIZE"]), int(said["LOCAL_RANK"]))
