"""`dod doctor` on this machine: what is there, what is missing, and that one check's failure stops no other."""

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dod_pipeline import cli, doctor, finding, tables
from dod_pipeline.doctor import Installation
from dod_pipeline.finding import Finding, Step, Trouble, examine
from dod_pipeline.storage import POSTGRES

from . import project as tiny
from .project import SOURCE, Project

Captured = pytest.CaptureFixture[str]
Enter = Callable[[Project], None]
CANARY = "canary-9f1c7e52d0b84a6f"
STORAGE = "s3://bucket/prefix"


@pytest.fixture
def fresh(tmp_path: Path, inside: Enter, monkeypatch: pytest.MonkeyPatch) -> Project:
    """The current folder: the tiny project, of which nothing was made."""
    monkeypatch.delenv(POSTGRES, raising=False)
    project = tiny.create(tmp_path / "project", tiny.params(tmp_path))
    inside(project)
    return project


def look(capsys: Captured, status: int) -> dict[str, dict[str, str]]:
    """What the command says, by name."""
    assert cli.main(["doctor", "--json"]) == status
    found: list[dict[str, str]] = json.loads(capsys.readouterr().out)
    return {one.pop("name"): one for one in found}


def test_a_fresh_project_is_well(fresh: Project, capsys: Captured):
    found = look(capsys, 0)
    assert list(found) == [
        *("Python", "DVC", "DVC's remote", "git", "Dagster", "PostgreSQL", "settings", "disk", "GPUs", "S3")
    ]
    assert {one["state"] for one in found.values()} <= {"ok", "warn", "skipped"}
    assert found["git"]["found"].endswith("code and settings are its own")
    assert found["settings"]["found"] == "params.yaml: 1 experiments, 10 stages"
    assert found["Dagster"]["found"] == f"DAGSTER_HOME={fresh.root / 'dagster_home'}"
    assert found["DVC's remote"]["found"].startswith("local, ")
    assert found["S3"]["found"] == "nothing in params.yaml names s3://"


def test_what_is_wrong_is_named_with_its_remedy_and_stops_nothing(
    fresh: Project, monkeypatch: pytest.MonkeyPatch, capsys: Captured
):
    values = fresh.params()
    values["experiments"]["tiny"]["stage2"]["guidence"] = 2
    fresh.write_params(values)
    fresh.dvc("remote", "modify", "--unset", "local", "verify")
    monkeypatch.setenv("DAGSTER_HOME", str(fresh.root / "gone"))
    found = look(capsys, 1)
    assert {name for name, one in found.items() if one["state"] == "fail"} == {"settings", "Dagster", "DVC's remote"}
    assert "guidence" in found["settings"]["found"] and "stage2 of tiny-6" in found["settings"]["found"]
    assert "there is no such folder" in found["Dagster"]["found"]
    assert found["DVC's remote"]["remedy"] == "`dvc remote modify local verify true`"
    assert (found["git"]["state"], found["git"]["remedy"]) == ("warn", "commit them")


def test_settings_that_do_not_load_leave_the_rest_to_be_checked(fresh: Project, capsys: Captured):
    Path("params.yaml").write_text("datasets: [")
    found = look(capsys, 1)
    assert found["settings"]["state"] == "fail" and "not YAML" in found["settings"]["found"]
    assert found["S3"] == {"state": "skipped", "found": "only with a params.yaml that loads", "remedy": ""}
    assert found["DVC"]["state"] != "fail" and found["GPUs"]["state"] != "fail"


def test_the_table_has_a_line_for_each_check_and_the_remedy_under_it(
    fresh: Project, monkeypatch: pytest.MonkeyPatch, capsys: Captured
):
    (fresh.root / "dvc.yaml").write_text("stages: {}\n")
    assert cli.main(["doctor"]) == 0
    lines = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines() if "│" in line
    ]
    at = next(index for index, cells in enumerate(lines) if cells[1] == "git")
    assert lines[at][0] == "warn" and lines[at + 1] == ["", "", "commit them"]


def test_markup_in_what_is_found_is_shown_as_it_is(capsys: Captured):
    tables.findings([("a[b]", Finding("fail", "[red]x[/red]", "[type=missing]"))])
    out = capsys.readouterr().out
    assert all(text in out for text in ("a[b]", "[red]x[/red]", "[type=missing]"))


# ---- how checks are carried out


def test_an_error_or_a_hang_of_one_check_leaves_the_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(finding, "LIMIT", 0.2)
    over = threading.Event()

    def broken() -> Finding:
        raise KeyError("gone")

    def refused() -> Finding:
        raise Trouble("no", "ask", state="skipped")

    def hangs() -> Finding:
        over.wait()
        return Finding("ok", "")

    def well() -> Finding:
        return Finding("ok", "well")

    found = dict(
        examine(
            [
                Step("broken", broken, (Step("behind", well),)),
                *map(Step, ("refused", "hangs", "well"), (refused, hangs, well)),
            ]
        )
    )
    over.set()
    assert found["broken"] == Finding("fail", "'gone'")
    assert found["behind"] == Finding("skipped", "only after 'broken'")
    assert found["refused"] == Finding("skipped", "no", "ask")
    assert found["hangs"].state == "fail" and found["hangs"].found == "no end after 0.2 s"
    assert found["well"] == Finding("ok", "well")


def test_neither_secrets_nor_what_steers_a_terminal_are_shown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_TOKEN", f" {CANARY}\n")
    monkeypatch.setenv("OTHER_PASSWORD", "yes")
    text = f"yes:\x1b[2J {CANARY} at https://user:{CANARY}x@host/a@b\nhttp://host"
    assert finding.shown(text) == "yes: [2J *** at https://host/a@b http://host"


# ---- environments


def test_this_environment_is_what_was_locked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(SOURCE)
    here = Installation(None)
    assert re.fullmatch(r"Python 3\.\d+\.\d+, \d{3} packages as in requirements/project.txt", here.python().found)
    assert re.fullmatch(r"\S+/dvc, \d+ packages as in requirements/dvc.txt", here.dvc().found)


def test_packages_that_are_missing_or_of_another_version_are_named(tmp_path: Path):
    place = tmp_path / "site-packages"
    for name, version in (("Some.Thing", "1.0"), ("other", "2.0")):
        (place / f"{name}-{version}.dist-info").mkdir(parents=True)
        (place / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    locked = tmp_path / "locked.txt"
    locked.write_text(
        "# made by uv\n"
        "some-thing==1.0 \\\n    --hash=sha256:aa\n    # via x\n"
        "other==2.1 ; python_version >= '3' \\\n    --hash=sha256:bb\n"
        "absent==3.0\n"
        "elsewhere==4.0 ; sys_platform == 'win32' \\\n    --hash=sha256:cc\n"
    )
    found = doctor.packages("here", place, locked)
    assert found.state == "fail" and found.remedy == "run `make setup`"
    assert "other==2.1" in found.found and "(here: 2.0)" in found.found
    assert "absent==3.0 (here: none)" in found.found
    assert "some-thing" not in found.found and "elsewhere" not in found.found
    locked.write_text("some-thing==1.0\nother==2.0\n")
    assert doctor.packages("here", place, locked) == Finding("ok", f"here, 2 packages as in {locked}")


def test_a_missing_environment_of_dvc_is_a_finding(fresh: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    launcher = tmp_path / "x" / ".venv" / "bin" / "dvc"
    launcher.parent.mkdir(parents=True)
    launcher.write_bytes((SOURCE / "infra" / "dvc-launcher.sh").read_bytes())
    launcher.chmod(0o755)
    monkeypatch.setattr("dod_pipeline.dvc_repo.executable", lambda: str(launcher))
    found = dict(examine([Step("DVC", (here := Installation(None)).dvc, (Step("DVC's remote", here.remote),))]))
    assert found["DVC"].state == "fail" and "is missing; run `make setup`" in found["DVC"].found
    assert found["DVC's remote"].state == "skipped"


def test_without_git_records_would_name_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert Installation(None).git().state == "warn"
    assert "name no commit" in Installation(None).git().found


@pytest.mark.parametrize(
    ("storage", "url", "verify", "state", "said"),
    [
        (STORAGE, f"{STORAGE}/dvc", "true", "ok", "what is pulled is checked"),
        (f"{STORAGE}/", STORAGE, "true", "ok", "what is pulled is checked"),
        (STORAGE, f"{STORAGE}-other/dvc", "true", "warn", "not below deployment.storage.url"),
        (STORAGE, f"{STORAGE}/dvc", "false", "fail", "what is pulled from it isn't checked"),
        (None, "s3://elsewhere", "true", "ok", "what is pulled is checked"),
    ],
)
def test_dvc_s_remote_lies_in_the_storage_and_checks(
    fresh: Project, storage: str | None, url: str, verify: str, state: str, said: str
):
    fresh.dvc("remote", "add", "--default", "Team", url)
    fresh.dvc("remote", "modify", "team", "verify", verify)
    fresh.dvc("remote", "modify", "--local", "team", "secret_access_key", CANARY)
    here = Installation(storage)
    assert here.dvc().state != "fail"
    found = here.remote()
    assert found.state == state and said in found.found and CANARY not in str(found)


def test_without_a_remote_nothing_can_be_pushed(fresh: Project):
    fresh.dvc("remote", "default", "--unset")
    here = Installation(STORAGE)
    here.dvc()
    assert here.remote().remedy == f"`dvc remote add --default team {STORAGE}/dvc`"
