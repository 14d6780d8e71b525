"""Any dvc.yaml that DVC reads is read as DVC reads it, or refused by name."""

from operator import itemgetter
from pathlib import Path
from typing import Any

import dagster as dg

from dod_pipeline import dvc_assets
from dod_pipeline.dvc_assets import Pipeline
from dod_pipeline.dvc_graph import Graph

from . import generated
from .project import Project

FILES = 100
FOREIGN = """
vars: [{words: [alpha, beta]}]
metrics: [far/beside.yaml]
plots:
  - far/steps.csv: {title: Steps, x: step, y: loss}
  - all: {x: step, y: {far/rows.json: [loss, rate]}}
stages:
  count:
    foreach: ${words}
    do:
      wdir: far
      cmd: "echo '{\\"length\\": {\\"of\\": 5}}' > ${item}.json"
      metrics: ["${item}.json": {cache: false}]
  odd:
    foreach: ["x y/z", 2.5, "2_5"]
    do:
      cmd: echo 1 > "${item}.txt"
      deps: [source]
      outs: ["${item}.txt"]
  curve:
    wdir: far
    frozen: true
    desc: A curve
    cmd: python ../curve.py
    deps: [alpha.json]
    outs: [beside.yaml, steps.csv]
    plots: [rows.json, {picture.png: {cache: false}}]
"""
CURVE = """
from pathlib import Path
Path("beside.yaml").write_text("score: 0.5")
Path("steps.csv").write_text("step,loss,rate\\n1,2,3\\n2,1,3\\n")
Path("rows.json").write_text('{"rows": [{"step": 1, "loss": 2.5, "rate": null}]}')
Path("picture.png").write_bytes(b"")
"""


def test_stages_and_edges_of_100_random_files_are_those_of_dvc(tmp_path: Path):
    project = Project(tmp_path)
    project.run("git", "init", "--quiet")
    project.dvc("init", "--quiet")
    for seed in range(FILES):
        generated.write(tmp_path / f"p{seed}", seed)
    found: dict[str, list[dict[str, Any]]] = {}
    for stage in generated.as_dvc_reads_them(tmp_path):
        found.setdefault(str(stage.pop("file")), []).append(stage)
    assert len(found) == FILES and sum(len(stages) for stages in found.values()) > 8 * FILES
    assert sum(bool(stage["upstream"]) for stages in found.values() for stage in stages) > 3 * FILES
    for seed in range(FILES):
        graph = Graph(tmp_path / f"p{seed}")
        mine: list[dict[str, Any]] = [
            {
                "name": name,
                "cmd": item.cmd,
                "frozen": item.frozen,
                "deps": sorted(set(item.read)),
                "outs": sorted(item.made),
                "upstream": sorted(graph.lineage[name]),
            }
            for name, item in graph.instances.items()
        ]

        assert sorted(mine, key=itemgetter("name")) == sorted(found[f"p{seed}/dvc.yaml"], key=itemgetter("name")), (
            f"seed {seed}"
        )


def ten_lines() -> str:
    """The example in the manual."""
    text = dvc_assets.__doc__ or ""
    lines = [line for line in text.splitlines() if line.startswith("    ")]
    assert len(lines) <= 10
    return "\n".join(line[4:] for line in lines)


def test_ten_lines_load_a_foreign_dvc_yaml_and_make_it(tmp_path: Path):
    """The frozen stage, which depends on another, was made before; its plots and metrics are the asset's."""
    project = Project(tmp_path)
    (tmp_path / "far").mkdir()
    (tmp_path / "x y").mkdir()
    (tmp_path / "source").write_text("")
    (tmp_path / "curve.py").write_text(CURVE)
    project.run("git", "init", "--quiet")
    project.dvc("init", "--quiet")
    (tmp_path / "dvc.yaml").write_text(FOREIGN.replace("frozen: true", "frozen: false"))
    project.dvc("repro")
    (tmp_path / "dvc.yaml").write_text(FOREIGN)
    names: dict[str, object] = {"__file__": str(tmp_path / "definitions.py")}
    exec(compile(ten_lines(), "definitions.py", "exec"), names)
    definitions, pipeline = names["defs"], names["pipeline"]
    assert isinstance(definitions, dg.Definitions) and isinstance(pipeline, Pipeline)
    before = project.lock()
    with dg.DagsterInstance.ephemeral() as instance:
        done = definitions.resolve_implicit_global_asset_job_def().execute_in_process(instance=instance)
        assert done.success
        odd = [str(key.path[1]) for key in instance.get_asset_keys() if key.path[0] == "odd"]
        assert sorted(name[:5] for name in odd) == ["2_5", "2_5_4", "x_y_z"]
        made = {m.asset_key.to_user_string(): m.metadata for m in done.asset_materializations_for_node("curve")}
    assert project.lock() == before
    metadata = made["curve"]
    assert metadata["score"].value == 0.5
    steps, rows, every = metadata["Steps"], metadata["rows"], metadata["all"]
    assert isinstance(steps, dg.TableMetadataValue) and isinstance(rows, dg.TableMetadataValue)
    assert [r.data for r in steps.records] == [{"step": "1", "loss": "2"}, {"step": "2", "loss": "1"}]
    assert [r.data for r in rows.records] == [{"step": 1, "loss": 2.5, "rate": "None"}]
    assert isinstance(every, dg.TableMetadataValue) and "picture" not in metadata
