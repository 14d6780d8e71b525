import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from dod_models import cost
from dod_models.model import ModelConfig
from dod_models.speed import Speed, peak_flops, training_flops

from . import tiny


def test_a_sample_s_flops_are_three_forward_passes_by_its_chance_of_a_prior():
    config = tiny.config()
    true = cost.describe(config)["gflops"]["true"]
    for drop in (0.0, 0.5, 1.0):
        forward = drop * true["stage1"] + (1 - drop) * (true["stage2"] + true["lem"])
        assert training_flops(config, prior_drop=drop) == pytest.approx(3e9 * forward, rel=1e-9)


def test_dod_b_needs_about_what_its_parameters_say():
    """2 FLOPs for each weight and token, thrice; attention and the tokens of the LEM come on top."""
    flops = training_flops(ModelConfig.model_validate({"preset": "DoD-B"}), prior_drop=1.0)
    assert 1.0 < flops / (6 * 256 * 85e6) < 1.25


def test_utilisation_is_flops_over_peak(monkeypatch):
    clock = iter([100.0, 102.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    found = Speed(Accelerator(), flops_per_image=1e9, peak_tflops=0.5)
    found.start(1000)
    held = np.ones(2**27)  # 1 GiB
    shown = found.read(1600)
    assert 1 < float(shown.pop("memory").removesuffix(" GiB")) < 64 and held.any()
    assert shown == {"images/s": "300.0", "MFU": "60.0 %"}  # 600 images in 2 s: 0.3 of 0.5 TFLOPs


def test_the_peak_is_known_for_known_gpus_alone(monkeypatch):
    gpu = torch.device("cuda", 0)
    for name, peak in (("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 80GB HBM3", 989e12), ("GeForce", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(gpu, stated=None) == peak
    assert peak_flops(gpu, stated=2.5) == 2.5e12
    assert peak_flops(torch.device("cpu"), stated=None) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_step_waits_for_the_device(pipeline):
    from dod_models.data import LatentShards
    from dod_models.record import Record
    from dod_models.state import TrainConfig, TrainState
    from dod_models.train import draw_share, train_step

    config, accelerator = TrainConfig.model_validate(tiny.TRAIN), Accelerator()
    state = TrainState(config, accelerator)
    record = Record(log_every=8, batch_size=8, device=accelerator.device)
    for step in range(4):
        draw = draw_share(step, config=config, shards=LatentShards(pipeline.latents), rank=0, processes=1)
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            record.add(draw, *train_step(state, draw))
        finally:
            torch.cuda.set_sync_debug_mode("default")
