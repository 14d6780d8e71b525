"""The gate over made-up blocks: what it refuses, where its tolerance comes from, what it records; and once for real."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dod_models import artifact, source
from dod_pipeline import cli, gate, history, ledger, trials
from dod_pipeline.config import Params
from dod_pipeline.deployment import Deployment
from dod_pipeline.gate import Calibration, Verdict

from . import project as tiny
from .project import Project
from .test_dvc_yaml import closure

Enter = Callable[[Project], None]
Captured = pytest.CaptureFixture[str]
NOISE = [0.3, -0.2, 0.1, 0.0, 0.2, -0.1, 0.1, 0.0]  # of blocks; the same for all checkpoints
OWN = [0.02, -0.01, 0.03, 0.0, 0.01, -0.02, 0.0, 0.01]  # of a candidate's blocks


def seeded(name: str, seed: int) -> dict[str, Any]:
    """Parts of params.yaml for a retrain under another seed."""
    experiment = tiny.params(Path("images"))["experiments"]["tiny"]
    experiment["train"]["seed"] = seed
    checkpoint = tiny.CHECKPOINT | {"experiment": name}
    return {"experiments": {name: experiment}, "checkpoints": {f"{name}-6": checkpoint}}


def values_with(*retrains: int) -> dict[str, Any]:
    """The tiny project's params.yaml, and retrains of its experiment called seed1, seed2, ..."""
    values = tiny.params(Path("images"))
    for seed in retrains:
        for place, more in seeded(f"seed{seed}", seed).items():
            values[place] |= more
    return values


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A folder in which all was trained, and blocks whose FID is that of `fids`, and noise; `drawn` are those."""
    monkeypatch.chdir(tmp_path)
    state: dict[str, Any] = {"fids": {"tiny-6": 10.0}, "drawn": [], "values": values_with(1, 2, 3, 4)}
    state["fids"] |= {"seed1-6": 9.0, "seed2-6": 11.0, "seed3-6": 10.5, "seed4-6": 12.0}

    def manifest(folder: Path) -> tuple[dict[str, Any], str]:
        about = {"extractor": {"name": "small-net-64", "digest": "e" * 64}}
        files = {f"ema-{decay}.safetensors": {"sha256": f"{decay} of {folder}"} for decay in (0.9, 0.95)}
        return {"files": files, "about": about}, f"sha {folder}"

    def scores(
        one: trials.Subject, block: int, *, seeds: dict[str, int], deployment: Deployment
    ) -> dict[str, dict[str, float]]:
        state["drawn"].append((one.key, block, seeds["stage2"]))
        own = OWN[block] * (one.key != "tiny-6")
        return {"stage1": {"fid": 99.0}, "stage2": {"fid": state["fids"][one.key] + NOISE[block] + own}}

    def trained(params: Params, experiment: str) -> Any:
        from dod_pipeline import stages

        return stages.resolve(params, "train", experiment).config

    for name, stub in (("manifest", manifest), ("scores", scores), ("trained", trained)):
        monkeypatch.setattr(trials, name, stub)
    yield state


def parsed(fake: dict[str, Any]) -> Params:
    Path("params.yaml").write_text(json.dumps(fake["values"]))
    return Params.parse(fake["values"], place="params.yaml")


@pytest.mark.parametrize(
    "candidate, status, verdict", [(9.8, 0, "PASS"), (10.0, 0, "PASS"), (10.5, 2, "FAIL"), (10.2, 3, "INCONCLUSIVE")]
)
def test_the_exit_status_is_the_verdict(fake: dict[str, Any], capsys: Captured, candidate: float, status: int, verdict):
    """The tolerance is 2 % of 10: 0.2."""
    fake["fids"]["seed1-6"] = candidate
    parsed(fake)
    assert cli.main(["gate", "seed1-6", "tiny-6"]) == status
    printed = capsys.readouterr().out
    assert f"{verdict}: seed1-6 against tiny-6" in printed
    (row,) = history.query(kind="verdict")
    record = ledger.typed(Verdict, row)
    assert (record.verdict, record.experiment, record.checkpoint) == (verdict, "seed1", "seed1-6")
    assert (record.incumbent.checkpoint, record.incumbent.train_seed) == ("tiny-6", 0)
    assert record.differences == pytest.approx([candidate - 10 + own for own in OWN[: len(record.differences)]])
    assert record.mean == pytest.approx(sum(record.differences) / len(record.differences))
    assert record.lower < record.mean < record.upper and record.num_samples == tiny.SAMPLES
    assert record.tolerance == pytest.approx(0.02 * sum(record.incumbent.fids[:3]) / 3)
    assert len(record.seeds) == len(set(record.seeds)) == len(record.differences)
    assert record.extractor.name == "small-net-64" and record.sampler.startswith("euler-2")


def test_both_are_sampled_under_the_incumbent_s_seed(fake: dict[str, Any]):
    fake["values"]["experiments"]["seed1"]["sampling"]["seed"] = 7
    gate.gate(parsed(fake), "seed1-6", "tiny-6")
    assert {seed for _, _, seed in fake["drawn"]} == {0}
    assert [(key, block) for key, block, _ in fake["drawn"][:2]] == [("tiny-6", 0), ("seed1-6", 0)]


def test_verdicts_are_listed_apart_from_scores(fake: dict[str, Any], capsys: Captured):
    parsed(fake)
    cli.main(["gate", "seed1-6", "tiny-6"])
    cli.main(["gate", "seed4-6", "tiny-6"])
    capsys.readouterr()
    assert history.query() == []
    assert [row["verdict"] for row in history.query(kind="verdict")] == ["PASS", "FAIL"]
    assert [row["verdict"] for row in history.query(kind="verdict", checkpoint="seed4-6")] == ["FAIL"]
    assert cli.main(["history", "--kind", "verdict"]) == 0
    assert " seed4-6 " in capsys.readouterr().out
    assert cli.main(["history", "--kind", "verdict", "--format", "csv"]) == 0
    assert capsys.readouterr().out.count("\n") == 3
    assert cli.main(["history", "--kind", "verdict", "--metric", "fid"]) == 1
    assert "a verdict has no metrics" in capsys.readouterr().err


def set_(values: dict[str, Any], place: str, value: Any) -> None:
    *folders, name = place.split(".")
    for folder in folders:
        values = values[folder]
    values[name] = value


@pytest.mark.parametrize(
    "place, value, message",
    [
        ("sampling.num_steps", 3, "stage1.num_steps is 2 and 3; stage2.num_steps is 2 and 3"),
        ("stage2.guidance", 3.0, "stage2.guidance is 2.0 and 3.0"),
        ("evaluation.num_samples", 66, "num_samples is 70 and 66"),
        ("gate", {"num_samples": 68}, "num_samples is 70 and 68"),
    ],
)
def test_what_is_not_measured_alike_is_refused(
    fake: dict[str, Any], capsys: Captured, place: str, value: Any, message: str
):
    set_(fake["values"]["experiments"]["seed1"], place, value)
    parsed(fake)
    for command in (["gate", "seed1-6", "tiny-6"], ["calibrate", "tiny-6", "seed1-6", "seed2-6"]):
        assert cli.main(command) == 1
        error = capsys.readouterr().err
        assert error.startswith("dod: tiny-6 and seed1-6 cannot be compared: ") and message in error
    assert fake["drawn"] == [] and not Path("history").exists()


def test_another_data_set_is_refused(fake: dict[str, Any], capsys: Captured):
    fake["values"]["datasets"]["other"] = fake["values"]["datasets"]["tiny"]
    fake["values"]["experiments"]["seed1"]["data"] = fake["values"]["checkpoints"]["seed1-6"]["data"] = "other"
    parsed(fake)
    assert cli.main(["gate", "seed1-6", "tiny-6"]) == 1
    error = capsys.readouterr().err
    assert "data is 'tiny' and 'other'; reference is 'sha reference/tiny' and 'sha reference/other'" in error


def test_train_settings_and_the_average_may_differ(fake: dict[str, Any]):
    fake["values"]["experiments"]["seed1"]["train"] |= {"learning_rate": 0.1, "ema_decays": [0.9, 0.95]}
    fake["values"]["experiments"]["seed1"]["sampling"]["ema_decay"] = 0.95
    found = gate.gate(parsed(fake), "seed1-6", "tiny-6")
    assert (found.verdict, found.candidate.weights) == ("PASS", "0.95 of train/seed1/step-6")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"learning_rate": 0.1}, r"tiny-6 and seed2-6 are not retrains .*: train.learning_rate is 0.003 and 0.1;"),
        ({"model": tiny.MODEL | {"depth": 3}}, r"train.model.depth is 2 and 3;"),
        ({"seed": 1}, r"the training seeds are 0, 1, 1;"),
    ],
)
def test_only_retrains_under_different_seeds_calibrate(fake: dict[str, Any], change: dict[str, Any], message: str):
    fake["values"]["experiments"]["seed2"]["train"] |= change
    with pytest.raises(ValueError, match=message):
        gate.calibrate(parsed(fake), ["tiny-6", "seed1-6", "seed2-6"])


def test_averages_that_differ_are_no_retrains_of_each_other(fake: dict[str, Any]):
    for place in ("tiny", "seed1", "seed2"):
        fake["values"]["experiments"][place]["train"]["ema_decays"] = [0.9, 0.95]
    fake["values"]["experiments"]["seed2"]["sampling"]["ema_decay"] = 0.95
    with pytest.raises(ValueError, match=r"ema_decay.stage1 is 0.9 and 0.95; ema_decay.stage2 is 0.9 and 0.95;"):
        gate.calibrate(parsed(fake), ["tiny-6", "seed1-6", "seed2-6"])


def test_weights_are_not_gated_against_themselves(fake: dict[str, Any]):
    """Every difference would be 0, and the verdict PASS."""
    with pytest.raises(ValueError, match="tiny-6 and tiny-6 are the same weights"):
        gate.gate(parsed(fake), "tiny-6", "tiny-6")


def test_two_checkpoints_of_one_training_are_no_retrains(fake: dict[str, Any]):
    fake["values"]["checkpoints"]["tiny-4"] = tiny.CHECKPOINT | {"step": 4}
    with pytest.raises(ValueError, match="step is 6 and 4"):
        gate.calibrate(parsed(fake), ["tiny-6", "tiny-4", "seed2-6"])
    with pytest.raises(ValueError, match="2 checkpoints: give at least 3"):
        gate.calibrate(parsed(fake), ["tiny-6", "seed2-6"])


def test_the_gate_takes_its_tolerance_from_the_newest_calibration(fake: dict[str, Any], capsys: Captured):
    parsed(fake)
    assert cli.main(["gate", "seed4-6", "tiny-6"]) == 2
    assert "no calibration of this configuration" in capsys.readouterr().out
    assert cli.main(["calibrate", "tiny-6", "seed1-6", "seed2-6"]) == 0
    printed = capsys.readouterr().out
    # means 10, 9, 11 and what OWN adds on average to the last two: s is 1, t(0.95, 2) = 2.92
    tolerance = 2.919986 * 2**0.5
    (row,) = history.query(kind="calibration")
    calibration = ledger.typed(Calibration, row)
    assert calibration.tolerance == pytest.approx(tolerance, rel=1e-3)
    assert [one.train_seed for one in calibration.retrains] == [0, 1, 2]
    assert f"experiments.tiny.gate: {{tolerance: {calibration.tolerance:.4g}}}" in printed
    assert cli.main(["gate", "seed4-6", "tiny-6"]) == 0
    (*_, verdict) = history.query(kind="verdict")
    assert verdict["tolerance"] == calibration.tolerance and verdict["calibration"] == calibration.digest
    assert gate.gate(parsed(fake), "seed4-6", "seed3-6").calibration == calibration.digest  # of the same configuration
    assert cli.main(["history", "--kind", "calibration"]) == 0
    assert "tiny-6, seed1-6, seed2-6" in capsys.readouterr().out


def test_a_calibration_of_other_settings_does_not_count(fake: dict[str, Any]):
    gate.append(gate.calibrate(parsed(fake), ["tiny-6", "seed1-6", "seed2-6"]))
    for experiment in fake["values"]["experiments"].values():
        experiment["stage2"]["guidance"] = 3.0
    assert gate.gate(parsed(fake), "seed1-6", "tiny-6").calibration is None


def test_a_tolerance_in_params_takes_the_calibration_s_place(fake: dict[str, Any]):
    gate.append(gate.calibrate(parsed(fake), ["tiny-6", "seed1-6", "seed2-6"]))
    fake["values"]["experiments"]["tiny"]["gate"] = {"tolerance": 0.25, "max_blocks": 4}
    found = gate.gate(parsed(fake), "seed3-6", "tiny-6")
    assert (found.verdict, found.tolerance, found.calibration) == ("FAIL", 0.25, None)
    assert found.tolerance_from == "experiments.tiny.gate.tolerance in params.yaml"
    fake["values"]["experiments"]["tiny"]["gate"] = {"tolerance": 0.1}
    found = gate.gate(parsed(fake), "seed3-6", "tiny-6")
    assert found.tolerance == pytest.approx(0.02 * (10 + sum(NOISE[:3]) / 3))
    assert found.tolerance_from.startswith("2% of the incumbent's FID, which is more than 0.100: ")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"min_blocks": 2}, "gate.min_blocks: Input should be greater than or equal to 3"),
        ({"max_blocks": 2}, "gate: max_blocks: 2 is below min_blocks: 3"),
        ({"tolerence": 1}, "gate.tolerence: unknown key"),
    ],
)
def test_senseless_settings_are_refused(fake: dict[str, Any], settings: dict[str, Any], message: str):
    fake["values"]["experiments"]["tiny"]["gate"] = settings
    with pytest.raises(ValueError, match=message):
        parsed(fake)


def test_the_gate_s_settings_change_no_digest(fake: dict[str, Any]):
    before = parsed(fake).only("tiny")
    fake["values"]["experiments"]["tiny"]["gate"] = {"tolerance": 3.0}
    assert parsed(fake).only("tiny").digest == before.digest


def test_a_block_s_scores_depend_on_the_modules_that_it_imports():
    assert {f"dod_models/{name}.py" for name in source.code("trial")} == closure("dod_models.trial")


@pytest.mark.timeout(600)
def test_the_gate_on_real_checkpoints(own: Project, inside: Enter, capsys: Captured):
    """Retrains under three seeds: blocks are sampled once, a killed gate goes on, and new weights have new blocks."""
    values = own.params()
    for seed in (1, 2):
        for place, more in copy.deepcopy(seeded(f"seed{seed}", seed)).items():
            values[place] |= more
    values["experiments"]["tiny"]["gate"] = {"max_blocks": 4}
    own.write_params(values)
    inside(own)
    cache = own.root / ".state" / "gate"
    for name in ("seed1", "seed2"):
        assert cli.main(["stage", "train", name]) == 0
    assert cli.main(["calibrate", "tiny-6", "seed1-6", "seed2-6"]) == 0
    assert len(list(cache.glob("*.json"))) == 3 * 3
    capsys.readouterr()

    status = cli.main(["gate", "seed1-6", "tiny-6"])
    printed = capsys.readouterr().out
    assert status in (0, 2, 3) and "block 0 of" not in printed
    assert cli.main(["gate", "tiny-6", "tiny-6"]) == 1
    assert "are the same weights" in capsys.readouterr().err
    (verdict,) = history.query(kind="verdict")
    (calibration,) = history.query(kind="calibration")
    assert verdict["calibration"] == calibration["id"]
    assert verdict["candidate"]["fids"][:3] == calibration["retrains"][1]["fids"]
    assert verdict["candidate"]["fids"][0] != verdict["incumbent"]["fids"][0]
    weights = artifact.read_json(Path("train/seed1/step-6/manifest.json"))["files"]["ema-0.9.safetensors"]["sha256"]
    assert verdict["candidate"]["weights"] == weights and verdict["seeds"][:3] == calibration["seeds"]

    one = trials.subject(Params.parse(values, place="params.yaml"), "tiny-6")
    lost = trials.job(one, 1, seeds=trials.seeds_of(one)).out
    before = lost.read_bytes()
    lost.unlink()
    assert cli.main(["gate", "seed1-6", "tiny-6"]) == status
    assert capsys.readouterr().out.count("block 1 of tiny-6\n") == 1
    assert lost.read_bytes() == before

    lost.write_bytes(before.replace(one.weights["stage2"].encode(), b"0" * 64))
    assert cli.main(["gate", "seed1-6", "tiny-6"]) == 1
    assert "tiny-6: its weights, codec or reference were made anew meanwhile" in capsys.readouterr().err

    values["experiments"]["seed1"]["train"]["learning_rate"] = 0.1
    own.write_params(values)
    assert cli.main(["gate", "seed1-6", "tiny-6"]) == 1
    assert "train/seed1: was made with other settings than params.yaml has now" in capsys.readouterr().err
