"""Checks of what everything is built on, the data set and its latents, and of what the gate said of a checkpoint."""

import json
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pytest

from dod_pipeline import checks, cli, gate, trials
from dod_pipeline.config import load_params
from dod_pipeline.definitions import define

from .project import Project
from .test_checks import failed
from .test_kill import Enter

IMAGES, VIEWS, SHAPE = 1500, 2, (4, 2, 2)


def write_dataset(folder: Path, labels: list[int], *, classes: int = 3, quarantined: int = 0) -> Path:
    """An index as stage `dataset` writes it."""
    folder.mkdir()
    about = {"train": len(labels), "val": 100 - quarantined, "classes": classes, "quarantined": quarantined}
    (folder / "manifest.json").write_text(json.dumps({"about": about}))
    (folder / "classes.json").write_text(json.dumps([f"n{label}" for label in range(classes)]))
    rows = [{"path": f"train/{n}.png", "label": label, "sha256": "0", "member": None} for n, label in enumerate(labels)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_sound_index_passes_and_says_how_large_classes_are(tmp_path: Path):
    outcomes = checks.check_dataset(write_dataset(tmp_path / "d", [0] * 5 + [1] * 7 + [2] * 6), limit=0.01)
    assert failed(outcomes) == {} and [outcome.name for outcome in outcomes] == list(checks.NAMES["dataset"])
    assert outcomes[0].grounds == "3 classes of 5 to 7 images"


@pytest.mark.parametrize(
    "labels, grounds",
    [
        ([0] * 5 + [2] * 5, "3 classes of 0 to 5 images; none in n1"),
        ([0, 1, 2, 3], "3 classes of 1 to 1 images; labels without a class: [3]"),
    ],
)
def test_an_index_without_images_of_a_class_is_found(tmp_path: Path, labels: list[int], grounds: str):
    assert failed(checks.check_dataset(write_dataset(tmp_path / "d", labels), limit=0.01)) == {"classes": grounds}


@pytest.mark.parametrize("quarantined, bad", [(2, set()), (3, {"quarantine"})])
def test_more_unreadable_images_than_the_limit_are_found(tmp_path: Path, quarantined: int, bad: set[str]):
    folder = write_dataset(tmp_path / "d", [0, 1, 2] * 34, quarantined=quarantined)
    assert set(failed(checks.check_dataset(folder, limit=0.01))) == bad


@pytest.fixture
def moments() -> Any:
    """Means and standard deviations of latents whose draws have a standard deviation of 1."""
    rng = np.random.default_rng(0)
    means = rng.normal(0, 0.6, size=(IMAGES, VIEWS, 1, *SHAPE))
    return np.concatenate([means, np.full_like(means, 0.8)], axis=2)


def write_latents(folder: Path, moments: Any, *, labels: int = IMAGES, shard_size: int = 400) -> Path:
    """Shards as stage `latents` writes them."""
    folder.mkdir()
    about = {"count": IMAGES, "views": VIEWS, "latent_shape": SHAPE, "shard_size": shard_size}
    (folder / "manifest.json").write_text(json.dumps({"about": about}))
    np.save(folder / "labels.npy", np.zeros(labels, np.int64))
    for number, first in enumerate(range(0, len(moments), shard_size)):
        np.save(folder / f"shard-{number:05d}.npy", moments[first : first + shard_size].astype(np.float16))
    return folder


def test_sound_latents_pass_and_say_how_many_were_looked_at(tmp_path: Path, moments: Any):
    outcomes = checks.check_latents(write_latents(tmp_path / "l", moments), images=IMAGES)
    assert failed(outcomes) == {} and [outcome.name for outcome in outcomes] == list(checks.NAMES["latents"])
    assert outcomes[0].grounds == "1,500 latents x 2 views, 1,500 labels, 1,500 images in the index"
    looked = int(outcomes[1].grounds.split()[-2].replace(",", ""))
    assert IMAGES / 4 < looked <= checks.ROWS


def test_spread_is_that_of_draws_not_of_means(tmp_path: Path, moments: Any):
    """0.6 ** 2 + 0.8 ** 2 = 1: a codec of weak means and wide posteriors keeps the promise too."""
    outcomes = {o.name: o.grounds for o in checks.check_latents(write_latents(tmp_path / "l", moments), images=IMAGES)}
    assert outcomes["spread"].startswith(("values drawn vary by 0.99", "values drawn vary by 1 "))


@pytest.mark.parametrize(
    "factor, shift, bad", [(3.0, 0.0, {"spread"}), (0.3, 0.0, {"spread"}), (1.0, 1.2, {"mean"}), (1.0, -1.2, {"mean"})]
)
def test_latents_that_are_not_as_scaled_are_found(
    tmp_path: Path, moments: Any, factor: float, shift: float, bad: set[str]
):
    moments = moments * factor
    moments[:, :, 0] += shift
    assert set(failed(checks.check_latents(write_latents(tmp_path / "l", moments), images=IMAGES))) == bad


@pytest.mark.parametrize("side", [0, 1])
def test_latents_that_are_not_finite_are_found(tmp_path: Path, moments: Any, side: int):
    moments[400, 1, side, 0, 0, 0] = np.nan  # the first of a shard, which is looked at
    assert "finite" in failed(checks.check_latents(write_latents(tmp_path / "l", moments), images=IMAGES))


@pytest.mark.parametrize("changes", [{"labels": 1499}, {"images": 1501}, {"kept": 1400}, {"views": 1}])
def test_a_wrong_count_of_latents_is_found(tmp_path: Path, moments: Any, changes: dict[str, int]):
    moments = moments[: changes.get("kept", IMAGES), : changes.get("views", VIEWS)]
    folder = write_latents(tmp_path / "l", moments, labels=changes.get("labels", IMAGES))
    assert "count" in failed(checks.check_latents(folder, images=changes.get("images", IMAGES)))


def verdict(ruling: str, weights: str) -> dict[str, Any]:
    """The part of the gate's record that is read."""
    numbers = {"mean": 0.5, "lower": 0.1, "upper": 0.9, "tolerance": 0.05, "time": "2026-11-24T01:02:03Z"}
    return {"verdict": ruling, "candidate": {"weights": weights}, "incumbent": {"checkpoint": "old"}, **numbers}


@pytest.mark.parametrize(
    "told, passed, grounds",
    [
        ([], True, "the gate has not judged these weights"),
        ([("FAIL", "of another training")], True, "the gate has not judged these weights"),
        ([("PASS", "ours")], True, "PASS against old at 2026-11-24T01:02: FID +0.500 (+0.100 to +0.900)"),
        ([("INCONCLUSIVE", "ours")], True, "INCONCLUSIVE"),
        ([("PASS", "ours"), ("FAIL", "ours")], False, "FAIL against old"),
        ([("FAIL", "ours"), ("PASS", "ours"), ("FAIL", "of another training")], True, "PASS"),
    ],
)
def test_the_newest_verdict_on_these_weights_counts(
    tmp_path: Path, told: list[tuple[str, str]], passed: bool, grounds: str
):
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {"ema-0.9.safetensors": {"sha256": "ours"}}}))
    outcome = checks.check_verdict([verdict(*one) for one in told], checkpoint=tmp_path)
    assert outcome.name in checks.NAMES["metrics"] and not outcome.blocks
    assert outcome.passed == passed and outcome.grounds.startswith(grounds)


def test_a_failed_gate_shows_and_stops_nothing(own: Project, inside: Enter, capsys: pytest.CaptureFixture[str]):
    inside(own)
    one = trials.subject(load_params(), "tiny-6")
    numbers = {"differences": [1.0] * 3, "mean": 1.0, "lower": 0.9, "upper": 1.1, "level": 0.05 / 6}
    both = {"candidate": gate.measured(one, [2.0] * 3), "incumbent": gate.measured(one, [1.0] * 3)}
    said = {"verdict": "FAIL", "tolerance_from": "this test", "calibration": None}
    common = gate.common(one, seeds=[1, 2, 3], tolerance=0.1)
    gate.append(gate.Verdict.model_validate(common | numbers | both | said))
    pipeline, _ = define()
    (shown,) = [one for one in pipeline.extras["metrics@tiny-6"].check() if not one.passed]
    assert shown.check_name == "not_worse_than_incumbent" and shown.severity is dg.AssetCheckSeverity.WARN
    assert cli.main(["run", "tiny"]) == 0
    assert "Nothing to do" in capsys.readouterr().out
