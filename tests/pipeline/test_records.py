"""What becomes of the rows of an evaluation: everything that a number depends on, and what it cost."""

from pathlib import Path
from typing import Any

import pytest

from dod_models import artifact
from dod_models.config import TOOK
from dod_pipeline import costs, stages
from dod_pipeline import records as made
from dod_pipeline.config import Params
from dod_pipeline.records import Record, Sampled

from . import project as tiny

EVALUATED = {"evaluations": 6.0, "gflops_paper": 0.5, "gflops_true": 0.75, "num_samples": 70}


@pytest.fixture
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    """The tiny project, its manifests written by hand."""
    monkeypatch.chdir(tmp_path)
    params = Params.parse(tiny.params(tmp_path), place="params.yaml")
    weights = {"files": {"ema-0.9.safetensors": {"sha256": "weights"}}, "about": {"seed": 5}}
    write("train/tiny/step-6", weights)
    write("codec/tiny", {})
    write("reference/tiny", {"about": {"extractor": {"name": "net", "digest": "e"}, "dataset": "the images"}})
    for number in (1, 2):
        job = stages.resolve(params, f"stage{number}", "tiny-6")
        about = {"stage": number, "sampling": job.config.model_dump(mode="json")}
        write(f"samples/tiny/tiny-6/stage{number}", {"about": about, "config": job.config.digest})
    for folder in ("train/tiny", "latents/tiny"):
        write(folder, {"config": f"settings of {folder}"})
    write("dataset/tiny", {"config": "settings of the data", "files": {"train.jsonl": {"sha256": "index"}}})
    return params


def write(folder: str, manifest: dict[str, Any]) -> None:
    artifact.write_json(Path(folder, artifact.MANIFEST), manifest)


def records(params: Params, stage: str, rows: dict[str, dict[str, Any]]) -> dict[Any, Record]:
    """The records of these rows, by stage."""
    job = stages.resolve(params, stage, "tiny-6")
    artifact.write_json(job.out, rows)
    return {record.stage: record for record in made.records(params, job)}


def took(params: Params, stage: str, seconds: float) -> None:
    costs.append(stages.resolve(params, stage, "tiny-6"), seconds=seconds, device="cpu", processes=1)


ROWS: dict[str, dict[str, Any]] = {
    "floor": {"fid": 0.5, "num_samples": 90},
    "codec": {"fid": 0.75, "num_samples": 90},
    "stage1": {"fid": 3.0, "fid_error": 0.1, **EVALUATED},
    "stage2": {"fid": 2.0, "fid_error": 0.1, **EVALUATED},
}


def test_a_row_of_metrics_says_everything_that_it_depends_on(params: Params):
    found = records(params, "metrics", ROWS)
    two, floor = found[2], found["floor"]
    assert two.metrics == {"fid": 2.0, "fid_error": 0.1}
    assert (two.num_samples, two.evaluations, two.gflops_paper, two.gflops_true) == (70, 6.0, 0.5, 0.75)
    assert (two.train_seed, two.seed, two.num_steps, two.guidance, two.weights) == (5, 0, 2, 2.0, "weights")
    assert two.extractor is not None and two.extractor.name == "net" and two.data == "the images"
    assert two.reference == artifact.sha256_file(Path("reference/tiny/manifest.json"))
    assert two.previous == found[1].config != two.config and found[1].previous is None
    assert (floor.train_seed, floor.seed, floor.weights, floor.num_samples) == (None, None, None, 90)
    assert found["codec"].weights == artifact.sha256_file(Path("codec/tiny/manifest.json"))


def test_a_number_names_every_file_on_the_way_from_the_images(params: Params):
    found = records(params, "metrics", ROWS)
    two = found[2].sources
    assert [*two] == [
        *("metrics", "stage2", "codec", "reference", "stage1", "weights2", "dataset", "weights1", "train"),
        *("train.jsonl", "latents"),
    ]
    assert {name: source.path for name, source in two.items()}["weights2"] == "train/tiny/step-6/ema-0.9.safetensors"
    assert all(
        two[name].sha256 == artifact.sha256_file(Path(two[name].path)) for name in two if "." not in two[name].path
    )
    assert two["weights1"].sha256 == "weights" and two["train.jsonl"].sha256 == "index"
    assert two["train"].config == "settings of train/tiny" and two["stage2"].config == found[2].config
    assert [*found["floor"].sources] == ["metrics", "reference", "dataset", "train.jsonl"]
    assert [*found["codec"].sources] == ["metrics", "codec", "reference", "dataset", "train.jsonl"]
    assert "stage2" not in found[1].sources


def test_what_a_clone_lacks_is_left_out(params: Params):
    for folder in ("train", "latents", "dataset"):
        Path(folder, "tiny", artifact.MANIFEST).unlink()
    assert [*records(params, "metrics", ROWS)[1].sources] == ["metrics", "stage1", "codec", "reference", "weights1"]


def test_seconds_are_those_of_the_newest_run_under_these_settings_and_of_all_stages_up_to_it(params: Params):
    took(params, "stage1", 90.0)
    took(params, "stage1", 10.0)
    assert records(params, "metrics", ROWS)[2].seconds is None  # stage 2's are not known
    took(params, "stage2", 25.0)
    found = records(params, "metrics", ROWS)
    assert (found[1].seconds, found[2].seconds, found["floor"].seconds) == (10.0, 35.0, None)
    assert (found[1].images_per_second, found[2].images_per_second, found[1].device) == (7.0, 2.0, "cpu")


def test_a_reconstruction_and_a_probe_are_compared_with_the_images_themselves(
    params: Params, monkeypatch: pytest.MonkeyPatch
):
    took(params, "stage1", 1.0)
    took(params, "stage2", 1.0)
    sampling = stages.resolve(params, "stage2", "tiny-6").config.model_dump(mode="json")
    drawn = Sampled(2, sampling, "config", "of stage 1")
    monkeypatch.setattr(made, "samplings", lambda job: {"third": drawn, "reconstruction guidance=2": drawn})
    rows = {
        "third": {"kind": "stage2", "guidance": 2.0, "fid": 2.0, **EVALUATED},
        "reconstruction guidance=2": {
            "kind": "reconstruction",
            "guidance": 2.0,
            "rfid": 0.5,
            "psnr": 20.0,
            **EVALUATED,
        },
        "probe": {"kind": "probe", "top1": 0.875, "num_train": 900, "num_test": 90},
    }
    artifact.write_json(Path(".state/sweeps/tiny-6") / TOOK, {"third": 6.0, "reconstruction guidance=2": 3.5})
    assert records(params, "sweeps", rows)[2].seconds is None  # on what it took so long isn't known
    took(params, "sweeps", 50.0)
    found = records(params, "sweeps", rows)
    swept, rebuilt, probe = (found[stage] for stage in (2, "reconstruction", "probe"))
    assert rebuilt.metrics == {"rfid": 0.5, "psnr": 20.0} and rebuilt.guidance == 2.0 and rebuilt.gflops_true == 0.75
    assert rebuilt.reference == "the images" != swept.reference
    assert (swept.previous, rebuilt.previous, rebuilt.sampler) == ("of stage 1", None, swept.sampler)
    assert (swept.seconds, rebuilt.seconds, probe.seconds) == (7.0, 3.5, None)  # with stage 1's; nothing before it
    assert (swept.images_per_second, swept.device) == (10.0, "cpu")
    assert probe.metrics == {"top1": 0.875}
    assert (probe.num_samples, probe.num_train, probe.extractor, probe.weights) == (90, 900, None, "weights")
    assert (probe.reference, probe.seed, probe.train_seed) == ("the images", None, 5)
