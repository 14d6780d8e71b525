"""dvc.yaml and dvc.lock, read without DVC, are what DVC reads."""

import re
from pathlib import Path

import pytest
import yaml

from dod_pipeline import dvc_graph
from dod_pipeline.dvc_graph import Graph

from .project import Project

TOY = """
stages:
  plain:
    desc: one stage
    cmd: touch plain.txt
    deps: [source.py, sources]
    params: [a, deep.b, {other.yaml: [c]}, {whole.yaml: null}]
    outs: [plain.txt]
  listed:
    foreach: [one, 2, "${deep.b}"]
    do:
      cmd: touch made/${item}.txt
      deps: [plain.txt]
      outs: ["made/${item}.txt": {cache: false}]
  objects:
    foreach: [{name: x}, {name: y}]
    do:
      cmd: touch object-${item.name}
      deps: [made]
      outs: ["object-${item.name}"]
  mapped:
    foreach: ${sets}
    do:
      cmd: mkdir -p folder-${key}/inner && echo ${item.size} > folder-${key}/inner/size
      deps: [made/one.txt]
      outs: ["folder-${key}"]
  crossed:
    matrix:
      set: [u, v]
      size: [1, 2]
    cmd: touch crossed-${item.set}-${item.size}
    deps: ["folder-${item.set}/inner"]
    metrics: ["crossed-${item.set}-${item.size}"]
  strings:
    cmd:
      - touch first
      - touch second
    deps: [object-x, crossed-u-1]
    outs: [first]
    plots: [second: {x: step, y: loss}]
"""
PARAMS = {"a": 1, "deep": {"b": "three"}, "sets": {"u": {"size": 1e-3}, "v": {"size": 2}}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A DVC project with every form of stage, after `dvc repro`; only to be copied."""
    root = tmp_path_factory.mktemp("toy")
    project = Project(root)
    for name, text in {
        "dvc.yaml": TOY,
        "params.yaml": yaml.safe_dump(PARAMS),
        "other.yaml": "c: 3\n",
        "whole.yaml": "d: 1e-3\n",
        "source.py": "",
        "sources/deep/a.py": "",
        ".dvcignore": "*.pyc\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "made").mkdir()
    project.run("git", "init", "--quiet")
    project.dvc("init", "--quiet", "--force")
    project.dvc("repro")
    return project


@pytest.fixture
def toy(made: Project, tmp_path: Path) -> Project:
    """A copy for one test."""
    return made.copy(tmp_path / "toy")


def test_instances_and_edges_are_those_of_dvc(toy: Project):
    graph = Graph(toy.root)
    lines = toy.dvc("dag", "--dot").stdout.splitlines()
    found = {tuple(re.findall(r'"([^"]+)"', line)) for line in lines if "->" in line}
    assert {(before, name) for name, all_before in graph.upstream.items() for before in all_before} == found
    listed = {line.split()[0] for line in toy.dvc("stage", "list", "--name-only").stdout.splitlines()}
    assert set(graph.instances) == listed


def test_every_stage_comes_after_what_it_depends_on(toy: Project):
    graph = Graph(toy.root)
    order = list(graph.instances)
    assert all(order.index(before) < order.index(name) for name in order for before in graph.upstream[name])


def test_what_dvc_recorded_is_what_stands_there(toy: Project):
    recorded, lock = Graph(toy.root).recorded(), toy.lock()
    assert set(recorded) == set(lock)
    assert recorded["plain"] == lock["plain"]["outs"][0]["md5"]
    assert recorded["mapped@u"] == lock["mapped@u"]["outs"][0]["md5"]  # a folder's, which ends in .dir


def code_of(toy: Project) -> dict[str, str]:
    """The code version of every instance."""
    graph = Graph(toy.root)
    return {name: graph.code(instance) for name, instance in graph.instances.items()}


@pytest.mark.parametrize(
    "file, text, changed",
    [
        ("source.py", "import os\n", {"plain"}),
        ("params.yaml", yaml.safe_dump({**PARAMS, "a": 2}), {"plain"}),
        ("params.yaml", yaml.safe_dump({**PARAMS, "a": 1.0}), set()),
        ("params.yaml", yaml.safe_dump({**PARAMS, "unused": 2}), set()),
        ("whole.yaml", "d: 2\n", {"plain"}),
        ("whole.yaml", "d: 0.001\n", set()),
        ("source.py", None, {"plain"}),
        ("sources/deep/a.py", "1", {"plain"}),
        ("sources/new.py", "", {"plain"}),
        ("sources/new.pyc", "", set()),  # .dvcignore
        ("params.yaml", yaml.safe_dump({**PARAMS, "sets": {"u": {"size": 5}, "v": {"size": 2}}}), {"mapped@u"}),
    ],
)
def test_a_change_of_code_is_one_for_dvc_too(toy: Project, file: str, text: str | None, changed: set[str]):
    before = code_of(toy)
    (toy.root / file).unlink() if text is None else (toy.root / file).write_text(text)
    assert {name for name, code in code_of(toy).items() if code != before[name]} == changed
    found = toy.dvc("status").stdout
    assert {name for name in before if f"{name}:" in found.splitlines()} == changed


def test_downstream_is_all_that_is_made_from_it(toy: Project):
    graph = Graph(toy.root)
    assert set(graph.downstream(["mapped@u"])) == {"mapped@u", "crossed@u-1", "crossed@u-2", "strings"}
    assert graph.downstream(graph.instances) == list(graph.instances)


@pytest.mark.parametrize(
    "text, message",
    [
        ("vars: [a.yaml]\nstages: {}", "dvc.yaml: vars: there is no file a.yaml; write it"),
        ("vars: [{a: 1}, {a: 2}]\nstages: {}", "dvc.yaml: vars: 'a' is defined twice.*rename one"),
        ("vars: ['v.json:b']\nstages: {}", "dvc.yaml: vars: v.json:b: v.json has no 'b'; it has .*'a'"),
        ("vars: ['v.py']\nstages: {}", "v.py: settings written in Python are not supported; write them as YAML"),
        ("steps: {}", "dvc.yaml: 'steps' is not supported; remove it"),
        ("stages: {s: {cmd: x, outz: []}}", "dvc.yaml: stage s: 'outz' is not supported; known are"),
        ("stages: {s: {deps: [a]}}", "dvc.yaml: stage s: cmd: is missing"),
        ("stages: {s: 3}", "dvc.yaml: stage s: must be a mapping with `cmd`, is 3"),
        ("stages: {s: {foreach: 3, do: {cmd: x}}}", "dvc.yaml: stage s: foreach: must be a list or a mapping, is 3"),
        ("stages: {s: {foreach: [3], cmd: x}}", "dvc.yaml: stage s: `foreach` takes `do` and nothing beside it"),
        ("stages: {s: {cmd: x, deps: ['s3://b/c']}}", "dvc.yaml: stage s: deps: s3://b/c is not supported.*import-url"),
        ("stages: {a: {cmd: x, outs: [o]}, b: {cmd: x, outs: [./o]}}", "dvc.yaml: o is made by a and by b"),
        ("stages: {s: {cmd: 'x ${nowhere.at}'}}", r"dvc.yaml: stage s: cmd: \$\{nowhere.at\} is not in params.yaml"),
        ("vars: [v.json]\nstages: {s: {cmd: x, deps: ['${l}']}}", r"stage s: deps: \$\{l\} is no plain value"),
        ("vars: [v.json]\nstages: {s: {cmd: 'x ${l}'}}", r"stage s: cmd: \$\{l\} is no plain value"),
        ("stages: [", "dvc.yaml: not YAML"),
        ("[1, 2]", "dvc.yaml: must hold a mapping, holds a list"),
        ("stages: {a: {cmd: x, deps: [b], outs: [a]}, b: {cmd: x, deps: [a], outs: [b]}}", "depend on each other"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, text: str, message: str):
    (tmp_path / "dvc.yaml").write_text(text)
    (tmp_path / "v.json").write_text('{"a": 1, "l": [1, 2]}')
    (tmp_path / "v.py").write_text("a = 1")
    with pytest.raises(ValueError, match=message):
        Graph(tmp_path)


def test_a_conflict_in_dvc_lock_is_named_with_its_line(toy: Project):
    lock = toy.root / dvc_graph.DVC_LOCK
    lines = lock.read_text().splitlines(keepends=True)
    lock.write_text("".join([*lines[:3], "<<<<<<< HEAD\n", *lines[3:5], "=======\n", ">>>>>>> other\n", *lines[5:]]))
    with pytest.raises(ValueError, match=r"dvc\.lock, line 4: git left a conflict here.*checkout --ours dvc.lock"):
        Graph(toy.root).recorded()
