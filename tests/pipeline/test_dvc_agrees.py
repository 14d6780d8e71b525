"""Whatever happens to a repository: once the sensor has looked, Dagster's pages say what `dvc status` says.

That is equality of two sets of names: the assets that read stale or missing, and the stage instances that `dvc status`
lists. Neither holds what is merely made from something outdated. What is up to date, with all that it is made from,
is what a fresh clone makes of the same sources.
"""

import os
import random
import shutil
from pathlib import Path

import dagster as dg
import pytest

from dod_pipeline.dvc_graph import Graph

from . import toy
from .project import Project

STEPS = int(os.environ.get("DOD_STEPS", "10"))
SEED = int(os.environ.get("DOD_SEED", "0"))
SOURCES = ("params.yaml", "one.src", "two.src", "sources/three.src")
OUTS = ("one", "two-x.txt", "two-y.txt", "three.txt", "four.txt", "five.txt")


class Fresh:
    """A clone that has nothing but the sources of a project, and makes all anew."""

    def __init__(self, project: Project, root: Path, dvc: toy.Dvc) -> None:
        self.project, self.root, self.dvc = project, root, dvc
        self.sources: list[bytes] = []
        self.compared = 0  # outputs, over all steps

    def make(self) -> None:
        """Of the sources as they are now, unless that was done; the frozen stage, too, which nothing is made from."""
        before, self.sources = self.sources, [(self.project.root / path).read_bytes() for path in SOURCES]
        if self.sources == before:
            return
        for path in ("dvc.lock", *OUTS, "three.json", ".dvc/cache", ".dvc/tmp"):
            remove(self.root / path)
        for path in SOURCES:
            shutil.copy(self.project.root / path, self.root / path)
        text = (self.project.root / "dvc.yaml").read_text()
        (self.root / "dvc.yaml").write_text(text.replace("    frozen: true\n", ""))
        self.dvc("reproduce")

    def differing(self, graph: Graph, outdated: set[str]) -> list[str]:
        """Outputs here that aren't those of the project, of what is up to date with all that it is made from."""
        behind = set(graph.downstream(outdated))
        current = [item for name, item in graph.instances.items() if name not in behind and not item.frozen]
        paths = [path for item in current for path in item.made]
        self.compared += len(paths)
        return [path for path in paths if content(self.root / path) != content(self.project.root / path)]


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def content(path: Path) -> dict[str, bytes]:
    """What a file, or each file of a folder, holds."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    assert files, path
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


class Walk:
    """Random changes of a project, made by its users, by DVC and by Dagster."""

    def __init__(
        self, project: Project, dvc: toy.Dvc, instance: dg.DagsterInstance, fresh: Fresh, *, seed: int
    ) -> None:
        self.project, self.dvc, self.instance, self.fresh = project, dvc, instance, fresh
        self.random = random.Random(seed)
        self.cursor: str | None = None

    def steps(self, number: int) -> list[str]:
        """So many changes at random, each kind among them."""
        kinds = ["edit_param", "edit_module", "materialize", "repro", "go_back", "go_back_in_dvc_lock", "lose", "spoil"]
        found = [*kinds, *self.random.choices([*kinds, "materialize", "repro"], k=max(0, number - len(kinds)))]
        self.random.shuffle(found)
        return ["repro", "freeze", *found]

    def freeze(self) -> None:
        """For good, unless it goes back to before."""
        (self.project.root / "dvc.yaml").write_text(toy.DVC_YAML)

    def edit_param(self) -> None:
        a, b = self.random.choices(range(3), k=2)
        (self.project.root / "params.yaml").write_text(f"a: {a}\nb: {b}\n")

    def edit_module(self) -> None:
        name = self.random.choice(["one.src", "two.src", "sources/three.src"])
        (self.project.root / name).write_text(str(self.random.randrange(3)))

    def materialize(self) -> None:
        """Some assets, in Dagster; fails where inputs are missing, which is right."""
        pipeline, definitions = toy.pipeline_of(self.project)
        chosen = self.random.sample(sorted(pipeline.keys), k=self.random.randint(1, 3))
        job = definitions.resolve_implicit_global_asset_job_def()
        keys = [pipeline.keys[name] for name in chosen]
        job.execute_in_process(instance=self.instance, asset_selection=keys, raise_on_error=False)
        self.project.commit()

    def repro(self) -> None:
        self.dvc("reproduce")
        self.project.commit()

    def go_back(self) -> None:
        self.check_out(".")

    def go_back_in_dvc_lock(self) -> None:
        self.check_out("dvc.lock")

    def check_out(self, path: str) -> None:
        """An older commit, with the outputs that it had."""
        self.project.commit()
        commits = self.project.run("git", "rev-list", "HEAD", "--", "dvc.lock").stdout.split()
        self.project.run("git", "checkout", "--quiet", self.random.choice(commits), "--", path)
        self.dvc("checkout", force=True)

    def lose(self) -> None:
        remove(self.project.root / self.random.choice(OUTS))

    def spoil(self) -> None:
        """Replace an output by hand, a file within a folder too."""
        path = self.project.root / self.random.choice(["one/data", "two-x.txt", "three.json"])
        if path.parent.exists():
            path.unlink(missing_ok=True)
            path.write_text(str(self.random.random()))

    def check(self, after: str) -> None:
        """The sensor looks; then both say the same, and it has nothing more to say. What is up to date can be made
        anew."""
        pipeline, definitions = toy.pipeline_of(self.project)
        said, self.cursor = toy.tick(self.instance, pipeline, self.cursor)
        expected = set(self.dvc("status"))
        assert toy.stale(self.instance, definitions) == expected, f"after {after}; the sensor {said}"
        assert toy.tick(self.instance, pipeline, self.cursor)[0] == "dvc.lock and the outputs are as they were"
        self.fresh.make()
        assert not self.fresh.differing(pipeline.graph, expected), f"after {after}"


@pytest.mark.timeout(600)
def test_after_any_change_dagster_says_what_dvc_status_says(tmp_path: Path):
    project = toy.create(tmp_path / "toy", toy.DVC_YAML.replace("    frozen: true\n", ""))
    project.dvc("remote", "add", "--default", "store", str(tmp_path / "store"))
    anew = project.clone(tmp_path / "anew")
    with (
        toy.serving(project) as dvc,
        toy.serving(anew) as dvc_anew,
        dg.DagsterInstance.local_temp(str(tmp_path)) as instance,
    ):
        walk = Walk(project, dvc, instance, Fresh(project, anew.root, dvc_anew), seed=SEED)
        history = []
        for step in walk.steps(STEPS):
            getattr(walk, step)()
            history.append(step)
            walk.check(", ".join(history))
        assert walk.fresh.compared > STEPS
        dvc("reproduce")
        walk.check("the last repro")
        project.commit()
        dvc("push")
    clone = project.clone(tmp_path / "clone")
    clone.dvc("pull")
    assert clone.files().keys() == project.files().keys()
    paths = clone.files().keys() - {"dvc.lock"}  # there, --force states anew what a frozen stage could be made from
    made = {path: (project.root / path).read_bytes() for path in paths}
    clone.dvc("repro", "--force")
    assert {path: (clone.root / path).read_bytes() for path in paths} == made
    assert clone.outs() == project.outs()
