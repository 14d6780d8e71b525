"""Taking turns at a file that several processes change: read, change and write belong together."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TURNS = Path(".state", "turns")


@contextmanager
def turn(name: str) -> Iterator[None]:
    """Wait until nobody else in this folder has the turn of that name; it ends with its holder."""
    TURNS.mkdir(parents=True, exist_ok=True)
    with (TURNS / name).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{TURNS.absolute() / name}: another dod is at this; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
