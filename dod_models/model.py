"""DoD: the FiTv2 backbone, the latent embedding module (LEM), and the condition that joins them (eq. 5 to 7).

Shapes: B batch, C H W latents, T = (H / patch)^2 tokens, D backbone width, N latent tokens of the LEM.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from dod_models.blocks import (
    BackboneBlock,
    FinalLayer,
    LabelEmbedding,
    Modulation,
    TimeEmbedding,
    Tokens,
    VitBlock,
    init_xavier,
    init_zero,
    patchify,
    rope_angles,
    sincos_position,
    unpatchify,
)
from dod_models.config import Frozen
from dod_models.flow import Latent, Time

Labels = Int[Tensor, " B"]


class LemConfig(Frozen):
    """The latent embedding module (section 3.2)."""

    width: PositiveInt  # d_l
    heads: PositiveInt
    encoder_depth: PositiveInt = 8
    decoder_depth: PositiveInt = 4
    num_tokens: PositiveInt = 32  # N: fewer keep less of the sample (Table 2)
    token_width: PositiveInt = 16  # d_e
    position_at_width: bool = False  # False: eq. 7 read literally, the mask tokens' positions live in d_e numbers


class ModelConfig(Frozen):
    """A whole DoD. In params.yaml `preset: DoD-B` fills in what is not given."""

    latent_size: PositiveInt = 32  # side of a latent
    channels: PositiveInt = 4
    num_classes: PositiveInt = 1000
    patch: PositiveInt = 2
    width: PositiveInt  # d
    depth: PositiveInt
    heads: PositiveInt
    lem: LemConfig

    @model_validator(mode="before")
    @classmethod
    def fill_from_preset(cls, values: Any) -> Any:
        """Replace `preset: NAME` by the preset's values; given keys win, those of `lem` one by one."""
        if not isinstance(values, dict) or "preset" not in values:
            return values
        name = values["preset"]
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
        given = {key: value for key, value in values.items() if key != "preset"}
        given["lem"] = PRESETS[name]["lem"] | given.get("lem", {})
        return PRESETS[name] | given

    @model_validator(mode="after")
    def check_divisibility(self) -> "ModelConfig":
        """Heads, patches and rotary pairs must come out even."""
        if self.latent_size % self.patch:
            raise ValueError(f"latent_size {self.latent_size} is not a multiple of patch {self.patch}")
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise ValueError(f"width {self.width} / heads {self.heads} must be a multiple of 4 (2-D RoPE)")
        if self.lem.width % self.lem.heads or self.lem.width % 4:
            raise ValueError(f"lem.width {self.lem.width} must be a multiple of 4 and of lem.heads {self.lem.heads}")
        if self.lem.token_width % 4:
            raise ValueError(f"lem.token_width {self.lem.token_width} must be a multiple of 4 (2-D positions)")
        return self

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return (self.channels, self.latent_size, self.latent_size)


# Table 1 of the paper, and a small one for 8x8x4 latents of digits.
PRESETS: dict[str, dict[str, Any]] = {
    "DoD-S": {"width": 384, "depth": 12, "heads": 6, "lem": {"width": 384, "heads": 6}},
    "DoD-B": {"width": 768, "depth": 12, "heads": 12, "lem": {"width": 768, "heads": 12}},
    "DoD-XL": {"width": 1152, "depth": 28, "heads": 16, "lem": {"width": 768, "heads": 12}},
    "DoD-demo": {
        "latent_size": 8,
        "num_classes": 10,
        "width": 96,
        "depth": 4,
        "heads": 3,
        "lem": {"width": 96, "heads": 3, "encoder_depth": 2, "decoder_depth": 1, "num_tokens": 1},
    },
}


class LatentEmbeddingModule(nn.Module):
    """Compress a sample's latents into N small tokens (eq. 6), then rebuild one embedding per patch (eq. 7)."""

    position: Tensor
    mask_position: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        lem, side = config.lem, config.latent_size // config.patch
        patch_dim = config.channels * config.patch**2
        self.config, self.num_patches = config, side * side
        self.patch_embed = nn.Linear(patch_dim, lem.width)
        self.latent_tokens = nn.Parameter(torch.empty(1, lem.num_tokens, lem.width))  # L
        self.encoder = nn.ModuleList(VitBlock(lem.width, lem.heads) for _ in range(lem.encoder_depth))
        self.compress = nn.Linear(lem.width, lem.token_width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, lem.token_width))  # M, repeated for every patch
        self.expand = nn.Linear(lem.token_width, lem.width)
        self.decoder = nn.ModuleList(VitBlock(lem.width, lem.heads) for _ in range(lem.decoder_depth))
        self.norm = nn.LayerNorm(lem.width, eps=1e-6)
        self.out = nn.Linear(lem.width, lem.width)
        mask_width = lem.width if lem.position_at_width else lem.token_width
        self.register_buffer("position", sincos_position(side, lem.width), persistent=False)
        self.register_buffer("mask_position", sincos_position(side, mask_width), persistent=False)
        init_xavier(self)
        nn.init.normal_(self.latent_tokens, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def encode(self, z: Latent) -> Float[Tensor, "B N e"]:
        """L-hat, the compressed visual prior (eq. 6)."""
        x = self.patch_embed(patchify(z, self.config.patch)) + self.position
        x = torch.cat([x, self.latent_tokens.expand(len(z), -1, -1)], dim=1)
        for block in self.encoder:
            x = block(x)
        compressed: Tensor = self.compress(x[:, self.num_patches :])
        return compressed

    def decode(self, prior: Float[Tensor, "B N e"]) -> Tokens:
        """One embedding of the LEM's width per patch (eq. 7)."""
        masks = self.mask_token.expand(len(prior), self.num_patches, -1)
        if self.config.lem.position_at_width:
            x = torch.cat([self.expand(masks) + self.mask_position, self.expand(prior)], dim=1)
        else:
            x = self.expand(torch.cat([masks + self.mask_position, prior], dim=1))
        for block in self.decoder:
            x = block(x)
        rebuilt: Tensor = self.out(self.norm(x[:, : self.num_patches]))
        return rebuilt

    def forward(self, z: Latent) -> Tokens:
        return self.decode(self.encode(z))


class DoD(nn.Module):
    """One network for all stages, conditioned on label + time + (S, or the embedding of a previous sample) (eq. 5)."""

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, side = config.width, config.latent_size // config.patch
        patch_dim = config.channels * config.patch**2
        self.config = config
        self.patch_embed = nn.Linear(patch_dim, width)
        self.time_embed = TimeEmbedding(width)
        self.label_embed = LabelEmbedding(config.num_classes, width)
        self.no_sample = nn.Parameter(torch.empty(1, 1, width))  # S: stands in for a prior where there is none
        self.sample_embed = nn.Sequential(nn.Linear(config.lem.width, width), nn.SiLU(), nn.Linear(width, width))
        rank = width // 4
        self.modulation = Modulation(width, rank=rank, depth=config.depth)
        self.blocks = nn.ModuleList(
            BackboneBlock(width, config.heads, rank=rank, hidden=8 * width // 3) for _ in range(config.depth)
        )
        self.final = FinalLayer(width, patch_dim)
        self.lem = LatentEmbeddingModule(config)
        angles = rope_angles(side, width // config.heads)
        self.register_buffer("rope_cos", angles.cos(), persistent=False)
        self.register_buffer("rope_sin", angles.sin(), persistent=False)
        self.reset_backbone()

    def reset_backbone(self) -> None:
        """FiTv2's initialization: modulation and output start at zero, so every block starts as the identity."""
        for module in (self.patch_embed, self.time_embed, self.sample_embed, *self.blocks):
            init_xavier(module)
        for mlp in (self.time_embed.mlp, self.sample_embed):
            for layer in mlp:
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.02)
        nn.init.normal_(self.label_embed.table.weight, std=0.02)
        nn.init.normal_(self.no_sample, std=0.02)
        self.modulation.reset_parameters()
        init_zero(self.final.out)
        for block in self.blocks:
            assert isinstance(block, BackboneBlock)
            block.mlp.reset_parameters()
            init_zero(block.lora_up)

    def embed_sample(self, z: Latent) -> Tokens:
        """e_s (eq. 5): the visual prior of the previous stage's latents, once per stage, for it is constant over t."""
        embedded: Tensor = self.sample_embed(self.lem(z))
        return embedded

    def velocity(self, x: Latent, t: Time, labels: Labels, sample: Tokens | None = None) -> Latent:
        """v(x_t, t | label, sample), with `sample` from `embed_sample`, or None for S."""
        condition = (self.time_embed(t) + self.label_embed(labels))[:, None, :]
        modulation = self.modulation(condition + (self.no_sample if sample is None else sample))
        shared, final, *low_rank = modulation.split(self.modulation.parts, dim=-1)
        tokens = self.patch_embed(patchify(x, self.config.patch))
        for block, own in zip(self.blocks, low_rank, strict=True):
            tokens = block(tokens, shared, own, self.rope_cos, self.rope_sin)
        return unpatchify(self.final(tokens, final), self.config.patch, self.config.channels)

    def forward(self, x: Latent, t: Time, labels: Labels, *, prior: Latent, keep: Int[Tensor, " K"]) -> Latent:
        """The training call: rows `keep` are conditioned on the LEM of their own clean latents `prior`, the rest on S.

        The kept rows alone pass through the LEM and have a condition for each token; the others have one for all.
        Either group may be empty: its layers then take part with zero gradients, as distributed training needs.
        """
        order = torch.ones(len(x), device=x.device).index_fill(0, keep, 0).argsort(stable=True)  # the kept rows first
        kept, others = order.split([len(keep), len(x) - len(keep)])
        with_prior = self.velocity(x[kept], t[kept], labels[kept], self.embed_sample(prior[kept]))
        without = self.velocity(x[others], t[others], labels[others])
        return torch.cat([with_prior, without])[order.argsort()]


def count_parameters(model: DoD) -> dict[str, int]:
    """Trained parameters of the backbone (the sample embedder and S included), of the LEM, and of both."""
    total, lem = (sum(p.numel() for p in module.parameters()) for module in (model, model.lem))
    return {"backbone": total - lem, "lem": lem, "total": total}
