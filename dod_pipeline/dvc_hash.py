"""Digests of what makes an instance: of files as DVC has them, and of commands and settings."""

import hashlib
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from pathspec import GitIgnoreSpec

IGNORED = (".hg/", ".git/", ".dvc/")  # by DVC, whatever .dvcignore says
MISSING = "missing"


class Sources:
    """The files of a folder that no stage makes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        listed = root / ".dvcignore"
        self.ignored = GitIgnoreSpec.from_lines(
            [*IGNORED, *(listed.read_text().splitlines() if listed.exists() else [])]
        )

    def digest(self, path: str) -> str:
        """md5 of a file; of a folder that of its files' names and md5s, without what .dvcignore lists; or "missing"."""
        full = self.root / path
        if not full.is_dir():
            return md5_of(full)
        found = {}
        for folder, folders, files in os.walk(full, followlinks=True):
            inside = Path(os.path.relpath(folder, self.root)).as_posix()
            folders[:] = sorted(name for name in folders if not self.ignored.match_file(f"{inside}/{name}/"))
            for name in files:
                if not self.ignored.match_file(f"{inside}/{name}"):
                    found[os.path.relpath(Path(folder, name), full)] = md5_of(Path(folder, name))
        return hashlib.md5(json.dumps(sorted(found.items())).encode(), usedforsecurity=False).hexdigest() + ".dir"


def md5_of(path: Path) -> str:
    """md5 of a file as DVC has it; "missing" for none."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return MISSING
    return md5_at(path, stat.st_ino, stat.st_size, stat.st_mtime_ns)


@cache
def md5_at(path: Path, inode: int, size: int, changed: int) -> str:
    """md5 of a file that has not been touched since; kept, for a sensor asks every half minute."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def digest_in(entry: dict[str, Any]) -> str:
    """The digest of a path in dvc.lock."""
    return str(entry.get("md5") or entry.get("etag") or entry.get("checksum") or MISSING)


def together(digests: list[str]) -> str:
    """One digest for several, and a single one as it is."""
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def code_digest(cmd: str | list[str], sources: dict[str, str], values: dict[str, Any]) -> str:
    """Digest of what makes an instance, its inputs from other instances apart; 1 and 1.0 are equal, as for DVC."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(name): plain(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [plain(inner) for inner in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    text = json.dumps([cmd, sources, plain(values)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
