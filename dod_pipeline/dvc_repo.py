"""The only file that calls dvc. It lives in an environment of its own, behind the launcher `.venv/bin/dvc`."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BUSY = re.compile("acquire lock|is busy|has locked", re.IGNORECASE)  # how dvc says that another one holds its lock
RETRY_PAUSES = (1.0, 2.0, 4.0)  # seconds


def executable() -> str:
    """Path of the launcher beside this Python, or of a dvc on PATH."""
    beside = Path(sys.executable).parent / "dvc"
    found = str(beside) if beside.exists() else shutil.which("dvc")
    if found is None:
        raise FileNotFoundError(f"{beside}: no dvc there, nor on PATH; run `make setup`")
    return found


def environment() -> dict[str, str]:
    """This process's environment with `dod` and `python` of this environment first on PATH."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def call(*arguments: str) -> int:
    """Run dvc with this terminal; returns its exit status."""
    return subprocess.run([executable(), *arguments], env=environment()).returncode


def read(*arguments: str) -> Any:
    """Run dvc and parse the JSON that it prints; OSError with its message if it fails."""
    for pause in (*RETRY_PAUSES, None):
        done = subprocess.run([executable(), *arguments], env=environment(), capture_output=True, text=True)
        if done.returncode == 0 or pause is None or not BUSY.search(done.stderr):
            break
        time.sleep(pause)
    if done.returncode != 0:
        raise OSError(
            f"dvc {' '.join(arguments)} failed ({done.returncode}): {done.stderr.strip() or done.stdout.strip()}"
        )
    return json.loads(done.stdout)


def address(stage: str, key: str) -> str:
    """DVC's name of a stage instance."""
    return f"{stage}@{key}"


def status(targets: list[str]) -> dict[str, Any]:
    """What changed, by stage instance; empty where there is nothing to do."""
    changed: dict[str, Any] = read("status", "--json", *targets)
    return changed


@contextmanager
def alone(root: Path = Path()) -> Iterator[None]:
    """Wait until no other `dod` runs stages in this folder: DVC itself would say "busy" and fail."""
    lock = root / ".dvc" / "tmp" / "dod.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another dod is running stages in {root.absolute()}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def repro(targets: list[str], *, single_item: bool = False) -> None:
    """`dvc repro` of the targets and all that they need, or of them alone; OSError if a stage fails."""
    code = call("repro", *["--single-item"] * single_item, *targets)
    if code != 0:
        raise OSError(
            f"dvc repro failed ({code}); the message above says where. What was finished stays: run it again to go on"
        )


def accept(targets: list[str]) -> None:
    """`dvc commit --force`: record the present code, params and outputs as belonging together."""
    code = call("commit", "--force", *targets)
    if code != 0:
        raise OSError(
            f"dvc commit failed ({code}); the message above says why. Nothing was recorded for the failing stage"
        )
