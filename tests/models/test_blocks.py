import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dod_models import blocks

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_patchify_lists_a_patch_channel_by_channel():
    z = torch.arange(2 * 4 * 4).reshape(1, 2, 4, 4).float()  # channel 0 counts 0..15, channel 1 counts 16..31
    tokens = blocks.patchify(z, 2)[0]
    assert tokens[0].tolist() == [0, 1, 4, 5, 16, 17, 20, 21]
    assert tokens[1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]  # the next column
    assert tokens[2].tolist() == [8, 9, 12, 13, 24, 25, 28, 29]  # the next row


@given(patch=st.integers(1, 3), side=st.integers(1, 4), channels=st.integers(1, 5), batch=st.integers(1, 3))
def test_unpatchify_inverts_patchify(patch, side, channels, batch):
    z = normal(batch, channels, side * patch, side * patch)
    assert torch.equal(blocks.unpatchify(blocks.patchify(z, patch), patch, channels), z)


def test_sincos_position_is_the_row_then_the_column():
    table = blocks.sincos_position(3, 8)
    for row in range(3):
        for column in range(3):
            angles = [row, row / 100, column, column / 100]  # 10000^0 and 10000^(-1/2)
            expected = [f(a) for pair in (angles[:2], angles[2:]) for f in (math.sin, math.cos) for a in pair]
            assert table[3 * row + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_rope_angles_are_the_row_s_then_the_column_s():
    angles = blocks.rope_angles(3, 8)
    assert angles[3 * 2 + 1].tolist() == pytest.approx([2, 0.02, 1, 0.01], abs=1e-7)  # row 2, column 1


def test_rotate_turns_interleaved_pairs():
    x = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4)
    angle = torch.tensor([[math.pi / 2, math.pi / 6]])
    turned = blocks.rotate(x, angle.cos(), angle.sin()).flatten().tolist()
    assert turned == pytest.approx([0, 1, -0.5, math.sqrt(3) / 2], abs=1e-6)  # (1, 0) by 90 and (0, 1) by 30 degrees


def test_rotation_keeps_norms():
    angle = blocks.rope_angles(4, 8).double()
    x = normal(2, 3, 16, 8)
    torch.testing.assert_close(blocks.rotate(x, angle.cos(), angle.sin()).norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("move", [(1, 0), (0, 1), (2, 3)])
def test_scores_depend_on_relative_positions_alone(move):
    side, head_dim = 8, 16
    angle = blocks.rope_angles(side, head_dim).double().view(side, side, -1)
    q, k = normal(head_dim), normal(head_dim, seed=1)

    def score(at_q: tuple[int, int], at_k: tuple[int, int]) -> float:
        pair = torch.stack([angle[at_q], angle[at_k]])
        turned = blocks.rotate(torch.stack([q, k]).view(1, 1, 2, -1), pair.cos(), pair.sin())[0, 0]
        return float(turned[0] @ turned[1])

    here = score((1, 2), (3, 4))
    assert score((1 + move[0], 2 + move[1]), (3 + move[0], 4 + move[1])) == pytest.approx(here, abs=1e-5)
    assert score((1 + move[0], 2 + move[1]), (3, 4)) != pytest.approx(here, abs=1e-2)


def attention(width: int = 16, heads: int = 2):
    module = blocks.RopeAttention(width, heads).double()
    angle = blocks.rope_angles(3, width // heads).double()
    return module, normal(2, 9, width), angle.cos(), angle.sin()


@torch.no_grad()
def test_queries_and_keys_are_normalized_and_values_are_not():
    module, x, cos, sin = attention()
    module.out.bias.zero_()
    module.qkv.bias.zero_()
    before = module(x, cos, sin)
    module.qkv.weight[:32] *= 7
    torch.testing.assert_close(module(x, cos, sin), before, rtol=1e-4, atol=1e-5)
    module.qkv.weight[32:] *= 7
    torch.testing.assert_close(module(x, cos, sin), 7 * before, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_attention_without_rotation_forgets_order_and_with_it_does_not():
    module, x, cos, sin = attention()
    order = torch.tensor([3, 1, 4, 0, 8, 5, 2, 6, 7])
    still_cos, still_sin = torch.ones_like(cos), torch.zeros_like(sin)
    torch.testing.assert_close(module(x, still_cos, still_sin)[:, order], module(x[:, order], still_cos, still_sin))
    assert (module(x, cos, sin)[:, order] - module(x[:, order], cos, sin)).abs().max() > 1e-3


def test_the_softmax_temperature_is_the_root_of_the_head_dimension():
    """With values one-hot per token, one head's output is its attention weights."""
    width = 4
    module = blocks.RopeAttention(width, 1).double()
    with torch.no_grad():
        module.qkv.weight.copy_(torch.eye(width).repeat(3, 1))
        module.qkv.bias.zero_()
        module.out.weight.copy_(torch.eye(width))
        module.out.bias.zero_()
    x = torch.eye(4, dtype=F64)[None]
    q = nn.functional.layer_norm(x, (width,), eps=1e-6)
    expected = (q @ q.transpose(1, 2) / math.sqrt(width)).softmax(dim=-1)
    still = torch.zeros(4, 2, dtype=F64)
    torch.testing.assert_close(module(x, still.cos(), still.sin()), expected)


@torch.no_grad()
def test_swiglu_gates_with_silu():
    module = blocks.SwiGLU(2, 2).double()
    module.gate_value.weight.copy_(torch.eye(2).repeat(2, 1))
    module.gate_value.bias.copy_(torch.tensor([0.0, 0.0, 10.0, 10.0]))  # gate x, value x + 10
    module.out.weight.copy_(torch.eye(2))
    module.out.bias.zero_()
    x = normal(1, 3, 2)
    torch.testing.assert_close(module(x), x / (1 + torch.exp(-x)) * (x + 10))


def test_swiglu_s_halves_are_initialized_as_separate_layers():
    module = blocks.SwiGLU(64, 128)
    module.reset_parameters()
    separate, fused = math.sqrt(6 / (64 + 128)), math.sqrt(6 / (64 + 256))
    for half in module.gate_value.weight.chunk(2):
        assert fused < half.abs().max() <= separate


@torch.no_grad()
def test_one_wide_layer_is_the_layers_of_fitv2_side_by_side():
    """Its parts are SiLU -> Linear each; the blocks' begin with Xavier's bounds of their own, the others at zero."""
    module = blocks.Modulation(16, rank=4, depth=3)
    module.reset_parameters()
    condition = normal(2, 5, 16).float()
    shared, final, *low_rank = module(condition).split(module.parts, dim=-1)
    assert not shared.any() and not final.any()
    silu = condition / (1 + torch.exp(-condition))
    for part, weight in zip(low_rank, module.weight[96 + 32 :].split(4), strict=True):
        assert math.sqrt(6 / (16 + 140)) < weight.abs().max() <= math.sqrt(6 / (16 + 4))
        torch.testing.assert_close(part, silu @ weight.T)


def test_modulation_keeps_the_digits_of_a_small_scale_in_bf16():
    x, scale = normal(2, 8, 64).float(), (normal(2, 8, 64, seed=1) / 100).bfloat16()
    found = blocks.modulate(x, torch.zeros_like(scale), scale)
    torch.testing.assert_close(found.double(), x.double() * (1 + scale.double()), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_gates_multiply_the_branches():
    """Modulation (shift, scale, gate) x 2: with both gates zero a block is the identity, whatever the rest says."""
    block = blocks.BackboneBlock(16, 2, rank=4, hidden=32).double()
    angle = blocks.rope_angles(3, 8).double()
    x, low_rank = normal(2, 9, 16), normal(2, 1, 4, seed=1)
    nn.init.zeros_(block.lora_up.weight)
    nn.init.zeros_(block.lora_up.bias)
    shared = normal(2, 1, 96, seed=2)
    shared[..., 32:48] = 0
    shared[..., 80:96] = 0
    assert torch.equal(block(x, shared, low_rank, angle.cos(), angle.sin()), x)
    shared[..., 80:96] = 1
    shift, scale = shared[..., 48:64], shared[..., 64:80]
    branch = block.mlp(block.norm_mlp(x) * (1 + scale) + shift)
    torch.testing.assert_close(block(x, shared, low_rank, angle.cos(), angle.sin()), x + branch)


@torch.no_grad()
def test_a_vit_block_treats_tokens_as_a_set():
    block = blocks.VitBlock(16, 2).double()
    x, order = normal(2, 5, 16), torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(block(x)[:, order], block(x[:, order]))


@torch.no_grad()
def test_the_time_embedding_is_cosines_then_sines_of_unscaled_time():
    module: Any = blocks.TimeEmbedding(8)
    t = torch.tensor([0.0, 0.3, 1.0])
    angle = t[:, None].double() * torch.exp(-math.log(10000) * torch.arange(128, dtype=F64) / 128)
    hidden = torch.cat([angle.cos(), angle.sin()], dim=1) @ module.mlp[0].weight.double().T + module.mlp[0].bias
    expected = hidden * hidden.sigmoid() @ module.mlp[2].weight.double().T + module.mlp[2].bias
    torch.testing.assert_close(module(t).double(), expected, rtol=0, atol=1e-6)


def test_the_null_label_is_the_last_row():
    module: Any = blocks.LabelEmbedding(5, 4)
    module(torch.tensor([module.null, 2])).sum().backward()
    touched = module.table.weight.grad.abs().sum(dim=1)
    assert touched.tolist() == [0, 0, 4, 0, 0, 4]
