"""What our model is measured against: the same maths done naively, and its peers written plainly from their papers.

Shapes: B batch, C H W latents, T tokens, D width. Nothing here is used by the pipeline; tests compare it with what is.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dod_models.blocks import TimeEmbedding, Tokens, VitBlock, patchify, rope_angles, sincos_position, unpatchify
from dod_models.flow import Latent, Time
from dod_models.model import DoD, Labels, ModelConfig

Keep = Int[Tensor, " K"]


class NaiveDoD(DoD):
    """The same network with the LEM, and one condition for each token, wherever the equations could be read so."""

    def forward(self, x: Latent, t: Time, labels: Labels, *, prior: Latent, keep: Keep) -> Latent:
        """Every sample passes through the LEM; what it gives is then replaced by S in the rows that keep no prior."""
        kept = torch.zeros(len(x), 1, 1, dtype=torch.bool).index_fill(0, keep, True)
        return self.velocity(x, t, labels, torch.where(kept, self.embed_sample(prior), self.no_sample))

    def everywhere(self, batch: int) -> Tokens:
        """S for every token."""
        return self.no_sample.expand(batch, (self.config.latent_size // self.config.patch) ** 2, -1)

    def first_stage(self, x: Latent, t: Time, *, labels: Labels) -> Latent:
        """A step with S for every token."""
        return self.velocity(x, t, labels, self.everywhere(len(x)))

    def guided(self, x: Latent, t: Time, *, labels: Labels, previous: Latent, scale: float) -> Latent:
        """A step of stage 2 with a doubled batch, and the LEM on all of it."""
        prior, _ = self.embed_sample(previous.repeat(2, 1, 1, 1)).chunk(2)
        sample = torch.cat([prior, self.everywhere(len(x))])
        doubled = torch.cat([labels, torch.full_like(labels, self.config.num_classes)])
        cond, free = self.velocity(x.repeat(2, 1, 1, 1), t.repeat(2), doubled, sample).chunk(2)
        return torch.cat([(free + scale * (cond - free))[:, :3], cond[:, 3:]], dim=1)


class PlainAttention(nn.Module):
    """QK-norm, then 2-D RoPE as x cos + (pairs turned by 90 degrees) sin."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm = nn.LayerNorm(width // heads, eps=1e-6, elementwise_affine=False)
        self.k_norm = nn.LayerNorm(width // heads, eps=1e-6, elementwise_affine=False)

    def forward(self, x: Tokens, cos: Tensor, sin: Tensor) -> Tokens:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        q, k = q * cos + turned(q) * sin, k * cos + turned(k) * sin
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        out: Tensor = self.proj(mixed)
        return out


def turned(x: Tensor) -> Tensor:
    """(x0, x1) -> (-x1, x0) for each pair."""
    x0, x1 = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([-x1, x0], dim=-1).flatten(-2)


class PlainSwiGLU(nn.Module):
    """fc2(SiLU(gate x) * value x) of three layers."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1_g, self.fc1_x = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tokens) -> Tokens:
        out: Tensor = self.fc2(F.silu(self.fc1_g(x)) * self.fc1_x(x))
        return out


class PlainBlock(nn.Module):
    """FiTv2's block: AdaLN-LoRA added to the global modulation, attention, SwiGLU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = PlainAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = PlainSwiGLU(width, 8 * width // 3)
        low_rank = (nn.Linear(width, width // 4), nn.Linear(width // 4, 6 * width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), *low_rank)

    def forward(self, x: Tokens, c: Tensor, shared: Tensor, cos: Tensor, sin: Tensor) -> Tokens:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.adaLN_modulation(c) + shared).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, cos, sin)
        x = x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return x


class PlainFinal(nn.Module):
    """The last layer of FiTv2 and of SiT: normalize, modulate, project."""

    def __init__(self, width: int, numbers: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.linear = nn.Linear(width, numbers)

    def forward(self, x: Tokens, c: Float[Tensor, "B 1 D"]) -> Float[Tensor, "B T numbers"]:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        out: Tensor = self.linear(self.norm_final(x) * (1 + scale) + shift)
        return out


class FiTv2(nn.Module):
    """The backbone's original, without visual prior, under its own names (dod_models/fitv2.py)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, numbers = config.width, config.channels * config.patch**2
        self.config = config
        self.x_embedder = nn.ModuleDict({"proj": nn.Linear(numbers, width)})
        self.t_embedder = TimeEmbedding(width)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(config.num_classes + 1, width)})
        self.global_adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(PlainBlock(width, config.heads) for _ in range(config.depth))
        self.final_layer = PlainFinal(width, numbers)
        angles = rope_angles(config.latent_size // config.patch, width // config.heads).repeat_interleave(2, dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Latent, t: Time, labels: Labels) -> Latent:
        c = (self.t_embedder(t) + self.y_embedder["embedding_table"](labels))[:, None, :]
        h, shared = self.x_embedder["proj"](patchify(x, self.config.patch)), self.global_adaLN_modulation(c)
        for block in self.blocks:
            h = block(h, c, shared, self.cos, self.sin)
        return unpatchify(self.final_layer(h, c), self.config.patch, self.config.channels)


class SiTBlock(nn.Module):
    """AdaLN-zero with a full layer per block, attention, GELU: a ViT block whose norms are modulated."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.vit = VitBlock(width, heads)
        self.vit.norm_attention = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.vit.norm_mlp = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tokens, c: Float[Tensor, "B 1 D"]) -> Tokens:
        vit = self.vit
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=-1)
        q, k, v = vit.qkv(vit.norm_attention(x) * (1 + scale1) + shift1).unflatten(2, (3, vit.heads, -1)).unbind(2)
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + gate1 * vit.out(mixed.transpose(1, 2).flatten(2))
        x = x + gate2 * vit.mlp(vit.norm_mlp(x) * (1 + scale2) + shift2)
        return x


class SiT(nn.Module):
    """SiT (Ma et al., 2024): DiT's network, whose last layer also predicts a variance that the flow leaves unused."""

    position: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, numbers = config.width, config.channels * config.patch**2
        self.config = config
        self.x_embed, self.t_embed = nn.Linear(numbers, width), TimeEmbedding(width)
        self.y_embed = nn.Embedding(config.num_classes + 1, width)
        self.register_buffer("position", sincos_position(config.latent_size // config.patch, width))
        self.blocks = nn.ModuleList(SiTBlock(width, config.heads) for _ in range(config.depth))
        self.final = PlainFinal(width, 2 * numbers)

    def forward(self, x: Latent, t: Time, labels: Labels) -> Latent:
        c = (self.t_embed(t) + self.y_embed(labels))[:, None, :]
        h = self.x_embed(patchify(x, self.config.patch)) + self.position
        for block in self.blocks:
            h = block(h, c)
        channels = self.config.channels
        return unpatchify(self.final(h, c), self.config.patch, 2 * channels)[:, :channels]
