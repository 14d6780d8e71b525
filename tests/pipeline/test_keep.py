"""`dod run` ends as params.yaml's `deployment` says."""

import dagster as dg

from .project import Project
from .test_dagster import dagster_of


def test_a_run_ends_in_a_push_and_in_a_commit_that_names_it(own: Project):
    store = own.root.parent / "store"
    own.dvc("remote", "modify", "--local", "local", "url", str(store))
    values = own.params()
    values["deployment"] = {"storage": {"push": "end"}, "versioning": {"git_commit": True}}
    own.write_params(values)
    template = own.root / "dod_pipeline" / "report.html"
    template.write_text(template.read_text() + "\n")  # of the report alone
    own.commit("a deployment")
    (own.root / "mine.txt").write_text("not of a run")
    own.dod("run", "tiny")
    subject, *files = own.run("git", "log", "-1", "--name-only", "--format=%s").stdout.split("\n")
    with dagster_of(own) as instance:
        (run,) = instance.get_runs(dg.RunsFilter(tags={"dvc/kept": "dod run"}), limit=1)
        assert subject == f"Results of run {run.run_id}"
    assert "dvc.lock" in files
    assert {path.split("/")[0] for path in files if path} <= {"dvc.lock", "metrics", "facts", "curves", "history"}
    assert own.run("git", "status", "--porcelain").stdout == "?? mine.txt\n"
    md5 = own.outs()["report/tiny.html"]
    assert list(store.rglob(f"{md5[:2]}/{md5[2:]}"))
