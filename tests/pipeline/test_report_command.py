"""When a report can be made, when it is out of date, and what is said where it can't."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dod_models import artifact
from dod_pipeline import cli, stages
from dod_pipeline.config import load_params

from .project import Project
from .test_report import PAGE, change

Enter = Callable[[Project], None]
Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    "missing, message",
    [
        (
            "metrics/tiny/tiny-6.json",
            "dod: metrics/tiny: no checkpoint of tiny has been evaluated; `dod run tiny` does",
        ),
        ("train/tiny/manifest.json", "dod: train/tiny/manifest.json: missing; `dod run tiny` makes it, `dvc pull` f"),
        ("samples/tiny/tiny-6/sweep.png", "dod: samples/tiny/tiny-6/sweep.png: missing; `dod run tiny`"),
    ],
)
def test_what_is_missing_is_named_with_the_command_that_makes_it(
    own: Project, inside: Enter, capsys: Captured, missing: str, message: str
):
    inside(own)
    before = PAGE.read_bytes()
    Path(missing).unlink()
    for command in (["report", "tiny"], ["stage", "report", "tiny"]):
        assert cli.main(command) == 1
        assert capsys.readouterr().err.startswith(message)
    assert PAGE.read_bytes() == before


def test_an_experiment_without_checkpoints_has_no_report(own: Project, inside: Enter, capsys: Captured):
    inside(own)
    change(own, lambda values: values.update(checkpoints={}, sweeps={}))
    assert ("report", "tiny") not in stages.instances(load_params(), "tiny", until="report")
    assert cli.main(["report", "tiny"]) == 1
    assert "params.yaml: no checkpoint of tiny to report; add one, then `dod run tiny`" in capsys.readouterr().err


def test_dod_report_fetches_or_makes_the_page_and_nothing_else(own: Project):
    page = (own.root / PAGE).read_bytes()
    own.run("rm", "-r", "report")
    assert own.dod("report", "tiny").stdout.endswith("report: report/tiny.html\n")
    assert (own.root / PAGE).read_bytes() == page  # DVC had kept it
    path = own.root / "metrics" / "tiny" / "tiny-6.json"
    scores = artifact.read_json(path)
    scores["stage2"]["fid"] = 123.456
    artifact.write_json(path, scores)
    before = own.outs()
    printed = own.dod("report", "tiny").stdout
    assert re.findall("Running stage '(.*)'", printed) == ["report@tiny"]
    assert "123.456" in (own.root / PAGE).read_text()
    assert {path for path, md5 in own.outs().items() if before[path] != md5} == {"report/tiny.html"}


def test_a_further_evaluation_makes_the_report_out_of_date(own: Project):
    scores = artifact.read_json(own.root / "metrics" / "tiny" / "tiny-6.json")
    artifact.write_json(own.root / "metrics" / "tiny" / "tiny-4.json", scores)
    assert "report@tiny" in json.loads(own.dvc("status", "--json", "report@tiny").stdout)


def test_run_names_the_page(built: Project):
    assert (built.root.parent / "log.txt").read_text().count("\nreport: report/tiny.html\n") == 1
