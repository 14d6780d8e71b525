"""Files that are written once: immutable JSON records under `history/`, and the commit that they name."""

import os
import subprocess
from pathlib import Path

from dod_models.config import Frozen

HISTORY = Path("history")

CODE = (
    "dod_models",
    "dod_pipeline",
    "params.yaml",
    "dvc.yaml",
)  # what a commit must hold for its numbers to be its own


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run git here."""
    return subprocess.run(["git", *arguments], capture_output=True, text=True)


def current_commit() -> str | None:
    """The commit of the working folder, with "-dirty" where code or settings differ from it; None outside of git."""
    try:
        head = git("rev-parse", "HEAD")
        dirty = git("diff", "--quiet", "HEAD", "--", *CODE).returncode != 0
    except FileNotFoundError:
        return None
    return head.stdout.strip() + "-dirty" * dirty if head.returncode == 0 else None


def write_once(folder: Path, name: str, record: Frozen) -> Path:
    """Write `folder/name.json` whole or not at all; FileExistsError rather than change one that is there."""
    folder.mkdir(parents=True, exist_ok=True)
    path, partial = folder / f"{name}.json", folder / f".{name}.{os.getpid()}.partial"
    try:
        partial.write_text(record.model_dump_json(indent=1) + "\n")
        os.link(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
