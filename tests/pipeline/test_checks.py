"""Checks pass what is sound and name what isn't; `dod run` stops at what isn't."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from dod_pipeline import checks, cli

from .project import Project
from .test_kill import Enter

SCORES = {"floor": {"fid": 0.1}, "codec": {"fid": 0.2}, "stage1": {"fid": 2.0}, "stage2": {"fid": 1.0}}


def write_samples(folder: Path, latents: Any, *, wanted: int = 2000, labels: int | None = None) -> Path:
    """A folder as a sampling stage writes it."""
    folder.mkdir()
    about = {"about": {"sampling": {"num_samples": wanted}}}
    (folder / "manifest.json").write_text(json.dumps(about))
    named = np.zeros(len(latents) if labels is None else labels, np.int64)
    save_file({"latents": latents.astype(np.float32), "labels": named}, folder / "samples.safetensors")
    return folder


@pytest.fixture
def sound() -> Any:
    """More samples than are read at a time."""
    return np.random.default_rng(0).normal(size=(2000, 4, 2, 2))


def failed(outcomes: list[checks.Outcome]) -> dict[str, str]:
    return {outcome.name: outcome.grounds for outcome in outcomes if not outcome.passed}


def test_sound_samples_pass(tmp_path: Path, sound: Any):
    outcomes = checks.check_samples(write_samples(tmp_path / "s", sound))
    assert failed(outcomes) == {}
    assert [outcome.name for outcome in outcomes] == list(checks.NAMES["stage1"])


def test_spread_is_the_mean_standard_deviation(tmp_path: Path, sound: Any):
    outcomes = {o.name: o.grounds for o in checks.check_samples(write_samples(tmp_path / "s", sound))}
    assert outcomes["variety"].startswith(f"values vary by {sound.astype(np.float32).std(0).mean():.3g} ")


@pytest.mark.parametrize("row", [0, 1500])
@pytest.mark.parametrize("value, name", [(np.nan, "finite"), (np.inf, "finite"), (26, "range"), (-26, "range")])
def test_one_bad_value_is_found(tmp_path: Path, sound: Any, row: int, value: float, name: str):
    sound[row, 1, 1, 0] = value
    assert name in failed(checks.check_samples(write_samples(tmp_path / "s", sound)))


def test_samples_that_are_all_alike_are_found(tmp_path: Path, sound: Any):
    alike = np.repeat(sound[:1], 2000, axis=0) + 0.01 * sound
    assert set(failed(checks.check_samples(write_samples(tmp_path / "s", alike)))) == {"variety"}


@pytest.mark.parametrize("changes", [{"wanted": 2001}, {"labels": 1999}])
def test_a_wrong_count_is_found(tmp_path: Path, sound: Any, changes: dict[str, int]):
    assert set(failed(checks.check_samples(write_samples(tmp_path / "s", sound, **changes)))) == {"count"}


@pytest.mark.parametrize(
    "row, fid, grounds",
    [
        ("stage1", 2.0, {}),
        ("stage2", 0.1, {"floor": "these are not above it: stage2 0.1"}),
        ("codec", 0.05, {"floor": "these are not above it: codec 0.05"}),
        ("stage1", float("nan"), {"finite": "not finite: stage1.fid"}),
        ("floor", float("inf"), {"finite": "not finite: floor.fid", "floor": "these are not above it: codec 0.2, "}),
    ],
)
def test_scores_that_cannot_be_are_found(tmp_path: Path, row: str, fid: float, grounds: dict[str, str]):
    file = tmp_path / "scores.json"
    file.write_text(json.dumps({**SCORES, row: {"fid": fid}}))
    found = failed(checks.check_metrics(file))
    assert set(found) == set(grounds)
    assert all(text in found[name] for name, text in grounds.items())


def test_a_floor_of_another_count_is_not_compared(tmp_path: Path):
    """Of fewer images an FID is larger: that says nothing of the evaluator."""
    scores = {"floor": {"fid": 2.0, "num_samples": 70}, "stage2": {"fid": 1.0, "num_samples": 700}}
    file = tmp_path / "scores.json"
    file.write_text(json.dumps(scores))
    assert not failed(checks.check_metrics(file))


def test_metrics_beside_fid_may_be_negative_or_below_the_floors(tmp_path: Path):
    """KID is unbiased, so real images' may be below zero; errors and costs are compared with nothing."""
    more = {"fid_error": 0.001, "sfid": 0.05, "kid": -0.0001, "gflops_paper": 0.07}
    file = tmp_path / "scores.json"
    file.write_text(json.dumps({name: row | more for name, row in SCORES.items()}))
    assert failed(checks.check_metrics(file)) == {}
    file.write_text(json.dumps({name: row | more | {"kid": float("nan")} for name, row in SCORES.items()}))
    assert set(failed(checks.check_metrics(file))) == {"finite"}


def test_nothing_is_built_on_what_fails(
    own: Project, inside: Enter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A blocking check: stage 1 is made, stage 2 isn't; the next run refuses too, until the cause is gone."""
    inside(own)
    values = own.params()
    values["experiments"]["tiny"]["sampling"]["seed"] = 1
    own.write_params(values)
    before = own.lock()
    with monkeypatch.context() as patch:
        patch.setattr(checks, "LARGEST", 0.0)
        assert cli.main(["run", "tiny"]) == 1
        assert "stage1/tiny-6" in capsys.readouterr().err
        after = own.lock()
        assert {name for name, entry in after.items() if entry != before[name]} == {"stage1@tiny-6"}
        assert cli.main(["run", "tiny"]) == 1
        assert "stage1@tiny-6: check 'range' failed: the largest value is" in capsys.readouterr().err
        assert own.lock() == after
    assert cli.main(["run", "tiny"]) == 0
    own.dvc("status", "-q", "metrics@tiny-6")
