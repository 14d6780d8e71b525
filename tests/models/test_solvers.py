"""Solvers on velocities whose paths are known in closed form."""

import math

import numpy as np
import pytest
import torch

from dod_models.sample import SampleConfig, integrate, per_sample_norm


def growth(x, t):
    """dz/dt = z: from 1 at t = 0 to e at t = 1."""
    return x


ONES = torch.ones(2, 1, 1, 1, dtype=torch.float64)


def global_error(num_steps: int) -> float:
    end = integrate(growth, ONES, SampleConfig(solver="euler", num_steps=num_steps))
    return abs(end[0].item() - math.e)


def test_euler_is_compound_interest():
    end = integrate(growth, ONES, SampleConfig(solver="euler", num_steps=10))
    assert end.flatten().tolist() == pytest.approx([1.1**10] * 2, rel=1e-6)


def test_euler_is_first_order():
    assert math.log2(global_error(64) / global_error(128)) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("num_steps", [1, 7, 30])
def test_euler_calls_the_velocity_once_a_step_from_noise_on(num_steps):
    times = []

    def velocity(x, t):
        times.append(t.tolist())
        return torch.zeros_like(x)

    integrate(velocity, ONES, SampleConfig(solver="euler", num_steps=num_steps))
    expected = [[n / num_steps] * 2 for n in range(num_steps)]
    assert np.array(times) == pytest.approx(np.array(expected), abs=1e-6)


def test_dopri5_meets_its_tolerance():
    end = integrate(growth, ONES, SampleConfig(solver="dopri5", num_steps=1))
    assert abs(end[0].item() - math.e) < 1e-3 * math.e  # one Euler step gives 2, ten give 2.59


def dopri5(rtol: float) -> tuple[int, float]:
    """Calls, and relative error, on dz/dt = 10 z from 1 to exp(10)."""
    calls = []

    def velocity(x, t):
        calls.append(t)
        return 10 * x

    end = integrate(velocity, ONES, SampleConfig(solver="dopri5", rtol=rtol, atol=rtol / 1000))
    return len(calls), abs(end[0].item() / math.exp(10) - 1)


def test_dopri5_is_fifth_order_and_its_error_follows_its_tolerance():
    found = {rtol: dopri5(rtol) for rtol in (1e-7, 1e-9, 1e-11)}
    for rtol, (_, error) in found.items():
        assert error / rtol == pytest.approx(3, abs=0.5)  # proportional over four decades
    (few, coarse), _, (many, fine) = found.values()
    assert math.log(coarse / fine) / math.log(many / few) == pytest.approx(5, abs=0.25)  # error ~ calls ** -5


def test_a_straight_path_needs_one_step():
    data = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    for solver in ("euler", "dopri5"):
        end = integrate(lambda x, t: data - noise, noise, SampleConfig(solver=solver, num_steps=1))
        torch.testing.assert_close(end, data, rtol=0, atol=1e-5)


def test_the_error_norm_is_that_of_the_worst_sample():
    rows = torch.zeros(10, 1, 2, 2)
    rows[3] = 3.0
    rows[5, 0, 0, 0] = 4.0  # root mean square 2
    assert per_sample_norm(rows).item() == pytest.approx(3)


def test_easy_samples_do_not_loosen_a_hard_one_s_tolerance():
    hard = ONES[:1].float()

    def velocity(x, t):
        return 20 * torch.cos(30 * t).view(-1, 1, 1, 1) * x  # a sample at zero stays there

    alone = integrate(velocity, hard, SampleConfig(solver="dopri5", num_steps=1))
    crowd = torch.cat([hard, torch.zeros(999, 1, 1, 1)])
    together = integrate(velocity, crowd, SampleConfig(solver="dopri5", num_steps=1))
    torch.testing.assert_close(together[:1], alone, rtol=1e-6, atol=0)
