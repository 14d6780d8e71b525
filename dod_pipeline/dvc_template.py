"""dvc.yaml's templates as DVC resolves them: `vars`, `foreach`, `matrix`, and ${...} in the fields of a stage."""

import itertools
import json
import posixpath
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

DVC_YAML, PARAMS = "dvc.yaml", "params.yaml"
EXPRESSION = re.compile(r"(?<!\\)\$\{(.*?)\}")
FIELDS = {
    "cmd",
    "wdir",
    "deps",
    "params",
    "vars",
    "frozen",
    "meta",
    "desc",
    "always_changed",
    "outs",
    "metrics",
    "plots",
}


class Context(NamedTuple):
    """What ${...} may name, and the files that were read for it as a whole."""

    values: dict[str, Any]
    files: frozenset[str] = frozenset()


class Template(NamedTuple):
    """A stage, or one of those that `foreach` or `matrix` make of it, with every ${...} resolved."""

    stage: str
    key: str | None
    wdir: str  # as seen from dvc.yaml
    fields: dict[str, Any]


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping as DVC reads it (YAML 1.2: 1e-3 is a number); {} for no file, a ValueError for no YAML."""
    if not path.exists():
        return {}
    try:
        found = deepcopy(parsed(path.read_text()))
    except YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict | None):
        raise ValueError(f"{path}: must hold a mapping, holds a {type(found).__name__}")
    return found or {}


@lru_cache(maxsize=16)
def parsed(text: str) -> Any:
    """What a YAML document holds; its parser takes a fifth of a second for a thousand lines, and is asked again."""
    return YAML(typ="safe", pure=True).load(text)


def read_values(path: Path) -> dict[str, Any]:
    """The mapping in a YAML, JSON or TOML file; {} for no file."""
    if path.suffix == ".py":
        raise ValueError(f"{path}: settings written in Python are not supported; write them as YAML, JSON or TOML")
    if path.suffix not in (".json", ".toml") or not path.exists():
        return read_yaml(path)
    try:
        found = (json.loads if path.suffix == ".json" else tomllib.loads)(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not {path.suffix[1:].upper()}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must hold a mapping, holds a {type(found).__name__}")
    return found


def templates(root: Path, read: Mapping[str, Any]) -> Iterator[Template]:
    """All stages of a dvc.yaml, in its order; a ValueError names stage, field and remedy."""
    context = load(root, [PARAMS] if (root / PARAMS).exists() else [], "", Context({}), "vars")
    context = load(root, read.get("vars") or [], "", context, "vars")
    for name, text in (read.get("stages") or {}).items():
        place = f"stage {name}"
        if not isinstance(text, dict):
            raise ValueError(f"{DVC_YAML}: {place}: must be a mapping with `cmd`, is {text!r}")
        for key, inner, names in expand(text, context, place):
            yield fill(root, name, key, inner, Context(names, context.files))


def load(root: Path, entries: list[Any], wdir: str, context: Context, place: str) -> Context:
    """The context with `vars` added: `file`, `file:key,key` or a mapping. None may name anew what is there."""
    values, files = dict(context.values), set(context.files)
    for entry in entries:
        if isinstance(entry, dict):
            values = merged(values, by_name(entry), place)
            continue
        file, _, listed = str(entry).partition(":")
        path = posixpath.normpath(posixpath.join(wdir, file))
        if path in files and not listed:
            continue
        if not (root / path).is_file():
            raise ValueError(f"{DVC_YAML}: {place}: there is no file {path}; write it, or remove it from `vars`")
        found = read_values(root / path)
        keys = [key for key in listed.split(",") if key]
        if missing := [key for key in keys if key not in found]:
            raise ValueError(f"{DVC_YAML}: {place}: {entry}: {path} has no {missing[0]!r}; it has {list(found)}")
        values = merged(values, by_name({key: found[key] for key in keys} if keys else found), place)
        files |= set() if keys else {path}
    return Context(values, frozenset(files))


def merged(values: dict[str, Any], more: dict[str, Any], place: str) -> dict[str, Any]:
    """Two mappings as one, and so the mappings within; a ValueError where both have a value."""
    result = dict(values)
    for name, value in more.items():
        if isinstance(result.get(name), dict) and isinstance(value, dict):
            result[name] = merged(result[name], value, place)
        elif name in result:
            raise ValueError(
                f"{DVC_YAML}: {place}: {name!r} is defined twice, in {PARAMS} or `vars`; rename one of them"
            )
        else:
            result[name] = value
    return result


def by_name(value: Any) -> Any:
    """Without what has a number for its name, which ${...} can't reach."""
    if isinstance(value, dict):
        return {name: by_name(inner) for name, inner in value.items() if isinstance(name, str)}
    return [by_name(inner) for inner in value] if isinstance(value, list) else value


def expand(
    text: dict[str, Any], context: Context, place: str
) -> Iterator[tuple[str | None, dict[str, Any], dict[str, Any]]]:
    """The key of each instance of a stage, its text, and what its ${...} may name."""
    if "foreach" in text:
        if set(text) != {"foreach", "do"} or not isinstance(text["do"], dict):
            raise ValueError(f"{DVC_YAML}: {place}: `foreach` takes `do` and nothing beside it; move {set(text)} there")
        items = resolve(text["foreach"], context.values, f"{place}: foreach")
        if not isinstance(items, dict | list):
            raise ValueError(f"{DVC_YAML}: {place}: foreach: must be a list or a mapping, is {items!r}")
        for key, item in keyed(items, text["foreach"]).items():
            known = {"item": by_name(item)} | ({"key": key} if isinstance(items, dict) else {})
            yield key, text["do"], context.values | known
    elif "matrix" in text:
        axes = resolve(text["matrix"], context.values, f"{place}: matrix")
        rest = {field: value for field, value in text.items() if field != "matrix"}
        for key, item in crossed(axes, text["matrix"]).items():
            yield key, rest, context.values | {"item": by_name(item), "key": key}
    else:
        yield None, text, context.values


def keyed(items: dict[Any, Any] | list[Any], written: Any) -> dict[str, Any]:
    """The elements by DVC's names for them: a list's are their values, or their places if one isn't a plain value."""
    if isinstance(items, dict):
        return {text_of(key): item for key, item in items.items()}
    if any(isinstance(item, dict | list) for item in items):
        return {str(index): item for index, item in enumerate(items)}
    return dict(zip(labels(items, written), items, strict=True))


def crossed(axes: dict[str, list[Any]], written: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each combination of a matrix by its name."""
    named = []
    for axis, items in axes.items():
        names = labels(items, written[axis])
        at = [f"{axis}{i}" if isinstance(items[i], dict | list) else name for i, name in enumerate(names)]
        named.append(list(zip(at, items, strict=True)))
    return {
        "-".join(name for name, _ in combination): dict(zip(axes, [item for _, item in combination], strict=True))
        for combination in itertools.product(*named)
    }


def labels(items: list[Any], written: Any) -> list[str]:
    """The values as text; DVC says `true` for one that is written in dvc.yaml itself, and `True` for one of ${...}."""
    before = written if isinstance(written, list) else [written] * len(items)
    return [str(item) if isinstance(text, str) else text_of(item) for item, text in zip(items, before, strict=True)]


def fill(root: Path, stage: str, key: str | None, text: dict[str, Any], context: Context) -> Template:
    """One instance, resolved."""
    place = f"stage {stage}"
    if unknown := set(text) - FIELDS:
        raise ValueError(
            f"{DVC_YAML}: {place}: {min(unknown)!r} is not supported; known are {', '.join(sorted(FIELDS))}"
        )
    if not text.get("cmd"):
        raise ValueError(f"{DVC_YAML}: {place}: cmd: is missing; write the command that makes the outputs")
    wdir = text_of(resolve(text.get("wdir") or "", context.values, f"{place}: wdir"))
    names = load(root, text.get("vars") or [], wdir, context, f"{place}: vars").values
    fields = {
        field: resolve(value, names, f"{place}: {field}", field) for field, value in text.items() if field != "vars"
    }
    return Template(stage, key, posixpath.normpath(wdir or "."), fields)


def resolve(value: Any, names: Mapping[str, Any], place: str, field: str | None = None) -> Any:
    """Replace ${dotted.name[0]} by its value: the value itself where it is the whole string, its text elsewhere, and
    options of a command for a mapping in `cmd`. Within a field, only that may be more than a plain value."""
    if isinstance(value, dict):
        return {resolve(k, names, place, field): resolve(v, names, place, field) for k, v in value.items()}
    if isinstance(value, list):
        return [resolve(v, names, place, field) for v in value]
    if not isinstance(value, str):
        return value
    whole = EXPRESSION.fullmatch(value)
    if whole and "${" not in whole[1]:
        found = select(names, whole[1], place)
        if field is not None and isinstance(found, dict | list):
            raise ValueError(f"{DVC_YAML}: {place}: {value} is no plain value; name one within it")
        return found

    def shown(match: re.Match[str]) -> str:
        found = select(names, match[1], place)
        if isinstance(found, list) or (isinstance(found, dict) and field != "cmd"):
            raise ValueError(f"{DVC_YAML}: {place}: {match[0]} is no plain value; name one within it")
        return text_of(found)

    return EXPRESSION.sub(shown, value).replace(r"\${", "${")


def select(names: Any, dotted: str, place: str) -> Any:
    """The value at a.b[0].c; where there is none a ValueError that names `place`."""
    try:
        return look_up(names, dotted.replace("[", ".").replace("]", ""))
    except KeyError:
        raise ValueError(f"{DVC_YAML}: {place}: ${{{dotted}}} is not in {PARAMS} or `vars`; add it there") from None


def look_up(values: Any, dotted: str) -> Any:
    """The value at a.b.0.c; KeyError for none."""
    for name in map(str.strip, dotted.split(".")):
        if isinstance(values, dict) and name in values:
            values = values[name]
        elif isinstance(values, list) and name.isdecimal() and int(name) < len(values):
            values = values[int(name)]
        else:
            raise KeyError(dotted)
    return values


def text_of(value: Any) -> str:
    """A value within a string: true and false as YAML writes them, a mapping as options of a command."""
    if isinstance(value, dict):
        return " ".join(option for name, inner in value.items() for option in options(str(name), inner))
    return str(value).lower() if isinstance(value, bool) else str(value)


def options(name: str, value: Any) -> Iterator[str]:
    """`--name value`, with a mapping's names joined by dots, `--name` for true and nothing for false."""
    if isinstance(value, dict):
        for inner, found in value.items():
            yield from options(f"{name}.{inner}", found)
    elif isinstance(value, list):
        if value:
            yield " ".join([f"--{name}", *(shlex.quote(v) if isinstance(v, str) else str(v) for v in value)])
    elif isinstance(value, bool):
        yield from [f"--{name}"] if value else []
    else:
        yield f"--{name} {shlex.quote(value) if isinstance(value, str) else value}"
