"""What a user of DVC expects to work, works."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from dod_models import artifact

from . import project as tiny
from .project import SOURCE, Project

DATA = ("dataset", "reference", "codec", "latents", "train", "samples")


def digests(root: Path) -> dict[str, str]:
    """sha256 of all data that DVC keeps, without what it ignores."""
    files = [p for name in DATA for p in (root / name).rglob("*") if p.is_file() and p.suffix != ".partial"]
    return {p.relative_to(root).as_posix(): artifact.sha256_file(p) for p in files}


def test_after_a_run_repro_has_nothing_to_do(shared: Project):
    shared.dvc("status", "-q")
    before = shared.files()
    assert shared.dvc("repro").stdout.rstrip().endswith("Data and pipelines are up to date.")
    assert shared.files() == before
    assert shared.run("git", "status", "--porcelain").stdout == ""  # what DVC keeps is ignored by git


def test_metrics_show_has_the_scores(shared: Project):
    found = json.loads(shared.dvc("metrics", "show", "--json").stdout)[""]["data"]
    scores = json.loads((shared.root / "metrics" / "tiny" / "tiny-6.json").read_text())
    assert found["metrics/tiny/tiny-6.json"]["data"] == scores
    assert {"facts/train/tiny.json", "facts/codec/tiny.json", "metrics/tiny/tiny-6.sweep.json"} <= set(found)


def test_plots_show_has_the_training_curve(shared: Project, tmp_path: Path):
    shared.dvc("plots", "show", "--out", str(tmp_path / "plots"))
    page = (tmp_path / "plots" / "index.html").read_text()
    assert "Training loss" in page
    for row in json.loads((shared.root / "curves" / "tiny.json").read_text()):
        assert f'"loss": {json.dumps(row["loss"])}' in page


def test_dag_shows_the_lineage(shared: Project):
    edges = set(shared.dvc("dag", "--dot").stdout.splitlines())
    for before, after in (("latents@tiny", "train@tiny"), ("stage1@tiny-6", "stage2@tiny-6")):
        assert f'"{before}" -> "{after}";' in edges
    assert "flowchart TD" in shared.dvc("dag", "--md").stdout


def test_a_clone_pulls_equal_files_and_is_up_to_date(built: Project, tmp_path: Path):
    clone = built.clone(tmp_path / "clone")
    clone.dvc("remote", "modify", "--local", "local", "url", str(built.root.parent / "dod-dvc-remote"))
    clone.dvc("pull")
    assert digests(clone.root) == digests(built.root) != {}
    clone.dvc("status", "-q")
    for folder, schema in (("train/tiny", "train/2"), ("train/tiny/step-6", "checkpoint/1"), ("codec/tiny", "codec/1")):
        artifact.verify(clone.root / folder, schema=schema)  # a manifest names what DVC keeps, and nothing else


def test_a_damaged_remote_is_noticed(built: Project, tmp_path: Path):
    remote = tmp_path / "remote"
    subprocess.run(["cp", "-r", str(built.root.parent / "dod-dvc-remote"), str(remote)], check=True)
    clone = built.clone(tmp_path / "clone")
    clone.dvc("remote", "modify", "--local", "local", "url", str(remote))
    stated = artifact.read_json(built.root / "codec" / "tiny" / "manifest.json")["files"]
    weights = "vae/diffusion_pytorch_model.safetensors"
    path = next(p for p in remote.rglob("*") if p.is_file() and artifact.sha256_file(p) == stated[weights]["sha256"])
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    clone.dvc("pull", "codec@tiny", status=1)
    assert not (clone.root / "codec" / "tiny" / weights).exists()


@pytest.mark.timeout(600)
def test_an_experiment_reruns_only_what_its_change_reaches(own: Project):
    before = own.outs()
    printed = own.dvc("exp", "run", "-S", "experiments.tiny.stage2.guidance=3", "metrics@tiny-6").stdout
    ran = [line.split("'")[1] for line in printed.splitlines() if line.startswith("Running stage")]
    assert ran == ["stage2@tiny-6", "metrics@tiny-6"]
    changed = {path for path, md5 in own.outs().items() if before[path] != md5}
    assert changed == {"samples/tiny/tiny-6/stage2", "metrics/tiny/tiny-6.json"}
    diff = json.loads(own.dvc("params", "diff", "--json").stdout)
    assert diff == {"params.yaml": {"experiments.tiny.stage2.guidance": {"old": 2.0, "new": 3, "diff": 1.0}}}
    scores = json.loads((own.root / "metrics" / "tiny" / "tiny-6.json").read_text())
    shown = json.loads(own.dvc("exp", "show", "--json").stdout)
    assert scores["stage2"]["fid"] == shown[0]["data"]["metrics"]["metrics/tiny/tiny-6.json"]["data"]["stage2"]["fid"]


OVERRIDE = """
import json, sys
from pathlib import Path
from dvc.utils.hydra import apply_overrides
path, original = Path("params.yaml"), Path("params.yaml").read_text()
for place in json.load(sys.stdin):
    path.write_text(original)
    apply_overrides(path, [f"{place}=7"])
    Path(place).write_text(path.read_text())
"""


def test_every_setting_of_the_repository_s_params_can_be_overridden_alone(tmp_path: Path):
    """What YAML's aliases and merge keys share, `dvc exp run -S` does not change, or changes in several places."""
    text = (SOURCE / "params.yaml").read_text()
    original = yaml.safe_load(text)
    (tmp_path / "params.yaml").write_text(text)
    places = [
        f"experiments.{name}.{part}.{setting}"
        for name, experiment in original["experiments"].items()
        for part in ("train", "sampling", "stage1", "stage2")
        for setting, value in experiment[part].items()
        if not isinstance(value, dict | list)
    ]
    python = tiny.BIN.parent.parent / ".venv-dvc" / "bin" / "python"
    subprocess.run([python, "-c", OVERRIDE], cwd=tmp_path, input=json.dumps(places), text=True, check=True)
    for place in places:
        inner = expected = json.loads(json.dumps(original))  # JSON has no aliases
        for name in place.split(".")[:-1]:
            inner = inner[name]
        inner[place.split(".")[-1]] = 7
        assert yaml.safe_load((tmp_path / place).read_text()) == expected, place
