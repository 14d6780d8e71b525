"""A full disk, a real one of 64 MiB: one clear line, the old output is intact, and with room again all is as before."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dod_pipeline import stages

from .project import Project, environment

FULL = "No space left on device"
NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")  # needs no root; ends with its process
MOUNT = 'mount -t tmpfs -o size=64m none "$0" && exec "$@"'

# Common to the programs that run beside the mount: fill the disk but for some bytes, and make room again.
BALLAST = """
import contextlib, hashlib, io, json, os, shutil, subprocess, sys
from pathlib import Path
source, disk, report = map(Path, sys.argv[1:4])
os.environ.pop("DAGSTER_HOME", None)  # .venv's Python has set it to that of the folder where it was started
shutil.copytree(source, disk / "project", symlinks=True)
os.chdir(disk / "project")
def fill(room):
    free = shutil.disk_usage(disk).free - room
    (disk / "ballast").write_bytes(bytes(free // PAGE * PAGE))
def empty():
    (disk / "ballast").unlink()
def content(top):
    files = [top] if top.is_file() else sorted(p for p in top.rglob("*") if p.is_file() and p.suffix != ".partial")
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
def size(top):
    return sum(p.stat().st_size for p in ([top] if top.is_file() else top.rglob("*")))
found, PAGE = {}, 4096
"""
EACH_STAGE = """
from dod_pipeline import cli, stages
from dod_pipeline.config import load_params
params = load_params()
def compute(stage, key):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = cli.main(["stage", stage, key])
    return {"status": status, "said": said.getvalue()}
for stage in stages.ORDER:
    key = stages.keys_of(params, stage)[0]
    target = stages.paths(params, stage, key)[1]
    before, tries = content(target), []
    for room in sorted({0, size(target) // 2 // PAGE * PAGE}):
        fill(room)
        tries.append(compute(stage, key) | {"intact": content(target) == before != {}, "room": room})
        empty()
    found[stage] = {"tries": tries, "after": compute(stage, key), "equal": content(target) == before}
report.write_text(json.dumps(found))
"""
WHOLE_RUN = """
before = content(Path("metrics")) | content(Path("samples"))
(disk / "project" / "metrics" / "tiny" / "tiny-6.json").unlink()
shutil.rmtree("samples/tiny/tiny-6/stage2")
def run():
    done = subprocess.run(["dod", "run", "tiny"], capture_output=True, text=True)
    return {"status": done.returncode, "said": done.stderr, "printed": done.stdout}
records = content(Path("history"))
found["tries"] = []
for room in map(int, sys.argv[4:]):
    fill(room)
    found["tries"].append(run() | {"room": room})
    empty()
found["after"] = run()
found["equal"] = content(Path("metrics")) | content(Path("samples")) == before
found["kept"] = records.items() <= content(Path("history")).items()
report.write_text(json.dumps(found))
"""


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Where a small file system can be mounted."""
    found = tmp_path / "disk"
    found.mkdir()
    tried = subprocess.run([*NAMESPACE, MOUNT, str(found), "true"], capture_output=True, text=True)
    if tried.returncode != 0:
        pytest.skip(f"this machine allows no mount in a namespace of the user's own: {tried.stderr.strip()}")
    return found


def beside(disk: Path, program: str, project: Project, *arguments: str) -> Any:
    """What the program reports, run on a small disk that holds a copy of the project."""
    report = disk.parent / "report.json"
    words = [sys.executable, "-P", "-c", BALLAST + program, str(project.root), str(disk), str(report), *arguments]
    done = subprocess.run([*NAMESPACE, MOUNT, str(disk), *words], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return json.loads(report.read_text())


@pytest.mark.timeout(600)
def test_a_full_disk_is_an_error_of_each_stage_that_loses_nothing(built: Project, disk: Path):
    found = beside(disk, EACH_STAGE, built)
    assert tuple(found) == stages.ORDER
    for stage, seen in found.items():
        for tried in seen["tries"]:
            last = tried["said"].splitlines()[-1]
            assert (tried["status"], tried["intact"]) == (1, True), (stage, tried)
            assert FULL in last and last.startswith((f"{stage}: ", "dod: ")), (stage, tried)
            assert "Traceback" not in tried["said"], (stage, tried)
        assert seen["after"]["status"] == 0, (stage, seen)
        assert seen["equal"] or stage == "report", (stage, seen)  # which shows what the stages took just now


@pytest.mark.timeout(600)
def test_a_run_on_a_full_disk_says_so_and_goes_on_once_there_is_room(built: Project, disk: Path):
    found = beside(disk, WHOLE_RUN, built, "0", "65536", "131072")
    for tried in found["tries"]:
        assert tried["status"] == 1 and "Traceback" not in tried["said"] and "Stack Trace" not in tried["said"], tried
        assert any(words in tried["said"] for words in (FULL, "disk is full", "bytes are free")), tried
    assert found["after"]["status"] == 0, found["after"]
    assert found["equal"] and found["kept"]
