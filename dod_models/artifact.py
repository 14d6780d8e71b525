"""Output folders of stages: written beside the target, described by a manifest, renamed into place when complete.

A folder that stands at its target is whole: `manifest.json` names the schema, the config's digest, counts, and the
sha256 of every file. Nothing in it differs between two equal runs. A killed process leaves only `.NAME.partial`
beside the target.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


class DamagedError(ValueError):
    """A file or folder is not what its manifest says."""


def sha256_file(path: Path) -> str:
    """sha256 of a file in hexadecimal, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write indented, sorted JSON beside `path`, flush it to disk, and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        json.dump(value, file, indent=1, sort_keys=True, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    """Read JSON; a ValueError names the file that isn't."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; run the stage that makes it, or `dvc pull`") from None
    except json.JSONDecodeError as error:
        raise DamagedError(
            f"{path}: not JSON ({error}); make it again with `dvc checkout --force` or its stage"
        ) from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder; BlockingIOError if another process has it. The lock dies with its holder."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"{folder}: another process is writing here; wait for it or stop it") from None
        yield
    finally:
        os.close(descriptor)


@contextmanager
def writing(target: Path, *, schema: str, config: str) -> Iterator["Folder"]:
    """Make the folder `target`: yield a `Folder` to fill, then write its manifest and rename it into place.

    `schema` names the layout of the files (e.g. "latents/1"), `config` is the digest of the config that made them. What
    stood at `target` stays until the new folder is complete.
    """
    target = target.absolute()
    partial = target.with_name(f".{target.name}.partial")
    with locked(partial):
        clear(partial)
        folder = Folder(partial)
        yield folder
        describe(partial, schema=schema, config=config, about=folder.about)
        put_in_place(partial, target)


class Folder:
    """A folder being written: `path` to put files in, `about` for facts that the manifest will state."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.about: dict[str, Any] = {}


def clear(folder: Path) -> None:
    """Remove what lies in a folder, but not the folder, on which a lock may be held."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def clear_partial(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for path in folder.rglob(".*.partial"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def describe(folder: Path, *, schema: str, config: str, about: dict[str, Any]) -> None:
    """Write `folder`'s manifest over the files that lie in it now, once the disk has them: a loss of power must not
    leave a manifest of files that are not there.
    """
    clear_partial(folder)
    names = sorted({p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {MANIFEST})
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)} for name in names}
    for path in (*folder.rglob("*"), folder):
        flush(path)
    write_json(folder / MANIFEST, {"schema": schema, "config": config, "about": about, "files": files})
    flush(folder)


def flush(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(folder: Path, target: Path) -> None:
    """Make `target` a copy of a finished folder, of hard links, in one rename."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(folder, partial, copy_function=os.link)
    put_in_place(partial, target)


def forget_finished(state: Path, *, but: str | None = None) -> None:
    """Remove the work under `state` that was published, except the one keyed `but`: `state/KEY/out` has a manifest."""
    for manifest in state.glob(f"*/out/{MANIFEST}"):
        if manifest.parent.parent.name != but:
            shutil.rmtree(manifest.parent.parent)


def put_in_place(partial: Path, target: Path) -> None:
    """Rename `partial` to `target`; what stood there goes only after."""
    target.parent.mkdir(parents=True, exist_ok=True)
    old = target.with_name(f".{target.name}.old.partial")
    if old.exists():
        shutil.rmtree(old)
    if target.exists():
        os.replace(target, old)
    os.replace(partial, target)
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def digest_of(folder: Path) -> str:
    """sha256 of a finished folder's manifest, and so of all that is in it; DamagedError if the folder isn't one."""
    check_finished(folder)
    return sha256_file(folder / MANIFEST)


def check_finished(folder: Path) -> None:
    """DamagedError if a folder has no manifest."""
    if not (folder / MANIFEST).is_file():
        raise DamagedError(
            f"{folder}: no {MANIFEST}, so this is not a finished output; run its stage again or `dvc pull`"
        )


def read_manifest(folder: Path, *, schema: str) -> dict[str, Any]:
    """The manifest's dictionary; DamagedError if it is missing or of another schema."""
    check_finished(folder)
    manifest: dict[str, Any] = read_json(folder / MANIFEST)
    if manifest.get("schema") != schema:
        raise DamagedError(f"{folder}: schema is {manifest.get('schema')!r}, expected {schema!r}; run its stage again")
    outside = [name for name in manifest.get("files", ()) if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise DamagedError(f"{folder / MANIFEST}: names {outside[0]!r}, a file outside of its folder; get it elsewhere")
    return manifest


def verify(folder: Path, *, schema: str, only: str | None = None) -> dict[str, Any]:
    """Check sizes and digests of all files (or of `only`) against the manifest, and return it."""
    manifest = read_manifest(folder, schema=schema)
    if only is not None and only not in manifest["files"]:
        raise DamagedError(f"{folder}: no file {only}; it has {', '.join(manifest['files']) or 'none'}")
    for name, stated in manifest["files"].items():
        if only in (None, name):
            check_file(folder / name, stated["sha256"])
    return manifest


def check_file(path: Path, sha256: str) -> None:
    """DamagedError unless `path` has this digest."""
    if not path.is_file():
        raise DamagedError(f"{path}: missing; run its stage again or `dvc checkout --force`")
    found = sha256_file(path)
    if found != sha256:
        raise DamagedError(
            f"{path}: sha256 is {found[:12]}..., its manifest says {sha256[:12]}...: the file was changed or damaged; "
            "restore it with `dvc checkout --force`, or run its stage again"
        )
