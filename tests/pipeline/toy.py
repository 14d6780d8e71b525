"""A DVC project whose stages take no time, with a Dagster instance of its own; and a DVC that answers at once."""

import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest

from dod_pipeline.dvc_assets import Pipeline
from dod_pipeline.dvc_graph import Graph

from .project import BIN, Project, environment

DVC_YAML = r"""
stages:
  five:
    always_changed: true
    cmd: cat two-y.txt three.txt > five.txt
    deps: [two-y.txt, three.txt]
    outs: [five.txt]
  one:
    cmd: mkdir one && cat one.src > one/data && echo ${a} > one/param
    deps: [one.src]
    outs: [one]
  two:
    foreach: [x, y]
    do:
      cmd: cat one/data two.src > two-${item}.txt && echo ${b} >> two-${item}.txt
      deps: [one/data, two.src]
      params: [b]
      outs: ["two-${item}.txt"]
  three:
    cmd: cat one/param two-x.txt > three.txt && echo "{\"size\":$(wc -c < three.txt)}" > three.json
    deps: [one/param, two-x.txt, sources]
    outs: [three.txt]
    metrics: [three.json: {cache: false}]
  four:
    frozen: true
    cmd: cat three.txt > four.txt
    deps: [three.txt]
    outs: [four.txt]
"""
IGNORED = "/one\n/two-*.txt\n/three.txt\n/four.txt\n/five.txt\n"
FILES = {"params.yaml": "a: 1\nb: 1\n", "one.src": "1", "two.src": "1", "sources/three.src": "1", ".gitignore": IGNORED}
# Carries out, in one process, what would be a call of dvc each; prints what `dvc status --json` would.
SERVE = """
import json, sys
from dvc.repo import Repo
for line in sys.stdin:
    call, given = json.loads(line)
    try:
        found = getattr(Repo("."), call)(**given)
        print(json.dumps(found if call == "status" else {}), file=sys.__stdout__, flush=True)
    except Exception as error:
        print(json.dumps({"error": repr(error)}), file=sys.__stdout__, flush=True)
"""


class Dvc:
    """A process that holds DVC loaded."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def __call__(self, call: str, **given: Any) -> dict[str, Any]:
        """Call a method of dvc's Repo."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([call, given]) + "\n")
        self.process.stdin.flush()
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found


@contextmanager
def serving(project: Project) -> Iterator[Dvc]:
    """A DVC for this project."""
    python = str(BIN.parent.parent / ".venv-dvc" / "bin" / "python")
    code = f"import os, sys\nsys.stdout = open(os.devnull, 'w')\n{SERVE}"
    with subprocess.Popen(
        [python, "-c", code],
        cwd=project.root,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        yield Dvc(process)
        process.kill()


def create(root: Path, text: str = DVC_YAML, files: Mapping[str, str] = FILES) -> Project:
    """A new project with this dvc.yaml and these files, committed; nothing made yet."""
    project = Project(root)
    for name, content in {**files, "dvc.yaml": text}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    project.run("git", "init", "--quiet", "--initial-branch=main")
    project.dvc("init", "--quiet")
    project.commit("start")
    return project


def pipeline_of(project: Project) -> tuple[Pipeline, dg.Definitions]:
    """As Dagster loads it now."""
    pipeline = Pipeline(Graph(project.root))
    return pipeline, dg.Definitions(assets=pipeline.assets(), sensors=[pipeline.sensor()])


def stale(instance: dg.DagsterInstance, definitions: dg.Definitions) -> set[str]:
    """The stage instances whose assets read stale or missing, as the pages show them."""
    graph = definitions.resolve_asset_graph()
    resolver = CachingStaleStatusResolver(instance, graph, LoadingContextForTest(instance))
    keys = graph.get_all_asset_keys()
    return {"@".join(key.path) for key in keys if resolver.get_status(key) != StaleStatus.FRESH}


def tick(instance: dg.DagsterInstance, pipeline: Pipeline, cursor: str | None) -> tuple[str, str | None]:
    """What the sensor says, and its cursor afterwards."""
    with dg.build_sensor_context(instance, cursor=cursor) as context:
        result = pipeline.sensor()(context)
        assert isinstance(result, dg.SkipReason) and result.skip_message is not None
        return result.skip_message, context.cursor
