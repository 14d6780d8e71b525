"""How a training is set up: compute, micro-batches, warm starts, and what its state must fit."""

import re
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from dod_models import artifact, checkpoint, train
from dod_models.data import LatentShards
from dod_models.state import TrainConfig, TrainState
from dod_models.train import draw_share, fit, train_step

from . import tiny


def state(**changes: Any) -> TrainState:
    """A state with random weights: at a fresh one's own, most gradients are zero."""
    found = TrainState(TrainConfig.model_validate({**tiny.TRAIN, **changes}), Accelerator())
    with torch.no_grad():
        for p, q in zip(found.raw.parameters(), tiny.random_model(found.config.model).parameters(), strict=True):
            p.copy_(q)
    return found


def gradients(pipeline, **compute: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Loss, norm and unclipped gradients of a step of 8 samples, of which the first five drop their prior."""
    found = state(compute=compute, clip=1e9)
    draw = draw_share(5, config=found.config, shards=LatentShards(pipeline.latents), rank=0, processes=1)
    draw.keep = torch.tensor([5, 6, 7])
    loss, norm = train_step(found, draw)
    return loss, norm, {name: p.grad for name, p in found.raw.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", [1, 3, 4, 5])
def test_micro_batches_add_up_to_the_batch(pipeline, size):
    """Also where one of them keeps no prior (the first of four, or of five), or is smaller (the last of three)."""
    whole, split = gradients(pipeline), gradients(pipeline, micro_batch=size)
    torch.testing.assert_close(split[:2], whole[:2], rtol=1e-5, atol=0)
    assert split[2].keys() == whole[2].keys()
    for name, gradient in whole[2].items():
        torch.testing.assert_close(split[2][name], gradient, rtol=1e-4, atol=1e-6)


def test_recomputed_activations_give_the_same_gradients(pipeline):
    whole, again = gradients(pipeline), gradients(pipeline, checkpointing=True)
    assert whole[0] == again[0]
    for name, gradient in whole[2].items():
        assert torch.equal(again[2][name], gradient), name


def test_compute_is_part_of_no_digest():
    plain = TrainConfig.model_validate(tiny.TRAIN)
    compute = {"micro_batch": 2, "sharding": "fsdp", "compile": True, "checkpointing": True, "peak_tflops": 1.0}
    assert TrainConfig.model_validate({**tiny.TRAIN, "compute": compute}).digest == plain.digest
    assert "compute" not in plain.canonical() and "warm_start" not in plain.canonical()


def warm(path, sha256: str, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({**tiny.TRAIN, "warm_start": {"path": str(path), "sha256": sha256}, **changes})


def test_a_warm_start_begins_from_the_named_weights_in_model_and_averages(pipeline):
    path = pipeline.checkpoint / "ema-0.9.safetensors"
    config = warm(path, artifact.sha256_file(path))
    assert config.digest != TrainConfig.model_validate(tiny.TRAIN).digest
    found = TrainState(config, Accelerator())
    found.warm_start()
    model, _ = checkpoint.load_checkpoint(pipeline.checkpoint, decay=0.9)
    for name, weight in model.named_parameters():
        assert torch.equal(found.raw.get_parameter(name), weight)
        assert all(torch.equal(average.weights[name], weight) for average in found.averages)


def test_a_killed_warm_start_goes_on_to_the_same_end(pipeline, tmp_path, monkeypatch):
    path = pipeline.checkpoint / "ema-0.9.safetensors"
    config = warm(path, artifact.sha256_file(path))

    def run(name):
        fit(config, latents=pipeline.latents, out=tmp_path / name, state=tmp_path / f"state-{name}")

    run("whole")
    real = checkpoint.save_state
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_state", lambda root, step, *a, **o: real(root, step, *a, **o) or 1 / (step != 4))
        with pytest.raises(ZeroDivisionError):
            run("cut")
    run("cut")
    assert tiny.digests(tmp_path / "cut") == tiny.digests(tmp_path / "whole") != tiny.digests(pipeline.train)


def test_other_bytes_than_the_stated_ones_are_refused(pipeline):
    path = pipeline.checkpoint / "ema-0.9.safetensors"
    message = f"{path}: sha256 is {artifact.sha256_file(path)}, train.warm_start.sha256 says {'0' * 64}"
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainState(warm(path, "0" * 64), Accelerator()).warm_start()
    with pytest.raises(FileNotFoundError, match=r"nowhere: there is no such file of weights; correct train.warm_start"):
        TrainState(warm("nowhere", "0" * 64), Accelerator()).warm_start()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"depth": 3}, r"ema-0.9.safetensors: no tensor blocks\.2\.\S+, which this model has"),
        ({"depth": 1}, r"ema-0.9.safetensors: tensor blocks\.1\.\S+ is unknown to this model"),
        ({"num_classes": 5}, r"tensor label_embed\S+ has shape \(4, 24\), this model's is \(6, 24\)"),
    ],
)
def test_weights_of_another_model_are_refused(pipeline, model, message):
    path = pipeline.checkpoint / "ema-0.9.safetensors"
    config = warm(path, artifact.sha256_file(path), model={**tiny.MODEL, **model})
    with pytest.raises(ValueError, match=message):
        TrainState(config, Accelerator()).warm_start()


def test_a_state_of_another_model_is_refused():
    found = state()
    tensors = found.tensors()
    missing = next(iter(tensors))
    del tensors[missing]
    with pytest.raises(ValueError, match=r"state of step 3, perhaps of an older version of dod: no tensor "):
        found.restore(tensors, 3)
