import math

import pytest
import torch

from dod_models import draws
from dod_models.sample import SampleConfig, sample_stage

from . import tiny

EULER = SampleConfig(solver="euler", num_steps=3, guidance=2.0, batch_size=4)


def run(count: int, *, previous: torch.Tensor | None, config: SampleConfig = EULER, stage: int = 2):
    model = tiny.random_model(tiny.config()).requires_grad_(False)
    labels = draws.labels_for(0, range(count), 3)
    return sample_stage(
        model, config, stage=stage, labels=labels, previous=None if previous is None else previous[:count]
    )


@pytest.mark.parametrize("prior", [False, True])
def test_a_sample_ignores_how_many_others_there_are(prior):
    previous = draws.noise_for(9, "any", range(7), (4, 4, 4)) if prior else None
    few, many = run(3, previous=previous)[0], run(7, previous=previous)[0]
    assert torch.equal(few, many[:3])
    assert (many[1:] - many[:-1]).abs().amax(dim=(1, 2, 3)).min() > 0.1


def test_a_sample_is_nearly_the_same_in_another_batch_size():
    other = EULER.model_copy(update={"batch_size": 3})
    torch.testing.assert_close(run(7, previous=None, config=other)[0], run(7, previous=None)[0], rtol=1e-4, atol=1e-4)


def test_stages_have_noise_of_their_own():
    assert not torch.equal(run(2, previous=None, stage=1)[0], run(2, previous=None, stage=2)[0])


def test_the_prior_reaches_the_samples():
    priors = draws.noise_for(9, "any", range(8), (4, 4, 4))
    first, second = run(4, previous=priors[:4])[0], run(4, previous=priors[4:])[0]
    assert (first - second).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_evaluations_are_counted_per_sample():
    assert run(7, previous=None)[1] == (3, 3)  # micro-batches are padded, which nobody counts
    assert run(7, previous=None, config=EULER.model_copy(update={"guidance": 1.0}))[1] == (3, 0)


def test_latents_that_are_not_finite_are_an_error():
    model = tiny.random_model(tiny.config()).requires_grad_(False)
    model.final.out.bias[0] = math.inf
    with pytest.raises(FloatingPointError, match=r"stage 1: latents are not finite; lower guidance \(2.0\)"):
        sample_stage(model, EULER, stage=1, labels=torch.tensor([0]), previous=None)
