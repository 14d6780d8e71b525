"""Random dvc.yaml files that use all that the bridge understands, and what DVC itself makes of them."""

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import yaml

from .project import BIN, environment

PARAMS: dict[str, Any] = {
    "size": 3,
    "on": True,
    "deep": {"er": {"name": "pearl"}, "list": ["a", "b", {"c": "sea"}]},
    "names": ["ann", "bob"],
    "mixed": [1, 2.5, True, "four"],
    "sets": {"u": {"size": 1, "tag": "x"}, "v": {"size": 2, "tag": "y"}},
    "arguments": {"lr": 0.1, "flag": True, "off": False, "words": ["o k", "fine"], "in": {"ner": "it's"}},
}
SHARED = {"shared": {"one": "eins", "two": "zwei"}, "unused": 1}
TEXTS = (
    *("echo ${size} ${on}", "echo ${deep.er.name} > /dev/null", "echo ${deep.list[1]} ${deep.list.0}"),
    *(r"echo \${HOME} ${ deep[er][name] }", "train ${arguments}", "echo ${deep.list[2].c} $HOME", "echo ${mixed}x"),
)
# All that DVC knows of the stages of a repository, in one process.
ASK = """
import json
from dvc.repo import Repo
repo = Repo(".")
def path(thing, stage): return repo.fs.relpath(thing.fs_path, repo.fs.dirname(stage.path))
print(json.dumps([{
    "file": repo.fs.relpath(s.path), "name": s.name, "cmd": s.cmd, "frozen": bool(s.frozen),
    "deps": sorted({path(d, s) for d in s.deps}), "outs": sorted(path(o, s) for o in s.outs),
    "upstream": sorted(o.name for o in repo.index.graph.successors(s)),
} for s in repo.index.stages if s.name]))
"""


class Writer:
    """Writes one dvc.yaml at random; what a stage depends on was made by those before it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.made: list[str] = ["source.txt", "raw"]
        self.count = 0

    def dvc_yaml(self) -> dict[str, Any]:
        makers = [self.plain, self.foreach_list, self.foreach_mapping, self.matrix]
        stages = {f"s{number}": self.random.choice(makers)(f"s{number}") for number in range(self.random.randint(2, 7))}
        items = list(stages.items())
        self.random.shuffle(items)
        inline = {"inline": {"vars": "too"}, "deep": {"new": 7}}
        top: Any = self.random.choice([{}, {"vars": ["shared.yaml"]}, {"vars": ["shared.json:shared", inline]}])
        outs = [path for path in self.made if path.endswith(".json")]
        beside = {"metrics": outs[:1], "plots": [{path: None} for path in outs[1:2]]} if outs else {}
        return {**top, "stages": dict(items), **beside}

    def path(self) -> str:
        self.count += 1
        return f"{self.random.choice(['out', 'far/out', './out', 'a/../out'])}{self.count}"

    def body(self, own: str, suffix: str = "") -> dict[str, Any]:
        """The fields of a stage; `own` keeps its outputs from those of others, `suffix` those of its instances."""
        wdir = self.random.choice([None, None, "sub", "sub/${deep.er.name}"])
        up = {"sub": "../", "sub/${deep.er.name}": "../../"}.get(wdir or "", "")
        made = f"{self.path()}-{own}{suffix}"
        kind = self.random.choice(["file", "folder", "inside"])
        out = made + {"file": ".txt", "folder": "", "inside": "/inner/file.json"}[kind]
        found: dict[str, Any] = {"cmd": self.command(), "outs": [self.random.choice([out, {out: {"cache": False}}])]}
        found["deps"] = [up + path for path in self.random.sample(self.made, min(2, len(self.made)))]
        if self.random.random() < 0.5:
            found["params"] = ["size", {f"{up}shared.yaml": self.random.choice([["shared.one"], None])}]
            found["params"] = found["params"][1:] if wdir else found["params"]
        extra = f"{made}.json"
        extras: list[dict[str, Any]] = [
            {},
            {"metrics": [{extra: {"cache": False}}]},
            {"plots": [{extra: {"x": "a", "y": "b"}}]},
        ]
        extras += [{"frozen": True}, {"always_changed": True}, {"desc": "words", "meta": {"any": ["thing"]}}]
        found |= self.random.choice(extras)
        if wdir:
            found["wdir"] = wdir
        if self.random.random() < 0.3:
            found |= {"vars": [{"local": "here"}], "cmd": "echo ${local} ${local}"}
        if not suffix:
            seen = str(yaml.safe_load(str(wdir or ".")).replace("${deep.er.name}", "pearl"))
            inside = {"file": "", "folder": "/part.txt", "inside": ""}[kind]
            whole = made if kind == "inside" and self.random.random() < 0.5 else out + self.random.choice(["", inside])
            self.made.append(f"{seen}/{whole}")
        return found

    def command(self) -> Any:
        one = self.random.choice(TEXTS[:-1])
        return [one, "true"] if self.random.random() < 0.2 else one

    def plain(self, name: str) -> dict[str, Any]:
        return self.body(name)

    def foreach_list(self, name: str) -> dict[str, Any]:
        items: Any = self.random.choice(
            ["${names}", "${mixed}", ["x", 1, True], [{"n": 1}, {"n": 2}], ["${size}", "y"]]
        )
        inner = "${item.n}" if isinstance(items, list) and isinstance(items[0], dict) else "${item}"
        return {"foreach": items, "do": self.body(name, f"-{inner}")}

    def foreach_mapping(self, name: str) -> dict[str, Any]:
        items: Any = self.random.choice(["${sets}", {"p": {"size": 1}, "q": {"size": "${size}"}}])
        return {"foreach": items, "do": self.body(name, "-${key}-${item.size}")}

    def matrix(self, name: str) -> dict[str, Any]:
        axes: Any = self.random.choice([{"a": "${names}", "b": [1, 2]}, {"a": [{"c": 1}, {"c": 2}], "b": [True, 0.5]}])
        return {"matrix": axes, **self.body(name, "-${key}-${item.b}")}


def write(folder: Path, seed: int) -> None:
    """One random pipeline with its settings."""
    folder.mkdir()
    (folder / "dvc.yaml").write_text(yaml.safe_dump(Writer(seed).dvc_yaml(), sort_keys=False))
    (folder / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    (folder / "shared.yaml").write_text(yaml.safe_dump(SHARED))
    (folder / "shared.json").write_text(json.dumps(SHARED))


def as_dvc_reads_them(root: Path) -> list[dict[str, Any]]:
    """Every stage below a DVC repository's root."""
    python = BIN.parent.parent / ".venv-dvc" / "bin" / "python"
    done = subprocess.run([python, "-c", ASK], cwd=root, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found
