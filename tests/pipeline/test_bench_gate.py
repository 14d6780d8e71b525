"""The study of benchmarks/gate.py counts what it says, on made-up blocks; its clone's params.yaml is a valid one."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gate as study
from dod_pipeline import paired, trials
from dod_pipeline.config import load_params

from .project import SOURCE

TRAINED = dict(zip(study.SEEDS, [20.0, 21.0, 19.0, 22.0, 20.5, 18.5], strict=True))  # FID by training seed


def fids(seed: int, step: int, block: int) -> float:
    """A training half as long is 30 worse; blocks have a noise of their own, smaller than retrains differ."""
    noise = np.random.default_rng([seed, step, block]).normal(0, 0.1)
    return TRAINED[seed] + 30 * (step == study.HALF) + float(noise)


def test_every_ordered_pair_of_different_seeds_is_gated_once():
    found = study.pairs(fids, step=study.FULL)
    assert len(found) == len({(pair.candidate, pair.incumbent) for pair in found}) == 30
    assert not [pair for pair in found if pair.candidate == pair.incumbent]


def test_a_pair_s_tolerance_is_calibrated_without_its_seeds():
    for pair in study.pairs(fids, step=study.FULL):
        others = [
            np.mean([fids(seed, study.FULL, block) for block in range(3)])
            for seed in study.SEEDS
            if seed not in (pair.candidate, pair.incumbent)
        ]
        expected, _ = paired.calibrated_tolerance([float(value) for value in others])
        assert pair.tolerance == pytest.approx(expected, rel=1e-12)


def test_verdicts_are_those_of_the_numbers():
    for pair in study.pairs(fids, step=study.FULL):
        difference = TRAINED[pair.candidate] - TRAINED[pair.incumbent]
        if abs(difference - pair.tolerance) > 1:
            assert pair.ruling == ("FAIL" if difference > pair.tolerance else "PASS")
    assert {pair.ruling for pair in study.pairs(fids, step=study.HALF)} == {"FAIL"}
    alone = study.pairs(fids, step=study.FULL, calibrated=False)
    assert {pair.ruling for pair in alone if TRAINED[pair.candidate] > TRAINED[pair.incumbent] + 0.9} == {"FAIL"}


def test_the_table_counts_them():
    printed = study.tables(fids).splitlines()
    assert "| 3 | 22.0" in "\n".join(printed)
    (power,) = [row for row in printed if "FAIL is right" in row]
    assert "| 30 of 30 | 0 of 30 | 0 of 30 | 3.0 |" in power
    (alarms,) = [row for row in printed if "false alarm" in row]
    assert sum(int(cell.split()[0]) for cell in alarms.split("|")[3:6]) == 30


def test_the_clone_s_experiments_differ_in_the_seed_of_training_alone(tmp_path: Path):
    shutil.copy(SOURCE / "params.yaml", tmp_path)
    experiments = study.write_params(tmp_path)
    params = load_params(tmp_path / "params.yaml")
    base = params.experiments["mnist"]
    for seed, name in zip(study.SEEDS, experiments, strict=True):
        found = params.experiments[name]
        assert found == base.model_copy(update={"train": base.train | {"seed": seed}})
        assert [item.step for item in params.checkpoints_of(name).values()] == [study.HALF, study.FULL]


def test_blocks_of_the_study_are_asked_for_once(monkeypatch, tmp_path: Path):
    shutil.copy(SOURCE / "params.yaml", tmp_path)
    study.write_params(tmp_path)
    drawn: list[tuple[str, int]] = []

    class Fake:
        def __init__(self, key: str) -> None:
            self.key = key

    def scores(one: Fake, block: int, *, seeds: object, deployment: object) -> dict[str, dict[str, float]]:
        drawn.append((one.key, block))
        return {"stage2": {"fid": float(len(one.key))}}

    monkeypatch.setattr(trials, "subject", lambda params, key: Fake(key))
    for name in ("check_alike", "check_retrains", "seeds_of"):
        monkeypatch.setattr(trials, name, lambda *_: {})
    monkeypatch.setattr(trials, "scores", scores)
    found = study.sampled(tmp_path)
    assert found(0, 1500, 0) == found(0, 1500, 0) == len("mnist-1500")
    assert found(3, 750, 1) == len("mnist-seed3-750")
    assert drawn == [("mnist-1500", 0), ("mnist-seed3-750", 1)]
