"""What a killed dvc leaves behind: a dvc.lock that was being written, and locks that nobody holds any more."""

import json
import re
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import psutil

from dod_pipeline.dvc_graph import check_conflict
from dod_pipeline.dvc_template import read_yaml

PAUSE = 0.2  # seconds in which a dvc that runs has written its table


def is_dead(table: Path) -> bool:
    """Whether dvc's table of locks was cut off, or none of those that it names is a dvc that runs: dvc itself asks only
    whether there is a process of that number, and numbers come again. A dvc that runs may be writing it just now."""
    for pause in (PAUSE, 0.0):
        text = table.read_text() if table.exists() else "{}"
        with suppress(ValueError):
            json.loads(text)
            break
        time.sleep(pause)
    else:
        return True
    holders = re.findall(r'"pid": (\d+)', text)
    return bool(holders) and not any(is_dvc(int(holder)) for holder in holders)


def is_dvc(number: int) -> bool:
    """Whether the process of that number runs dvc."""
    try:
        return any(Path(word).name == "dvc" for word in psutil.Process(number).cmdline())
    except psutil.NoSuchProcess:
        return False


def is_committed(lock: Path) -> bool:
    """Whether dvc.lock is the one of git's HEAD: `git checkout`, `switch` or `stash` put it there on purpose."""
    try:
        shown = subprocess.run(["git", "show", f"HEAD:./{lock.name}"], cwd=lock.parent, capture_output=True)
    except FileNotFoundError:  # no git here
        return False
    return shown.returncode == 0 and shown.stdout == lock.read_bytes()


def is_cut_off(lock: Path, copy: Path) -> bool:
    """Whether dvc.lock has lost its end since the copy was made, for the stage that names it: is no YAML any more, or
    holds a part of that stage's entry, or of the copy's other entries and nothing else."""
    if not lock.exists():
        return False
    check_conflict(lock)
    try:
        then = stages_in(copy)
    except ValueError:
        return False  # was made while another dvc wrote
    try:
        now = stages_in(lock)
    except ValueError:
        return True
    name = unquote(copy.stem)
    then.pop(name, None)
    whole = name not in now or is_whole(now.pop(name))
    return is_part(now, then) and (now != then or not whole)


def stages_in(lock: Path) -> dict[str, Any]:
    """The entries of a dvc.lock; ValueError if it is no YAML mapping."""
    found: dict[str, Any] = read_yaml(lock).get("stages") or {}
    if not isinstance(found, dict):
        raise ValueError(f"{lock}: stages must be a mapping")
    return found


def is_part(now: Any, then: Any) -> bool:
    """Whether writing `then` may have got as far as `now`."""
    if isinstance(now, dict) and isinstance(then, dict):
        return all(name in then and is_part(value, then[name]) for name, value in now.items())
    if isinstance(now, list) and isinstance(then, list):
        return len(now) <= len(then) and all(map(is_part, now, then))
    if isinstance(now, str) and isinstance(then, dict):
        return any(name.startswith(now) for name in then)
    return now is None or now == then or (not isinstance(now, dict | list) and str(then).startswith(str(now)))


def is_whole(entry: Any) -> bool:
    """Whether dvc would read the entry: a command, and a path with its digest for each dependency and output."""
    if not isinstance(entry, dict) or not isinstance(entry.get("cmd"), str | list):
        return False
    paths = [entry.get(kind, []) for kind in ("deps", "outs")]
    return all(isinstance(some, list) for some in paths) and all(
        isinstance(one, dict) and isinstance(one.get("path"), str) and len(one) > 1 for some in paths for one in some
    )
