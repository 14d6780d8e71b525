"""What benchmarks/ measures against is what it says: the same numbers as ours, or the peers' own counts."""

import pytest
import torch

from benchmarks import peers
from dod_models import cost
from dod_models.fitv2 import from_fitv2
from dod_models.model import DoD, ModelConfig
from dod_models.sample import GuidedVelocity, SampleConfig

from . import tiny


def pair(batch: int):
    """Our model, the naive one with the same weights, and inputs."""
    ours = tiny.random_model(tiny.config())
    naive = peers.NaiveDoD(ours.config)
    naive.load_state_dict(ours.state_dict())
    rng = torch.Generator().manual_seed(1)
    x, z = torch.randn(2, batch, *ours.config.latent_shape, generator=rng)
    return ours, naive, x, z, torch.rand(batch, generator=rng), torch.arange(batch) % 3


def test_the_fast_training_call_equals_the_naive_one_and_so_do_its_gradients():
    ours, naive, x, z, t, labels = pair(5)
    for keep in ([], [1, 4], [0, 1, 2, 3, 4]):
        found = [model(x, t, labels, prior=z, keep=torch.tensor(keep, dtype=torch.long)) for model in (ours, naive)]
        torch.testing.assert_close(*found, rtol=0, atol=1e-5)
        for model, out in zip((ours, naive), found, strict=True):
            model.zero_grad()
            out.square().mean().backward()
        for (name, p), q in zip(ours.named_parameters(), naive.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-5), name


@torch.no_grad()
def test_the_fast_steps_of_both_stages_equal_the_naive_ones():
    ours, naive, x, z, t, labels = pair(3)
    first = GuidedVelocity(ours, labels, None, SampleConfig(guidance=1.0))
    torch.testing.assert_close(first(x, t), naive.first_stage(x, t, labels=labels), rtol=0, atol=1e-5)
    second = GuidedVelocity(ours, labels, ours.embed_sample(z), SampleConfig(guidance=2.0))
    expected = naive.guided(x, t, labels=labels, previous=z, scale=2.0)
    torch.testing.assert_close(second(x, t), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_plain_fitv2_is_our_backbone_under_s():
    plain = peers.FiTv2(tiny.config())
    rng = torch.Generator().manual_seed(0)
    for p in plain.parameters():
        p.normal_(std=p.shape[-1] ** -0.5, generator=rng)
    ours = DoD(plain.config)
    ours.load_state_dict(ours.state_dict() | from_fitv2(plain.state_dict(), plain.config))
    _, _, x, _, t, labels = pair(3)
    assert plain(x, t, labels).abs().mean() > 0.1
    torch.testing.assert_close(ours.velocity(x, t, labels), plain(x, t, labels), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "depth", "count"),
    [
        # DoD's Table 4 leaves attention's products out, DiT's Table 4 counts them; both count 1 for a multiply-add.
        (peers.FiTv2, 15, lambda model, call: (cost.paper_gflops(model, call), 27.3)),
        (peers.SiT, 12, lambda model, call: (cost.true_gflops(model, call) / 2, 23.01)),
    ],
)
def test_the_peers_cost_what_their_papers_say(build, depth, count):
    with torch.device("meta"):
        model = build(ModelConfig.model_validate({"preset": "DoD-B", "depth": depth}))
        args = (torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1, dtype=torch.long))
    found, stated = count(model, lambda: model(*args))
    assert found == pytest.approx(stated, abs=0.1)
