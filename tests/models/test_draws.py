import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dod_models import draws

SHAPE = (4, 3, 3)


def test_a_sample_ignores_its_batch():
    alone, together = draws.noise_for(0, "stage1", [7], SHAPE), draws.noise_for(0, "stage1", [3, 7, 9], SHAPE)
    assert torch.equal(alone[0], together[1])


@pytest.mark.parametrize("other", [(1, "stage1", 7), (0, "stage2", 7), (0, "stage1", 8), (0, "stage1", 7 + 2**32)])
def test_seed_purpose_and_index_each_change_the_draw(other):
    """Indices 2**32 apart collide in torch's CPU generator, which keeps 32 bits of its seed."""
    seed, purpose, index = other
    assert not torch.equal(draws.noise_for(0, "stage1", [7], SHAPE), draws.noise_for(seed, purpose, [index], SHAPE))


def test_neighbouring_draws_are_independent_standard_normals():
    noise = draws.noise_for(0, "stage1", range(400), (4, 8, 8)).double().flatten(1)
    count = noise.numel()
    assert abs(noise.mean()) < 5 / count**0.5
    assert abs(noise.square().mean() - 1) < 5 * (2 / count) ** 0.5
    assert abs((noise[:-1] * noise[1:]).mean()) < 5 / count**0.5


def test_labels_are_uniform_and_belong_to_their_index():
    labels = draws.labels_for(3, range(3000), 5)
    shares = torch.bincount(labels, minlength=5) / 3000
    assert (shares - 0.2).abs().max() < 5 * (0.2 * 0.8 / 3000) ** 0.5
    assert torch.equal(draws.labels_for(3, [11, 2999], 5), labels[[11, 2999]])
    assert not torch.equal(draws.labels_for(4, range(3000), 5), labels)


@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 1000), size=st.integers(1, 200))
def test_an_epoch_visits_everything_once(seed, epoch, size):
    assert np.array_equal(np.sort(draws.permutation(seed, epoch, size)), np.arange(size))


def test_epochs_have_different_orders():
    assert not np.array_equal(draws.permutation(0, 0, 100), draws.permutation(0, 1, 100))


def test_seeded_is_repeatable_and_leaves_the_global_generator_alone():
    torch.manual_seed(123)
    undisturbed = torch.rand(3)
    torch.manual_seed(123)
    with draws.seeded(0, "model"):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), undisturbed)
    with draws.seeded(0, "model"):
        assert torch.equal(torch.rand(3), first)
    with draws.seeded(0, "codec"):
        assert not torch.equal(torch.rand(3), first)


def test_the_global_generator_is_restored_after_an_error():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    with pytest.raises(RuntimeError, match="stop"), draws.seeded(0, "model"):
        torch.rand(3)
        raise RuntimeError("stop")
    assert torch.equal(torch.random.get_rng_state(), before)
