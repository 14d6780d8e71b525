import inspect
import json
import subprocess
import sys

import pytest

from dod_models import artifact, cli
from dod_models.config import Frozen
from dod_models.images import SCHEMA

from . import tiny


def test_help_does_not_import_torch():
    code = (
        "import sys; from dod_models import cli\ntry: cli.main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"dod_models.{stage.module}.{stage.function}" in done.stdout for stage in cli.STAGES.values())


@pytest.mark.parametrize("name", cli.STAGES)
def test_every_stage_takes_the_paths_that_the_table_names(name):
    config, function = cli.STAGES[name].load()
    options = {n: p for n, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
    needed = {n for n, p in options.items() if p.default is p.empty}
    assert needed <= {*cli.STAGES[name].inputs, "out"} <= set(options)
    assert issubclass(config, Frozen)


def test_a_stage_writes_its_output_and_its_facts(tmp_path, capsys):
    root = tiny.write_images(tmp_path / "images", per_class=2)
    facts = tiny.stage("dataset", {"root": str(root)}, tmp_path / "dataset", tmp_path / "facts.json")
    assert facts == {"train": 6, "val": 6, "classes": 3, "quarantined": 0}
    artifact.verify(tmp_path / "dataset", schema=SCHEMA)
    assert json.loads(capsys.readouterr().out.removeprefix("dataset: ")) == facts
    assert cli.main(["dataset", "--config", json.dumps({"root": str(root)}), "--out", str(tmp_path / "again")]) == 0
    assert capsys.readouterr().out.endswith(f"dataset: wrote {tmp_path / 'again'}\n")
    assert tiny.digests(tmp_path / "again") == tiny.digests(tmp_path / "dataset")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"rot": "x"}', "dataset: the command line: rot: unknown key; remove it or correct its spelling\n"),
        ("{", "dataset: the command line: not JSON"),
        ("/nowhere.json", "No such file or directory: '/nowhere.json'\n"),
        ("{}", "dataset: dataset.root: missing"),
        ('{"root": "/nowhere"}', "dataset: /nowhere: no folder `train`"),
    ],
)
def test_an_expected_error_is_one_message_and_status_1(tmp_path, capsys, config, message):
    assert cli.main(["dataset", "--config", config, "--out", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("dataset: ")
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_a_bug_shows_its_traceback(tmp_path, monkeypatch):
    def broken(config, *, out):
        raise KeyError("bug")

    monkeypatch.setattr("dod_models.dataset.build_dataset", broken)
    with pytest.raises(KeyError, match="bug"):
        cli.main(["dataset", "--config", "{}", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("arguments", [[], ["datset"], ["dataset"], ["reference", "--config", "{}", "--out", "x"]])
def test_a_wrong_command_line_is_a_usage_error(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: python -m dod_models.cli" in capsys.readouterr().err


def test_the_module_runs_as_a_command(tmp_path):
    command = [sys.executable, "-m", "dod_models.cli", "dataset", "--config", "{}", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("dataset: dataset.root: missing")
