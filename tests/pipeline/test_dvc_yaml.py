"""dvc.yaml says what the code says: modules, inputs, outputs and settings of every stage."""

import copy
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import grimp
import pytest
import yaml

from dod_models.cli import STAGES
from dod_pipeline import listing, stages
from dod_pipeline.config import Params
from dod_pipeline.dvc_graph import Graph
from dod_pipeline.report import TEMPLATE

from .project import SOURCE, Project

RAW: dict[str, Any] = yaml.safe_load((SOURCE / "params.yaml").read_text())
GRAPH: dict[str, Any] = yaml.safe_load((SOURCE / "dvc.yaml").read_text())["stages"]
PACKAGES = ("dod_models", "dod_pipeline")
MODULES = {name: f"dod_models.{stage.module}" for name, stage in STAGES.items()} | {"report": "dod_pipeline.report"}
STRUCTURE = {"experiment", "data", "step"}  # these name paths, which are dependencies, and configure nothing


def substitute(value: Any, *, key: str, item: dict[str, Any]) -> Any:
    """Replace ${key} and ${item.x} as DVC does."""
    if isinstance(value, dict):
        return {substitute(k, key=key, item=item): substitute(v, key=key, item=item) for k, v in value.items()}
    if isinstance(value, list):
        return [substitute(v, key=key, item=item) for v in value]
    if isinstance(value, str):
        value = value.replace("${key}", key)
        return re.sub(r"\$\{item\.(\w+)\}", lambda match: str(item[match[1]]), value)
    return value


def expand(raw: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Every stage instance of dvc.yaml over these params, by stage and key."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for name, stage in GRAPH.items():
        mapping = raw[stage["foreach"].removeprefix("${").removesuffix("}")]
        found |= {(name, key): substitute(stage["do"], key=key, item=item) for key, item in mapping.items()}
    return found


def names(entries: list[Any]) -> set[str]:
    """Paths of a list of outputs, with or without options."""
    return {path for entry in entries for path in ([entry] if isinstance(entry, str) else entry)}


def outputs(instance: dict[str, Any]) -> set[str]:
    """Everything that a stage instance writes."""
    return {path for kind in ("outs", "metrics", "plots") for path in names(instance.get(kind, []))}


@cache
def closure(module: str) -> set[str]:
    """Files of both packages that a module imports, directly or not, and its own."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None, exclude_type_checking_imports=True)
    modules = graph.find_upstream_modules(module) | {module}
    return {f"{name.replace('.', '/')}.py" for name in modules if name not in PACKAGES}


def sources(instance: dict[str, Any]) -> set[str]:
    """The dependencies that are code; the rest is data."""
    return {dep for dep in instance["deps"] if Path(dep).parts[0] in PACKAGES}


def listings(stage: str, key: str) -> set[str]:
    """What a stage doesn't read, and depends on for DVC to notice that images have changed."""
    return {str(listing.file_of(key))} if stage == "dataset" else set()


INSTANCES = expand(RAW)
ADDRESSES = pytest.mark.parametrize(
    "stage, key", [pytest.param(*instance, id="@".join(instance)) for instance in INSTANCES]
)


def test_the_stages_are_those_of_the_code_in_a_possible_order():
    assert set(GRAPH) == set(stages.ORDER) == set(MODULES) - {"generate", "export", "fitv2", "trial"}
    made: set[str] = set()
    for name in stages.ORDER:
        for (_, key), instance in ((pair, i) for pair, i in INSTANCES.items() if pair[0] == name):
            data = set(instance["deps"]) - sources(instance) - listings(name, key)
            missing = {dep for dep in data if not any(within(dep, out) or within(out, dep) for out in made)}
            assert not missing, f"{name} comes before the stage that makes {missing}"
        made |= {out for (stage, _), i in INSTANCES.items() if stage == name for out in outputs(i)}


def test_a_bare_repro_makes_the_demo_before_it_asks_for_imagenet():
    """DVC goes through the instances as they stand in dvc.yaml, and makes what each one needs before it."""
    upstream, plan = Graph(SOURCE).upstream, dict[str, None]()

    def visit(name: str) -> None:
        for before in upstream[name]:
            visit(before)
        plan[name] = None

    for stage, key in INSTANCES:
        visit(f"{stage}@{key}")
    demo = ["@".join(pair) for pair in stages.instances(Params.parse(RAW, place=""), "mnist", "report")]
    assert set(list(plan)[: len(demo)]) == set(demo)
    assert list(plan)[len(demo)] == "dataset@imagenet"


def within(path: str, folder: str) -> bool:
    """Whether a path is the folder or lies in it."""
    return Path(path).is_relative_to(folder)


@pytest.mark.parametrize("name", stages.ORDER)
def test_a_stage_depends_on_exactly_the_modules_that_it_imports(name: str):
    deps = GRAPH[name]["do"]["deps"]
    template = {f"dod_pipeline/{TEMPLATE}"} if name == "report" else set()
    assert sources(GRAPH[name]["do"]) == closure(MODULES[name]) | template
    assert len(deps) == len(set(deps))


def test_an_edit_of_the_evaluation_does_not_retrain():
    assert "dod_models/evaluate.py" in GRAPH["metrics"]["do"]["deps"]
    assert "dod_models/evaluate.py" not in GRAPH["train"]["do"]["deps"]


@ADDRESSES
def test_a_stage_reads_and_writes_the_paths_of_the_code(stage: str, key: str):
    params, instance = Params.parse(RAW, place="params.yaml"), INSTANCES[stage, key]
    inputs, out, facts = stages.paths(params, stage, key)
    stated = set(instance["deps"]) - sources(instance)
    read = {str(path) for name, path in inputs.items() if name not in ("state", "picture")}
    assert stated == read | listings(stage, key)
    assert instance["cmd"] == f"exec dod stage {stage} {key}"
    if stage == "report":  # without numbers of its own
        assert outputs(instance) == {str(out)}
    elif facts is None:  # the output is the numbers
        assert names(instance["metrics"]) == {str(out)}
        assert names(instance.get("plots", [])) == {str(path) for name, path in inputs.items() if name == "picture"}
    else:
        assert names(instance["outs"]) == {str(out)} and names(instance["metrics"]) == {str(facts)}


def leaves(values: dict[str, Any], *place: str) -> Iterator[tuple[str, ...]]:
    """Paths of everything that is not a mapping."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, *place, name)
        else:
            yield (*place, name)


@ADDRESSES
def test_a_stage_lists_exactly_the_settings_that_configure_it(stage: str, key: str):
    before = stages.settings(Params.parse(RAW, place="params.yaml"), stage, key)
    listed = {tuple(name.split(".")) for name in INSTANCES[stage, key]["params"]}
    for place in leaves(RAW):
        if place[-1] in STRUCTURE or {"compute", "gate", "provisional", "retrain", "deployment"} & set(place):
            continue
        if stage == "report" and place[0] == "sweeps" and RAW["sweeps"][place[1]]["experiment"] != key:
            continue  # dvc.yaml can't pick an experiment's own out of the mapping; a page is made in seconds
        changed = copy.deepcopy(RAW)
        inner = changed
        for name in place[:-1]:
            inner[name] = inner = dict(inner[name])
        inner[place[-1]] = [] if isinstance(inner[place[-1]], list) else "another value"
        after = stages.settings(Params.parse(changed, place="params.yaml"), stage, key)
        is_listed = any(place[: len(prefix)] == prefix for prefix in listed)
        assert (after != before) == is_listed, f"{'.'.join(place)}: listed {is_listed}, configures {after != before}"


def test_no_stage_tracks_what_changes_no_result():
    free = re.compile(r"experiments(\.[^.]+(\.(compute|gate|retrain).*)?)?")
    for instance in INSTANCES.values():
        assert not [name for name in instance["params"] if free.fullmatch(name)]


def test_dvc_expands_the_stages_as_this_file_does(built: Project):
    lock = built.lock()
    tiny = expand(yaml.safe_load((built.root / "params.yaml").read_text()))
    assert set(lock) == {f"{stage}@{key}" for stage, key in tiny}
    for (stage, key), instance in tiny.items():
        found = lock[f"{stage}@{key}"]
        assert {dep["path"] for dep in found["deps"]} == set(instance["deps"])
        assert {out["path"] for out in found["outs"]} == outputs(instance)
        assert set(found["params"]["params.yaml"]) == set(instance["params"])
