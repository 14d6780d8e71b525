import json
import os
import signal

import numpy as np
import pytest
import torch

from dod_models import artifact, draws, train
from dod_models.data import LatentShards, image_indices
from dod_models.record import check_ledger, digest, read_rows
from dod_models.state import TrainConfig
from dod_models.train import fit

from . import tiny

ROWS = {"log_every": 4, "state_every": 4, "save_every": 4}


def run(pipeline, root, **changes):
    config = TrainConfig.model_validate({**tiny.TRAIN, **changes})
    return fit(config, latents=pipeline.latents, out=root / "train", state=root / "state")


@pytest.fixture
def ledger(pipeline):
    size = len(LatentShards(pipeline.latents))
    return read_rows(pipeline.train / "ledger.jsonl"), {"samples": 64, "seed": 0, "size": size}


def test_the_ledger_holds_the_images_of_every_sample_in_order(ledger):
    rows, facts = ledger
    check_ledger(rows, **facts)
    order = np.concatenate([draws.permutation(0, epoch, facts["size"]) for epoch in range(2)])
    assert [row["images"] for row in rows] == [digest(order[i : i + 16]) for i in range(0, 64, 16)]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda rows: rows.pop(1), r"step 6: begins with sample 32 after 16: a gap"),
        (lambda rows: rows.insert(1, rows[0]), r"step 2: begins with sample 0 after 16: a repeat"),
        (lambda rows: rows.pop(), r"ends with sample 48, expected 64"),
        (lambda rows: rows[2].update(images=rows[1]["images"]), r"step 6: samples 32 to 47 were other images"),
    ],
)
def test_a_gap_a_repeat_and_another_image_are_found(ledger, spoil, message):
    rows, facts = ledger
    spoil(rows)
    with pytest.raises(ValueError, match=message):
        check_ledger(rows, **facts)


@pytest.mark.parametrize("step", [1, 2, 4, 7])
def test_sigterm_ends_the_step_and_loses_nothing(pipeline, tmp_path, monkeypatch, caplog, step):
    """In the middle of a row too; a second notice, after one more step, does no harm."""
    run(pipeline, tmp_path / "whole", **ROWS)
    real, steps = train.train_step, []

    def told(state, draw):
        steps.append(state.step)
        if state.step in (step - 1, step):
            os.kill(os.getpid(), signal.SIGTERM)
        return real(state, draw)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", told)
        for stopped in (step, step + 1):
            if stopped < 8:
                with pytest.raises(SystemExit) as stop:
                    run(pipeline, tmp_path / "cut", **ROWS)
                assert stop.value.code == 143
                assert f"train: stopped after step {stopped}, which was saved" in caplog.text
    run(pipeline, tmp_path / "cut", **ROWS)
    assert steps == list(range(min(step + 1, 7)))
    assert tiny.digests(tmp_path / "cut" / "train") == tiny.digests(tmp_path / "whole" / "train")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("what", ["loss", "norm"])
def test_the_first_step_that_is_not_finite_is_named_with_its_images(pipeline, tmp_path, monkeypatch, what):
    real = train.train_step

    def spoilt(state, draw):
        loss, norm = real(state, draw)
        bad = torch.tensor(float("nan"))
        if state.step >= 6:
            return (bad, norm) if what == "loss" else (loss, bad)
        return loss, norm

    monkeypatch.setattr(train, "train_step", spoilt)
    images = image_indices(range(40, 48), seed=0, size=len(LatentShards(pipeline.latents))).tolist()
    with pytest.raises(FloatingPointError) as error:
        run(pipeline, tmp_path, **ROWS)
    assert "at step 6, samples 40 to 47; nothing was saved since. Lower train.learning_rate" in str(error.value)
    assert str(error.value).endswith(f"by their places in the latents: {images}")
    assert [path.name for path in tmp_path.glob("state/*/resume/step-*")] == ["step-000000004"]


def test_the_row_s_norm_is_the_mean_of_the_steps(pipeline, tmp_path, monkeypatch):
    real, norms = train.train_step, []

    def kept(state, draw):
        loss, norm = real(state, draw)
        norms.append(norm.item())
        return loss, norm

    monkeypatch.setattr(train, "train_step", kept)
    run(pipeline, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "train" / "curve.jsonl").read_text().splitlines()]
    assert [row["gradient_norm"] for row in rows] == pytest.approx([np.mean(norms[i : i + 2]) for i in (0, 2, 4, 6)])
    assert min(norms) > 0
    artifact.verify(tmp_path / "train", schema=train.SCHEMA)
