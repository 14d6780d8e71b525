import pytest
import torch
from torch import nn

from dod_models.blocks import Modulation
from dod_models.packed import packed_weights

from . import tiny


def inputs(model, batch=3):
    rng = torch.Generator().manual_seed(1)
    x, z = torch.randn(2, batch, *model.config.latent_shape, generator=rng)
    return x, z, torch.rand(batch, generator=rng), torch.arange(batch) % 3


@torch.no_grad()
def test_packed_weights_change_nothing_but_the_last_bits_and_leave_no_trace():
    model = tiny.random_model(tiny.config())
    x, z, t, labels = inputs(model)

    def step():
        return model.velocity(x, t, labels, model.embed_sample(z))

    plain, state = step(), {name: value.clone() for name, value in model.state_dict().items()}
    with packed_weights(model):
        packed, again = step(), step()
    assert plain.abs().mean() > 0.1
    torch.testing.assert_close(packed, plain, rtol=0, atol=1e-5)
    assert torch.equal(packed, again)
    assert torch.equal(step(), plain)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_every_linear_layer_is_packed_but_one_that_does_more():
    model = tiny.random_model(tiny.config())
    with packed_weights(model):
        for module in model.modules():
            assert ("forward" in vars(module)) == (type(module) is nn.Linear)
    assert any(isinstance(module, Modulation) for module in model.modules())


@torch.no_grad()
def test_a_packed_layer_doesn_t_see_a_later_change_of_its_weight():
    """It is a copy that is used: the one way to see that it is."""
    layer = nn.Linear(4, 4)
    x = torch.ones(1, 4)
    with packed_weights(layer):
        before = layer(x)
        layer.weight.zero_()
        assert torch.equal(layer(x), before)
    assert torch.equal(layer(x)[0], layer.bias)


def test_an_error_inside_leaves_no_trace():
    layer = nn.Linear(2, 2)
    with pytest.raises(KeyError), packed_weights(layer):
        raise KeyError
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("layer", [nn.Linear(2, 2, dtype=torch.bfloat16), nn.Linear(2, 2, device="meta")])
def test_other_precisions_and_devices_are_left_alone(layer):
    with packed_weights(layer):
        assert "forward" not in vars(layer)
