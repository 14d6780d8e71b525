"""`dod run` ends as params.yaml's `deployment` says."""

import shutil

import dagster as dg

from .project import Project
from .test_dagster import dagster_of


def test_a_run_ends_in_a_push_and_in_a_commit_that_names_it(own: Project):
    store = own.root.parent / "store"
    own.dvc("remote", "modify", "--local", "local", "url", str(store))
    values = own.params()
    values["deployment"] = {"storage": {"push": "end"}, "versioning": {"git_commit": True}}
    own.write_params(values)
    own.commit("a deployment")
    before, made = own.outs(), own.root / "samples" / "tiny" / "tiny-6" / "stage2"
    shutil.rmtree(made)
    (own.root / "metrics" / "tiny" / "tiny-6.json").unlink()
    (own.root / "mine.txt").write_text("not of a run")
    own.dod("run", "tiny")
    assert own.outs() == before
    subject, *files = own.run("git", "log", "-1", "--name-only", "--format=%s").stdout.split("\n")
    with dagster_of(own) as instance:
        (run,) = instance.get_runs(dg.RunsFilter(tags={"dvc/kept": "dod run"}), limit=1)
        assert subject == f"Results of run {run.run_id}"
    assert {path.split("/")[0] for path in files if path} <= {"dvc.lock", "metrics", "facts", "curves", "history"}
    assert own.run("git", "status", "--porcelain").stdout == "?? mine.txt\n"
    md5 = before["samples/tiny/tiny-6/stage2"]
    assert list(store.rglob(f"{md5[:2]}/{md5[2:]}"))
