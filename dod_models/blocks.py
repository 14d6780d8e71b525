"""The parts of both networks: attention, the AdaLN-LoRA block, the ViT block, embedders.

Shapes: B batch, T tokens, D width. A condition is one row for a whole sample (B 1 D) or one for each token (B T D);
every function here broadcasts over the two.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

Tokens = Float[Tensor, "B T D"]


def init_xavier(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every Linear below `module` (FiTv2)."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            nn.init.zeros_(child.bias)


def init_zero(*layers: nn.Linear) -> None:
    """Zero weights and biases: what the layer feeds starts as the identity."""
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def patchify(z: Float[Tensor, "B C H W"], patch: int) -> Tokens:
    """Cut latents into tokens (c p1 p2): the first patch*patch numbers of a token are channel 0."""
    batch, channels, height, width = z.shape
    rows, columns = height // patch, width // patch
    z = z.reshape(batch, channels, rows, patch, columns, patch)
    return z.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch * patch)


def unpatchify(tokens: Tokens, patch: int, channels: int) -> Float[Tensor, "B C H W"]:
    """The inverse of `patchify` for square latents."""
    batch, num_tokens, _ = tokens.shape
    side = math.isqrt(num_tokens)
    z = tokens.reshape(batch, side, side, channels, patch, patch)
    return z.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, side * patch, side * patch)


def sincos_position(side: int, width: int) -> Float[Tensor, "T D"]:
    """Frozen 2-D sine-cosine position embedding: the first half of the width is the row, the second the column."""
    frequency = 10000.0 ** (-torch.arange(width // 4) / (width // 4))
    angle = torch.arange(side)[:, None] * frequency  # side, width / 4
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # side, width / 2
    rows = axis[:, None, :].expand(side, side, -1)
    columns = axis[None, :, :].expand(side, side, -1)
    return torch.cat([rows, columns], dim=2).reshape(side * side, width)


def rope_angles(side: int, head_dim: int, theta: float = 10000.0) -> Float[Tensor, "T half"]:
    """Angles of the 2-D rotary embedding: head_dim / 4 frequencies for the row, then as many for the column."""
    frequency = theta ** (-torch.arange(0, head_dim // 2, 2) / (head_dim // 2))
    angle = torch.arange(side)[:, None] * frequency
    rows = angle[:, None, :].expand(side, side, -1)
    columns = angle[None, :, :].expand(side, side, -1)
    return torch.cat([rows, columns], dim=2).reshape(side * side, head_dim // 2)


def rotate(x: Float[Tensor, "... hd"], cos: Float[Tensor, "... half"], sin: Float[Tensor, "... half"]) -> Tensor:
    """Turn each interleaved pair (x0, x1) by its angle: (x0 cos - x1 sin, x1 cos + x0 sin)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


class RopeAttention(nn.Module):
    """Self-attention of the backbone: LayerNorm on q and k over the head dimension, then 2-D RoPE."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_qk = nn.LayerNorm(width // heads, eps=1e-6, elementwise_affine=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tokens, cos: Float[Tensor, "T half"], sin: Float[Tensor, "T half"]) -> Tokens:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # B T 3 heads hd
        q, k = rotate(self.norm_qk(qkv[:, :, :2]), cos[:, None, None], sin[:, None, None]).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, qkv[:, :, 2]))
        mixed: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return mixed


class SwiGLU(nn.Module):
    """fc2(SiLU(gate x) * value x) (eq. 8); gate and value are the halves of one fused layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_value = nn.Linear(width, 2 * hidden)
        self.out = nn.Linear(hidden, width)

    def reset_parameters(self) -> None:
        """Xavier bounds of two separate layers, as FiTv2 has them."""
        for half in self.gate_value.weight.chunk(2):
            nn.init.xavier_uniform_(half)

    def forward(self, x: Tokens) -> Tokens:
        gate, value = self.gate_value(x).chunk(2, dim=-1)
        mixed: Tensor = self.out(F.silu(gate) * value)
        return mixed


class Modulation(nn.Linear):
    """SiLU(condition) through one wide layer, where FiTv2 has a layer for each of these outputs:

    the global AdaLN (6 D: shift, scale, gate of attention, then of the MLP), the final layer's shift and scale (2 D),
    and the low-rank term of every block (`rank` each).
    """

    def __init__(self, width: int, *, rank: int, depth: int) -> None:
        self.parts = [6 * width, 2 * width, *[rank] * depth]
        super().__init__(width, sum(self.parts))

    def reset_parameters(self) -> None:
        """The blocks' terms start with Xavier's bounds, the rest at zero (FiTv2)."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        for rows in self.weight.split(self.parts)[2:]:
            nn.init.xavier_uniform_(rows)

    def forward(self, condition: Float[Tensor, "B c D"]) -> Float[Tensor, "B c parts"]:
        return super().forward(F.silu(condition))


def modulate(x: Tokens, shift: Float[Tensor, "B c D"], scale: Float[Tensor, "B c D"]) -> Tokens:
    """x * (1 + scale) + shift, in two passes; 1 + scale itself would lose most of a bf16 scale's digits."""
    return torch.addcmul(x + shift, x, scale)


class BackboneBlock(nn.Module):
    """A FiTv2 block. Its modulation is the shared global AdaLN plus a low-rank term of its own (eq. 10)."""

    def __init__(self, width: int, heads: int, rank: int, hidden: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = RopeAttention(width, heads)
        self.norm_mlp = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = SwiGLU(width, hidden)
        self.lora_up = nn.Linear(rank, 6 * width)

    def forward(
        self,
        x: Tokens,
        shared: Float[Tensor, "B c 6*D"],
        low_rank: Float[Tensor, "B c rank"],
        cos: Float[Tensor, "T half"],
        sin: Float[Tensor, "T half"],
    ) -> Tokens:
        """`shared` and `low_rank` are this block's parts of `Modulation`."""
        modulation = self.lora_up(low_rank.contiguous()).add_(shared)  # a slice would cost the bias a pass of its own
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
        x = torch.addcmul(x, gate_a, self.attention(modulate(self.norm_attention(x), shift_a, scale_a), cos, sin))
        x = torch.addcmul(x, gate_m, self.mlp(modulate(self.norm_mlp(x), shift_m, scale_m)))
        return x


class FinalLayer(nn.Module):
    """LayerNorm, modulation, projection to the numbers of a patch."""

    def __init__(self, width: int, patch_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.out = nn.Linear(width, patch_dim)

    def forward(self, x: Tokens, modulation: Float[Tensor, "B c 2*D"]) -> Float[Tensor, "B T patch_dim"]:
        """`modulation` is the final layer's part of `Modulation`."""
        shift, scale = modulation.chunk(2, dim=-1)
        numbers: Tensor = self.out(modulate(self.norm(x), shift, scale))
        return numbers


class VitBlock(nn.Module):
    """A standard pre-norm ViT block (affine LayerNorm, GELU, MLP ratio 4), for the latent embedding module."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tokens) -> Tokens:
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.mlp(self.norm_mlp(x))
        return x


class TimeEmbedding(nn.Module):
    """Sinusoid of 256 numbers [cos, sin] of t in [0, 1] (not times 1000), then Linear, SiLU, Linear."""

    FREQUENCIES = 128  # half of the sinusoid's width
    MAX_PERIOD = 10000.0

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * self.FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Float[Tensor, " B"]) -> Float[Tensor, "B D"]:
        exponent = torch.arange(self.FREQUENCIES, device=t.device, dtype=torch.float32) / self.FREQUENCIES
        angle = t.float()[:, None] * self.MAX_PERIOD**-exponent
        sinusoid = torch.cat([angle.cos(), angle.sin()], dim=1)
        embedded: Tensor = self.mlp(sinusoid)
        return embedded


class LabelEmbedding(nn.Module):
    """One row for each class and a last one for "no class"."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.null = num_classes
        self.table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Int[Tensor, " B"]) -> Float[Tensor, "B D"]:
        embedded: Tensor = self.table(labels)
        return embedded
