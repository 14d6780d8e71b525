"""Work that comes in files: several processes share it, a killed run goes on with the files that lack."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dod_models import artifact

log = logging.getLogger(__name__)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: how convolutions are split over several changes their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Shards:
    """Files under work in `folder`: `out/` holds those that are whole, `done/` a note of each one's digest."""

    def __init__(self, folder: Path) -> None:
        self.out, self.done = folder / "out", folder / "done"
        self.out.mkdir(parents=True, exist_ok=True)

    def note(self, name: str) -> Path:
        """Where a whole file's digest stands."""
        return self.done / f"{name}.json"

    def has(self, name: str) -> bool:
        """Whether a file is there; one that was damaged since is not."""
        if not self.note(name).exists():
            return False
        try:
            artifact.check_file(self.out / name, self.stated(name)["sha256"])
        except artifact.DamagedError as error:
            log.warning(f"making a shard again: {error}")
            return False
        return True

    def stated(self, name: str) -> dict[str, Any]:
        """What the note of a whole file says of it."""
        found: dict[str, Any] = artifact.read_json(self.note(name))
        return found

    def save(self, name: str, write: Callable[[Path], None], **facts: Any) -> None:
        """Put a file in place, whole, then its note: its digest, and these facts."""
        partial = self.out / f".{name}.partial"
        write(partial)
        artifact.flush(partial)
        digest = artifact.sha256_file(partial)
        os.replace(partial, self.out / name)
        artifact.write_json(self.note(name), {"sha256": digest, **facts})
