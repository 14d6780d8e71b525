"""Guidance: its formula, its null branches, its interval."""

from typing import Any

import pytest
import torch

from dod_models.sample import GuidedVelocity, SampleConfig, sample_stage

from . import tiny


@pytest.fixture(scope="module")
def scene():
    model = tiny.random_model(tiny.config()).requires_grad_(False)
    rng = torch.Generator().manual_seed(2)
    x, z = torch.randn(2, 5, 4, 4, 4, generator=rng)
    return model, x, torch.full((5,), 0.4), torch.tensor([0, 1, 2, 0, 1]), model.embed_sample(z)


def guided(scene, prior: bool = True, **options):
    model, x, t, labels, sample = scene
    velocity = GuidedVelocity(model, labels, sample if prior else None, SampleConfig(**options))
    return velocity(x, t), velocity


def test_scale_1_is_the_conditional_velocity_at_one_evaluation(scene):
    model, x, t, labels, sample = scene
    found, velocity = guided(scene, guidance=1.0)
    assert torch.equal(found, model.velocity(x, t, labels, sample))
    assert (velocity.conditional_calls, velocity.null_calls) == (1, 0)


@pytest.mark.parametrize("null_branch", ["both", "label", "prior"])
@pytest.mark.parametrize("scale", [0.0, 2.5])
def test_guidance_is_its_formula_for_every_null_branch(scene, scale, null_branch):
    model, x, t, labels, sample = scene
    nothing = torch.full((5,), 3)
    free = {
        "both": model.velocity(x, t, nothing),
        "label": model.velocity(x, t, nothing, sample),
        "prior": model.velocity(x, t, labels),
    }[null_branch]
    conditional = model.velocity(x, t, labels, sample)
    expected = (1 - scale) * free + scale * conditional
    found, velocity = guided(scene, guidance=scale, null_branch=null_branch, channels="all")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (velocity.conditional_calls, velocity.null_calls) == (1, 1)
    three, _ = guided(scene, guidance=scale, null_branch=null_branch)  # "first3" is the default
    assert torch.equal(three[:, :3], found[:, :3])
    assert torch.equal(three[:, 3], conditional[:, 3])


def test_stage_1_drops_its_label(scene):
    model, x, t, labels, _ = scene
    free, conditional = model.velocity(x, t, torch.full((5,), 3)), model.velocity(x, t, labels)
    expected = free + 3 * (conditional - free)
    for null_branch in ("both", "label"):
        found, _ = guided(scene, prior=False, guidance=3.0, null_branch=null_branch, channels="all")
        torch.testing.assert_close(found, expected)


def test_dropping_a_prior_that_is_not_there_is_refused(scene):
    with pytest.raises(ValueError, match="null_branch 'prior' drops nothing in stage 1"):
        guided(scene, prior=False, guidance=2.0, null_branch="prior")
    found, _ = guided(scene, prior=False, guidance=1.0, null_branch="prior")  # guidance is off
    assert found.isfinite().all()


# --- The interval of t


def at(scene, t: float, **options):
    """The guided velocity at one time, and the evaluations that it took."""
    model, x, _, labels, sample = scene
    velocity = GuidedVelocity(model, labels, sample, SampleConfig(guidance=2.5, **options))
    return velocity(x, torch.full((5,), t)), velocity.conditional_calls + velocity.null_calls


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_without_an_interval_every_time_is_guided(scene, t):
    """t = 1 too, where dopri5 ends."""
    model, x, _, labels, sample = scene
    time, nothing = torch.full((5,), t), torch.full((5,), 3)
    free, conditional = model.velocity(x, time, nothing), model.velocity(x, time, labels, sample)
    found, evaluations = at(scene, t, channels="all")
    torch.testing.assert_close(found, free + 2.5 * (conditional - free))
    assert evaluations == 2


def test_guidance_is_whole_inside_the_interval_and_absent_outside(scene):
    model, x, _, labels, sample = scene
    assert at(scene, 1.0, guidance_interval=(0.3, 1.0))[1] == 2  # up to data, where dopri5 ends
    for t in (0.3, 0.5):
        found, evaluations = at(scene, t, guidance_interval=(0.3, 0.6))
        assert evaluations == 2
        assert torch.equal(found, at(scene, t)[0])
    for t in (0.0, 0.29, 0.6, 1.0):
        found, evaluations = at(scene, t, guidance_interval=(0.3, 0.6))
        assert evaluations == 1
        assert torch.equal(found, model.velocity(x, torch.full((5,), t), labels, sample))


def spent(**options: Any):
    """Evaluations of the network per sample of a stage 1."""
    model = tiny.random_model(tiny.config()).requires_grad_(False)
    config = SampleConfig(**{"guidance": 2.0, "batch_size": 4, **options})
    return sample_stage(model, config, stage=1, labels=torch.arange(4) % 3, previous=None)[1]


@pytest.mark.parametrize("num_steps", [1, 10, 30])
def test_euler_evaluates_n_times_and_twice_as_often_under_guidance(num_steps):
    euler: dict[str, Any] = {"solver": "euler", "num_steps": num_steps}
    assert spent(**euler, guidance=1.0) == (num_steps, 0)
    assert spent(**euler) == (num_steps, num_steps)
    assert spent(**euler).total == 2 * num_steps


@pytest.mark.parametrize("low", range(10))
def test_each_euler_step_that_starts_inside_the_interval_costs_one_evaluation_more(low):
    """Exactly, for every tenth: the solver's times are float32, where 7 / 10 is less than 0.7."""
    for high in range(low + 1, 11):
        interval = (low / 10, high / 10)
        assert spent(solver="euler", num_steps=10, guidance_interval=interval) == (10, high - low)


def test_dopri5_is_guided_inside_the_interval_alone():
    adaptive = spent(solver="dopri5", guidance_interval=(0.25, 0.5))
    assert 0 < adaptive.null < adaptive.conditional
    whole = spent(solver="dopri5")
    assert whole.null == whole.conditional > 6


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.6, 0.2), (-0.1, 0.5), (0.0, 1.1), (0.0, float("nan"))])
def test_what_is_no_interval_of_t_is_refused(interval):
    with pytest.raises(ValueError, match=r"guidance_interval: give \(low, high\) with 0 <= low < high <= 1"):
        SampleConfig.parse({"guidance_interval": interval}, place="")
