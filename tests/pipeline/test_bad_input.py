"""Bad input ends in going on or in a clear error, and nothing that was there before is lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dod_models import artifact
from dod_pipeline import cli

from . import project as tiny
from .project import Project

Enter = Callable[[Project], None]
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def spoilt(own: Project, images: Path, inside: Enter) -> Path:
    """The current folder is a built project; returns its own copy of the images, which params.yaml now names."""
    root = own.root.parent / "images"
    shutil.copytree(images, root)
    own.write_params(tiny.params(root))
    inside(own)
    return root


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def test_a_truncated_image_is_quarantined_with_its_reason_and_the_run_goes_on(spoilt: Path):
    truncate(spoilt / "train" / "pole" / "003.png")
    (spoilt / "val" / "bar" / "000.png").write_text("<html>not found</html>")
    assert cli.main(["stage", "dataset", "tiny"]) == 0
    found = artifact.read_json(Path("dataset", "tiny", "quarantine.json"))
    assert set(found) == {"train/pole/003.png", "val/bar/000.png"}
    assert "truncated" in found["train/pole/003.png"]
    assert "cannot identify image file" in found["val/bar/000.png"]
    rows = [json.loads(line) for line in Path("dataset", "tiny", "train.jsonl").read_text().splitlines()]
    assert len(rows) == 89 and "train/pole/003.png" not in {row["path"] for row in rows}
    facts = artifact.read_json(Path("facts", "dataset", "tiny.json"))
    assert facts == {"train": 89, "val": 89, "classes": 3, "quarantined": 2}
    assert cli.main(["stage", "reference", "tiny"]) == 0


def test_too_many_unreadable_images_are_an_error_that_loses_nothing(spoilt: Path, capsys: Captured):
    for index in range(5):  # 5 of 90 are more than 5 %
        truncate(spoilt / "train" / "pole" / f"{index:03d}.png")
    before = {p: p.read_bytes() for p in Path("dataset", "tiny").iterdir()}
    assert cli.main(["stage", "dataset", "tiny"]) == 1
    message = capsys.readouterr().err
    assert f"{spoilt}/train: 5 of 90 images can't be read, dataset.max_quarantined allows 5.00%" in message
    assert "first: train/pole/000.png: " in message and "truncated" in message
    assert {p: p.read_bytes() for p in Path("dataset", "tiny").iterdir()} == before


def test_an_empty_class_folder_is_an_error_and_dvc_still_has_the_earlier_outputs(spoilt: Path, own: Project):
    for path in (spoilt / "val" / "spot").iterdir():
        path.unlink()
    before = own.outs()["dataset/tiny"]
    done = own.dod("run", "tiny", status=1)
    assert (
        f"dataset: {spoilt}/val/spot: no images; remove the class from every split or add images to it" in done.stderr
    )
    assert "dod: dataset@tiny failed (dvc: 255)" in done.stderr
    own.run("git", "checkout", "--", ".")
    own.dvc("checkout")
    own.dvc("status", "-q")
    assert own.outs()["dataset/tiny"] == before
    assert sorted(p.name for p in Path("dataset", "tiny").iterdir() if p.suffix != ".partial") == [
        *("classes.json", "manifest.json", "quarantine.json", "train.jsonl", "val.jsonl")
    ]


@pytest.mark.parametrize("gone", ["", "train", "train/bar"])
def test_a_missing_folder_of_images_is_named(spoilt: Path, capsys: Captured, gone: str):
    shutil.rmtree(spoilt / gone)
    assert cli.main(["stage", "dataset", "tiny"]) == 1
    assert str(spoilt) in capsys.readouterr().err


def test_an_image_that_changed_after_it_was_indexed_is_named(spoilt: Path, capsys: Captured):
    assert cli.main(["stage", "dataset", "tiny"]) == 0
    shutil.copy(spoilt / "train" / "bar" / "001.png", spoilt / "train" / "bar" / "000.png")
    assert cli.main(["stage", "latents", "tiny"]) == 1
    message = "train/bar/000.png: changed since it was indexed; index it again: `dvc repro --force dataset@KEY`"
    assert message in capsys.readouterr().err


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # a link into DVC's cache must not be written through
    path.write_bytes(bytes(data))


DAMAGE = {
    "stage1": "train/tiny/step-6/ema-0.9.safetensors",
    "stage2": "samples/tiny/tiny-6/stage1/samples.safetensors",
    "metrics": "reference/tiny/extractor.safetensors",
    "latents": "codec/tiny/vae/diffusion_pytorch_model.safetensors",
    "train": "latents/tiny/shard-00001.npy",
    "reference": "dataset/tiny/train.jsonl",
}


@pytest.mark.parametrize("stage, path", [pytest.param(*item, id=item[0]) for item in DAMAGE.items()])
def test_a_stage_refuses_a_damaged_input_and_names_the_file(
    own: Project, inside: Enter, capsys: Captured, stage: str, path: str
):
    inside(own)
    flip(Path(path))
    before = own.files()
    assert cli.main(["stage", stage, "tiny-6" if stage in ("stage1", "stage2", "metrics") else "tiny"]) == 1
    message = capsys.readouterr().err
    assert f"{stage}: {path}: sha256 is" in message and "restore it with `dvc checkout --force`" in message
    assert {p: s for p, s in own.files().items() if not p.endswith(".partial")} == {
        p: s for p, s in before.items() if not p.endswith(".partial")
    }


def test_dvc_restores_a_damaged_checkpoint(own: Project):
    path = own.root / DAMAGE["stage1"]
    digest = artifact.sha256_file(path)
    flip(path)
    own.dvc("checkout", "--force", "train@tiny")
    assert artifact.sha256_file(path) == digest


def test_a_stage_without_its_inputs_says_what_to_run(own: Project, inside: Enter, capsys: Captured):
    inside(own)
    shutil.rmtree("codec")
    assert cli.main(["stage", "stage1", "tiny-6"]) == 1
    message = (
        "stage1: codec/tiny: no manifest.json, so this is not a finished output; run its stage again or `dvc pull`"
    )
    assert message in capsys.readouterr().err


def test_fewer_samples_than_features_are_refused(own: Project, inside: Enter, capsys: Captured):
    values = tiny.params(own.root.parent / "images")
    values["experiments"]["tiny"]["evaluation"]["num_samples"] = 64
    own.write_params(values)
    inside(own)
    assert cli.main(["stage", "metrics", "tiny-6"]) == 1
    assert "64 images for 64 features" in capsys.readouterr().err


@pytest.mark.timeout(600)
def test_two_processes_train_as_one_does(own: Project):
    def losses() -> list[float]:
        return [json.loads(line)["loss"] for line in (own.root / "train/tiny/curve.jsonl").read_text().splitlines()]

    alone = losses()
    own.run("dod", "stage", "train", "tiny", DOD_PROCESSES="2", ACCELERATE_USE_CPU="true")
    assert losses() == pytest.approx(alone, rel=1e-5) and len(alone) == 6
    artifact.verify(own.root / "train" / "tiny" / "step-6", schema="checkpoint/1")
