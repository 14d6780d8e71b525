"""The codec between images and latents: diffusers' AutoencoderKL and a scale factor.

One class serves Stable Diffusion's VAE and the small one trained on a small data set. Pixels are uint8 (B, H, W, C);
latents are scaled so that their standard deviation is about 1.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from dod_models import artifact
from dod_models.flow import Latent
from dod_models.pixels import to_pixels, to_signal

SCHEMA = "codec/1"
Pixels = UInt8[np.ndarray, "B height width channels"]  # C, H and W are the latent's
BATCH = 100  # images at a time
RECONSTRUCTIONS = "reconstructions.safetensors"  # features of the held-out images after the codec

# The VAE of the paper's baselines; its config carries the scale 0.18215.
STABLE_DIFFUSION = "stabilityai/sd-vae-ft-ema"


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Codec:
    """A frozen autoencoder. `scale` multiplies what it encodes (0.18215 for Stable Diffusion)."""

    def __init__(self, vae: Any, *, scale: float) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.scale = scale

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return int(self.vae.config.in_channels)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return int(self.vae.config.latent_channels)

    @property
    def factor(self) -> int:
        """Pixels per latent along a side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @classmethod
    def load(cls, folder: Path) -> "Codec":
        """Read a finished stage `codec`, its weights checked against the manifest."""
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        manifest = artifact.verify(folder, schema=SCHEMA)
        vae = AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True, use_safetensors=True)
        return cls(vae.to(device()), scale=manifest["about"]["scale"])

    @torch.inference_mode()
    def encode(self, pixels: Pixels) -> tuple[Latent, Latent]:
        """Mean and standard deviation of the scaled latents' posterior."""
        posterior = self.vae.encode(to_signal(pixels).to(self.vae.device)).latent_dist
        return posterior.mean * self.scale, posterior.std * self.scale

    @torch.inference_mode()
    def decode(self, z: Latent) -> Pixels:
        """Scaled latents -> uint8 pixels."""
        return to_pixels(self.vae.decode(z.to(self.vae.device) / self.scale).sample)

    def decode_all(self, z: Latent) -> Iterator[UInt8[np.ndarray, "_ H W C"]]:
        """`decode` block by block, so that memory stays bounded."""
        return (self.decode(part) for part in z.split(BATCH))


def load_stable_diffusion(path: str | None) -> Codec:
    """Stable Diffusion's VAE from the folder `path`, or from the Hugging Face cache; never from the network."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    try:
        vae = AutoencoderKL.from_pretrained(path or STABLE_DIFFUSION, local_files_only=True, use_safetensors=True)
    except OSError as error:
        raise FileNotFoundError(
            f"codec.path: {path or 'not set'}: no VAE there ({str(error).splitlines()[0]}); with network access run "
            f"`hf download {STABLE_DIFFUSION}`, and set codec.path in params.yaml to the folder it prints"
        ) from None
    return Codec(vae.to(device()), scale=float(vae.config.scaling_factor))
