"""Files that are written once: immutable JSON records under `history/`, and the commit that they name.

A record's id is the sha256 of its canonical JSON, which is all that its file holds, and the file is named by it: no
change goes unseen (`sha256sum` checks it), and two writers never want one name for different things.
"""

import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from dod_models import artifact
from dod_models.config import Config, Frozen

HISTORY = Path("history")
NAME = re.compile(r"[0-9a-f]{64}\.json")
SHORT = 12  # digits of an id that are shown

CODE = (
    "dod_models",
    "dod_pipeline",
    "params.yaml",
    "dvc.yaml",
)  # what a commit must hold for its numbers to be its own


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run git here."""
    return subprocess.run(["git", *arguments], capture_output=True, text=True)


def current_commit(paths: Sequence[str] = CODE) -> str | None:
    """The commit of the working folder, with "-dirty" where these paths differ from it; None outside of git."""
    try:
        head = git("rev-parse", "HEAD")
        dirty = git("diff", "--quiet", "HEAD", "--", *paths).returncode != 0
    except FileNotFoundError:
        return None
    return head.stdout.strip() + "-dirty" * dirty if head.returncode == 0 else None


def write_once(folder: Path, record: Frozen) -> Path:
    """Write a record whole or not at all, and return its file; DamagedError if the name is taken by something else."""
    return put(folder / f"{record.digest}.json", record.canonical().encode())


def put(path: Path, text: bytes) -> Path:
    """The same for the text of a record, under its name."""
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.write_bytes(text)
        artifact.flush(partial)
        os.link(partial, path)
    except FileExistsError:
        read(path)  # it is this record already
    finally:
        partial.unlink(missing_ok=True)
    return path


def read(path: Path) -> str:
    """The JSON text of a record; DamagedError unless the file is one and whole."""
    text = path.read_bytes()
    if wrong := wrong_with(path.name, text):
        raise artifact.DamagedError(
            f"{path}: {wrong}; left out. `git checkout -- {path}` restores it, or else remove it"
        )
    return text.decode()


def wrong_with(name: str, text: bytes) -> str:
    """Why a file of that name and text is no record; "" if it is one."""
    if not NAME.fullmatch(Path(name).name):
        return "no record's name: those are SHA256.json"
    if (found := sha256(text).hexdigest()) != Path(name).stem:
        return f"its sha256 is {found[:SHORT]}..., not its name: changed, damaged or cut off"
    return "" if is_object(text) else "not a JSON object, so no record"


def typed(kind: type[Config], row: dict[str, Any]) -> Config:
    """A record of that class from what a query gives, whose id it doesn't hold but is."""
    return kind.parse({name: value for name, value in row.items() if name != "id"}, place=f"record {row['id']}")


def is_object(text: bytes) -> bool:
    """Whether this is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def warn(message: object) -> None:
    """Say on stderr what is left out."""
    print(f"dod: {message}", file=sys.stderr)


def records_in(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of one folder in no order; what is damaged is named on stderr and left out."""
    for path in sorted(folder.glob("[!.]*")):
        try:
            yield json.loads(read(path))
        except artifact.DamagedError as error:
            warn(error)
