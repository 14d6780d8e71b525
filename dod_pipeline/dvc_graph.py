"""dvc.yaml and dvc.lock as data: stage instances, the edges between them, and versions of code and outputs.

Read without DVC, which lives in another environment and takes seconds to start. Supported: plain stages, `foreach` and
`matrix`, interpolation of params.yaml. `vars` and `wdir` raise a ValueError.
"""

import hashlib
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

DVC_YAML, DVC_LOCK, PARAMS = "dvc.yaml", "dvc.lock", "params.yaml"
EXPRESSION = re.compile(r"\$\{\s*([^{}\s]+)\s*\}")


class Instance(NamedTuple):
    """A stage of dvc.yaml, or one that its `foreach` or `matrix` expands to. Paths are relative to dvc.yaml."""

    name: str  # as DVC addresses it: "train@mnist"
    stage: str
    key: str | None
    desc: str
    cmd: str | list[str]
    deps: tuple[str, ...]
    params: tuple[tuple[str, str], ...]  # (file, dotted name; "" for the whole file)
    outs: tuple[str, ...]
    metrics: tuple[str, ...]
    plots: tuple[tuple[str, Mapping[str, Any]], ...]  # (path, options)

    @property
    def made(self) -> tuple[str, ...]:
        """Every path that the stage writes."""
        return (*self.outs, *self.metrics, *(path for path, _ in self.plots))


class Version(NamedTuple):
    """What dvc.lock says of an instance."""

    code: str  # digest of command, sources and settings that made it
    data: str  # md5 of its outputs


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping as DVC reads it (YAML 1.2: 1e-3 is a number); {} for no file, a ValueError for no YAML."""
    if not path.exists():
        return {}
    try:
        found = YAML(typ="safe", pure=True).load(path.read_text())
    except YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict | None):
        raise ValueError(f"{path}: must hold a mapping, holds a {type(found).__name__}")
    return found or {}


class Graph:
    """The stage instances of a folder's dvc.yaml, in an order in which they can run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.settings: dict[str, dict[str, Any]] = {PARAMS: read_yaml(root / PARAMS)}
        read = read_yaml(root / DVC_YAML)
        if "vars" in read:
            raise ValueError(f"{root / DVC_YAML}: 'vars' is not supported; move its values into {PARAMS}")
        found = [i for name, text in read.get("stages", {}).items() for i in expand(name, text, self.settings[PARAMS])]
        unsorted = {instance.name: instance for instance in found}
        self.upstream = edges(unsorted)
        self.instances = {name: unsorted[name] for name in in_order(self.upstream)}

    def code(self, instance: Instance) -> str:
        """Digest of the command, the sources and the settings as they are now."""
        sources = self.sources(instance.name, instance.deps)
        values: dict[str, Any] = {}
        for file, name in instance.params:
            if file not in self.settings:
                self.settings[file] = read_yaml(self.root / file)
            values |= {name: look_up(self.settings[file], name)} if name else self.settings[file]
        return code_digest(instance.cmd, {dep: md5_of(self.root / dep) for dep in sources}, values)

    def sources(self, name: str, deps: Iterable[str]) -> list[str]:
        """Those dependencies of an instance that no stage makes."""
        made = [path for before in self.upstream[name] for path in self.instances[before].made]
        return [dep for dep in deps if not any(overlap(dep, path) for path in made)]

    def downstream(self, names: Iterable[str]) -> list[str]:
        """These instances and all that are made from them, in order."""
        reached = set(names)
        for name in self.instances:
            if self.upstream[name] & reached:
                reached.add(name)
        return [name for name in self.instances if name in reached]

    def recorded(self) -> dict[str, Version]:
        """The versions in dvc.lock, by instance; a ValueError names the line where git left a conflict."""
        path = self.root / DVC_LOCK
        check_conflict(path)
        stages, found = read_yaml(path).get("stages", {}), {}
        for name, entry in stages.items():
            if name not in self.instances:
                continue
            instance = self.instances[name]
            deps = {dep["path"]: digest_in(dep) for dep in entry.get("deps", [])}
            sources = {path: deps[path] for path in self.sources(name, deps)}
            values = {name: value for file in entry.get("params", {}).values() for name, value in file.items()}
            outs = {out["path"]: digest_in(out) for out in entry.get("outs", [])}
            main = [path for path in (instance.outs or instance.made) if path in outs]
            found[name] = Version(code_digest(entry["cmd"], sources, values), together([outs[path] for path in main]))
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


def expand(name: str, text: dict[str, Any], params: dict[str, Any]) -> Iterator[Instance]:
    """The instances of one stage."""
    if "foreach" in text:
        items = resolve(text["foreach"], params, name)
        pairs = items.items() if isinstance(items, dict) else ((label(i, v), v) for i, v in enumerate(items))
        for key, item in pairs:
            yield instance(name, str(key), resolve(text["do"], {**params, "key": key, "item": item}, name))
    elif "matrix" in text:
        axes = resolve(text["matrix"], params, name)
        for values in itertools.product(*axes.values()):
            key = "-".join(label(axes[axis].index(v), v, axis) for axis, v in zip(axes, values, strict=True))
            item = dict(zip(axes, values, strict=True))
            rest = {part: value for part, value in text.items() if part != "matrix"}
            yield instance(name, key, resolve(rest, {**params, "key": key, "item": item}, name))
    else:
        yield instance(name, None, resolve(text, params, name))


def label(index: int, value: Any, axis: str = "") -> str:
    """DVC's name of a list's element: the value, or its place where it is not a plain one."""
    return f"{axis}{index}" if isinstance(value, dict | list) else str(value)


def instance(stage: str, key: str | None, text: dict[str, Any]) -> Instance:
    """One instance from its resolved text."""
    if "wdir" in text:
        raise ValueError(f"{DVC_YAML}: stage {stage}: 'wdir' is not supported; write paths as seen from {DVC_YAML}")
    pairs = {kind: list(with_options(text.get(kind, []))) for kind in ("outs", "metrics", "plots")}
    return Instance(
        name=stage if key is None else f"{stage}@{key}",
        stage=stage,
        key=key,
        desc=text.get("desc", ""),
        cmd=text["cmd"],
        deps=tuple(text.get("deps", [])),
        params=tuple(settings_of(text.get("params", []))),
        outs=tuple(path for path, _ in pairs["outs"]),
        metrics=tuple(path for path, _ in pairs["metrics"]),
        plots=tuple(pairs["plots"]),
    )


def with_options(entries: list[Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Paths of outputs, which may be written as `path` or as `path: {option: value}`."""
    for entry in entries:
        yield from entry.items() if isinstance(entry, dict) else [(entry, {})]


def settings_of(entries: list[Any]) -> Iterator[tuple[str, str]]:
    """(file, dotted name) of parameters, written as `name`, `file: [names]` or `file:`."""
    for entry in entries:
        if isinstance(entry, str):
            yield PARAMS, entry
            continue
        for file, names in entry.items():
            yield from ((file, name) for name in names or [""])


def resolve(value: Any, context: dict[str, Any], place: str) -> Any:
    """Replace ${dotted.name} by its value: the value itself where it is the whole string, its text elsewhere."""
    if isinstance(value, dict):
        return {resolve(k, context, place): resolve(v, context, place) for k, v in value.items()}
    if isinstance(value, list):
        return [resolve(v, context, place) for v in value]
    if not isinstance(value, str):
        return value
    whole = EXPRESSION.fullmatch(value)
    if whole:
        return look_up(context, whole[1], place)
    return EXPRESSION.sub(lambda match: str(look_up(context, match[1], place)), value)


def look_up(values: Any, dotted: str, place: str | None = None) -> Any:
    """The value at a.b.c; where there is none a ValueError that names `place`, or None without one."""
    for name in dotted.split("."):
        if not isinstance(values, dict) or name not in values:
            if place is None:
                return None
            raise ValueError(f"{DVC_YAML}: stage {place}: ${{{dotted}}} is not in {PARAMS}")
        values = values[name]
    return values


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
    makers = {path: name for name, item in instances.items() for path in item.made}
    inside = defaultdict(set)  # folder -> those that make something in it
    for path, name in makers.items():
        for folder in PurePosixPath(path).parents:
            inside[str(folder)].add(name)
    found: dict[str, set[str]] = {}
    for name, item in instances.items():
        found[name] = set()
        for dep in map(PurePosixPath, item.deps):
            found[name] |= {makers[str(p)] for p in (dep, *dep.parents) if str(p) in makers} | inside[str(dep)]
    return found


def in_order(upstream: dict[str, set[str]]) -> list[str]:
    """Names such that each comes after what it depends on, otherwise as they stand in dvc.yaml."""
    from graphlib import CycleError, TopologicalSorter

    sorter = TopologicalSorter({name: sorted(before, key=list(upstream).index) for name, before in upstream.items()})
    try:
        return list(sorter.static_order())
    except CycleError as error:
        raise ValueError(f"{DVC_YAML}: stages depend on each other in a circle: {' -> '.join(error.args[1])}") from None


def md5_of(path: Path) -> str:
    """md5 of a file as DVC has it; "missing" for none."""
    if path.is_dir():
        raise ValueError(f"{path}: a folder that no stage makes is not supported as a dependency; list its files")
    if not path.exists():
        return "missing"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def digest_in(entry: dict[str, Any]) -> str:
    """The digest of a path in dvc.lock."""
    return str(entry.get("md5") or entry.get("etag") or entry.get("checksum") or "missing")


def together(digests: list[str]) -> str:
    """One digest for several, and a single one as it is."""
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def code_digest(cmd: str | list[str], sources: dict[str, str], values: dict[str, Any]) -> str:
    """Digest of what makes an instance, its inputs from other instances apart; 1 and 1.0 are equal, as for DVC."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(name): plain(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [plain(inner) for inner in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    text = json.dumps([cmd, sources, plain(values)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
