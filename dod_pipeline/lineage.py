"""From a number back to the index of the images: every file on the way, its digest, and what lies in its place now."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dod_models import artifact
from dod_pipeline.sources import INPUTS, behind

Now = Literal["the same", "another", "missing", "not recorded"]


class Node(NamedTuple):
    """A source, and what it was made from."""

    name: str
    path: str | None  # None, as the next two: not recorded
    sha256: str | None
    config: str | None
    now: Now  # what lies at the path
    inputs: list["Node"]


def trace(record: dict[str, Any]) -> Node:
    """The table that holds a record's number, with all that it was made from; paths are below the current folder."""
    seen: dict[str, Node] = {}

    def node(name: str, inputs: tuple[str, ...]) -> Node:
        if name not in seen:
            source = record["sources"].get(name, {})
            path, sha256 = source.get("path"), source.get("sha256")
            found = [node(one, INPUTS[one]) for one in inputs if one in record["sources"] or INPUTS[one]]
            seen[name] = Node(name, path, sha256, source.get("config"), state(path, sha256), found)
        return seen[name]

    return node(record["job"], behind(record["job"], record["stage"]))


def state(path: str | None, sha256: str | None) -> Now:
    """What lies there now; reads the whole file."""
    if path is None:
        return "not recorded"
    if not Path(path).is_file():
        return "missing"
    return "the same" if artifact.sha256_file(Path(path)) == sha256 else "another"


def walk(node: Node, seen: set[str], before: str = "") -> Iterator[tuple[str, Node, bool]]:
    """Each line of the tree: its indent, its node, and whether that was shown with all its inputs before."""
    again = node.name in seen and bool(node.inputs)
    yield before, node, again
    if not again:
        seen.add(node.name)
        for one in node.inputs:
            yield from walk(one, seen, before + "  ")


def remake(record: dict[str, Any]) -> str:
    """The commands that make the number again, and what stands against it."""
    target = f"{record['job']}@{record['checkpoint']}"
    commit = record["commit"]
    if commit is None:
        return f"dvc repro {target}    # with the code of that time: it was under no commit"
    clean = commit.removesuffix("-dirty")
    warning = "    # code or settings had changes that were in no commit" if clean != commit else ""
    return f"git checkout {clean}{warning}\ndvc repro {target}    # or: dod run {record['experiment']}"


def as_json(record: dict[str, Any]) -> dict[str, Any]:
    """The tree as nested mappings, each node in full where it is first met."""
    seen: set[str] = set()

    def plain(node: Node) -> dict[str, Any]:
        found = {**node._asdict(), "inputs": [] if node.name in seen else None}
        if node.name not in seen:
            seen.add(node.name)
            found["inputs"] = [plain(one) for one in node.inputs]
        return found

    return {
        "id": record["id"],
        "metrics": record["metrics"],
        "made_from": plain(trace(record)),
        "again": remake(record),
    }
