"""A clone of this repository below `.state/`, for studies that add experiments: the demo's own graph stays small.

It shares this folder's DVC cache, unless it is to stand apart, so that what was made here is not made again.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent


def call(*command: str, cwd: Path = ROOT) -> str:
    """Run a command; a failure is shown and ends the study."""
    return subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def at_this_commit(name: str, *, apart: bool = False) -> Path:
    """The clone of that name, brought to this folder's commit; `apart`: with a cache of its own."""
    if call("git", "status", "--porcelain", "--", "dod_models", "dod_pipeline", "dvc.yaml", "params.yaml"):
        sys.exit(f"{name}: code or settings differ from the last commit, on which the study runs; commit them first")
    clone = ROOT / ".state" / name
    if not clone.exists():
        call("git", "clone", "--quiet", "--no-local", str(ROOT), str(clone))
    call("git", "fetch", "--quiet", str(ROOT), "HEAD", cwd=clone)
    call("git", "reset", "--quiet", "--hard", "FETCH_HEAD", cwd=clone)
    cache = clone if apart else ROOT
    call(str(ROOT / ".venv/bin/dvc"), "cache", "dir", "--local", str(cache / ".dvc" / "cache"), cwd=clone)
    return clone


def environment(clone: Path) -> dict[str, str]:
    """Of commands in it: they run its own code, and its Dagster."""
    return os.environ | {"DAGSTER_HOME": str(clone / "dagster_home"), "PYTHONPATH": str(clone)}


def read_params(clone: Path) -> dict[str, Any]:
    """Its params.yaml."""
    found: dict[str, Any] = yaml.safe_load((clone / "params.yaml").read_text())
    return found


def write_params(clone: Path, params: dict[str, Any]) -> None:
    """Write its params.yaml, without YAML's references."""
    dumper = yaml.SafeDumper
    dumper.ignore_aliases = lambda *_: True  # type: ignore[method-assign]
    (clone / "params.yaml").write_text(yaml.dump(params, Dumper=dumper, sort_keys=False))
