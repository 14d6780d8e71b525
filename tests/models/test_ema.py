import pytest
import torch
from torch import nn

from dod_models.ema import Ema


def walk(decay: float, *, warm_up: bool, steps: int):
    """A one-weight model that takes the values 1, 2, ..., from 0."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    average = Ema(model, decay=decay, warm_up=warm_up)
    for step in range(steps):
        nn.init.constant_(model.weight, step + 1.0)
        average.update(model, step)
        yield average.weights["weight"].item()


def test_a_constant_decay_gives_the_geometric_sum():
    decay, steps = 0.9, 12
    closed = sum((1 - decay) * decay ** (steps - n) * n for n in range(1, steps + 1))
    assert list(walk(decay, warm_up=False, steps=steps))[-1] == pytest.approx(closed, rel=1e-12)


def test_warm_up_follows_its_sequence_until_the_decay_is_reached():
    decay, value = 0.25, 0.0
    for step, found in enumerate(walk(decay, warm_up=True, steps=6)):
        used = [1 / 10, 2 / 11, 3 / 12, 0.25, 0.25, 0.25][step]  # (1 + i) / (10 + i) reaches 0.25 at i = 2
        value = used * value + (1 - used) * (step + 1)
        assert found == pytest.approx(value, rel=1e-12)


def test_the_average_is_a_copy_and_needs_no_gradient():
    model = nn.Linear(2, 2)
    average = Ema(model, decay=0.5, warm_up=False)
    before = average.weights["weight"].clone()
    with torch.no_grad():
        model.weight.add_(1)
    assert torch.equal(average.weights["weight"], before)
    average.update(model, 0)
    torch.testing.assert_close(average.weights["weight"], before + 0.5)
    assert not average.weights["weight"].requires_grad
    assert model.weight.requires_grad
