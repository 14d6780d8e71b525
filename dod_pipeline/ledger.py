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
    folder.mkdir(parents=True, exist_ok=True)
    path, partial = folder / f"{record.digest}.json", folder / f".{uuid.uuid4().hex}.partial"
    try:
        partial.write_text(record.canonical())
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
    if not NAME.fullmatch(path.name):
        wrong = "no record's name: those are SHA256.json"
    elif (found := sha256(text).hexdigest()) != path.stem:
        wrong = f"its sha256 is {found[:SHORT]}..., not its name: changed, damaged or cut off"
    elif not is_object(text):
        wrong = "not a JSON object, so no record"
    else:
        return text.decode()
    raise artifact.DamagedError(f"{path}: {wrong}; left out. `git checkout -- {path}` restores it, or else remove it")


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
