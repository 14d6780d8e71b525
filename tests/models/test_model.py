import cmath
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from dod_models.model import DoD, ModelConfig

from . import tiny

F64 = torch.float64

# No two of its numbers are equal where they could be confused.
ODD: dict[str, Any] = {
    "latent_size": 6,
    "channels": 4,
    "num_classes": 5,
    "width": 24,
    "depth": 3,
    "heads": 3,
    "lem": {"width": 12, "heads": 3, "encoder_depth": 2, "decoder_depth": 2, "num_tokens": 3, "token_width": 8},
}


def inputs(config: ModelConfig, batch: int = 3, dtype: torch.dtype = torch.float32):
    rng = torch.Generator().manual_seed(1)
    x, z = torch.randn(2, batch, *config.latent_shape, generator=rng, dtype=dtype)
    t = torch.rand(batch, generator=rng, dtype=dtype)
    labels = torch.arange(batch) % (config.num_classes + 1)
    return x, z, t, labels


# --- The network once more, from the tables of MODEL.md, in plain functions of the weights `w`


def linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return torch.einsum("...i,oi->...o", x, w[f"{name}.weight"]) + w[f"{name}.bias"]


def normalize(x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


def to_tokens(z: Tensor, p: int) -> Tensor:
    """(c p1 p2), row by row."""
    _, channels, height, width = z.shape
    corners = [(i, j) for i in range(0, height, p) for j in range(0, width, p)]
    offsets = [(c, a, b) for c in range(channels) for a in range(p) for b in range(p)]
    rows = [torch.stack([z[:, c, i + a, j + b] for c, a, b in offsets], dim=1) for i, j in corners]
    return torch.stack(rows, dim=1)


def from_tokens(tokens: Tensor, p: int, channels: int, side: int) -> Tensor:
    z = tokens.new_zeros(len(tokens), channels, side * p, side * p)
    for n in range(side * side):
        for d in range(channels * p * p):
            c, a, b = d // (p * p), d // p % p, d % p
            z[:, c, n // side * p + a, n % side * p + b] = tokens[:, n, d]
    return z


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(torch.einsum("bid,bjd->bij", q, k) / math.sqrt(q.shape[-1]), dim=-1)
    return torch.einsum("bij,bjd->bid", weights, v)


def turn(x: Tensor, side: int) -> Tensor:
    """2-D RoPE on one head (B, T, hd), pairs as complex numbers: first half by the row, second half by the column."""
    half = x.shape[-1] // 2
    factors = torch.empty(side * side, half, dtype=torch.complex128)
    for n in range(side * side):
        for axis, position in enumerate((n // side, n % side)):
            for i in range(half // 2):
                angle = position * 10000 ** (-2 * i / half)
                factors[n, axis * (half // 2) + i] = torch.tensor(cmath.exp(1j * angle), dtype=torch.complex128)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (half, 2)).contiguous()) * factors).flatten(-2)


def backbone(w: dict[str, Tensor], config: ModelConfig, x: Tensor, condition: Tensor) -> Tensor:
    """The table "Backbone (FiTv2)"; `condition` is time + label + (S or e_s), (B, 1 or T, d)."""
    d, side, head = config.width, config.latent_size // config.patch, config.width // config.heads
    h = linear(w, "patch_embed", to_tokens(x, config.patch))
    shared, final, *low_rank = linear(w, "modulation", silu(condition)).split(
        [6 * d, 2 * d, *[d // 4] * config.depth], -1
    )
    for i in range(config.depth):
        name = f"blocks.{i}"
        modulation = shared + linear(w, f"{name}.lora_up", low_rank[i])
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (modulation[..., j * d : (j + 1) * d] for j in range(6))
        qkv = linear(w, f"{name}.attention.qkv", normalize(h) * (1 + scale_a) + shift_a)
        heads = []
        for j in range(config.heads):
            q, k, v = (qkv[..., part * d + j * head : part * d + (j + 1) * head] for part in range(3))
            heads.append(attend(turn(normalize(q), side), turn(normalize(k), side), v))
        h = h + gate_a * linear(w, f"{name}.attention.out", torch.cat(heads, dim=-1))
        gate_value = linear(w, f"{name}.mlp.gate_value", normalize(h) * (1 + scale_m) + shift_m)
        hidden = 8 * d // 3
        h = h + gate_m * linear(w, f"{name}.mlp.out", silu(gate_value[..., :hidden]) * gate_value[..., hidden:])
    shift, scale = final.split(d, dim=-1)
    out = linear(w, "final.out", normalize(h) * (1 + scale) + shift)
    return from_tokens(out, config.patch, config.channels, side)


def sincos(side: int, width: int) -> Tensor:
    rows = []
    for n in range(side * side):
        row = []
        for position in (n // side, n % side):
            angles = [position * 10000 ** (-j / (width // 4)) for j in range(width // 4)]
            row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        rows.append(row)
    return torch.tensor(rows, dtype=F64)


def vit_block(w: dict[str, Tensor], name: str, heads: int, x: Tensor) -> Tensor:
    d = x.shape[-1]
    affine = {n: (w[f"{name}.{n}.weight"], w[f"{name}.{n}.bias"]) for n in ("norm_attention", "norm_mlp")}
    qkv = linear(w, f"{name}.qkv", normalize(x) * affine["norm_attention"][0] + affine["norm_attention"][1])
    q, k, v = qkv.split(d, dim=-1)
    split = [part.split(d // heads, dim=-1) for part in (q, k, v)]
    x = x + linear(w, f"{name}.out", torch.cat([attend(*parts) for parts in zip(*split, strict=True)], dim=-1))
    hidden = linear(w, f"{name}.mlp.0", normalize(x) * affine["norm_mlp"][0] + affine["norm_mlp"][1])
    return x + linear(w, f"{name}.mlp.2", gelu(hidden))


def lem(w: dict[str, Tensor], config: ModelConfig, z: Tensor) -> tuple[Tensor, Tensor]:
    """Equations 6 and 7: L-hat and the embeddings per patch."""
    c, side, batch = config.lem, config.latent_size // config.patch, len(z)
    patches = side * side
    x = linear(w, "lem.patch_embed", to_tokens(z, config.patch)) + sincos(side, c.width)
    x = torch.cat([x, w["lem.latent_tokens"].repeat(batch, 1, 1)], dim=1)
    for i in range(c.encoder_depth):
        x = vit_block(w, f"lem.encoder.{i}", c.heads, x)
    compressed = linear(w, "lem.compress", x[:, patches:])
    masks = w["lem.mask_token"].repeat(batch, patches, 1)
    if c.position_at_width:
        x = linear(w, "lem.expand", torch.cat([masks, compressed], dim=1))
        x[:, :patches] += sincos(side, c.width)
    else:
        x = linear(w, "lem.expand", torch.cat([masks + sincos(side, c.token_width), compressed], dim=1))
    for i in range(c.decoder_depth):
        x = vit_block(w, f"lem.decoder.{i}", c.heads, x)
    normal = normalize(x[:, :patches]) * w["lem.norm.weight"] + w["lem.norm.bias"]
    return compressed, linear(w, "lem.out", normal)


def both(**changes):
    config = ModelConfig.model_validate({**ODD, **changes})
    model = tiny.random_model(config, dtype=F64)
    return config, model, dict(model.named_parameters())


@torch.no_grad()
@pytest.mark.parametrize("prior", [False, True])
def test_the_backbone_is_the_one_of_the_table(prior):
    config, model, w = both()
    x, z, t, labels = inputs(config, dtype=F64)
    sample = model.embed_sample(z) if prior else None
    time = model.time_embed(t)[:, None]  # a test of test_blocks.py: its sinusoid is in float32
    label = w["label_embed.table.weight"][labels][:, None]
    expected = backbone(w, config, x, time + label + (w["no_sample"] if sample is None else sample))
    found = model.velocity(x, t, labels, sample)
    assert found.abs().mean() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("position_at_width", [False, True])
def test_the_latent_embedding_module_is_equations_6_and_7(position_at_width):
    config, model, w = both(lem={**ODD["lem"], "position_at_width": position_at_width})
    z = inputs(config, dtype=F64)[1]
    compressed, rebuilt = lem(w, config, z)
    torch.testing.assert_close(model.lem.encode(z), compressed, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.lem(z), rebuilt, rtol=0, atol=1e-10)
    embedded = linear(w, "sample_embed.2", silu(linear(w, "sample_embed.0", rebuilt)))
    torch.testing.assert_close(model.embed_sample(z), embedded, rtol=0, atol=1e-10)


# --- What must hold for any weights


def test_a_fresh_model_is_zero_and_its_blocks_are_the_identity():
    model = DoD(tiny.config())
    x, z, t, labels = inputs(model.config)
    assert not model.velocity(x, t, labels).any()
    assert not model(x, t, labels, prior=z, keep=torch.tensor([0, 2])).any()
    tokens = torch.randn(3, 4, 24)
    shared, _, *low_rank = model.modulation(torch.randn(3, 1, 24)).split(model.modulation.parts, dim=-1)
    for block, own in zip(model.blocks, low_rank, strict=True):
        assert own.any()
        assert torch.equal(block(tokens, shared, own, model.rope_cos, model.rope_sin), tokens)


def test_initial_spreads():
    torch.manual_seed(0)
    model: Any = DoD(ModelConfig.model_validate({"preset": "DoD-demo"}))
    small = [model.label_embed.table, *model.time_embed.mlp[::2], *model.sample_embed[::2]]
    for layer in small:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for token in (model.no_sample, model.lem.latent_tokens, model.lem.mask_token):
        assert 0.01 < token.std() < 0.03
    d = model.config.width
    for layer, fan_out in (
        (model.patch_embed, d),
        (model.blocks[0].attention.qkv, 3 * d),
        (model.lem.encoder[0].qkv, 3 * d),
    ):
        bound = math.sqrt(6 / (layer.in_features + fan_out))
        assert 0.97 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()


@torch.no_grad()
def test_one_row_of_s_equals_s_for_every_token():
    model: Any = tiny.random_model(tiny.config())
    x, _, t, labels = inputs(model.config)
    broadcast = model.no_sample.expand(3, 4, -1)
    torch.testing.assert_close(model.velocity(x, t, labels), model.velocity(x, t, labels, broadcast), rtol=0, atol=1e-5)


@torch.no_grad()
def test_kept_rows_see_their_prior_and_the_others_s():
    model: Any = tiny.random_model(tiny.config())
    x, z, t, labels = inputs(model.config, batch=4)
    found = model(x, t, labels, prior=z, keep=torch.tensor([0, 3]))
    with_prior, without = model.velocity(x, t, labels, model.embed_sample(z)), model.velocity(x, t, labels)
    torch.testing.assert_close(found[[0, 3]], with_prior[[0, 3]], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[[1, 2]], without[[1, 2]], rtol=0, atol=1e-5)
    assert (with_prior - without).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("keep", [[], [2], [0, 3]])
def test_only_kept_rows_pass_through_the_lem(keep):
    model: Any = tiny.random_model(tiny.config())
    x, z, t, labels = inputs(model.config, batch=4)
    seen = []
    model.lem.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0]))
    model(x, t, labels, prior=z, keep=torch.tensor(keep, dtype=torch.long))
    assert torch.equal(torch.cat(seen), z[keep])


def test_a_batch_without_priors_gives_the_lem_zero_gradients():
    """Not missing ones: distributed training waits for the gradient of every parameter."""
    model: Any = tiny.random_model(tiny.config())
    x, z, t, labels = inputs(model.config)
    model(x, t, labels, prior=z, keep=torch.tensor([], dtype=torch.long)).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
    for p in (*model.lem.parameters(), *model.sample_embed.parameters()):
        assert not p.grad.any()
    assert model.no_sample.grad.any()


def test_every_parameter_learns_from_a_mixed_batch():
    model: Any = tiny.random_model(tiny.config())
    x, z, t, labels = inputs(model.config)
    model(x, t, labels, prior=z, keep=torch.tensor([1])).square().mean().backward()
    assert [name for name, p in model.named_parameters() if not p.grad.any()] == []


def test_the_prior_passes_through_n_tokens_alone():
    """The LEM's Jacobian, 64 numbers to 80, has rank N * d_e = 4."""
    model = tiny.random_model(tiny.config(), dtype=F64)
    z = inputs(model.config, batch=1, dtype=F64)[1]
    jacobian = torch.autograd.functional.jacobian(lambda z: model.lem(z).flatten(), z).view(4 * 20, 64)
    singular = torch.linalg.svdvals(jacobian)
    assert singular[3] > 1e-6 * singular[0]
    assert singular[4] < 1e-12 * singular[0]


@torch.no_grad()
def test_samples_of_a_batch_do_not_mix():
    model: Any = tiny.random_model(tiny.config())
    x, z, t, labels = inputs(model.config)
    together = model.velocity(x, t, labels, model.embed_sample(z))
    for i in range(3):
        row = slice(i, i + 1)
        alone = model.velocity(x[row], t[row], labels[row], model.embed_sample(z[row]))
        torch.testing.assert_close(alone, together[row], rtol=0, atol=1e-5)


def test_frozen_positions_are_no_weights():
    """They follow from the config, so checkpoints hold trained parameters alone."""
    model = DoD(tiny.config())
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
