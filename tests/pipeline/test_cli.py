"""The command `dod`: quick help, and errors of one message that name place, value and remedy."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dod_pipeline import cli, dvc_repo, tables

from . import project as tiny
from .project import SOURCE, Project

HEAVY = {
    "torch",
    "matplotlib",
    "numpy",
    "diffusers",
    "accelerate",
    "pandas",
    "duckdb",
    "pydantic",
    "yaml",
    "rich",
    "dagster",
    "PIL",
}
Enter = Callable[[Project], None]
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def bare(tmp_path: Path, inside: Enter) -> Project:
    """The current folder, with the tiny project's params.yaml and nothing else."""
    project = Project(tmp_path)
    project.write_params(tiny.params(tmp_path / "images"))
    inside(project)
    return project


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["generate", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]):
    program = f"""
import json, sys
from dod_pipeline import cli
try:
    cli.main({arguments!r})
except SystemExit as end:
    assert end.code == 0
print(json.dumps(sorted(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "usage: dod" in done.stdout
    assert not HEAVY & set(json.loads(done.stdout.splitlines()[-1]))


def test_help_names_every_command():
    done = subprocess.run([str(tiny.BIN / "dod"), "--help"], capture_output=True, text=True, check=True)
    known = {line.split()[0] for line in done.stdout.splitlines() if re.match(r" {4}\w", line)}
    judging = {"history", "compare", "gate", "calibrate"}
    assert known >= {"run", "stage", "report", "status", "models", "generate", "accept"} | judging


def test_listing_commands_do_without_torch(bare: Project):
    program = "import sys; from dod_pipeline import cli; cli.main(['history']); assert 'torch' not in sys.modules"
    bare.run(sys.executable, "-c", program)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "tony"], "dod: experiment 'tony' is not in params.yaml; it has tiny"),
        (["run", "tiny", "tony"], "dod: experiment 'tony' is not in params.yaml; it has tiny"),
        (["run", "tiny", "--until", "metric"], "dod: --until 'metric' is unknown; choose one of dataset, "),
        (["stage", "trian", "tiny"], "dod: stage 'trian' is unknown; choose one of dataset, "),
        (["stage", "train", "a; rm"], "dod: train: key 'a; rm' is not in params.yaml; it has tiny"),
        (["generate", "tiny-7", "--class", "0"], "dod: stage1: key 'tiny-7' is not in params.yaml; it has tiny-6"),
        (["gate", "tiny-7", "tiny-6"], "dod: metrics: key 'tiny-7' is not in params.yaml; it has tiny-6"),
        (["calibrate", "tiny-6"], "dod: 1 checkpoints: give at least 3, of different training seeds"),
        (["compare", "tiny-6", "tiny-6"], "dod: 'tiny-6' is neither a record's id nor a checkpoint with a record"),
        (["report", "tony"], "dod: report: key 'tony' is not in params.yaml; it has tiny"),
        (["history", "--plot", "fid.jpg"], "dod: --plot fid.jpg: the picture is a PNG; name it FILE.png"),
        (["history", "--plot", "fid.png"], "dod: no such record; `dod history` lists what there is"),
        (["history", "--metric", "fdi"], None),
    ],
)
def test_an_error_is_one_line(bare: Project, capsys: Captured, arguments: list[str], message: str | None):
    status = cli.main(arguments)
    out, err = capsys.readouterr()
    if message is None:  # no history at all
        assert status == 0 and out == "no such record; `dod run EXPERIMENT` makes some\n"
        return
    assert status == 1
    assert err.startswith(message) and err.count("\n") == 1


@pytest.mark.parametrize("place", ["train", "stage2"])
def test_a_misspelt_setting_is_found_by_run_before_any_stage(own: Project, inside: Enter, capsys: Captured, place: str):
    values = tiny.params(own.root.parent / "other images")  # so that all stages are due, the first one too
    values["experiments"]["tiny"][place]["sede"] = 1
    own.write_params(values)
    before = own.files()
    inside(own)
    assert cli.main(["run", "tiny"]) == 1
    assert "sede: unknown key; remove it or correct its spelling" in capsys.readouterr().err
    assert own.files() == before


def test_without_params_the_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured):
    monkeypatch.chdir(tmp_path)
    for command in (["run", "tiny"], ["stage", "train", "tiny"], ["status"], ["generate", "x", "--class", "1"]):
        assert cli.main(command) == 1
        assert f"dod: {tmp_path}/params.yaml: not found; run dod in the folder" in capsys.readouterr().err


@pytest.mark.parametrize("processes", ["0", "two", "-1", ""])
def test_a_senseless_number_of_processes_is_refused(
    own: Project, inside: Enter, monkeypatch: pytest.MonkeyPatch, capsys: Captured, processes: str
):
    inside(own)
    monkeypatch.setenv("DOD_PROCESSES", processes)
    assert cli.main(["stage", "train", "tiny"]) == 1
    assert f"DOD_PROCESSES={processes!r}: must be a number of processes, 1 or more" in capsys.readouterr().err


def test_models_as_json(capsys: Captured):
    assert cli.main(["models", "--json"]) == 0
    found = {model["name"]: model for model in json.loads(capsys.readouterr().out)}
    assert {"DoD-S", "DoD-B", "DoD-XL"} <= set(found)
    for model in found.values():
        assert set(model) == {"name", "params", "gflops", "stated"}
        assert set(model["params"]) == {"backbone", "lem", "total"}
        assert model["params"]["total"] == model["params"]["backbone"] + model["params"]["lem"]
        assert set(model["gflops"]) == {"paper", "true"}
        for counts in model["gflops"].values():
            assert set(counts) == {"stage1", "stage2", "lem"} and min(counts.values()) > 0
    assert found["DoD-XL"]["gflops"]["paper"]["stage1"] > found["DoD-B"]["gflops"]["paper"]["stage1"]
    assert found["DoD-XL"]["stated"]["params"] == {"backbone": 527, "lem": 86, "total": 613}


def test_models_stand_beside_the_paper_s(capsys: Captured):
    """The model, what is counted, the paper's value, ours, the difference, true FLOPs."""
    params, counts = {"total": 190_670_000}, {"stage1": 21.814, "stage2": 26.471, "lem": 24.647}
    stated = {"params": {"total": 191}, "gflops": {"stage1": 26.5, "stage2": 26.5}}
    gflops = {"paper": counts, "true": {name: 2 * count for name, count in counts.items()}}
    tables.models([{"name": "B", "params": params, "gflops": gflops, "stated": stated}])
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [cells for cells in lines if cells] == [
        ["B", "parameters, total (M)", "191", "190.67", "-0.33", "-"],
        ["B", "GFLOPs, step of stage 1", "26.5", "21.81", "-4.69", "43.63"],
        ["B", "GFLOPs, step of stage 2", "26.5", "26.47", "-0.03", "52.94"],
        ["B", "GFLOPs, LEM, once per stage", "-", "24.65", "-", "49.29"],
    ]


@pytest.fixture
def launcher(tmp_path: Path) -> Path:
    """The launcher where `make setup` puts it, but without .venv-dvc."""
    path = tmp_path / "clone" / ".venv" / "bin" / "dvc"
    path.parent.mkdir(parents=True)
    shutil.copy(SOURCE / "infra" / "dvc-launcher.sh", path)
    path.chmod(0o755)
    return path


def test_a_missing_dvc_environment_names_make_setup(launcher: Path, tmp_path: Path):
    link = tmp_path / "dvc"
    link.symlink_to(launcher)
    for path in (launcher, link):
        done = subprocess.run([path, "status", "-q"], capture_output=True, text=True)
        clone = launcher.parents[2]
        assert done.returncode == 127  # 1 would mean that something has changed
        assert done.stderr == f"dvc: {clone}/.venv-dvc/bin/dvc is missing; run `make setup` in {clone}\n"


def test_the_launcher_hands_on_arguments_and_puts_the_project_s_commands_first(launcher: Path):
    dvc = launcher.parents[2] / ".venv-dvc" / "bin" / "dvc"
    dvc.parent.mkdir(parents=True)
    dvc.write_text('#!/bin/sh\nprintf "%s|" "$@"; echo "$PATH" "$DVC_NO_ANALYTICS"; exit 3\n')
    dvc.chmod(0o755)
    done = subprocess.run([launcher, "repro", "a b", "c;d"], capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stdout.startswith(f"repro|a b|c;d|{launcher.parent}:") and done.stdout.endswith(" 1\n")


def test_dod_says_make_setup_where_dvc_is_missing(
    bare: Project, launcher: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
):
    monkeypatch.setattr(dvc_repo, "executable", lambda: str(launcher))
    shutil.copy(tiny.SOURCE / "dvc.yaml", bare.root)
    for command in (["run", "tiny"], ["status"]):
        assert cli.main(command) == 1
        assert "run `make setup` in" in capsys.readouterr().err


def test_dod_says_make_setup_where_there_is_no_launcher(
    bare: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["status"]) == 1
    assert capsys.readouterr().err == f"dod: {tmp_path}/bin/dvc: no dvc there, nor on PATH; run `make setup`\n"


def test_accept_refuses_an_unknown_stage(own: Project, inside: Enter, capsys: Captured):
    inside(own)
    before = (own.root / "dvc.lock").read_bytes()
    assert cli.main(["accept", "train@tony"]) == 1
    assert "Nothing was recorded" in capsys.readouterr().err
    assert (own.root / "dvc.lock").read_bytes() == before
