import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dod_models.flow import flow_loss, logit_normal, point_on_path, velocity_target


def pair(seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 2, 4, 4, generator=rng, dtype=torch.float64)


def test_the_path_starts_at_noise_and_ends_at_data():
    data, noise = pair()
    assert torch.equal(point_on_path(data, noise, torch.zeros(3)), noise)
    assert torch.equal(point_on_path(data, noise, torch.ones(3)), data)


@given(start=st.floats(0, 0.9), step=st.floats(0.01, 0.1), seed=st.integers(0, 1000))
def test_the_target_is_the_path_s_derivative(start, step, seed):
    data, noise = pair(seed)
    t = torch.full((3,), start, dtype=torch.float64)
    slope = (point_on_path(data, noise, t + step) - point_on_path(data, noise, t)) / step
    torch.testing.assert_close(slope, velocity_target(data, noise), rtol=0, atol=1e-11)


def test_every_sample_has_its_own_time():
    data, noise = pair()
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    together = point_on_path(data, noise, t)
    for i in range(3):
        assert torch.equal(together[i : i + 1], point_on_path(data[i : i + 1], noise[i : i + 1], t[i : i + 1]))


@pytest.mark.parametrize(
    ("normal", "quantile"), [(0.0, 0.5), (1.0, 1 / (1 + math.exp(-1))), (-2.0, 1 / (1 + math.exp(2)))]
)
def test_logit_normal_maps_quantiles_to_quantiles(normal, quantile):
    assert logit_normal(torch.tensor([normal])).item() == pytest.approx(quantile, abs=1e-7)


@given(st.floats(-8, 8))
def test_the_logit_of_a_training_time_is_its_normal_draw(u):
    t = logit_normal(torch.tensor([u], dtype=torch.float64))
    assert t.logit().item() == pytest.approx(u, abs=1e-9)


def test_the_loss_is_the_mean_square_distance_from_the_target():
    data, noise = pair()
    target = velocity_target(data, noise)
    assert flow_loss(target, data, noise).item() == 0
    assert flow_loss(target + 3, data, noise).item() == pytest.approx(9, abs=1e-12)
    one_wrong = target.clone()
    one_wrong[0] -= 3  # one sample of three
    assert flow_loss(one_wrong, data, noise).item() == pytest.approx(3, abs=1e-12)
