"""dvc.yaml and dvc.lock as data: stage instances, the edges between them, and versions of code and outputs.

Read without DVC, which lives in another environment and takes seconds to start.
"""

import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from dod_pipeline.dvc_hash import Sources, code_digest, digest_in, together
from dod_pipeline.dvc_template import DVC_YAML, PARAMS, Template, look_up, read_values, read_yaml, templates

DVC_LOCK = "dvc.lock"
URL = re.compile(r"^\w+://")
FROZEN = "frozen"  # stands for the code of what DVC doesn't make anew, whatever changes
SECTIONS = {"stages", "vars", "params", "metrics", "plots", "artifacts", "datasets"}

Options = Mapping[str, Any]


class Instance(NamedTuple):
    """A stage of dvc.yaml, or one that its `foreach` or `matrix` expands to. Paths are relative to dvc.yaml."""

    name: str  # as DVC addresses it: "train@mnist"
    stage: str
    key: str | None
    desc: str
    cmd: str | list[str]
    wdir: str
    deps: tuple[str, ...]
    params: tuple[tuple[str, str], ...]  # (file, dotted name; "" for the whole file)
    outs: tuple[str, ...]
    metrics: tuple[str, ...]
    plots: tuple[tuple[str, Options], ...]  # (path, options)
    frozen: bool

    @property
    def made(self) -> tuple[str, ...]:
        """Every path that the stage writes."""
        return (*self.outs, *self.metrics, *dict(self.plots))

    @property
    def read(self) -> tuple[str, ...]:
        """Every path that the stage depends on."""
        return (*self.deps, *dict(self.params))


class Graph:
    """The stage instances of a folder's dvc.yaml, in an order in which they can run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.settings: dict[str, dict[str, Any]] = {}
        self.files = Sources(root)
        read = read_yaml(root / DVC_YAML)
        if unknown := set(read) - SECTIONS:
            raise ValueError(f"{DVC_YAML}: {min(unknown)!r} is not supported; remove it")
        self.stages = set(read.get("stages") or {})
        found = {item.name: item for item in map(instance, templates(root, read))}
        self.lineage = edges(found)  # as `dvc dag` shows it
        self.instances = {name: found[name] for name in in_order(self.lineage)}
        # As `dvc repro` goes along it.
        self.upstream = {name: set() if found[name].frozen else before for name, before in self.lineage.items()}
        self.metrics = {posixpath.normpath(path) for path in read.get("metrics") or []}
        self.plots = list(top_plots(read.get("plots") or []))

    def code(self, instance: Instance) -> str:
        """Digest of the command, the sources and the settings as they are now."""
        if instance.frozen:
            return FROZEN
        made = [path for before in self.upstream[instance.name] for path in self.instances[before].made]
        sources = [path for path in instance.read if not any(overlap(path, other) for other in made)]
        values: dict[str, Any] = {}
        for file, name in instance.params:
            if file not in self.settings:
                self.settings[file] = read_values(self.root / file)
            if file in sources:
                values |= {f"{file}:{name}": value_at(self.settings[file], name)}
        return code_digest(
            instance.cmd, {dep: self.files.digest(dep) for dep in instance.deps if dep in sources}, values
        )

    def downstream(self, names: Iterable[str]) -> list[str]:
        """These instances and all that are made from them, in order."""
        reached = set(names)
        for name in self.instances:
            if self.upstream[name] & reached:
                reached.add(name)
        return [name for name in self.instances if name in reached]

    def ends(self, names: Iterable[str]) -> list[str]:
        """Those of the instances from which none of the others is made."""
        inside = set(names)
        if unknown := inside - self.instances.keys():
            raise ValueError(f"{DVC_YAML}: has no stage {min(unknown)!r} any more; run it again")
        before = set[str]().union(*(self.upstream[name] for name in inside))
        return [name for name in self.instances if name in inside - before]

    def recorded(self) -> dict[str, str]:
        """md5s of outputs in dvc.lock, by instance; a ValueError names the line where git left a conflict."""
        path = self.root / DVC_LOCK
        check_conflict(path)
        found = {}
        for name, entry in (read_yaml(path).get("stages") or {}).items():
            if name in self.instances:
                item = self.instances[name]
                outs = {placed(item.wdir, out["path"]): digest_in(out) for out in entry.get("outs", [])}
                found[name] = together([outs[path] for path in item.outs or item.made if path in outs])
        return found


def check_conflict(path: Path) -> None:
    """ValueError if git's conflict markers stand in the file."""
    lines = path.read_text().splitlines() if path.exists() else []
    marked = [number for number, line in enumerate(lines, 1) if line.startswith(("<<<<<<< ", ">>>>>>> "))]
    if marked:
        raise ValueError(
            f"{path}, line {marked[0]}: git left a conflict here. Take one side, `git checkout --ours {path.name}` or "
            "`--theirs`, and run again: what does not fit the code is then made anew"
        )


def instance(template: Template) -> Instance:
    """One instance from its resolved text."""
    stage, key, wdir, fields = template

    def paths(field: str) -> Iterator[tuple[str, Any]]:
        for path, options in with_options(fields.get(field) or []):
            if URL.match(path):
                raise ValueError(
                    f"{DVC_YAML}: stage {stage}: {field}: {path} is not supported, which lies outside of the project; "
                    "bring it in with `dvc import-url`, and name the copy here"
                )
            yield placed(wdir, path), options

    return Instance(
        name=stage if key is None else f"{stage}@{key}",
        stage=stage,
        key=key,
        desc=fields.get("desc") or "",
        cmd=fields["cmd"],
        wdir=wdir,
        deps=tuple(path for path, _ in paths("deps")),
        params=tuple((placed(wdir, file), name) for file, name in settings_of(fields.get("params") or [])),
        outs=tuple(path for path, _ in paths("outs")),
        metrics=tuple(path for path, _ in paths("metrics")),
        plots=tuple((path, options or {}) for path, options in paths("plots")),
        frozen=bool(fields.get("frozen")),
    )


def placed(wdir: str, path: str) -> str:
    """A path of a stage as seen from dvc.yaml."""
    return posixpath.normpath(posixpath.join(wdir, path))


def with_options(entries: list[Any]) -> Iterator[tuple[str, Any]]:
    """Paths of outputs, which may be written as `path` or as `path: {option: value}`."""
    for entry in entries:
        yield from entry.items() if isinstance(entry, dict) else [(str(entry), {})]


def settings_of(entries: list[Any]) -> Iterator[tuple[str, str]]:
    """(file, dotted name) of parameters, written as `name`, `file: [names]` or `file:`."""
    for entry in entries:
        if isinstance(entry, str):
            yield PARAMS, entry
            continue
        for file, names in entry.items():
            yield from ((file, name) for name in names or [""])


def top_plots(entries: list[Any]) -> Iterator[tuple[str, Options]]:
    """(path, options) of the plots that stand beside the stages: `y` may map several files to their columns."""
    for name, options in with_options(entries):
        options = options or {}
        if not isinstance(options.get("y"), dict):
            yield posixpath.normpath(name), options
            continue
        for file, y in options["y"].items():
            x = options.get("x")
            x = x.get(file) if isinstance(x, dict) else x
            yield posixpath.normpath(file), {"title": name, **options, "x": x, "y": y}


def value_at(values: dict[str, Any], name: str) -> Any:
    """A setting, or all of them for ""; None where there is none."""
    try:
        return look_up(values, name) if name else values
    except KeyError:
        return None


def overlap(one: str, other: str) -> bool:
    """Whether one path is the other or lies in it."""
    a, b = parts(one), parts(other)
    common = min(len(a), len(b))
    return a[:common] == b[:common]


@cache
def parts(path: str) -> tuple[str, ...]:
    """The names along a path. Kept, for a graph compares the same few thousands of times."""
    return PurePosixPath(path).parts


def edges(instances: dict[str, Instance]) -> dict[str, set[str]]:
    """For each instance those that it depends on: a dependency overlaps what they make."""
    makers: dict[str, str] = {}
    inside = defaultdict(set)  # folder -> those that make something in it
    for name, item in instances.items():
        for path in item.made:
            if path in makers:
                raise ValueError(
                    f"{DVC_YAML}: {path} is made by {makers[path]} and by {name}; give each a path of its own"
                )
            makers[path] = name
            for folder in PurePosixPath(path).parents:
                inside[str(folder)].add(name)
    found: dict[str, set[str]] = {}
    for name, item in instances.items():
        found[name] = set()
        for dep in map(PurePosixPath, item.read):
            found[name] |= {makers[str(p)] for p in (dep, *dep.parents) if str(p) in makers} | inside[str(dep)]
    return found


def in_order(upstream: dict[str, set[str]]) -> list[str]:
    """Names such that each comes after what it depends on, otherwise as they stand in dvc.yaml."""
    place = {name: number for number, name in enumerate(upstream)}
    sorter = TopologicalSorter({name: sorted(before, key=place.__getitem__) for name, before in upstream.items()})
    try:
        return list(sorter.static_order())
    except CycleError as error:
        raise ValueError(f"{DVC_YAML}: stages depend on each other in a circle: {' -> '.join(error.args[1])}") from None
