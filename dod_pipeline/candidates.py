"""The retrains of an experiment in params.yaml: EXPERIMENT-r1, EXPERIMENT-r2, ..., and how another one is added there.

A candidate is a copy of its experiment that begins from the champion's weights, named by digest, and sees other noise.
Its entries are put in as text: every other byte of the file, comments and all, stays as it is.
"""

import os
import re
import textwrap
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dod_pipeline import stages
from dod_pipeline.champion import Champion, Event
from dod_pipeline.config import PARAMS_FILE, Params, load_params
from dod_pipeline.turns import turn


class Candidate(NamedTuple):
    """A retrain, and its only checkpoint."""

    experiment: str
    checkpoint: str


def numbers(params: Params, experiment: str) -> list[int]:
    """Those of the experiment's retrains, in order."""
    return [
        number
        for number in numbers_in(params.experiments, experiment)
        if f"{experiment}-r{number}" in params.experiments
    ]


def numbers_in(names: Iterable[str], experiment: str) -> list[int]:
    """The numbers of the retrains that experiments, or their checkpoints, belong to."""
    found = (re.fullmatch(rf"{re.escape(experiment)}-r(\d+)(-\d+)?", name) for name in names)
    return sorted({int(match[1]) for match in found if match})


def pending(params: Params, experiment: str, known: Champion) -> Candidate | None:
    """The newest retrain, if nothing was decided about it yet: it was stopped on its way."""
    for number in reversed(numbers(params, experiment)):
        name = f"{experiment}-r{number}"
        checkpoints = list(params.checkpoints_of(name))
        if "warm_start" in params.experiments[name].train and checkpoints and checkpoints[-1] not in known.decided:
            return Candidate(name, checkpoints[-1])
        break
    return None


def add(experiment: str, decided: Champion, *, path: Path = PARAMS_FILE) -> Candidate:
    """Write the entries of a new retrain; ValueError if its settings don't hold. No number is given twice, also if the
    entries of one that was decided about are gone."""
    with turn(path.name):
        params = load_params(path)
        known = numbers(params, experiment)
        number = max([*known, *numbers_in(decided.decided, experiment)], default=0) + 1
        name = f"{experiment}-r{number}"
        settings = entry(params, experiment, decided.champion, number)
        step = settings["train"]["steps"]
        one = Candidate(name, f"{name}-{step}")
        last = f"{experiment}-r{known[-1]}" if known else experiment
        evaluated = {"experiment": name, "data": settings["data"], "step": step}
        text = inserted(path.read_text(), "experiments", last, {name: settings})
        beside = [*params.checkpoints_of(experiment), *params.checkpoints_of(last)] or list(params.checkpoints)
        text = inserted(text, "checkpoints", beside[-1], {one.checkpoint: evaluated})
        stages.resolve(Params.parse(yaml.safe_load(text), place=f"{path}, with {name}"), "train", name)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text)
        os.replace(partial, path)
    return one


def entry(params: Params, experiment: str, champion: Event, number: int) -> dict[str, Any]:
    """The settings of a retrain: the experiment's, but for what `retrain` says, the beginning, and the seed."""
    base = params.experiments[experiment]
    full = stages.resolve(params, "train", experiment).config.model_dump()
    asked = base.retrain.model_dump(include={"steps", "learning_rate", "warmup_steps"}, exclude_none=True)
    train = base.train | {"steps": full["steps"], "seed": full["seed"] + number} | asked
    train |= {"save_every": train["steps"], "warm_start": {"path": champion.path, "sha256": champion.sha256}}
    return base.model_dump(exclude_unset=True, exclude={"gate", "retrain"}) | {"train": train}


def inserted(text: str, mapping: str, after: str, new: dict[str, Any]) -> str:
    """YAML with new entries in a top-level mapping, below the entry called `after`."""
    top = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(top, yaml.MappingNode)
    inside = next(node for name, node in top.value if name.value == mapping)
    if inside.flow_style:
        raise ValueError(f"params.yaml: {mapping}: stands in braces; write an entry a line, for others to be added")
    line = last_line(next(node for name, node in inside.value if name.value == after)) + 1
    written = yaml.safe_dump(new, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)
    lines = (text if text.endswith("\n") else text + "\n").splitlines(keepends=True)
    lines.insert(line, textwrap.indent(written, " " * inside.value[0][0].start_mark.column))
    found, before = "".join(lines), yaml.safe_load(text)
    with suppress(yaml.YAMLError):
        if yaml.safe_load(found) == before | {mapping: before[mapping] | new}:
            return found
    raise ValueError(f"params.yaml: found no place for {', '.join(new)} in {mapping}; take its anchors away")


def last_line(node: yaml.Node) -> int:
    """The line, from 0, on which a value ends, without the comments below it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style:
        last = node.value[-1]
        return last_line(last[1] if isinstance(node, yaml.MappingNode) else last)
    is_block = isinstance(node, yaml.ScalarNode) and node.style in ("|", ">")
    return int(node.end_mark.line) - is_block
